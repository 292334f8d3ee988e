"""Sampling parameters: what is taken, what is refused, and with which words. Pure Python."""

import copy
import dataclasses
import pickle
from typing import Any

import pytest

from longspan.errors import InvalidRequestError
from longspan.sampling_params import SamplingParams

NAN, INFINITY = float("nan"), float("inf")


def refusal(**parameters: Any) -> str:
    """The words with which parameters are refused."""
    with pytest.raises(InvalidRequestError) as refused:
        SamplingParams(**parameters)
    return str(refused.value)


def test_defaults_are_those_of_vllm() -> None:
    assert dataclasses.asdict(SamplingParams()) == {
        "n": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None,
        "max_tokens": 16,
        "min_tokens": 0,
        "stop": None,
        "stop_token_ids": (),
        "ignore_eos": False,
        "logprobs": None,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "skip_special_tokens": True,
    }


@pytest.mark.parametrize(
    "parameters",
    [
        {"n": 100},
        {"temperature": 0},
        {"temperature": 1e-300},
        {"top_p": 1e-9},
        {"top_k": -1},
        {"top_k": 10**9},
        {"min_p": 1},
        {"seed": 0},
        {"seed": -(2**63)},
        {"seed": 2**63 - 1},
        {"max_tokens": None, "min_tokens": 10**6},
        {"max_tokens": 5, "min_tokens": 5},
        {"stop": []},
        {"stop": " "},
        {"stop": ("a", "b")},
        {"stop_token_ids": None},
        {"stop_token_ids": [0, 7]},
        {"logprobs": 0},
        {"logprobs": -1},
        {"repetition_penalty": 0.1},
        {"presence_penalty": -2, "frequency_penalty": 2},
    ],
    ids=str,
)
def test_limits_themselves_are_allowed(parameters: dict[str, Any]) -> None:
    SamplingParams(**parameters)


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("n", 0, "a whole number of at least 1"),
        ("n", -1, "a whole number of at least 1"),
        ("n", 1.0, "a whole number of at least 1"),
        ("n", True, "a whole number of at least 1"),
        ("n", None, "a whole number of at least 1"),
        ("temperature", -0.1, "a finite number of at least 0"),
        ("temperature", NAN, "a finite number of at least 0"),
        ("temperature", INFINITY, "a finite number of at least 0"),
        ("temperature", 10**400, "a finite number of at least 0"),
        ("temperature", "hot", "a finite number of at least 0"),
        ("temperature", False, "a finite number of at least 0"),
        ("temperature", None, "a finite number of at least 0"),
        ("top_p", 0, "a number above 0 and at most 1"),
        ("top_p", 1.01, "a number above 0 and at most 1"),
        ("top_p", NAN, "a number above 0 and at most 1"),
        ("top_k", -2, "a whole number of at least -1"),
        ("top_k", 2.5, "a whole number of at least -1"),
        ("top_k", 2**63, f"at most {2**63 - 1}"),
        ("min_p", -0.01, "a number from 0 to 1"),
        ("min_p", 1.5, "a number from 0 to 1"),
        ("min_p", NAN, "a number from 0 to 1"),
        ("seed", 0.5, f"a whole number of at least {-(2**63)} or None"),
        ("seed", True, f"a whole number of at least {-(2**63)} or None"),
        ("seed", 2**63, f"at most {2**63 - 1} or None"),
        ("max_tokens", 0, "a whole number of at least 1 or None"),
        ("max_tokens", "16", "a whole number of at least 1 or None"),
        ("min_tokens", -1, "a whole number of at least 0"),
        ("min_tokens", None, "a whole number of at least 0"),
        ("stop", "", "a string or a list of strings, none of them empty"),
        ("stop", ["a", ""], "a string or a list of strings, none of them empty"),
        ("stop", [1], "a string or a list of strings, none of them empty"),
        ("stop", b"a", "a string or a list of strings, none of them empty"),
        ("stop", 0, "a string or a list of strings, none of them empty"),
        ("stop_token_ids", 5, "a list of token ids, whole numbers of at least 0"),
        ("stop_token_ids", [-1], "a list of token ids, whole numbers of at least 0"),
        ("stop_token_ids", [True], "a list of token ids, whole numbers of at least 0"),
        ("stop_token_ids", ["</s>"], "a list of token ids, whole numbers of at least 0"),
        ("stop_token_ids", "12", "a list of token ids, whole numbers of at least 0"),
        ("ignore_eos", 1, "True or False"),
        ("logprobs", -2, "a whole number of at least -1 or None"),
        ("logprobs", True, "a whole number of at least -1 or None"),
        ("repetition_penalty", 0, "a finite number above 0"),
        ("repetition_penalty", -1.0, "a finite number above 0"),
        ("repetition_penalty", INFINITY, "a finite number above 0"),
        ("repetition_penalty", NAN, "a finite number above 0"),
        ("presence_penalty", 2.1, "a number from -2 to 2"),
        ("presence_penalty", NAN, "a number from -2 to 2"),
        ("frequency_penalty", -2.1, "a number from -2 to 2"),
        ("frequency_penalty", [], "a number from -2 to 2"),
        ("skip_special_tokens", None, "True or False"),
    ],
)
def test_a_wrong_value_is_refused_with_name_and_limit(name: str, value: Any, limit: str) -> None:
    message = refusal(**{name: value})
    assert message.startswith(f"{name}=")
    assert message.endswith(f" must be {limit}")


