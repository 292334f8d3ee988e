"""Numbers of tokens as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.errors import ConfigError
from longspan.token_count import parse_tokens, show_tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("1", 1),
        ("131072", 131_072),
        ("131,072", 131_072),
        ("1_000", 1000),
        ("128K", 131_072),
        ("128k", 128_000),
        ("1M", 1_048_576),
        ("1m", 1_000_000),
        ("10M", 10_485_760),
        ("1.5k", 1500),
        ("0.5M", 524_288),
        ("2G", 2_147_483_648),
    ],
)
def test_small_letters_are_decimal_and_capitals_binary(text: str, tokens: int) -> None:
    assert parse_tokens("context", text) == tokens


@pytest.mark.parametrize("text", ["", "K", "0", "-1", "1.5", "1.0001k", "12T", "1 K", "nan", "1e6"])
def test_what_is_no_number_of_tokens_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^context='.*' must be a whole number of tokens"):
        parse_tokens("context", text)


@given(st.integers(1, 10**9))
def test_what_is_shown_can_be_read(tokens: int) -> None:
    assert parse_tokens("context", show_tokens(tokens)) == tokens


def test_lengths_are_shown_short() -> None:
    assert [show_tokens(n) for n in (131_072, 1 << 20, 100_000, 10**7, 4097)] == [
        "128K",
        "1M",
        "100k",
        "10m",
        "4,097",
    ]
