"""The command line. First with a stand-in for LLM, then whole programs with real ranks."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, get_args, get_type_hints

import psutil
import pytest
import typer
from family import ranks_of
from typer.testing import CliRunner, Result

import longspan.demo
import longspan.llm
from longspan.cli import app
from longspan.config import EngineConfig
from longspan.errors import InvalidRequestError, RankFailedError
from longspan.evaluation.prose import prose
from longspan.options import SAMPLING_HELP
from longspan.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from longspan.sampling_params import SamplingParams

PROGRAM = [sys.executable, "-c", "from longspan.cli import main; main()"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def invoke(*arguments: str, input: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, arguments, input=input)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class StandIn:
    """What `generate` needs of an LLM; keeps what it was given."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}
        self.prompt: object = None
        self.params = SamplingParams()
        self.texts = ["A dash — and no newline"]
        self.pieces = [(0, "A dash", False), (0, " —", False), (0, "", True)]
        self.error: BaseException | None = None
        self.late_error: BaseException | None = None

    def __call__(self, **options: Any) -> "StandIn":
        self.options = options
        return self

    def __enter__(self) -> "StandIn":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def generate(self, prompt: object, params: SamplingParams) -> list[RequestOutput]:
        self.prompt, self.params = prompt, params
        if self.error:
            raise self.error
        completions = [
            CompletionOutput(index, text, [7, 8, 9], finish_reason="length")
            for index, text in enumerate(self.texts)
        ]
        metrics = RequestMetrics(1.0, 1.0, 3.0, 3.5, num_generation_tokens=3, kv_tokens=[5, 4])
        return [RequestOutput("0", None, [1] * 7, completions, True, metrics=metrics)]

    def stream(
        self, prompt: object, params: SamplingParams, *, use_tqdm: bool
    ) -> Iterator[RequestOutput]:
        assert use_tqdm
        [whole] = self.generate(prompt, params)
        for place, (index, text, end) in enumerate(self.pieces):
            one = CompletionOutput(index, text, [place], finish_reason="length" if end else None)
            yield dataclasses.replace(whole, outputs=[one])
        if self.late_error:
            raise self.late_error

    def preprocess_chat(self, messages: object) -> list[object]:
        return [messages]


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(longspan.llm, "LLM", stand_in)
    return stand_in


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from longspan.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "generate", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def test_help_names_the_commands() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    assert re.findall(r"^  (\w+)  ", result.stdout, re.MULTILINE)[-7:] == [
        "generate",
        "serve",
        "chat",
        "plan",
        "calibrate",
        "demo",
        "eval",
    ]


@pytest.mark.parametrize("noun", [EngineConfig, SamplingParams])
def test_help_has_every_field_with_its_default(noun: type[Any]) -> None:
    help = " ".join(invoke("generate", "--help").stdout.split())
    for field in dataclasses.fields(noun):
        if field.name == "model":
            assert re.search(r"generate \[OPTIONS\] \W?model\b", help, re.IGNORECASE)
            continue
        _, found, text = help.partition(f" {flag(field.name)} ")
        assert found, field.name
        if isinstance(field.default, int | float | str) and not isinstance(field.default, bool):
            default = text.partition("[default: ")[2].partition("]")[0]
            assert default == str(field.default), field.name


def test_every_sampling_parameter_has_a_help_text() -> None:
    assert list(SAMPLING_HELP) == [field.name for field in dataclasses.fields(SamplingParams)]


def test_choices_are_shown() -> None:
    help = invoke("generate", "--help").stdout
    for name in ("dtype", "kv_cache_dtype", "device", "attention_strategy"):
        choices = get_args(get_type_hints(EngineConfig)[name])
        assert "|".join(choices) in help


def test_version() -> None:
    assert invoke("--version").stdout == f"longspan {longspan.__version__}\n"


def test_without_options_everything_has_its_default(llm: StandIn) -> None:
    assert invoke("generate", "folder", "--prompt", "Hello").exit_code == 0
    assert llm.options == dataclasses.asdict(EngineConfig(model="folder"))
    assert llm.prompt == "Hello"
    assert llm.params == SamplingParams(seed=EngineConfig(model="folder").seed)


