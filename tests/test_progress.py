"""What a person sees of long work: layer one, an engine whose ranks are a stub."""

import io
import re
import time
from collections.abc import Mapping

import pytest
from rich.console import Console

import longspan.progress
from longspan.config import EngineConfig
from longspan.cost.rates import CPU_THREAD
from longspan.engine.engine import Engine, KVUsage
from longspan.models import ModelSpec
from longspan.outputs import CompletionOutput, RequestMetrics, RequestOutput
from longspan.plan import RankPlan, RankResult, Sampled
from longspan.progress import Progress, Snapshot, kv_cells, summary
from longspan.sampling_params import SamplingParams
from longspan.topology import Topology

SPEC = ModelSpec(
    name="stub",
    architecture="Stub",
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    vocab_size=100,
    max_model_len=100_000,
    eos_token_ids=(0,),
    dtype="float32",
    kv_cache_dtype="float32",
    num_active_parameters=1000,
)


class Ranks:
    """An executor whose steps take `seconds` and draw token 7."""

    def __init__(self, num_ranks: int, seconds: float = 0.0) -> None:
        self.num_pages = (627,) * num_ranks
        self.rates = CPU_THREAD
        self.topology = Topology.of_hosts([num_ranks])
        self.joins = False
        self.queues = False
        self._seconds = seconds
        self._done: dict[int, RankResult] = {}

    def start(self, plans: Mapping[int, RankPlan]) -> None:
        for rank, plan in plans.items():
            drawn = tuple(Sampled(sampling.request_id, 7) for sampling in plan.samplings)
            self._done[rank] = RankResult(drawn, {})

    def wait(self, timeout: float | None = None) -> dict[int, RankResult]:
        time.sleep(self._seconds)
        done, self._done = self._done, {}
        return done

    def close(self) -> None:
        pass


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    @property
    def frames(self) -> list[list[str]]:
        """What stood on the screen after each redrawing, without control codes."""
        redrawings = re.split(r"(?:\r?\x1b\[2K(?:\x1b\[1A\x1b\[2K)*)", self.getvalue())
        plain = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text) for text in redrawings]
        return [text.splitlines() for text in plain if text.strip()]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    screen = Terminal()
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    _use_as_standard_error(monkeypatch, screen)
    return screen


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    stream = io.StringIO()
    _use_as_standard_error(monkeypatch, stream)
    return stream


