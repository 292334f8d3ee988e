"""Tests of the server: a real process for each module, real sockets, the official client."""

import sys
from pathlib import Path

import pytest
import zoo
from transformers import AutoTokenizer, PreTrainedTokenizerBase

sys.path.append(str(Path(__file__).parents[1] / "equivalence"))  # `reference`


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = zoo.build("llama", tmp_path_factory.mktemp("llama"))
    return zoo.build_tokenizer(folder)


@pytest.fixture(scope="session")
def tokenizer(model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model)
