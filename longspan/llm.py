"""The offline interface: `LLM(...).generate(prompts)`, with vLLM's names."""

import logging
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from longspan.config import EngineConfig
from longspan.engine.completion import Group
from longspan.engine.engine import Engine
from longspan.engine.executor import Executor
from longspan.errors import EngineStoppedError, InvalidRequestError
from longspan.models import ModelSpec, load_spec
from longspan.outputs import CompletionOutput, RequestOutput
from longspan.progress import Progress
from longspan.sampling_params import SamplingParams
from longspan.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, {"prompt": text} or {"prompt_token_ids": [...]}."""

logger = logging.getLogger(__name__)


class LLM:
    """A model on `context_parallel_size` ranks, for generation from Python.

    Options are the fields of `longspan.config.EngineConfig`. Worker processes are started here
    and end with `close()`, the end of a `with` block, or this process.

    Raises:
        ConfigError: an option is unknown or wrong, or the model can't be found.
        UnsupportedModelError: the model can't be served exactly.
        RankFailedError: a rank could not start.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self.config = EngineConfig.from_options(model=str(model), **options)
        spec = load_spec(self.config)
        tokenizer = load_tokenizer(self.config)
        self._executor = _start(self.config, spec)
        self.engine = Engine(self.config, spec, self._executor, tokenizer)
        self._closed = False
        limit, asked = self.engine.context_limit, self.config.max_model_len
        if asked is not None and limit < asked:
            logger.warning(
                "all KV pools together hold %d tokens, less than max_model_len=%d: that is the "
                "longest context",
                limit,
                asked,
            )

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete one prompt or several; returns one output for each, in order.

        `sampling_params` is one for all or one for each. `use_tqdm` shows a progress bar when the
        work takes long. A request that can't be served comes back with `error` set and finish
        reason "error" beside the others' outputs; if none can be served the first error is raised.

        Raises:
            InvalidRequestError: no request of the call can be served; the engine stays usable.
            RankFailedError: a rank died; every process has been stopped.
        """
        self._check_open()
        listed = _as_list(prompts)
        params = _params_for(len(listed), sampling_params)
        outputs: list[RequestOutput | Group] = []
        refusals: list[InvalidRequestError] = []
        try:
            for prompt, one in zip(listed, params, strict=True):
                try:
                    outputs.append(self._add(prompt, one))
                except InvalidRequestError as error:
                    refusals.append(error)
                    outputs.append(_refused(prompt, error))
        except BaseException:  # also Ctrl-C: what is queued must not run with the next call
            for output in outputs:
                self.engine.abort(output.request_id)
            raise
        if refusals and len(refusals) == len(listed):
            raise refusals[0]
        self._run(show_progress=use_tqdm)
        return [out.output() if isinstance(out, Group) else out for out in outputs]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool = True,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Complete one conversation or several by the tokenizer's chat template.

        A conversation is a list of `{"role": ..., "content": ...}`; `template_options` go to the
        template, as `tools` and `documents` do.
        """
        self._check_open()
        tokenizer = self.get_tokenizer()
        if tokenizer.chat_template is None:
            raise InvalidRequestError(
                f"the tokenizer of {self.config.model!r} has no chat template; use generate()"
            )
        if not messages:
            raise InvalidRequestError("messages is empty; it must have at least 1 message")
        conversations: Sequence[Any] = [messages] if isinstance(messages[0], Mapping) else messages
        options = {"add_generation_prompt": add_generation_prompt, **template_options}
        prompts = [
            {"prompt_token_ids": _templated(tokenizer, conversation, options)}
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm)

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

    def _add(self, prompt: Prompt, params: SamplingParams) -> Group:
        text, token_ids = self._tokenize(prompt)
        return self.engine.add_request(token_ids, params, prompt=text)

    def _tokenize(self, prompt: Prompt) -> tuple[str | None, Sequence[int]]:
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" in prompt:
                return prompt.get("prompt"), _token_ids(prompt["prompt_token_ids"])
            if not isinstance(prompt.get("prompt"), str):
                raise InvalidRequestError(
                    f"a prompt needs 'prompt' (text) or 'prompt_token_ids', not {sorted(prompt)}"
                )
            prompt = prompt["prompt"]
        if isinstance(prompt, str):
            return prompt, self.get_tokenizer().encode(prompt, verbose=False)
        return None, _token_ids(prompt)

    def _run(self, show_progress: bool) -> None:
        try:
            with Progress(self.engine, enabled=show_progress) as progress:
                while self.engine.has_requests:
                    self.engine.step()
                    progress.update()
        except BaseException:
            # Also Ctrl-C: a step that was cut short leaves ranks that can't go on.
            self.close()
            raise

    def _check_open(self) -> None:
        if self._closed:
            raise EngineStoppedError("this LLM has been closed or stopped; make a new one")


def _start(config: EngineConfig, spec: ModelSpec) -> Executor:
    if config.executor == "uni":
        from longspan.worker.in_process import InProcessExecutor

        return InProcessExecutor(config, spec)
    from longspan.worker.processes import ProcessExecutor

    return ProcessExecutor(config, spec)


def _as_list(prompts: Any) -> list[Prompt]:
    if isinstance(prompts, str | Mapping) or not isinstance(prompts, Sequence):
        return [prompts]
    one_prompt = bool(prompts) and all(isinstance(item, int) for item in prompts)
    return [prompts] if one_prompt else list(prompts)


def _params_for(
    count: int, params: SamplingParams | Sequence[SamplingParams] | None
) -> list[SamplingParams]:
    if params is None:
        return [SamplingParams()] * count
    if isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, Sequence) or not all(isinstance(p, SamplingParams) for p in params):
        raise InvalidRequestError(
            f"sampling_params={params!r} must be SamplingParams, or a list of them"
        )
    if len(params) != count:
        raise InvalidRequestError(
            f"sampling_params has {len(params)} entries for {count} prompts; give one for all or "
            "one for each"
        )
    return list(params)


def _templated(
    tokenizer: "PreTrainedTokenizerBase", conversation: Any, options: Mapping[str, Any]
) -> list[int]:
    try:
        token_ids: Any = tokenizer.apply_chat_template(
            conversation, tokenize=True, return_dict=False, **options
        )
    except Exception as error:  # templates are programs of the model's: they raise what they like
        reason = " ".join(str(error).split())
        raise InvalidRequestError(f"messages don't fit the chat template: {reason}") from error
    return list(token_ids)


def _token_ids(value: object) -> list[int]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        value = getattr(value, "tolist", lambda: None)()
    if not isinstance(value, Sequence):
        raise InvalidRequestError("prompt_token_ids must be a list of whole numbers")
    for position, token_id in enumerate(value):
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            raise InvalidRequestError(
                f"prompt_token_ids[{position}]={token_id!r} must be a whole number"
            )
    return list(value)


def _refused(prompt: Prompt, error: InvalidRequestError) -> RequestOutput:
    text = prompt if isinstance(prompt, str) else None
    completion = CompletionOutput(index=0, text="", token_ids=[], finish_reason="error")
    return RequestOutput("", text, [], [completion], finished=True, error=str(error))