def test_the_message_shows_the_value() -> None:
    assert refusal(top_p=1.5) == "top_p=1.5 must be a number above 0 and at most 1"


def test_a_message_is_one_short_line_whatever_the_value() -> None:
    class Poem:
        def __repr__(self) -> str:
            return "line\n" * 1000

    for value in (Poem(), ["x" * 10_000] * 10_000 + [""], {"a": Poem()}):
        message = refusal(stop=value)
        assert "\n" not in message
        assert len(message) < 400


def test_min_tokens_may_not_exceed_max_tokens() -> None:
    assert refusal(min_tokens=17) == "min_tokens=17 must be at most max_tokens=16"


def test_greedy_gives_one_completion_only() -> None:
    assert refusal(n=2, temperature=0) == (
        "n=2 must be 1 with temperature=0, as all completions would be the same; "
        "give a temperature above 0"
    )


def test_an_unknown_parameter_is_refused_with_the_nearest_name() -> None:
    assert refusal(temprature=0.5) == (
        "unknown sampling parameter temprature=0.5; did you mean 'temperature'?"
    )


def test_an_unknown_parameter_without_a_near_name_is_answered_with_all_names() -> None:
    message = refusal(zzz=1)
    assert message.startswith("unknown sampling parameter zzz=1; known parameters: ['n', ")
    assert all(repr(field.name) in message for field in dataclasses.fields(SamplingParams))


def test_numbers_are_kept_as_floats_and_lists_as_tuples() -> None:
    stop, stop_token_ids = ["a"], [3]
    params = SamplingParams(temperature=2, stop=stop, stop_token_ids=stop_token_ids)
    stop.append("")
    stop_token_ids.append(-1)
    assert isinstance(params.temperature, float)
    assert params.stop == ("a",)
    assert params.stop_token_ids == (3,)
    assert hash(params) == hash(dataclasses.replace(params))


def test_params_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().top_p = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("stop", "strings"), [(None, ()), ("ab", ("ab",)), ([], ()), (["a", "b"], ("a", "b"))]
)
def test_stop_strings(stop: Any, strings: tuple[str, ...]) -> None:
    assert SamplingParams(stop=stop).stop_strings == strings


def test_params_can_be_copied_pickled_and_replaced() -> None:
    params = SamplingParams(top_k=7, stop=["x"], seed=3)
    assert copy.deepcopy(params) == pickle.loads(pickle.dumps(params)) == params
    assert dataclasses.replace(params, top_k=8).top_k == 8
    with pytest.raises(InvalidRequestError, match="top_k"):
        dataclasses.replace(params, top_k=-3)


def test_vocabulary_limits() -> None:
    SamplingParams(stop_token_ids=[0, 99], logprobs=100).check_vocab(100)
    SamplingParams(logprobs=-1).check_vocab(100)
    with pytest.raises(InvalidRequestError) as refused:
        SamplingParams(stop_token_ids=[5, 100]).check_vocab(100)
    assert str(refused.value) == "stop_token_ids contains 100; the model's token ids are 0 to 99"
    with pytest.raises(InvalidRequestError) as refused:
        SamplingParams(logprobs=101).check_vocab(100)
    assert str(refused.value) == (
        "logprobs=101 must be at most the vocabulary's 100; -1 reports all of it"
    )
