"""`longspan demo`: facts are found in a text that no rank can hold, and every token is checked."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from longspan.demo import model_path
from longspan.errors import InvalidRequestError
from longspan.evaluation.needle import Haystack, Needle, haystacks
from longspan.evaluation.subject import MAX_TOKENS, EngineSubject
from longspan.llm import LLM
from longspan.outputs import RequestOutput
from longspan.plan import Traffic
from longspan.sampling_params import SamplingParams

__all__ = ["run"]

PAGE_SIZE = 16

CHUNK_TOKENS = 1024
"""Tokens of one rank in one step: few enough for a progress bar that moves."""

DEPTHS = (0, 25, 50, 75, 100)
"""Where the facts are hidden, in percent of the text."""

SEED = 1

BAR_WIDTH = 30


@dataclass(frozen=True, slots=True)
class Asked:
    """A question that has been answered, and what was answered."""

    needle: Needle
    output: RequestOutput

    @property
    def token_ids(self) -> list[int]:
        return self.output.outputs[0].token_ids

    @property
    def right(self) -> bool:
        return self.needle.fact.is_told_by(self.output.outputs[0].text)


def run(num_ranks: int = 3, num_tokens: int = 40_000, *, compare: bool = True) -> bool:
    """Ask for what is hidden in a long text, on CPU ranks, and once more of transformers alone.

    Each rank is a process whose KV pool is too small for the text. What happens is printed to
    standard output, progress to standard error. Returns False if an answer is wrong or any token
    differs.

    Raises:
        InvalidRequestError: the text is too short.
        ConfigError: it has no room for the facts, or is longer than the model's longest context.
    """
    console = Console(highlight=False)
    capacity = _capacity(num_ranks, num_tokens)
    console.print(
        f"A text of some [bold]{num_tokens:,}[/] tokens for [bold]{num_ranks}[/] ranks, CPU "
        f"processes with room for the KV of [bold]{capacity:,}[/] tokens each: no rank can hold it "
        "alone."
    )
    asked, traffic = _serve(console, num_ranks, num_tokens, capacity)
    _show_kv(console, asked[0].output, capacity)
    _show_traffic(console, traffic)
    right = sum(each.right for each in asked)
    style = "green" if right == len(asked) else "red"
    console.print(f"\n[bold {style}]{right} of {len(asked)} questions are answered right.[/]")
    return (not compare or _compare(console, asked)) and right == len(asked)


def _capacity(num_ranks: int, num_tokens: int) -> int:
    """Tokens of one rank's pool: a quarter more than its share, less than the text."""
    capacity = -(-5 * num_tokens // (4 * num_ranks * PAGE_SIZE)) * PAGE_SIZE
    if num_tokens < 20 * PAGE_SIZE * num_ranks:
        raise InvalidRequestError(
            f"tokens={num_tokens} must be at least {20 * PAGE_SIZE * num_ranks}, for pools of "
            f"{num_ranks} ranks to be too small"
        )
    return capacity


def _serve(
    console: Console, num_ranks: int, num_tokens: int, capacity: int
) -> tuple[list[Asked], Mapping[str, Traffic]]:
    begun = time.monotonic()
    with LLM(
        str(model_path()),
        device="cpu",
        dtype="float32",
        context_parallel_size=num_ranks,
        kv_cache_tokens=capacity,
        page_size=PAGE_SIZE,
        max_model_len=num_tokens,
        max_num_batched_tokens=CHUNK_TOKENS,
    ) as llm:
        console.print(f"Started {num_ranks} ranks in {time.monotonic() - begun:.1f} s.")
        subject = EngineSubject(llm)
        [haystack] = haystacks(num_tokens, DEPTHS, 1, SEED, subject.count)
        _show_text(console, haystack)
        asked = [
            _ask(console, llm, needle, subject.prompt(haystack.text, needle.fact))
            for needle in haystack.needles
        ]
        return asked, llm.engine.traffic


def _show_text(console: Console, haystack: Haystack) -> None:
    middle = haystack.needles[0].fact.statement
    at = haystack.text.index(middle)
    before, after = haystack.text[at - 300 : at], haystack.text[at + len(middle) :][:300]
    console.rule("a few lines of the text", align="left", style="dim")
    lines = Text.assemble("... ", before.split(" ", 1)[-1], (middle, "bold"), after, " ...")
    lines.stylize("dim")
    console.print(lines)
    console.rule(style="dim")


def _ask(console: Console, llm: LLM, needle: Needle, prompt: Any) -> Asked:
    """Print a question, and its answer as it is drawn."""
    console.print(f"\n[bold]{needle.fact.question}[/] [dim](told at {needle.depth:.0f} %)[/]")
    whole = None
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    for increment in llm.stream(prompt, params, use_tqdm=True):
        console.print(Text(increment.outputs[0].text, style="bold cyan"), end="")
        if whole is None:
            whole = increment
        else:
            whole.add(increment)
    assert whole is not None
    asked = Asked(needle, whole)
    console.print("  [green]right[/]" if asked.right else "  [red]WRONG[/]")
    metrics = whole.metrics
    assert metrics is not None
    console.print(
        f"[dim]{len(whole.prompt_token_ids):,} tokens, {whole.num_cached_tokens:,} of them known "
        f"from before; first token after {metrics.time_to_first_token:.2f} s, others after "
        f"{1e3 * (metrics.time_per_output_token or 0):.0f} ms each[/]"
    )
    return asked


def _show_kv(console: Console, output: RequestOutput, capacity: int) -> None:
    assert output.metrics is not None
    prompt, held = len(output.prompt_token_ids), output.metrics.kv_tokens
    assert max(held) <= capacity < prompt, (held, capacity, prompt)
    console.print(f"\nWhere the KV was; no pool has room for the prompt's {prompt:,} tokens:")
    table = Table.grid(padding=(0, 2))
    for rank, tokens in enumerate(held):
        full = round(BAR_WIDTH * tokens / capacity)
        bar = Text.assemble(("█" * full, "cyan"), ("░" * (BAR_WIDTH - full), "dim"))
        table.add_row(f"rank{rank}", bar, f"{tokens:,} tokens in a pool of {capacity:,}")
    console.print(table)


def _show_traffic(console: Console, traffic: Mapping[str, Traffic]) -> None:
    console.print("\nWhat the ranks sent each other:")
    table = Table("strategy", box=None, padding=(0, 2, 0, 0))
    for title in ("exchanges", "messages", "MB"):
        table.add_column(title, justify="right")
    for strategy, sent in traffic.items():
        table.add_row(strategy, f"{sent.calls:,}", f"{sent.messages:,}", f"{sent.bytes / 1e6:,.1f}")
    console.print(table)


def _compare(console: Console, asked: Sequence[Asked]) -> bool:
    console.print("\nThe same with transformers alone, in one process that holds all the KV ...")
    prompts = [each.output.prompt_token_ids for each in asked]
    with console.status("model.generate"):
        expected, seconds = _generate_alone(prompts)
    took = _took(asked)
    console.print(f"It took {seconds:.1f} s; all ranks together, on the same cores, {took:.1f} s.")
    for each, theirs in zip(asked, expected, strict=True):
        if each.token_ids != theirs:
            console.print(
                f"[bold red]THE TOKENS DIFFER for {each.needle.fact.name}: Longspan "
                f"{each.token_ids}, transformers {theirs}.[/] That must not be; please report it."
            )
            return False
    count = sum(map(len, expected))
    console.print(f"[bold green]All {count} tokens of the answers are identical.[/]")
    return True


def _took(asked: Sequence[Asked]) -> float:
    """Seconds from each question to the end of its answer, added up."""
    seconds = 0.0
    for each in asked:
        metrics = each.output.metrics
        assert metrics is not None
        assert metrics.finished_time is not None
        seconds += metrics.finished_time - metrics.arrival_time
    return seconds


def _generate_alone(prompts: Sequence[Sequence[int]]) -> tuple[list[list[int]], float]:
    """Answers by plain transformers, greedy, float32, and the seconds that all of them take.

    What the prompts have in common is computed once, as Longspan does by its prefix cache.
    """
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    columns = zip(*prompts, strict=False)
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    answers = []
    begun = time.monotonic()
    cache = DynamicCache(config=model.config)
    for prompt in prompts:
        token_ids = torch.tensor([prompt])
        whole = model.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            past_key_values=cache,
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
        )
        cache.crop(shared - cache.get_seq_length())
        answers.append(whole[0, len(prompt) :].tolist())
    return answers, time.monotonic() - begun
