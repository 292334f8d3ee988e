"""Train the tokenizer and the model that `longspan.demo` packages, from `longspan.demo.text()`.

The model must still write text after 24,000 tokens, though it is trained almost only on short
sequences. Three things see to that: the lengths of the training sequences are mixed, up to 24,576;
positions jump inside a sequence, so that short sequences hold long distances too; and RoPE turns
slowly.

It runs on one thread with fixed seeds.
"""

import argparse
import math
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from longspan.demo import model_path, text

END, USER, ASSISTANT = "<|endoftext|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}<|assistant|>{{ message.content }}<|endoftext|>"
    "{% else %}<|user|>{{ message.content }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
QUESTIONS = ("What is {}?", "Explain {}.", "Tell me about {}.", "{}")

VOCAB = 2048
FARTHEST = 32_768  # largest distance that the jumps of positions make
TOKENS_PER_STEP = 2048
LENGTHS = {512: 0.862, 2048: 0.12, 8192: 0.015, 24_576: 0.003}  # of a sequence: share of steps
CHAT_SHARE = 0.2  # of the shortest sequences
LEARNING_RATE, WARMUP = 4e-3, 30


def train_tokenizer(document: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that adds no token of its own to a text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([document], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=65_536,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def chats(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Every topic as a question of the user and its first paragraphs as the answer."""
    conversations = []
    for title in sorted(topics):
        answer = topics[title].strip()
        answer = answer[: answer.find("\n\n", min(200, len(answer) - 1))]
        for question in QUESTIONS:
            messages = [
                {"role": "user", "content": question.format(title)},
                {"role": "assistant", "content": answer},
            ]
            rendered = tokenizer.apply_chat_template(messages, tokenize=False)
            conversations.append(tokenizer(rendered).input_ids)
    return conversations


def positions(length: int, draw: random.Random) -> list[int]:
    """Ascending positions; in half of the sequences with up to four jumps, up to FARTHEST."""
    jumps = dict.fromkeys(draw.sample(range(1, length), draw.choice((0, 0, 0, 1, 2, 4))), 0)
    for at in jumps:
        jumps[at] = int(math.exp(draw.uniform(0, math.log((FARTHEST - length) / len(jumps)))))
    result, position = [], 0
    for index in range(length):
        position += jumps.get(index, 0)
        result.append(position)
        position += 1
    return result


def batches(
    tokens: list[int], conversations: list[list[int]], steps: int, draw: random.Random
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield tokens and positions, both [batch, length]."""
    for length in draw.choices(list(LENGTHS), list(LENGTHS.values()), k=steps):
        rows = []
        for _ in range(max(1, TOKENS_PER_STEP // length)):
            if length == min(LENGTHS) and draw.random() < CHAT_SHARE:
                row: list[int] = []
                while len(row) < length:
                    row += draw.choice(conversations)
                rows.append(row[:length])
            else:
                start = draw.randrange(len(tokens) - length)
                rows.append(tokens[start : start + length])
        yield torch.tensor(rows), torch.tensor([positions(length, draw) for _ in rows])


def train(
    model: LlamaForCausalLM,
    tokens: list[int],
    conversations: list[list[int]],
    steps: int,
    log: Path,
) -> None:
    layers = [p for p in model.model.layers.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if all(p is not layer for layer in layers)]
    muon = torch.optim.Muon(
        layers, lr=LEARNING_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / WARMUP)
        return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(o, factor) for o in (muon, adam)]
    started, seen, recent = time.monotonic(), 0, []
    stream = batches(tokens, conversations, steps, random.Random(0))
    model.train()
    with log.open("w") as lines:
        for step, (inputs, places) in enumerate(stream):
            # The mask of ones keeps transformers from taking a jump for a new sequence.
            loss = model(
                inputs,
                attention_mask=torch.ones_like(inputs),
                position_ids=places,
                labels=inputs,
                use_cache=False,
            ).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for schedule in schedules:
                schedule.optimizer.step()
                schedule.step()
            model.zero_grad()
            seen += inputs.numel()
            if inputs.shape[1] == min(LENGTHS):
                recent.append(loss.item())
            if step % 50 == 0 or inputs.shape[1] > TOKENS_PER_STEP:
                mean = sum(recent[-50:]) / max(1, len(recent[-50:]))
                line = (
                    f"step {step:5d}  tokens {seen:8d}  length {inputs.shape[1]:5d}  "
                    f"loss {loss.item():.3f}  short {mean:.3f}  {time.monotonic() - started:6.0f} s"
                )
                print(line, flush=True)
                lines.write(line + "\n")
                lines.flush()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Replace the files of the folder one by one, each at once."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as fresh:
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        for file in sorted(Path(fresh).iterdir()):
            file.chmod(0o644)
            shutil.move(file, folder / file.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=model_path())
    parser.add_argument("--log", type=Path, default=Path(__file__).with_name("train.log"))
    options = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    document = text()
    tokenizer = train_tokenizer(document)
    tokens = tokenizer(document).input_ids
    conversations = chats(tokenizer)
    model = make_model(tokenizer)
    print(f"{len(document)} characters, {len(tokens)} tokens, {model.num_parameters()} parameters")
    train(model, tokens, conversations, options.steps, options.log)
    save(model, tokenizer, options.out)


if __name__ == "__main__":
    main()
