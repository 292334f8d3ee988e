"""The offline API: what goes in, what comes out, and what is refused before any work."""

import contextlib
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import zoo

import longspan.llm
from longspan import LLM, RequestOutput, SamplingParams
from longspan.engine.completion import Group
from longspan.errors import (
    ConfigError,
    EngineStoppedError,
    InvalidRequestError,
    LongspanError,
    RankFailedError,
)

GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = zoo.build("llama", tmp_path_factory.mktemp("llama"))
    zoo.build_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(
        str(folder),
        context_parallel_size=2,
        max_model_len=600,
        kv_cache_tokens=256,
        min_tokens_per_rank=32,
        distributed_executor_backend="uni",
    )


def test_outputs_have_vllms_fields(llm: LLM) -> None:
    first, second = llm.generate(["Hello there", {"prompt_token_ids": [1, 2, 3]}], GREEDY)
    assert first.prompt == "Hello there"
    assert first.prompt_token_ids == llm.get_tokenizer().encode("Hello there")
    assert second.prompt is None
    assert second.prompt_token_ids == [1, 2, 3]
    assert first.request_id != second.request_id
    for output in (first, second):
        assert output.finished
        assert output.num_cached_tokens == 0
        assert output.error is None
        completion = output.outputs[0]
        assert completion.index == 0
        assert len(completion.token_ids) == 8
        assert completion.finish_reason == "length"
        assert completion.text == llm.get_tokenizer().decode(completion.token_ids)
        metrics = output.metrics
        assert metrics is not None
        assert metrics.time_to_first_token > 0
        assert metrics.time_per_output_token > 0
        assert sum(metrics.kv_tokens) == len(output.prompt_token_ids) + 7


