"""Token ids of texts, which come by a shorter way than the tokenizer's own and are the same."""

from pathlib import Path

import pytest
import zoo
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import longspan.demo
from longspan.errors import InvalidRequestError
from longspan.prompts import templated
from longspan.tokenizer import encoded, is_plain

MESSAGES = [{"role": "user", "content": "Tell me."}, {"role": "assistant", "content": "No."}]


@pytest.fixture(scope="module", params=["zoo", "demo"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> PreTrainedTokenizerBase:
    if request.param == "zoo":
        folder = zoo.build_tokenizer(tmp_path_factory.mktemp("zoo"))
    else:
        folder = Path(longspan.demo.__file__).parent / "model"
    return AutoTokenizer.from_pretrained(folder)


@given(text=st.text() | st.sampled_from([zoo.END, f" a{zoo.END}b ", "", "\x00 \n\t", "é" * 50]))
def test_they_are_those_of_encode(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    assert is_plain(tokenizer)
    assert encoded(tokenizer, text) == tokenizer.encode(text)
    assert encoded(tokenizer, text, add_special_tokens=False) == tokenizer.encode(
        text, add_special_tokens=False
    )


def test_those_of_a_conversation_are_the_templates(tokenizer: PreTrainedTokenizerBase) -> None:
    for options in (
        {"add_generation_prompt": True},
        {"add_generation_prompt": False, "continue_final_message": True},
    ):
        assert templated(tokenizer, MESSAGES, options) == tokenizer.apply_chat_template(
            MESSAGES, tokenize=True, return_dict=False, **options
        )


def test_a_tokenizer_with_ways_of_its_own_is_left_to_them(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(zoo.build_tokenizer(tmp_path))
    tokenizer.backend_tokenizer.enable_truncation(4)
    assert not is_plain(tokenizer)
    text = "More than four tokens, all of which count."
    assert len(encoded(tokenizer, text)) > 4, "encode cuts nothing off"

    options = {"truncation": True, "max_length": 5}
    assert len(templated(tokenizer, MESSAGES, options)) == 5, "the template's own way"

    class Own(type(tokenizer)):  # type: ignore[misc]
        def encode(self, text: str, **_: object) -> list[int]:
            return [len(text)]

    tokenizer.__class__ = Own
    assert encoded(tokenizer, text) == [len(text)]


def test_surrogates_are_no_text(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(InvalidRequestError, match=r"the text is not Unicode: .* at character 1"):
        encoded(tokenizer, "a\ud800")
    with pytest.raises(InvalidRequestError, match="not Unicode"):
        templated(tokenizer, [{"role": "user", "content": "\udfff"}], {})
