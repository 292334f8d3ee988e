"""The plot of a comparison: python benchmarks/peers/plot.py RESULT.json PICTURE.png"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NAMES = {
    "longspan-1": "Longspan, 1 rank x 2 threads",
    "longspan-2": "Longspan, 2 ranks x 1 thread",
    "vllm": "vLLM 0.32, CPU",
    "transformers": "transformers generate",
    "continuous": "transformers generate_batch",
}
COLORS = dict(zip(NAMES, ("tab:blue", "tab:cyan", "tab:orange", "tab:gray", "silver"), strict=True))


def save_plot(rows: Sequence[Mapping[str, Any]], machine: str, path: Path) -> None:
    """Time to the first token by length, and tokens a second, for each dtype; a PNG or SVG."""
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure = Figure(figsize=(11, 4.2 * len(dtypes)), layout="constrained")
    for (left, right), dtype in zip(
        figure.subplots(len(dtypes), 2, squeeze=False), dtypes, strict=True
    ):
        own = [row for row in rows if row["dtype"] == dtype]
        _draw_ttft(left, own)
        _draw_rates(right, own)
        left.set_title(f"{dtype}: time to first token, s (lower is better)")
        right.set_title(f"{dtype}: tokens/s while decoding (higher is better)")
    figure.suptitle(f"Random Llama (8 layers, hidden 512) on {machine}; medians of pairs in turn")
    figure.savefig(path, dpi=110)


def _draw_ttft(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    for name in dict.fromkeys(row["engine"] for row in rows):
        points = sorted(
            (row["prompt_tokens"], row["ttft_s"])
            for row in rows
            if row["engine"] == name and row["ttft_s"] is not None
        )
        axes.plot(
            *zip(*points, strict=True), "o-", color=COLORS.get(name), label=NAMES.get(name, name)
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    lengths = sorted({row["prompt_tokens"] for row in rows})
    axes.set_xticks(lengths, [f"{length // 1024}K" for length in lengths])
    axes.set_xlabel("prompt tokens")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()


def _draw_rates(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    cells = dict.fromkeys((row["batch"], row["prompt_tokens"]) for row in rows)
    groups = sorted(cell for cell in cells if cell[1] >= 4096)
    names = list(dict.fromkeys(row["engine"] for row in rows))
    width = 0.8 / len(names)
    for offset, name in enumerate(names):
        rates = {
            (row["batch"], row["prompt_tokens"]): 1e3 * row["batch"] / row["tpot_ms"]
            for row in rows
            if row["engine"] == name and row["tpot_ms"] is not None
        }
        places = [i + (offset - (len(names) - 1) / 2) * width for i in range(len(groups))]
        heights = [rates.get(group, 0) for group in groups]
        axes.bar(places, heights, width, color=COLORS.get(name))
    labels = [f"batch {batch}\n{length // 1024}K" for batch, length in groups]
    axes.set_xticks(range(len(groups)), labels)
    axes.set_yscale("log")
    axes.grid(True, axis="y", which="both", alpha=0.3)


def main() -> None:
    source, path = map(Path, sys.argv[1:])
    document = json.loads(source.read_text())
    save_plot(document["rows"], document["machine"], path)


if __name__ == "__main__":
    main()
