"""The offline API: what goes in, what comes out, and what is refused before any work."""

from pathlib import Path

import pytest
import zoo

from longspan import LLM, SamplingParams
from longspan.errors import ConfigError, EngineStoppedError, InvalidRequestError, LongspanError

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