def test_prompts_of_every_form(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    ids = tokenizer.encode("A page")
    forms = ["A page", {"prompt": "A page"}, {"prompt_token_ids": ids}, ids]
    outputs = [llm.generate(form, GREEDY)[0] for form in forms] + llm.generate(forms, GREEDY)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    assert llm.generate([], GREEDY) == []


def test_one_sampling_params_for_each_prompt(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (1, 5)]
    outputs = llm.generate(["a", "b"], params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 5]
    with pytest.raises(InvalidRequestError, match="2 entries for 1 prompts"):
        llm.generate(["a"], params)


def test_logprobs(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=3)
    completion = llm.generate("Hello", params)[0].outputs[0]
    assert completion.logprobs is not None
    for token_id, found in zip(completion.token_ids, completion.logprobs, strict=True):
        assert len(found) == 3
        assert found[token_id].rank == 1
        assert found[token_id].decoded_token == llm.get_tokenizer().decode([token_id])
        assert [one.rank for one in found.values()] == [1, 2, 3]
    chosen = [f[t].logprob for t, f in zip(completion.token_ids, completion.logprobs, strict=True)]
    assert completion.cumulative_logprob == pytest.approx(sum(chosen))
    assert llm.generate("Hello", GREEDY)[0].outputs[0].logprobs is None


def test_stops(llm: LLM) -> None:
    plain = llm.generate("Hello", SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    tokens, text = plain[0].outputs[0].token_ids, plain[0].outputs[0].text

    def stopped(**options: object):
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, **options)
        return llm.generate("Hello", params)[0].outputs[0]

    by_token = stopped(stop_token_ids=[tokens[5]])
    first = tokens.index(tokens[5])
    assert by_token.token_ids == tokens[: first + 1]
    assert (by_token.finish_reason, by_token.stop_reason) == ("stop", tokens[5])
    later = stopped(stop_token_ids=[tokens[5]], min_tokens=first + 2)
    assert len(later.token_ids) > first + 1

    stop = text[7:9]
    by_text = stopped(stop=[stop])
    assert by_text.text == text[: text.index(stop)]
    assert (by_text.finish_reason, by_text.stop_reason) == ("stop", stop)


def test_generation_ends_at_the_longest_context(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    completion = llm.generate({"prompt_token_ids": [5] * 500}, params)[0].outputs[0]
    assert completion.finish_reason == "length"
    assert len(completion.token_ids) == llm.engine.context_limit - 500 == 12


def test_chat(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    ids = llm.get_tokenizer().apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    output = llm.chat(messages, GREEDY)[0]
    assert output.prompt_token_ids == ids
    assert [one.outputs for one in llm.chat([messages, messages], GREEDY)] == [output.outputs] * 2
    with pytest.raises(InvalidRequestError, match="messages is empty"):
        llm.chat([])


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("", "prompt is empty"),
        ({"prompt_token_ids": []}, "prompt is empty"),
        ({"prompt_token_ids": [1, 512]}, r"prompt_token_ids\[1\]=512 .* \(0 to 511\)"),
        ({"prompt_token_ids": [-1]}, r"prompt_token_ids\[0\]=-1 .* \(0 to 511\)"),
        ({"prompt_token_ids": [1.5]}, r"prompt_token_ids\[0\]=1.5 must be a whole number"),
        ({"prompt_token_ids": "abc"}, "must be a list of whole numbers"),
        ({"prompt_token_ids": [1] * 600}, "600 tokens.*max_model_len=600"),
        ({"prompt_token_ids": [1] * 512}, "512 tokens.*all 2 ranks together.*512.*kv_cache_tokens"),
        ({"text": "x"}, "'prompt'.*'prompt_token_ids'"),
        (None, "must be a list of whole numbers"),
    ],
)
def test_a_bad_prompt_is_refused_alone_and_the_engine_goes_on(
    llm: LLM, prompt: object, named: str
) -> None:
    with pytest.raises(InvalidRequestError, match=named) as caught:
        llm.generate([prompt], GREEDY)
    assert "\n" not in str(caught.value)
    good, bad, also_good = llm.generate(["Hello", prompt, "Hello"], GREEDY)
    assert bad.error == str(caught.value)
    assert bad.outputs[0].finish_reason == "error"
    assert good.outputs[0].token_ids == also_good.outputs[0].token_ids
    assert len(good.outputs[0].token_ids) == 8
    assert [usage.used for usage in llm.engine.kv_usage] == [0, 0]


def test_sampling_params_of_another_type(llm: LLM) -> None:
    for params in ({"temperature": 0}, [GREEDY, {"temperature": 0}], 7):
        with pytest.raises(InvalidRequestError, match="must be SamplingParams, or a list"):
            llm.generate(["a", "b"], params)
    assert not llm.engine.has_requests


def test_what_was_queued_before_an_unexpected_error_is_not_run_later(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = llm.get_tokenizer().encode

    def fail_at_bad(text: str, **options: object) -> list[int]:
        if text == "bad":
            raise RuntimeError("a tokenizer's own fault")
        return encode(text, **options)

    monkeypatch.setattr(llm.get_tokenizer(), "encode", fail_at_bad)
    with pytest.raises(RuntimeError, match="own fault"):
        llm.generate(["good", "bad"], GREEDY)
    assert not llm.engine.has_requests
    assert len(llm.generate("good", GREEDY)) == 1


def test_outputs_say_which_prompt_is_theirs(llm: LLM) -> None:
    outputs = llm.generate(["a", "", "b"], GREEDY)
    assert [output.prompt_index for output in outputs] == [0, 1, 2]


@pytest.mark.parametrize(("given", "each"), [(0, [0, 0]), (-3, [-3, -3]), ((2, -1), [2, -1])])
def test_priorities_reach_the_engine(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, given: Any, each: list[int]
) -> None:
    add, seen = llm.engine.add_request, []

    def add_request(*arguments: Any, priority: int, **options: Any) -> Group:
        seen.append(priority)
        return add(*arguments, **options)

    monkeypatch.setattr(llm.engine, "add_request", add_request)
    llm.generate(["a", "b"], GREEDY, priority=given)
    llm.chat([[{"role": "user", "content": "a"}]] * 2, GREEDY, priority=given)
    list(llm.stream(["a", "b"], GREEDY, priority=given))
    assert seen == each * 3


@pytest.mark.parametrize(
    ("priority", "named"),
    [
        (1.5, r"priority=1.5 must be a whole number, or a list of them"),
        (True, r"priority=True must be"),
        (None, r"priority=None must be"),
        ([1, "2"], r"priority=\[1, '2'\] must be"),
        ("12", r"priority='12' must be"),
        ([1], r"priority has 1 entries for 2 prompts; give one for all or one for each"),
    ],
)
def test_bad_priorities(llm: LLM, priority: Any, named: str) -> None:
    with pytest.raises(InvalidRequestError, match=named):
        llm.generate(["a", "b"], GREEDY, priority=priority)
    with pytest.raises(InvalidRequestError, match=named):
        next(llm.stream(["a", "b"], GREEDY, priority=priority))
    assert not llm.engine.has_requests


def added(increments: Iterable[RequestOutput]) -> list[RequestOutput]:
    """The outputs of a stream put together, in the order of the prompts."""
    wholes: dict[int, RequestOutput] = {}
    for increment in increments:
        if increment.prompt_index in wholes:
            wholes[increment.prompt_index].add(increment)
        else:
            wholes[increment.prompt_index] = increment
    return [wholes[index] for index in sorted(wholes)]


def plain(outputs: Iterable[RequestOutput]) -> list[object]:
    """What two runs of the same requests have in common."""
    return [
        (
            output.prompt_index,
            output.prompt,
            output.prompt_token_ids,
            output.finished,
            output.error,
            [
                (one.index, one.text, one.token_ids, one.finish_reason, one.stop_reason)
                for one in output.outputs
            ],
        )
        for output in outputs
    ]


def assert_idle(llm: LLM) -> None:
    assert not llm.engine.has_requests
    assert [usage.used for usage in llm.engine.kv_usage] == [0, 0]


LONG = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)


def test_a_stream_adds_up_to_what_generate_returns(llm: LLM) -> None:
    prompts = ["Hello there", {"prompt_token_ids": [5] * 100}, "A page"]
    params = [LONG, SamplingParams(n=2, seed=3, max_tokens=20), GREEDY]
    increments = list(llm.stream(prompts, params))
    assert len(increments) >= 60 + 20 + 8
    assert [one.finished for one in increments].count(True) == 3
    assert plain(added(increments)) == plain(llm.generate(prompts, params))
    assert_idle(llm)


def test_a_stream_yields_each_token_as_it_is_drawn(llm: LLM) -> None:
    for number, output in enumerate(llm.stream("Hello", GREEDY), start=1):
        [completion] = output.outputs
        assert len(completion.token_ids) == 1
        assert output.metrics is not None
        assert output.metrics.num_generation_tokens == number
    assert number == 8


def test_a_stream_never_shows_a_stop_string(llm: LLM) -> None:
    text = llm.generate("Hello", LONG)[0].outputs[0].text
    stop = text[7:14]
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, stop=stop)
    [whole] = added(llm.stream("Hello", params))
    assert whole.outputs[0].text == text[: text.index(stop)]
    assert (whole.outputs[0].finish_reason, whole.outputs[0].stop_reason) == ("stop", stop)