def _use_as_standard_error(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> None:
    def console(*, stderr: bool) -> Console:
        assert stderr
        return Console(file=stream)

    # Not sys.stderr, which pytest sets anew after a test's fixtures.
    monkeypatch.setattr(longspan.progress, "Console", console)


def engine(
    num_ranks: int = 3, *, prompt: int = 24_000, max_tokens: int = 48, seconds: float = 0.0
) -> Engine:
    config = EngineConfig(model="stub", context_parallel_size=num_ranks)
    made = Engine(config, SPEC, Ranks(num_ranks, seconds))
    made.add_request([1] * prompt, SamplingParams(max_tokens=max_tokens))
    return made


def run(engine: Engine, *, enabled: bool = True) -> None:
    with Progress(engine, enabled=enabled) as progress:
        while engine.has_requests:
            engine.step()
            progress.update()


def test_the_snapshot_counts_tokens_of_all_requests() -> None:
    started = engine(prompt=5_000, max_tokens=20)
    started.add_request([1] * 1_000, SamplingParams(max_tokens=10))
    requests = list(started.scheduler.waiting)
    assert Snapshot.of(started, requests).prompt == "0 of 6,000 tokens"
    started.step()
    assert Snapshot.of(started, requests).prompt_done > 0
    while any(request.num_pending > 1 for request in requests):
        started.step()
    started.step()
    now = Snapshot.of(started, requests)
    assert (now.prompt_done, now.prompt_total) == (6_000, 6_000)
    assert now.output.endswith("of at most 30 tokens")
    assert sum(usage.used for usage in now.kv) >= 6_000 // 16
    while started.has_requests:
        started.step()
    assert Snapshot.of(started, requests).output == "30 of 30 tokens"


def test_a_sequence_that_stops_early_lowers_what_is_left() -> None:
    started = engine(prompt=10, max_tokens=500)
    [request] = started.scheduler.waiting
    started.step()
    started.abort("0")
    snapshot = Snapshot.of(started, [request])
    assert (snapshot.output_done, snapshot.output_limit) == (1, 1)


def test_each_of_a_few_ranks_has_a_cell() -> None:
    assert kv_cells([KVUsage(512, 800), KVUsage(0, 1_600)]) == [
        "rank0 [512/800 pages]",
        "rank1 [0/1,600 pages]",
    ]


def test_many_ranks_are_summarised() -> None:
    kv = [KVUsage(10 * rank, 800) for rank in range(64)]
    assert kv_cells(kv) == [
        "64 ranks [20,160/51,200 pages]",
        "fullest rank63 [630/800 pages]",
        "emptiest rank0 [0/800 pages]",
    ]
    assert len(kv_cells(kv[:8])) == 8
    assert len(kv_cells(kv[:9])) == 3


@pytest.mark.parametrize("num_ranks", [1, 3, 8, 64])
def test_everything_fits_on_80_columns(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, num_ranks: int
) -> None:
    monkeypatch.setattr(longspan.progress, "PATIENCE_SECONDS", 0.0)
    run(engine(num_ranks, prompt=9_000, seconds=0.02))
    assert all(len(line) <= 80 for frame in terminal.frames for line in frame)
    assert "…" not in terminal.getvalue()
    last = terminal.frames[-1]
    assert re.search(r"prompt ━+ 9,000 of 9,000 tokens +\d:\d\d", last[0])
    assert re.search(r"output ━+ 48 of 48 tokens +\d:\d\d", last[1])
    assert "pages]" in last[2]


def test_the_last_frame_keeps_the_pages_that_were_in_use(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(longspan.progress, "PATIENCE_SECONDS", 0.0)
    run(engine(2, prompt=8_000, seconds=0.01))
    assert "rank0 [0/627 pages]" not in "\n".join(terminal.frames[-1])


def test_time_left_is_shown_while_a_prompt_is_under_way(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(longspan.progress, "PATIENCE_SECONDS", 0.0)
    run(engine(1, prompt=9_000, max_tokens=1, seconds=0.3))
    lines = [line for frame in terminal.frames for line in frame]
    assert any(re.search(r"of 9,000 tokens \d:\d\d, \d:\d\d left", line) for line in lines)


def test_a_long_first_step_is_seen_before_it_ends(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(longspan.progress, "PATIENCE_SECONDS", 0.05)
    with Progress(engine()):
        time.sleep(0.5)
        assert "0 of 24,000 tokens" in terminal.getvalue()


def test_short_work_shows_nothing(terminal: Terminal) -> None:
    run(engine(prompt=10, max_tokens=2))
    assert terminal.getvalue() == ""


def test_the_screen_is_left_in_order_after_an_error(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(longspan.progress, "PATIENCE_SECONDS", 0.0)

    def interrupted() -> None:
        with Progress(engine()):
            time.sleep(0.3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    shown, hidden = terminal.getvalue().rfind("\x1b[?25h"), terminal.getvalue().rfind("\x1b[?25l")
    assert shown > hidden >= 0, "the cursor must be visible again"
    written = terminal.getvalue()
    time.sleep(0.4)
    assert terminal.getvalue() == written, "nothing is drawn any more"


def test_hidden_bars_leave_the_screen_to_others(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(longspan.progress, "PATIENCE_SECONDS", 0.0)
    with Progress(engine()) as progress:
        time.sleep(0.3)
        assert "0 of 24,000 tokens" in terminal.getvalue()
        progress.hide()
        shown = terminal.getvalue()
        assert shown.endswith("\x1b[1A\x1b[2K" * 2), "the lines of the bars are cleared"
        progress.update()
        progress.hide()
        time.sleep(0.3)
    assert terminal.getvalue() == shown


def test_bars_that_are_hidden_early_never_come(terminal: Terminal) -> None:
    with Progress(engine()) as progress:
        progress.hide()
    assert terminal.getvalue() == ""


def test_hiding_leaves_the_lines_of_a_pipe(
    pipe: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(longspan.progress, "LINE_SECONDS", 0.0)
    with Progress(engine()) as progress:
        progress.hide()
        progress.update()
    assert pipe.getvalue().startswith("longspan: prompt 0 of 24,000 tokens")


@pytest.mark.parametrize("forced", ["", "1"])
def test_a_pipe_gets_plain_lines_now_and_then(
    pipe: io.StringIO, monkeypatch: pytest.MonkeyPatch, forced: str
) -> None:
    monkeypatch.setenv("FORCE_COLOR", forced)
    monkeypatch.setattr(longspan.progress, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(longspan.progress, "LINE_SECONDS", 0.25)
    run(engine(2, prompt=9_000, seconds=0.02))
    lines = pipe.getvalue().splitlines()
    assert 2 <= len(lines) <= 8
    pattern = (
        r"longspan: prompt [\d,]+ of 9,000 tokens; output \d+ of (at most )?48 tokens; "
        r"KV rank0 \[\d+/627 pages\], rank1 \[\d+/627 pages\]"
    )
    assert all(re.fullmatch(pattern, line) for line in lines)


def test_short_work_writes_no_line_to_a_pipe(pipe: io.StringIO) -> None:
    run(engine(prompt=9_000, seconds=0.01))
    assert pipe.getvalue() == ""


def test_a_dumb_terminal_gets_no_control_codes(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(longspan.progress, "LINE_SECONDS", 0.1)
    run(engine(prompt=9_000, seconds=0.02))
    assert "longspan: prompt" in terminal.getvalue()
    assert "\x1b" not in terminal.getvalue()


@pytest.mark.parametrize("stream", ["terminal", "pipe"])
def test_nothing_is_shown_if_it_is_not_wanted(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, stream: str
) -> None:
    monkeypatch.setattr(longspan.progress, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(longspan.progress, "LINE_SECONDS", 0.0)
    output: io.StringIO = request.getfixturevalue(stream)
    run(engine(prompt=9_000, seconds=0.01), enabled=False)
    assert output.getvalue() == ""


def test_the_summary_has_times_speeds_and_places() -> None:
    metrics = RequestMetrics(
        10.0, 10.0, 12.0, 12.9, num_generation_tokens=10, kv_tokens=[8_047, 8_000]
    )
    completion = CompletionOutput(0, "text", [7] * 10, finish_reason="length")
    table = summary(RequestOutput("0", None, [1] * 16_000, [completion], True, metrics=metrics))
    cells = [[str(cell) for cell in column.cells] for column in table.columns]
    assert dict(zip(*cells, strict=True)) == {
        "prompt": "16,000 tokens",
        "output": "10 tokens, finish reason: length",
        "time to first token": "2.0 s (8,000.0 tokens/s)",
        "time per output token": "100.0 ms (10.0 tokens/s)",
        "KV tokens": "rank0 8,047, rank1 8,000",
    }


def test_the_summary_of_one_token_has_no_time_for_each() -> None:
    metrics = RequestMetrics(10.0, 10.0, 12.0, 12.0, num_generation_tokens=1, kv_tokens=[5])
    completion = CompletionOutput(0, "t", [7], finish_reason="stop")
    table = summary(RequestOutput("0", None, [1] * 5, [completion], True, metrics=metrics))
    assert "-" in [str(cell) for cell in table.columns[1].cells]


def test_what_is_printed_meanwhile_stays_on_standard_output(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(longspan.progress, "PATIENCE_SECONDS", 0.0)
    with Progress(engine()):
        time.sleep(0.2)
        print("data")
    assert capsys.readouterr().out == "data\n"
    assert "data" not in terminal.getvalue()
