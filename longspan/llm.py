"""The offline interface: `LLM(...).generate(prompts)` and `stream`, with vLLM's names."""

from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from longspan.config import EngineConfig
from longspan.engine.completion import Group
from longspan.errors import ConfigError, EngineStoppedError, InvalidRequestError
from longspan.interrupts import interrupts_afterwards
from longspan.outputs import CompletionOutput, RequestOutput
from longspan.progress import Progress
from longspan.prompts import (
    Prompt,
    conversations,
    params_for,
    priorities_for,
    prompt_list,
    templated,
    tokenized,
)
from longspan.sampling_params import SamplingParams
from longspan.start import start_engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LLM:
    """A model on `context_parallel_size` ranks, for generation from Python.

    Options are the fields of `longspan.config.EngineConfig`. Worker processes are started here
    and end with `close()`, the end of a `with` block, or this process.

    `generate` and `chat` return finished outputs; `stream` yields text as it is drawn:

        with LLM("path-or-hub-id", context_parallel_size=4) as llm:
            for output in llm.stream("Once upon a time"):
                print(output.outputs[0].text, end="", flush=True)

    Raises:
        ConfigError: an option is unknown or wrong, or the model can't be found.
        UnsupportedModelError: the model can't be served exactly.
        RankFailedError: a rank could not start.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self.config = EngineConfig.from_options(model=str(model), **options)
        if self.config.node_rank:
            raise ConfigError(
                f"node_rank={self.config.node_rank} lends its ranks by `longspan serve`; the "
                "engine runs on node 0"
            )
        self.engine = start_engine(self.config)
        self._executor = self.engine.executor
        self._closed = False
        self._news: dict[str, deque[Group]] = {}
        """For each request that is streamed, where its stream looks for those that drew tokens."""

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: int | Sequence[int] = 0,
    ) -> list[RequestOutput]:
        """Complete one prompt or several; returns one output for each, in order.

        `sampling_params` and `priority` are one for all or one for each; a request with a lower
        `priority` goes first. `use_tqdm` shows a progress bar when the work takes long. A request
        that can't be served comes back with `error` set and finish reason "error" beside the
        others' outputs; if none can be served the first error is raised.

        Raises:
            InvalidRequestError: no request of the call can be served; the engine stays usable.
            RankFailedError: a rank died; every process has been stopped.
        """
        self._check_open()
        queued = self._queue(prompts, sampling_params, priority)
        groups = [one for one in queued if isinstance(one, Group)]
        try:
            with Progress(self.engine, enabled=use_tqdm) as progress:
                for group in groups:
                    while not group.finished:
                        self._step()
                        progress.update()
        except BaseException:
            self._abort(groups)
            raise
        outputs = [one.output() if isinstance(one, Group) else one for one in queued]
        for index, output in enumerate(outputs):
            output.prompt_index = index
        return outputs

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = False,
        priority: int | Sequence[int] = 0,
    ) -> Generator[RequestOutput, None, None]:
        """Complete prompts as `generate` does, and yield what is new as it is drawn.

        Each output has the text, token ids and logprobs that none before it had, of the
        completions of one prompt that have any; `prompt_index` tells which prompt it is. Text that
        may yet become part of a stop string or of a character waits. All outputs of a prompt add
        up to what `generate` returns for it (`RequestOutput.add` does that). A refused request has
        one output, with `error` set. `use_tqdm` shows progress until the first output.

        Requests are checked and queued when the first output is asked for, and run while outputs
        are asked for or another call runs. When the generator is closed or dropped, or an error or
        Ctrl-C ends it, those that still run are aborted and their pages are free; the engine stays
        usable. Ctrl-C waits for the end of a step, a second one ends the engine.

        Raises:
            InvalidRequestError: no request of the call can be served; the engine stays usable.
            RankFailedError: a rank died; every process has been stopped.
        """
        self._check_open()
        queued = self._queue(prompts, sampling_params, priority)
        indices = {one.request_id: i for i, one in enumerate(queued) if isinstance(one, Group)}
        groups = {one.request_id: one for one in queued if isinstance(one, Group)}
        try:
            for index, refused in enumerate(queued):
                if isinstance(refused, RequestOutput):
                    refused.prompt_index = index
                    yield refused
            with Progress(self.engine, enabled=use_tqdm) as progress:
                for output in self._increments(groups, progress):
                    output.prompt_index = indices[output.request_id]
                    progress.hide()
                    yield output
        finally:
            self._abort([*groups.values()])

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: int | Sequence[int] = 0,
        add_generation_prompt: bool = True,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Complete one conversation or several by the tokenizer's chat template.

        A conversation is a list of `{"role": ..., "content": ...}`; `template_options` go to the
        template, as `tools` and `documents` do.
        """
        self._check_open()
        template_options["add_generation_prompt"] = add_generation_prompt
        prompts = self.preprocess_chat(messages, **template_options)
        return self.generate(prompts, sampling_params, use_tqdm, priority=priority)

    def preprocess_chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        *,
        add_generation_prompt: bool = True,
        **template_options: Any,
    ) -> list[Prompt]:
        """The prompts that `chat` makes of conversations, to be given to `stream`."""
        tokenizer = self.get_tokenizer()
        if tokenizer.chat_template is None:
            raise InvalidRequestError(
                f"the tokenizer of {self.config.model!r} has no chat template; use generate()"
            )
        options = {"add_generation_prompt": add_generation_prompt, **template_options}
        return [
            {"prompt_token_ids": templated(tokenizer, conversation, options)}
            for conversation in conversations(messages)
        ]

    def get_tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer. Raises InvalidRequestError if the model has none."""
        if self.engine.tokenizer is None:
            raise InvalidRequestError(
                f"{self.config.model!r} has no tokenizer: give prompt_token_ids, or tokenizer=..."
            )
        return self.engine.tokenizer

    def close(self) -> None:
        """End all worker processes. Safe to call twice."""
        self._closed = True
        self._executor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _queue(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        priority: int | Sequence[int],
    ) -> list[RequestOutput | Group]:
        """Queue what can be served; the rest is refused, with an error if that is all of it."""
        listed = prompt_list(prompts)
        params = params_for(len(listed), sampling_params)
        priorities = priorities_for(len(listed), priority)
        queued: list[RequestOutput | Group] = []
        refusals: list[InvalidRequestError] = []
        try:
            for prompt, one, order in zip(listed, params, priorities, strict=True):
                try:
                    queued.append(self._add(prompt, one, order))
                except InvalidRequestError as error:
                    refusals.append(error)
                    queued.append(_refused(prompt, error))
        except BaseException:  # also Ctrl-C: what is queued must not run with the next call
            self._abort([group for group in queued if isinstance(group, Group)])
            raise
        if refusals and len(refusals) == len(listed):
            raise refusals[0]
        return queued

    def _add(self, prompt: Prompt, params: SamplingParams, priority: int) -> Group:
        text, token_ids = tokenized(prompt, self.get_tokenizer)
        return self.engine.add_request(token_ids, params, prompt=text, priority=priority)

    def _increments(
        self, groups: Mapping[str, Group], progress: Progress
    ) -> Iterator[RequestOutput]:
        """Step until all of these groups have ended; yields what is new of them."""
        unfinished, news = dict(groups), deque[Group]()
        self._news |= dict.fromkeys(unfinished, news)
        while unfinished:
            while not news and self.engine.has_requests:
                with interrupts_afterwards():
                    self._step()
                progress.update()
            # Without a step that told of them, requests can only have been aborted.
            group = news.popleft() if news else next(iter(unfinished.values()))
            output = group.increment()
            if output is None:
                continue
            if output.finished:
                del unfinished[group.request_id]
            yield output
            if group.finished and not output.finished:  # the caller has aborted it
                news.append(group)

    def _step(self) -> None:
        """Run one step, and tell streams of those of their requests that drew tokens."""
        self._check_open()
        try:
            drawn = self.engine.step()
        except BaseException:
            # Also Ctrl-C: a step that was cut short leaves ranks that can't go on.
            self.close()
            raise
        for group in drawn:
            if group.request_id in self._news:
                self._news[group.request_id].append(group)

    def _abort(self, groups: Sequence[Group]) -> None:
        """End what still runs of these groups, and see that their pages are free."""
        for group in groups:
            self._news.pop(group.request_id, None)
            self.engine.abort(group.request_id)
        while not self._closed and any(group.in_flight for group in groups):
            self._step()

    def _check_open(self) -> None:
        if self._closed:
            raise EngineStoppedError("this LLM has been closed or stopped; make a new one")


def _refused(prompt: Prompt, error: InvalidRequestError) -> RequestOutput:
    text = prompt if isinstance(prompt, str) else None
    completion = CompletionOutput(index=0, text="", token_ids=[], finish_reason="error")
    return RequestOutput("", text, [], [completion], finished=True, error=str(error))
