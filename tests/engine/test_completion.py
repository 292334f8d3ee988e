"""What a group gives back, at once and in increments. Pure Python."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_detokenizer import BYTE_LEVEL, broken_bytes, bytes_of, texts

from longspan.engine.completion import Group
from longspan.engine.detokenizer import Detokenizer
from longspan.engine.request import Request
from longspan.outputs import RequestOutput
from longspan.plan import Sampled, TokenLogprob
from longspan.sampling_params import SamplingParams

NO_TOKENIZER = object()


def group(params: SamplingParams, tokenizer: Any = BYTE_LEVEL, max_tokens: int = 10**6) -> Group:
    if tokenizer is NO_TOKENIZER:
        tokenizer = None
    requests = [
        Request(
            f"5/{index}",
            [1, 2, 3],
            params,
            seed=index,
            end_ids=frozenset([0]),
            max_tokens=max_tokens,
            detokenizer=Detokenizer(
                tokenizer, params.skip_special_tokens, params.stop_strings, params.min_tokens
            ),
        )
        for index in range(params.n)
    ]
    return Group("5", "p", [1, 2, 3], requests, tokenizer)


def draw(group: Group, index: int, token_id: int) -> None:
    request = group.requests[index]
    logprobs: tuple[TokenLogprob, ...] = ()
    if request.params.logprobs is not None:
        drawn = TokenLogprob(token_id, -0.1 - token_id / 1000, 2)
        logprobs = (drawn, TokenLogprob(token_id + 1, -0.05, 1))
    request.append(Sampled(request.request_id, token_id, logprobs))


def added(increments: list[RequestOutput]) -> RequestOutput:
    whole, *others = increments
    for increment in others:
        whole.add(increment)
    return whole


def assert_same(whole: RequestOutput, output: RequestOutput) -> None:
    """Equal but for the rounding of the sums of logprobs."""
    for mine, other in zip(whole.outputs, output.outputs, strict=True):
        assert mine.cumulative_logprob == pytest.approx(other.cumulative_logprob)
        mine.cumulative_logprob = other.cumulative_logprob
    assert whole == output


@given(st.data())
@settings(max_examples=300)
def test_increments_add_up_to_the_output(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 3), "n")
    inputs = texts.map(bytes_of) | broken_bytes
    left = [data.draw(inputs, f"tokens of {index}") for index in range(n)]
    params = SamplingParams(
        n=n,
        stop=data.draw(
            st.lists(st.text("ab 世\ufffd", min_size=1, max_size=4), max_size=3), "stop"
        ),
        min_tokens=data.draw(st.integers(0, 5), "min_tokens"),
        max_tokens=None,
        skip_special_tokens=data.draw(st.booleans(), "skip"),
        logprobs=data.draw(st.sampled_from([None, 1]), "logprobs"),
    )
    made = group(params, max_tokens=data.draw(st.integers(1, 70), "max_tokens"))
    increments: list[RequestOutput] = []
    shown = [""] * n

    def look() -> None:
        increment = made.increment()
        assert made.increment() is None, "nothing is told twice"
        for completion in increment.outputs if increment else ():
            shown[completion.index] += completion.text
        increments.extend([increment] if increment else [])

    while running := [i for i, r in enumerate(made.requests) if left[i] and not r.finish_reason]:
        index = data.draw(st.sampled_from(running))
        draw(made, index, left[index].pop(0))
        if data.draw(st.booleans()):
            look()
    for request in made.requests:
        if request.finish_reason is None:
            request.finish("abort")
    before_the_end = list(shown)
    look()
    output = made.output()
    assert shown == [completion.text for completion in output.outputs]
    for early, late in zip(before_the_end, shown, strict=True):
        assert late.startswith(early)
    assert [increment.finished for increment in increments].count(True) == 1
    assert_same(added(increments), output)


def increments_of(made: Group, token_ids: list[int]) -> list[str]:
    """The text of the increment after each token."""
    found = []
    for token_id in token_ids:
        draw(made, 0, token_id)
        increment = made.increment()
        assert increment is not None
        [completion] = increment.outputs
        assert completion.token_ids == [token_id]
        found.append(completion.text)
    return found


def test_a_stop_string_over_many_tokens_never_appears() -> None:
    made = group(SamplingParams(stop="STOP", max_tokens=None))
    shown = increments_of(made, bytes_of("a STA STOP"))
    assert shown == ["a", " ", "", "", "STA", " ", "", "", "", ""]
    assert made.increment() is None
    assert made.output().outputs[0].text == "a STA "
    assert made.output().outputs[0].stop_reason == "STOP"


def test_what_was_held_for_a_stop_string_comes_with_the_end() -> None:
    made = group(SamplingParams(stop="STOP"), max_tokens=4)
    assert increments_of(made, bytes_of("aSTO")) == ["a", "", "", "STO"]


def test_a_character_comes_with_its_last_byte() -> None:
    made = group(SamplingParams(max_tokens=None))
    assert increments_of(made, bytes_of("a🎉é")) == ["a", "", "", "", "🎉", "", "é"]


def test_nothing_is_new_at_first() -> None:
    made = group(SamplingParams(n=2))
    assert made.increment() is None


def test_only_sequences_with_news_are_in_an_increment() -> None:
    made = group(SamplingParams(n=3, max_tokens=None))
    [letter] = bytes_of("a")
    draw(made, 2, letter)
    first = made.increment()
    assert first is not None
    assert [completion.index for completion in first.outputs] == [2]
    assert (first.request_id, first.prompt, first.prompt_token_ids) == ("5", "p", [1, 2, 3])
    draw(made, 0, letter)
    draw(made, 0, 0)
    second = made.increment()
    assert second is not None
    [completion] = second.outputs
    assert (completion.index, completion.text) == (0, "a")
    assert (completion.token_ids, completion.finish_reason) == ([letter, 0], "stop")
    assert not second.finished


def test_an_end_without_a_token_is_news() -> None:
    made = group(SamplingParams(stop="bc", logprobs=0, max_tokens=None))
    assert increments_of(made, bytes_of("ab")) == ["a", ""]
    made.requests[0].finish("abort")
    increment = made.increment()
    assert increment is not None
    assert increment.finished
    [completion] = increment.outputs
    assert (completion.text, completion.token_ids, completion.logprobs) == ("b", [], [])
    assert completion.finish_reason == "abort"
    assert made.increment() is None


def test_without_a_tokenizer_tokens_are_news() -> None:
    made = group(SamplingParams(max_tokens=None), NO_TOKENIZER)
    assert increments_of(made, [7, 8]) == ["", ""]


class Reads(list[Any]):
    """A list that counts the items that are read from it."""

    read = 0

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        self.read += len(found) if isinstance(place, slice) else 1
        return found

    def __iter__(self) -> Any:
        self.read += len(self)
        return super().__iter__()


def test_an_increment_costs_what_is_new() -> None:
    made = group(SamplingParams(logprobs=1, max_tokens=None))
    request = made.requests[0]
    request.output_token_ids, request.logprobs = Reads(), Reads()
    certain: Any = Reads()
    request.detokenizer._certain = certain
    for token_id in bytes_of("abcdefgh") * 50:
        draw(made, 0, token_id)
        made.increment()
    assert request.output_token_ids.read == 400
    assert request.logprobs.read <= 2 * 400
    assert certain.read == 400
