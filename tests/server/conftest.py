"""Tests of the server: a real process for each module, real sockets, the official client."""

import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import zoo
from program import ServerProgram
from transformers import AutoTokenizer, PreTrainedTokenizerBase

sys.path.append(str(Path(__file__).parents[1] / "equivalence"))  # `reference`


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = zoo.build("llama", tmp_path_factory.mktemp("llama"))
    return zoo.build_tokenizer(folder)


@pytest.fixture(scope="session")
def tokenizer(model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="module")
def client(server: ServerProgram) -> Iterator[openai.OpenAI]:
    """The official client of a module's own `server`."""
    with server.client() as client:
        yield client