ENGINE_OPTIONS: dict[str, Any] = {
    "tokenizer": "other",
    "revision": "v2",
    "trust_remote_code": True,
    "dtype": "bfloat16",
    "kv_cache_dtype": "int8",
    "device": "cpu",
    "context_parallel_size": 3,
    "max_model_len": 4_000,
    "kv_cache_tokens": (800, 400, 800),
    "page_size": 8,
    "enable_prefix_caching": False,
    "async_scheduling": False,
    "max_num_batched_tokens": 512,
    "max_num_seqs": 7,
    "max_step_time": 0.5,
    "min_tokens_per_rank": 64,
    "attention_strategy": "pass_q",
    "calibration": "rates.json",
    "distributed_executor_backend": "uni",
    "communication_backend": "gloo",
    "master_addr": "10.1.2.3",
    "master_port": 29511,
    "seed": 5,
}

SAMPLING_OPTIONS: dict[str, Any] = {
    "n": 2,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.1,
    "seed": 5,
    "max_tokens": 9,
    "min_tokens": 2,
    "stop": ("END", "a b"),
    "stop_token_ids": (3, 4),
    "ignore_eos": True,
    "logprobs": 2,
    "repetition_penalty": 1.1,
    "presence_penalty": -0.5,
    "frequency_penalty": 0.25,
    "skip_special_tokens": False,
}


def as_arguments(options: dict[str, Any]) -> list[str]:
    arguments = []
    for name, value in options.items():
        if isinstance(value, bool):
            arguments.append(flag(name) if value else flag(f"no_{name}"))
        elif name == "kv_cache_tokens":
            arguments += [flag(name), ",".join(map(str, value))]
        else:
            for item in value if isinstance(value, tuple) else (value,):
                arguments += [flag(name), str(item)]
    return arguments


def test_every_option_arrives(llm: StandIn) -> None:
    arguments = as_arguments({**ENGINE_OPTIONS, **SAMPLING_OPTIONS})
    result = invoke("generate", "folder", "--prompt", "Hello", *arguments)
    assert result.exit_code == 0, result.stderr
    assert llm.options == dataclasses.asdict(EngineConfig(model="folder", **ENGINE_OPTIONS))
    assert llm.params == SamplingParams(**SAMPLING_OPTIONS)
    left = {f.name for f in dataclasses.fields(EngineConfig)} - ENGINE_OPTIONS.keys()
    # These contradict others, or are tested where there are several nodes.
    nodes = {"nnodes", "node_rank", "context_parallel_size_local"}
    assert left == {"model", "kv_cache_memory_bytes", "gpu_memory_utilization"} | nodes
    assert {f.name for f in dataclasses.fields(SamplingParams)} == SAMPLING_OPTIONS.keys()


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--kv-cache-tokens", "800"], "kv_cache_tokens", 800),
        (["--kv-cache-memory-bytes", "1000000"], "kv_cache_memory_bytes", 1_000_000),
        (["--gpu-memory-utilization", "0.8"], "gpu_memory_utilization", 0.8),
    ],
)
def test_the_size_of_the_pools(llm: StandIn, arguments: list[str], name: str, value: float) -> None:
    assert invoke("generate", "folder", "--prompt", "Hello", *arguments).exit_code == 0
    assert llm.options[name] == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pagesize", "8"], "No such option"),
        (["--page-size", "eight"], "--page-size"),
        (["--kv-cache-tokens", "800,x"], "'800,x' is not a whole number"),
        (["--dtype", "int8"], "--dtype"),
        (["--stop-token-ids", "END"], "--stop-token-ids"),
        (["--prompt-file", "-"], "give one of --prompt and --prompt-file"),
    ],
)
def test_wrong_use_exits_with_2(llm: StandIn, arguments: list[str], message: str) -> None:
    result = invoke("generate", "folder", "--prompt", "Hello", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert llm.prompt is None


def test_a_prompt_is_needed() -> None:
    result = invoke("generate", "folder")
    assert result.exit_code == 2
    assert "give one of --prompt and --prompt-file" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (["--temperature", "-1"], "error: temperature=-1.0 must be"),
        (["--page-size", "0"], "error: page_size=0 must be"),
        (["--kv-cache-tokens", "800,400"], "error: kv_cache_tokens=[800, 400] names 2 ranks"),
        (["--n", "2", "--temperature", "0"], "error: n=2 must be 1"),
    ],
)
def test_a_refused_value_is_one_line(llm: StandIn, arguments: list[str], start: str) -> None:
    result = invoke("generate", "folder", "--prompt", "Hello", *arguments)
    assert_one_line(result, start)
    assert llm.prompt is None


