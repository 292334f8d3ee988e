"""The packaged model finds what is hidden: on ranks, and by the command line."""

import json
import os
import struct
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner, Result

from longspan import LLM
from longspan.cli import app
from longspan.demo import model_path
from longspan.evaluation.subject import EngineSubject
from longspan.evaluation.sweep import Question, Report, Sweep, evaluate

SWEEP = Sweep((512, 2048), (0.0, 50.0, 100.0), samples=2, seed=5)


def report(ranks: int) -> Report:
    told: list[tuple[int, list[Question]]] = []
    pools = 3000 // ranks  # of two, neither has room for the longer texts
    options = {"distributed_executor_backend": "mp", "kv_cache_tokens": pools}
    with LLM(str(model_path()), context_parallel_size=ranks, dtype="float32", **options) as llm:
        done = evaluate(EngineSubject(llm), SWEEP, ranks, lambda *news: told.append(news))
    assert told == [(length, done.at(length)) for length in SWEEP.lengths]
    return done


def test_ranks_find_what_one_finds() -> None:
    spread, alone = report(2), report(1)
    for length in SWEEP.lengths:
        assert len(spread.at(length)) == 6
        assert spread.accuracy(length) >= 0.8
    answers = [question.answer for question in spread.questions]
    assert [each.text for each in answers] == [q.answer.text for q in alone.questions]
    cached = [each.answer.cached_tokens for each in spread.at(2048)]
    assert cached[0] == 0, "the first question's prompt is computed"
    assert min(cached[1:]) > 1900, "the others share it"


def command(*arguments: object) -> Result:
    options = ("--distributed-executor-backend", "mp", "--kv-cache-tokens", "2500")
    runner = CliRunner(env={**os.environ, "COLUMNS": "100", "TERM": "dumb"})
    return runner.invoke(app, ["eval", "needle", str(model_path()), *options, *map(str, arguments)])


def test_the_command_prints_a_table_and_draws_a_heat_map(tmp_path: Path) -> None:
    picture = tmp_path / "needle.png"
    options = ("--lengths", "512,1K", "--depths", "0,50,100", "--samples", "2")
    done = command(*options, "--plot", picture)
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[0] == ["depth", "512", "1K"]
    assert [row[0] for row in rows[1:5]] == ["0", "50", "100", "all"]
    assert "1K: 6 of 6 right; prompts of up to " in done.stderr
    head = picture.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", head[16:])
    assert width > 300
    assert height > 200


def test_json_has_every_answer() -> None:
    done = command("--lengths", "512", "--depths", "0,100", "--samples", "1", "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["sweep"] == {"lengths": [512], "depths": [0, 100], "samples": 1, "seed": 0}
    assert document["ranks"] == 1
    [result] = document["results"]
    questions = msgspec.convert(document["questions"], list[Question])
    assert result["accuracy"] == sum(question.right for question in questions) / 2
    assert len(result["by_depth"]) == 2
    assert all(question.answer.output_tokens for question in questions)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--lengths", "4K,1K"), "lengths=[4096, 1024] must be one or more, ascending"),
        (("--depths", "0,110"), "depths=[0.0, 110.0] must be from 0 to 100, in percent"),
        (("--depths", "begin"), "depths='begin' must be numbers with commas, as in 0,50,100"),
        (("--samples", "0"), "samples=0 must be at least 1"),
        (("--lengths", "4K"), "lengths=4096 is above the 2,496 tokens that model="),
        (("--plot", "map.jpg"), "plot='map.jpg' must be the name of a .png file"),
        (("--base-url", "http://127.0.0.1:9"), "no server at http://127.0.0.1:9: "),
    ],
)
def test_what_can_not_be_asked_is_refused(options: tuple[str, ...], said: str) -> None:
    done = command(*options)
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: {said}")
    assert done.stderr.count("\n") == 1
