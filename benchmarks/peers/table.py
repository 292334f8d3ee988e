"""The README's table of a comparison: python benchmarks/peers/table.py RESULT.json"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from plot import NAMES

Row = Mapping[str, Any]


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of Markdown: times, and behind Longspan's in brackets which part of vLLM's they are."""
    present = {row["engine"] for row in rows}
    engines = [name for name in NAMES if name in present]
    yield "| | " + " | ".join(NAMES[name] for name in engines) + " |"
    yield "|---" * (len(engines) + 1) + "|"
    cells = sorted({cell(row) for row in rows}, key=lambda of: (of[0] != "float32", of))
    for figure, what, unit in (("ttft_s", "first token of", "s"), ("tpot_ms", "token after", "ms")):
        for dtype, batch, tokens in cells:
            if figure == "ttft_s" and batch > 1:
                continue
            of = {r["engine"]: r for r in rows if cell(r) == (dtype, batch, tokens)}
            requests = "" if figure == "ttft_s" else f", {batch} request{'s' * (batch > 1)}"
            times = (time(of.get(name), figure) for name in engines)
            name = f"{dtype}, {what} {tokens // 1024}K{requests}, {unit}"
            yield f"| {name} | " + " | ".join(times) + " |"


def cell(row: Row) -> tuple[str, int, int]:
    return row["dtype"], row["batch"], row["prompt_tokens"]


def time(row: Row | None, figure: str) -> str:
    if row is None or row[figure] is None:
        return "-"
    ratio = row.get(f"{figure[:4]} vs vllm")
    return f"{row[figure]:.3g}" + ("" if ratio is None else f" ({ratio:.2f})")


if __name__ == "__main__":
    print(*table(json.loads(Path(sys.argv[1]).read_text())["rows"]), sep="\n")
