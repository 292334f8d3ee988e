"""C++ is compiled once, by whichever process comes first, and again when anything of it changes."""

import multiprocessing
import shutil
from pathlib import Path

import pytest

from longspan import compiled

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def write(folder: Path, answer: int) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "answer.h").write_text(f"constexpr int ANSWER = {answer};\n")
    source = folder / "answer.cpp"
    source.write_text('#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n')
    return source


def answer_of(source: Path) -> int:
    library = compiled.library(source)
    assert library is not None
    answer: int = library.answer()
    return answer


def test_processes_that_start_together_compile_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = write(tmp_path / "source", 42)
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.map(answer_of, [source] * 3) == [42] * 3
    kept = [path.suffix for path in (tmp_path / "cache" / "longspan").iterdir()]
    assert sorted(kept) == [".lock", ".so"]


def test_what_lies_beside_a_source_belongs_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for answer in (1, 2, 1):
        assert answer_of(write(tmp_path / "source", answer)) == answer
        compiled.library.cache_clear()
    assert len(list((tmp_path / "cache" / "longspan").glob("*.so"))) == 2
