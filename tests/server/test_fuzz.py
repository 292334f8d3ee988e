"""Whatever requests are made of the API's own description, none makes the server fail or hang.

A hundred cases or so, the same each time; `make fuzz` runs thousands, other ones each time.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from program import PATIENCE_S, ServerProgram

CASES = int(os.environ.get("LONGSPAN_FUZZ_CASES", "0"))
"""How many there have to be at least; without it few, and the same each time."""

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "allow_header_conformance",
    "unsupported_method",
)
"""Not that all that fits the description is taken, which can't say what SamplingParams checks."""

FEW = ["--phases", "fuzzing", "-n", "12", "--generation-deterministic"]
MANY = ["--phases", "coverage,fuzzing", "-n", str(CASES // 4), "--generation-database", "none"]
"""Of ten operations, some have no more cases than one."""


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProgram]:
    server = ServerProgram(model, tmp_path_factory.mktemp("fuzz"), "--max-output-tokens", "8")
    yield server
    server.kill()


@pytest.mark.timeout(1800)
def test_no_request_makes_the_server_fail_or_hang(server: ServerProgram, tmp_path: Path) -> None:
    """Afterwards it is healthy, and every page is free."""
    free = server.figure("longspan:kv_pages_free")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"),
            *("--checks", ",".join(CHECKS), "--continue-on-failure", "--no-color"),
            *("--request-timeout", f"{PATIENCE_S:g}"),
            *(MANY if CASES else FEW),
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout
    cases = re.search(r"(\d+) generated", done.stdout)
    assert cases is not None
    assert int(cases[1]) >= max(CASES, 60)
    assert server.http.get("/health").json() == {"status": "ok"}
    server.wait_until_idle()
    assert server.figure("longspan:kv_pages_free") == free
    answer = server.http.post("/v1/completions", json={"prompt": "x", "ignore_eos": True})
    assert answer.json()["usage"]["completion_tokens"] == 8, "as many as may be"