def test_logprobs_come_in_increments(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=2)
    [whole], [expected] = added(llm.stream("Hello", params)), llm.generate("Hello", params)
    mine, other = whole.outputs[0], expected.outputs[0]
    assert mine.logprobs is not None
    assert other.logprobs is not None
    assert [list(found) for found in mine.logprobs] == [list(found) for found in other.logprobs]
    assert mine.cumulative_logprob == pytest.approx(other.cumulative_logprob)


def test_a_conversation_is_streamed(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    streamed = added(llm.stream(llm.preprocess_chat(messages), GREEDY))
    assert plain(streamed) == plain(llm.chat(messages, GREEDY))


def test_nothing_is_queued_before_the_first_output_is_asked_for(llm: LLM) -> None:
    stream = llm.stream("Hello", LONG)
    assert_idle(llm)
    stream.close()
    assert list(llm.stream([], LONG)) == []


def test_a_closed_stream_ends_its_requests_and_frees_their_pages(llm: LLM) -> None:
    stream = llm.stream(["Hello", {"prompt_token_ids": [5] * 100}], LONG)
    next(stream)
    next(stream)
    assert llm.engine.has_requests
    assert sum(usage.used for usage in llm.engine.kv_usage) > 0
    stream.close()
    assert_idle(llm)
    assert list(stream) == []
    assert len(llm.generate("Hello", GREEDY)[0].outputs[0].token_ids) == 8


def test_an_error_in_the_callers_loop_ends_the_requests(llm: LLM) -> None:
    def loop() -> None:
        for _ in llm.stream(["Hello", "there"], LONG):
            raise RuntimeError("the caller's own")

    with pytest.raises(RuntimeError, match="the caller's own"):
        loop()
    assert_idle(llm)


def test_ctrl_c_waits_for_the_end_of_a_step(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    step, ended = llm.engine.step, []

    def interrupted_step() -> list[Group]:
        if not ended:
            signal.raise_signal(signal.SIGINT)
        ended.append(step())
        return ended[-1]

    stream = llm.stream(["Hello", "there"], LONG)
    next(stream)
    monkeypatch.setattr(llm.engine, "step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    monkeypatch.undo()
    assert ended
    assert_idle(llm)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert llm.generate("Hello", GREEDY)[0].finished


def test_a_second_ctrl_c_does_not_wait(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck() -> list[Group]:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second one interrupts")

    with LLM(str(folder), kv_cache_tokens=256, max_model_len=256) as llm:
        monkeypatch.setattr(llm.engine, "step", stuck)
        with pytest.raises(KeyboardInterrupt):
            next(llm.stream("Hello", LONG))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with pytest.raises(EngineStoppedError, match="make a new one"):
            next(llm.stream("Hello", LONG))


def test_a_handler_of_the_programs_own_is_left_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupts: list[int] = []
    step = llm.engine.step

    def interrupted_step() -> list[Group]:
        signal.raise_signal(signal.SIGINT)
        return step()

    monkeypatch.setattr(llm.engine, "step", interrupted_step)
    usual = signal.signal(signal.SIGINT, lambda number, _: interrupts.append(number))
    try:
        assert added(llm.stream("Hello", GREEDY))[0].finished
    finally:
        signal.signal(signal.SIGINT, usual)
    assert len(interrupts) == 8


def test_refused_prompts_are_streamed_beside_others(llm: LLM) -> None:
    prompts = ["Hello", "", "there", {"prompt_token_ids": [512]}]
    streamed, expected = added(llm.stream(prompts, GREEDY)), llm.generate(prompts, GREEDY)
    assert plain(streamed) == plain(expected)
    assert [bool(output.error) for output in streamed] == [False, True, False, True]
    with pytest.raises(InvalidRequestError, match="prompt is empty"):
        list(llm.stream(["", {"prompt_token_ids": [512]}], GREEDY))
    with pytest.raises(InvalidRequestError, match="must be SamplingParams"):
        list(llm.stream("Hello", 7))
    assert_idle(llm)


def test_other_calls_in_the_loop_take_nothing_from_a_stream(llm: LLM) -> None:
    expected = plain(llm.generate("Hello", LONG))
    others, increments = [], []
    for number, output in enumerate(llm.stream("Hello", LONG)):
        increments.append(output)
        if number == 5:
            others += llm.generate("there", GREEDY)
            assert llm.engine.has_requests, "the stream's request goes on after it"
        if number == 10:
            others += added(llm.stream("there", GREEDY))
    assert plain(added(increments)) == expected
    assert plain(others) == plain(llm.generate("there", GREEDY)) * 2


def test_a_stream_that_ends_during_another_call_is_told_of_it(llm: LLM) -> None:
    stream = llm.stream("there", GREEDY)
    first = next(stream)
    llm.generate("Hello", LONG)
    assert not llm.engine.has_requests
    assert plain(added([first, *stream])) == plain(llm.generate("there", GREEDY))


@pytest.mark.parametrize("own", [True, False])
def test_the_caller_may_abort_a_request(llm: LLM, own: bool) -> None:
    increments: list[RequestOutput] = []
    aborted = None
    for output in llm.stream(["Hello", "there"], LONG):
        increments.append(output)
        others = {one.request_id for one in increments} - {output.request_id}
        if others and not aborted:
            aborted = llm.engine.abort(output.request_id if own else others.pop())
    reasons = [output.outputs[0].finish_reason for output in added(increments)]
    assert sorted(map(str, reasons)) == ["abort", "length"]
    assert_idle(llm)


def test_a_closed_llm_ends_its_streams(folder: Path) -> None:
    with LLM(str(folder), kv_cache_tokens=256, max_model_len=256) as llm:
        stream = llm.stream("Hello", LONG)
        next(stream)
    with pytest.raises(EngineStoppedError, match="make a new one"):
        next(stream)
    assert not llm.engine.has_requests


def test_a_failing_step_stops_the_engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> list[Group]:
        raise RankFailedError("rank 0 failed")

    with LLM(str(folder), kv_cache_tokens=256, max_model_len=256) as llm:
        monkeypatch.setattr(llm.engine, "step", fail)
        with pytest.raises(RankFailedError, match="rank 0 failed"):
            list(llm.stream("Hello", LONG))
        with pytest.raises(EngineStoppedError, match="make a new one"):
            llm.generate("Hello", LONG)


def test_progress_is_shown_until_the_first_output(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    class Spy(contextlib.nullcontext[Any]):
        def __init__(self, _: object, *, enabled: bool) -> None:
            super().__init__(self)
            events.append(f"enabled={enabled}")

        def update(self) -> None:
            events.append("update")

        def hide(self) -> None:
            events.append("hide")

    monkeypatch.setattr(longspan.llm, "Progress", Spy)
    stream = llm.stream({"prompt_token_ids": [5] * 100}, GREEDY, use_tqdm=True)
    next(stream)
    stream.close()
    assert events[0] == "enabled=True"
    assert events[1:] == ["update"] * (len(events) - 2) + ["hide"]
    events.clear()
    next(llm.stream("Hello", GREEDY))
    assert events[0] == "enabled=False"


def test_messages_that_the_chat_template_cannot_take(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{{ raise_exception('roles must\nalternate') }}"
    monkeypatch.setattr(llm.get_tokenizer(), "chat_template", template)
    with pytest.raises(InvalidRequestError, match=r"chat template: roles must alternate$"):
        llm.chat([{"role": "user", "content": "Hello"}], GREEDY)


def test_parameters_beyond_the_vocabulary(llm: LLM) -> None:
    for params in (SamplingParams(stop_token_ids=[512]), SamplingParams(logprobs=513)):
        with pytest.raises(InvalidRequestError, match=r"51[12]"):
            llm.generate("Hello", params)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"context_parallel_size": 0}, "context_parallel_size=0 .* at least 1"),
        ({"context_parallel_sise": 2}, "context_parallel_sise=2; did you mean"),
        ({"dtype": "int3"}, "dtype='int3' must be one of"),
        ({"kv_cache_tokens": [100, 100, 100]}, "names 3 ranks; context_parallel_size=2"),
        ({"kv_cache_tokens": 100, "kv_cache_memory_bytes": 10}, "contradict"),
        ({"kv_cache_memory_bytes": 10}, "less than one page"),
        ({"max_model_len": 10**9}, "max_model_len=1000000000"),
    ],
)
def test_bad_options(folder: Path, options: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        LLM(
            str(folder),
            **{
                "context_parallel_size": 2,
                "distributed_executor_backend": "uni",
                **options,
            },
        )
    assert "\n" not in str(caught.value)


def test_an_unknown_model() -> None:
    with pytest.raises(LongspanError, match="no/such-model") as caught:
        LLM("no/such-model", context_parallel_size=2)
    assert "\n" not in str(caught.value)


def test_a_model_without_a_tokenizer_takes_token_ids_only(tmp_path: Path) -> None:
    with LLM(str(zoo.build("llama", tmp_path)), kv_cache_tokens=512) as llm:
        assert llm.generate([1, 2, 3], GREEDY)[0].outputs[0].text == ""
        with pytest.raises(InvalidRequestError, match="has no tokenizer: give prompt_token_ids"):
            llm.generate("Hello")
        with pytest.raises(InvalidRequestError, match="use stop_token_ids"):
            llm.generate([1, 2, 3], SamplingParams(stop="x"))
    with pytest.raises(EngineStoppedError, match="make a new one"):
        llm.generate([1, 2, 3])
