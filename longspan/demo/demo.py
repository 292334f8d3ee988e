"""`longspan demo`: a prompt that no rank could hold alone is served, and every token checked."""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from longspan.demo import model_path, text
from longspan.errors import InvalidRequestError
from longspan.llm import LLM
from longspan.outputs import RequestOutput
from longspan.plan import Traffic
from longspan.progress import summary
from longspan.sampling_params import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["run"]

PAGE_SIZE = 16

CHUNK_TOKENS = 1024
"""Tokens of one rank in one step: few enough for a progress bar that moves."""

TAIL_TOKENS = 100
"""So much of the prompt's end is shown, but for its first line, before the continuation."""

BAR_WIDTH = 30


def run(
    num_ranks: int = 3, num_tokens: int = 24_000, max_tokens: int = 48, *, compare: bool = True
) -> bool:
    """Generate greedily in float32 on CPU ranks, and once more with transformers alone.

    Each rank is a process whose KV pool is too small for the prompt. What happens is printed to
    standard output, progress to standard error. Returns False if any token differs.

    Raises:
        InvalidRequestError: a length is outside its limits.
        ConfigError: prompt and output are longer than the model's longest context.
    """
    console = Console(highlight=False)
    capacity = _capacity(num_ranks, num_tokens, max_tokens)
    console.print(
        f"A prompt of [bold]{num_tokens:,}[/] tokens for [bold]{num_ranks}[/] ranks, CPU processes "
        f"with room for the KV of [bold]{capacity:,}[/] tokens each: no rank can hold it alone."
    )
    output, traffic = _serve(console, num_ranks, num_tokens, max_tokens, capacity)
    _show_kv(console, output, capacity)
    _show_traffic(console, traffic)
    return not compare or _compare(console, output)


def _capacity(num_ranks: int, num_tokens: int, max_tokens: int) -> int:
    """Tokens of one rank's pool: a quarter more than its share, less than the prompt."""
    if max_tokens > num_tokens // 2:
        raise InvalidRequestError(
            f"max_tokens={max_tokens} must be at most half of the prompt's {num_tokens} tokens"
        )
    pages = -(-5 * (num_tokens + max_tokens) // (4 * num_ranks * PAGE_SIZE))
    capacity = pages * PAGE_SIZE
    if capacity >= num_tokens:
        raise InvalidRequestError(
            f"tokens={num_tokens} must be more, for pools of {capacity} tokens to be too small"
        )
    return capacity


def _serve(
    console: Console, num_ranks: int, num_tokens: int, max_tokens: int, capacity: int
) -> tuple[RequestOutput, Mapping[str, Traffic]]:
    begun = time.monotonic()
    with LLM(
        str(model_path()),
        device="cpu",
        dtype="float32",
        context_parallel_size=num_ranks,
        kv_cache_tokens=capacity,
        page_size=PAGE_SIZE,
        max_model_len=num_tokens + max_tokens,
        max_num_batched_tokens=CHUNK_TOKENS,
    ) as llm:
        console.print(f"Started {num_ranks} ranks in {time.monotonic() - begun:.1f} s.")
        tokenizer = llm.get_tokenizer()
        prompt = _prompt(tokenizer, num_tokens)
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        [output] = llm.generate({"prompt_token_ids": prompt}, params)
        _show_text(console, tokenizer, output)
        return output, llm.engine.traffic


def _prompt(tokenizer: "PreTrainedTokenizerBase", num_tokens: int) -> list[int]:
    token_ids: list[int] = tokenizer.encode(text(), truncation=True, max_length=num_tokens)
    if len(token_ids) < num_tokens:
        raise InvalidRequestError(
            f"tokens={num_tokens} must be at most {len(token_ids)}, the length of the demo's text"
        )
    return token_ids


def _show_text(
    console: Console, tokenizer: "PreTrainedTokenizerBase", output: RequestOutput
) -> None:
    tail = str(tokenizer.decode(output.prompt_token_ids[-TAIL_TOKENS:]))
    console.rule("the end of the prompt", align="left", style="dim")
    console.print(Text(tail.split("\n", 1)[-1].strip("\n"), style="dim"))
    console.rule("how the model goes on", align="left", style="dim")
    console.print(Text(output.outputs[0].text.strip("\n"), style="bold"))
    console.rule(style="dim")
    console.print(summary(output))


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


def _compare(console: Console, output: RequestOutput) -> bool:
    console.print("\nThe same with transformers alone, in one process that holds all the KV ...")
    tokens, metrics = output.outputs[0].token_ids, output.metrics
    assert metrics is not None
    assert metrics.finished_time is not None
    with console.status("model.generate"):
        expected, seconds = _generate_alone(output.prompt_token_ids, len(tokens))
    took = metrics.finished_time - metrics.arrival_time
    console.print(f"It took {seconds:.1f} s; all ranks together, on the same cores, {took:.1f} s.")
    if tokens == expected:
        console.print(f"[bold green]All {len(tokens)} tokens are identical.[/]")
        return True
    pairs = enumerate(zip(tokens, expected, strict=True))
    position, (ours, theirs) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
    console.print(
        f"[bold red]THE TOKENS DIFFER from output token {position} on: Longspan {ours}, "
        f"transformers {theirs}.[/] That must not be; please report it."
    )
    return False


def _generate_alone(prompt: Sequence[int], count: int) -> tuple[list[int], float]:
    """The next `count` tokens and the seconds they take by plain transformers, greedy, float32."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    # As with ignore_eos: an end-of-sequence token is a token like others.
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    token_ids = torch.tensor([prompt])
    begun = time.monotonic()
    whole = model.generate(
        token_ids, attention_mask=torch.ones_like(token_ids), max_new_tokens=count
    )
    return whole[0, len(prompt) :].tolist(), time.monotonic() - begun