def assert_one_line(result: Result, start: str) -> None:
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith(start)
    assert result.stderr.count("\n") == 1


def test_an_error_of_several_lines_is_told_on_one(llm: StandIn) -> None:
    llm.error = InvalidRequestError("the prompt\n  is wrong")
    assert_one_line(invoke("generate", "m", "--prompt", "p"), "error: the prompt is wrong\n")


def test_a_failed_rank_may_tell_more(llm: StandIn) -> None:
    llm.error = RankFailedError("rank 1 failed: KeyError: 3\nTraceback\n  line")
    result = invoke("generate", "m", "--prompt", "p")
    assert result.exit_code == 1
    assert result.stderr == "error: rank 1 failed: KeyError: 3\nTraceback\n  line\n"


def test_an_interrupt_is_one_line_and_130(llm: StandIn) -> None:
    llm.error = KeyboardInterrupt()
    result = invoke("generate", "m", "--prompt", "p")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")


def test_a_prompt_from_a_file_is_taken_as_it_is(llm: StandIn, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes("Zwölf\r\n\n".encode())
    assert invoke("generate", "m", "--prompt-file", str(file)).exit_code == 0
    assert llm.prompt == "Zwölf\r\n\n"


def test_a_prompt_from_standard_input(llm: StandIn) -> None:
    assert invoke("generate", "m", "--prompt-file", "-", input="Zwölf\n").exit_code == 0
    assert llm.prompt == "Zwölf\n"


def test_a_prompt_that_is_not_utf8(llm: StandIn, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"Zw\xf6lf")
    result = invoke("generate", "m", "--prompt-file", str(file))
    assert_one_line(result, f"error: --prompt-file {file} is not UTF-8")
    result = invoke("generate", "m", "--prompt-file", "-", input=b"Zw\xf6lf")
    assert_one_line(result, "error: --prompt-file - is not UTF-8")
    result = invoke("generate", "m", "--prompt", os.fsdecode(b"Zw\xf6lf"))
    assert_one_line(result, "error: --prompt is not UTF-8")


def test_a_prompt_file_that_cannot_be_read(llm: StandIn, tmp_path: Path) -> None:
    missing = tmp_path / "missing.txt"
    result = invoke("generate", "m", "--prompt-file", str(missing))
    assert_one_line(result, f"error: --prompt-file {missing} can't be read: No such file")
    result = invoke("generate", "m", "--prompt-file", str(tmp_path))
    assert_one_line(result, f"error: --prompt-file {tmp_path} can't be read: Is a directory")


def test_the_text_is_printed_as_it_is_and_the_figures_aside(llm: StandIn) -> None:
    result = invoke("generate", "m", "--prompt", "p")
    assert result.stdout_bytes == "A dash — and no newline".encode()
    for figure in ("7 tokens", "3 tokens, finish reason: length", "2.0 s", "rank0 5, rank1 4"):
        assert figure in result.stderr
    assert "\x1b" not in result.stderr


def test_several_completions_are_set_apart(llm: StandIn) -> None:
    llm.texts = ["one", "two"]
    assert invoke("generate", "m", "--prompt", "p", "--n", "2").stdout == "one\n---\ntwo"


@pytest.mark.parametrize("flags", [[], ["--stream"]])
def test_chat_makes_a_message_of_the_prompt(llm: StandIn, flags: list[str]) -> None:
    assert invoke("generate", "m", "--chat", "--prompt", "Hello", *flags).exit_code == 0
    assert llm.prompt == [{"role": "user", "content": "Hello"}]


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What is written to standard output, in pieces as it is written."""
    written: list[bytes] = []
    echo = typer.echo

    def spy(message: object = None, nl: bool = True, err: bool = False) -> None:
        if isinstance(message, bytes):
            written.append(message)
        echo(message, nl=nl, err=err)

    monkeypatch.setattr(typer, "echo", spy)
    return written


def test_a_stream_is_printed_as_it_comes_and_the_figures_aside(
    llm: StandIn, writes: list[bytes]
) -> None:
    result = invoke("generate", "m", "--prompt", "p", "--stream")
    assert result.exit_code == 0, result.stderr
    assert writes == [b"A dash", " —".encode()]
    assert result.stdout_bytes == b"".join(writes)
    assert "3 tokens, finish reason: length" in result.stderr


@pytest.mark.parametrize("flags", [[], ["--no-stream"]])
def test_a_file_or_pipe_gets_the_text_at_the_end(
    llm: StandIn, writes: list[bytes], flags: list[str]
) -> None:
    assert invoke("generate", "m", "--prompt", "p", *flags).exit_code == 0
    assert writes == ["A dash — and no newline".encode()]


def test_completions_are_streamed_one_after_the_other(llm: StandIn, writes: list[bytes]) -> None:
    llm.pieces = [
        (0, "a", False),
        (1, "x", False),
        (2, "1", True),
        (1, "y", False),
        (0, "b", True),
        (1, "z", True),
    ]
    result = invoke("generate", "m", "--prompt", "p", "--n", "3", "--stream")
    assert writes == [b"a", b"b\n---\nxy", b"z\n---\n1"]
    assert "6 tokens, finish reason: length, length, length" in result.stderr


def test_what_was_streamed_before_an_error_stays(llm: StandIn) -> None:
    llm.late_error = KeyboardInterrupt()
    result = invoke("generate", "m", "--prompt", "p", "--stream")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "A dash —", "interrupted\n")
    llm.error = InvalidRequestError("no")
    assert_one_line(invoke("generate", "m", "--prompt", "p", "--stream"), "error: no\n")


def test_a_document_is_not_streamed(llm: StandIn) -> None:
    result = invoke("generate", "m", "--prompt", "p", "--json", "--stream")
    assert result.exit_code == 2
    assert "give one of --json and --stream" in result.stderr
    assert llm.prompt is None


def test_json_is_one_document(llm: StandIn) -> None:
    llm.texts = ["A dash —", "two"]
    result = invoke("generate", "m", "--prompt", "p", "--n", "2", "--json")
    document = json.loads(result.stdout)
    assert document["text"] == "A dash —"
    assert document["token_ids"] == [7, 8, 9]
    assert document["finish_reason"] == "length"
    assert [other["text"] for other in document["alternatives"]] == ["two"]
    assert document["metrics"] == {
        "prompt_tokens": 7,
        "output_tokens": 6,
        "time_to_first_token": 2.0,
        "time_per_output_token": 0.25,
        "kv_tokens_per_rank": [5, 4],
        "num_preemptions": 0,
    }
    assert result.stderr == ""


def test_json_has_logprobs_that_every_reader_takes(
    llm: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    [output] = llm.generate("p", SamplingParams())
    output.outputs[0].logprobs = [{7: Logprob(-0.5, 1, "x"), 8: Logprob(float("-inf"), 9, None)}]
    monkeypatch.setattr(llm, "generate", lambda *_: [output])
    result = invoke("generate", "m", "--prompt", "p", "--json")
    first = {"logprob": -0.5, "rank": 1, "decoded_token": "x"}
    second = {"logprob": None, "rank": 9, "decoded_token": None}
    assert json.loads(result.stdout)["logprobs"] == [{"7": first, "8": second}]


@pytest.mark.parametrize(("identical", "status"), [(True, 0), (False, 1)])
def test_demo_ends_with_its_verdict(
    monkeypatch: pytest.MonkeyPatch, identical: bool, status: int
) -> None:
    given: list[object] = []

    def run(*arguments: int, compare: bool) -> bool:
        given.extend([*arguments, compare])
        return identical

    monkeypatch.setattr("longspan.demo.demo.run", run)
    options = ["--context-parallel-size", "2", "--tokens", "9", "--no-compare"]
    assert invoke("demo", *options).exit_code == status
    assert given == [2, 9, False]


# Whole programs, on the packaged model.

MODEL = str(longspan.demo.model_path())
GREEDY = ("--temperature", "0", "--max-tokens", "8", "--ignore-eos")


@contextmanager
def program(*arguments: str, stdout: int = subprocess.PIPE) -> Iterator[subprocess.Popen[str]]:
    command = [*PROGRAM, *arguments]
    with subprocess.Popen(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_two_processes_generate_what_one_does() -> None:
    asked = ("generate", MODEL, "--prompt-file", "-", "--json", *GREEDY)
    prompt = " ".join(islice(prose(0), 70))
    spread = ("--context-parallel-size", "2", "--kv-cache-tokens", "800,400", "--page-size", "8")
    options = ("--min-tokens-per-rank", "64", "--max-model-len", "1200")
    command = [*PROGRAM, *asked, *spread, *options]
    done = subprocess.run(command, input=prompt, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    kv = document["metrics"]["kv_tokens_per_rank"]
    assert sum(kv) == document["metrics"]["prompt_tokens"] + 7
    assert all(kv)
    alone = invoke(*asked, "--kv-cache-tokens", "1600", input=prompt)
    assert json.loads(alone.stdout)["token_ids"] == document["token_ids"]
    assert done.stderr == ""


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    result = invoke("generate", str(tmp_path / "none"), "--prompt", "p")
    assert_one_line(result, f"error: model='{tmp_path / 'none'}'")


def test_a_prompt_that_is_too_long_is_one_line() -> None:
    pools = ("--kv-cache-tokens", "64", "--max-model-len", "64")
    result = invoke("generate", MODEL, "--prompt", "word " * 100, *pools)
    assert_one_line(result, "error: the prompt has ")


def test_chat_uses_the_template_of_the_tokenizer() -> None:
    asked = ("generate", MODEL, "--prompt", "What is a list?", "--json", "--kv-cache-tokens", "800")
    plain = json.loads(invoke(*asked, *GREEDY).stdout)["metrics"]["prompt_tokens"]
    chat = json.loads(invoke(*asked, *GREEDY, "--chat").stdout)["metrics"]["prompt_tokens"]
    assert chat > plain


def test_ctrl_c_ends_everything() -> None:
    endless = ("--max-tokens", "60000", "--ignore-eos", "--kv-cache-tokens", "32000")
    options = ("--prompt", "word " * 3_000, "--context-parallel-size", "2", *endless)
    with program("generate", MODEL, *options) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        while line and not line.startswith("longspan: prompt"):
            line = process.stderr.readline()
        assert len(ranks_of(process.pid)) == 2
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        text, rest = process.communicate(timeout=30)
        assert (process.returncode, text) == (130, "")
        assert [line for line in rest.splitlines() if "longspan: prompt" not in line] == [
            "interrupted"
        ]
        assert not psutil.wait_procs(started, timeout=5)[1]


def test_a_terminal_gets_the_text_as_it_is_drawn() -> None:
    asked = ("generate", MODEL, "--prompt", "A list", "--kv-cache-tokens", "8000")
    long = ("--temperature", "0", "--ignore-eos", "--max-tokens")
    terminal, end = os.openpty()
    try:
        with program(*asked, *long, "4000", stdout=end) as process:
            os.close(end)
            begun = os.read(terminal, 10_000).decode()
            assert process.poll() is None, "the text is far from its end"
            process.send_signal(signal.SIGINT)
            text = "".join([begun, *read_all(terminal)]).replace("\r\n", "\n")
            _, errors = process.communicate(timeout=30)
    finally:
        os.close(terminal)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted"
    whole = invoke(*asked, *long, "100", "--no-stream").stdout
    assert text.endswith("\n"), "what follows begins a line"
    assert whole.startswith(text[:-1][:50])


def read_all(terminal: int) -> Iterator[str]:
    """What comes until the last program lets go of the terminal."""
    with suppress(OSError):  # Linux's way to say that it has
        while data := os.read(terminal, 10_000):
            yield data.decode(errors="replace")


def test_the_streamed_text_is_that_of_generate() -> None:
    asked = ("generate", MODEL, "--prompt", "A list is", "--kv-cache-tokens", "800", "--n", "2")
    options = ("--max-tokens", "40", "--seed", "7", "--ignore-eos", "--logprobs", "1")
    at_the_end = invoke(*asked, *options)
    streamed = invoke(*asked, *options, "--stream")
    assert streamed.exit_code == 0, streamed.stderr
    assert streamed.stdout_bytes == at_the_end.stdout_bytes
    assert b"\n---\n" in streamed.stdout_bytes


def test_ctrl_c_while_ranks_start() -> None:
    options = ("--prompt", "p", "--context-parallel-size", "2", "--kv-cache-tokens", "800")
    with program("generate", MODEL, *options) as process:
        while len(ranks_of(process.pid)) < 2 and process.poll() is None:
            time.sleep(0.02)
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        text, rest = process.communicate(timeout=30)
        assert (process.returncode, text, rest) == (130, "", "interrupted\n")
        assert not psutil.wait_procs(started, timeout=5)[1]


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "--help"),
        ("generate", MODEL, "--prompt", "p", "--kv-cache-tokens", "800", *GREEDY),
    ],
)
def test_a_reader_that_goes_away_is_no_traceback(arguments: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with program(*arguments, stdout=writer) as process:
        os.close(writer)
        _, errors = process.communicate(timeout=120)
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors
