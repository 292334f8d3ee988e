"""Measure the packaged model: loss over a long context, and what it writes after one.

Plain transformers, one process, one thread; the figures are in README.md.
"""

import argparse
import itertools
import resource
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from longspan.demo import model_path, text

BOUNDS = (0, 512, 2048, 8192, 24_576)


@torch.inference_mode()
def losses(model: LlamaForCausalLM, tokens: list[int]) -> list[float]:
    """Mean loss between each two of BOUNDS, as one long sequence."""
    inputs = torch.tensor([tokens[: BOUNDS[-1]]])
    logits = model(inputs).logits[0, :-1]
    each = cross_entropy(logits, inputs[0, 1:], reduction="none")
    pairs = itertools.pairwise(BOUNDS)
    return [each[start:stop].mean().item() for start, stop in pairs]


def show_greedy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tokens: list[int], prompt: int
) -> None:
    """Print 48 greedy tokens after a prompt, and how nearly another token had been chosen."""
    inputs = torch.tensor([tokens[:prompt]])
    started = time.monotonic()
    answer = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=48,
        output_logits=True,
        return_dict_in_generate=True,
    )
    seconds = time.monotonic() - started
    new = answer.sequences[0, prompt:].tolist()
    best = torch.cat(answer.logits).topk(2).values
    same = sum(a == b for a, b in zip(new, tokens[prompt:], strict=False))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"after {prompt} tokens: {seconds:.1f} s, peak RSS {peak:.0f} MB, "
        f"{len(set(new))} distinct of {len(new)}, {same} as in the text, "
        f"least lead {(best[:, 0] - best[:, 1]).min():.4f}\n{tokenizer.decode(new)!r}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the packaged model.")
    parser.add_argument("--model", type=Path, default=model_path())
    options = parser.parse_args()

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    tokens = tokenizer(text()).input_ids

    for prompt in (24_000, 20_000, 30_000):
        show_greedy(model, tokenizer, tokens, prompt)
    for start in (0, 60_000):
        row = "  ".join(f"{loss:.3f}" for loss in losses(model, tokens[start:]))
        print(f"loss from token {start:6d}, up to {BOUNDS[1:]}: {row}", flush=True)
    for question in ("What is assert?", "Explain classes.", "Hello!"):
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        answer = model.generate(**chat, max_new_tokens=100)[0, chat["input_ids"].shape[1] :]
        print(f"{question} -> {tokenizer.decode(answer)!r}", flush=True)


if __name__ == "__main__":
    main()
