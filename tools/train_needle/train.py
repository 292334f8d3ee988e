"""Train the tokenizer and the model that `longspan.demo` packages: it finds codes in long texts.

Training sequences are short; contexts of 100,000 tokens and more must work all the same. Three
things see to that. The last layer, which finds the fact, has no positions (NoPE), so that distance
is nothing to it. Positions jump inside a sequence, so that the layers with RoPE, which look at what
is near, have met every distance. And prose that is far from a query counts as if it were there up
to 512 times: the log of that is added to its attention scores, so that what is looked for must
stand out from as much as a long context has.

Fixed seeds, two processes of one thread, which share their gradients.
"""

import argparse
import math
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from muon import Muon
from samples import ASSISTANT, CODE, END, FILLER, USER, Sample, Writer, corpus
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import (
    AttentionInterface,
    GenerationConfig,
    PreTrainedTokenizerFast,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from longspan.demo import model_path

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}<|assistant|>{{ message.content }}<|endoftext|>"
    "{% else %}<|user|>{{ message.content }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Words with the space or sign before them, numbers in groups of three digits, signs, white space.
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

VOCAB = 3072
CONTEXT = 524_288
FARTHEST = 262_144  # sum of the jumps of a sequence's positions, at most
NEAR = 48  # tokens before a query that count once
THETA = 1000.0
OFFSETS = ((2, 3, 4, 5), (3, 4, 5, 6))  # of the heads of the layers with RoPE, at first
TOKEN = 64  # numbers of a state that a token's embedding begins with
SHARP = 2.0
WARMUP = 30
PROCESSES = 2


@dataclass(frozen=True)
class Stage:
    """Steps of `batch` sequences of `length` a process; far prose counts up to `most` times."""

    steps: int
    batch: int
    length: int
    most: int


@dataclass(frozen=True)
class Phase:
    """Stages with optimizers of their own; the rate falls to nothing if it is to `end`."""

    rate: float
    end: bool
    stages: tuple[Stage, ...]

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def factor(self, step: int) -> float:
        """Of the learning rate."""
        left = 1 - step / self.steps
        return min(1.0, (step + 1) / WARMUP, 0.01 + 1.2 * left if self.end else 1.0)


PHASES = (
    Phase(2e-3, False, (Stage(160, 8, 128, 1), Stage(40, 6, 192, 16))),
    Phase(1.5e-3, True, (Stage(40, 6, 192, 64), Stage(100, 4, 256, 512), Stage(60, 3, 384, 512))),
)


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that adds no token of its own to a text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus(0), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> SmolLM3ForCausalLM:
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = SmolLM3Config(
        vocab_size=VOCAB,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        no_rope_layers=[1, 1, 0],
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        attention_bias=True,
        use_sliding_window=False,
        tie_word_embeddings=True,
        dtype="float32",
        **ends,
    )
    model = SmolLM3ForCausalLM(config)
    begin(model)
    model.generation_config = GenerationConfig(**ends)
    return model


@torch.no_grad()
def begin(model: SmolLM3ForCausalLM) -> None:
    """Give the model the outline of what it has to learn, which training alone finds too slowly.

    Of each token's state a third is the token itself. The heads of the layers with RoPE begin as
    ones that see a fixed number of tokens back, and write what they see each in a part of the
    state of its own. The last layer begins with heads that look for the state whose token came
    after what has just been read: what is `n` back here is `n + 1` back there.
    """
    generator = torch.Generator().manual_seed(0)
    dim, half = model.config.head_dim, model.config.head_dim // 2
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            weight *= 0.0 if name.endswith("down_proj.weight") else 0.2
    model.model.embed_tokens.weight[:, :TOKEN] += torch.empty(VOCAB, TOKEN).normal_(
        0, 0.15, generator=generator
    )
    turns = THETA ** (-torch.arange(half) / half)  # w: radians a token
    sizes = torch.tensor([30.0, 30.0, 20.0, 10.0] + [5.0] * (half - 4)).sqrt()
    near, last = model.model.layers[:2], model.model.layers[2].self_attn
    for index, layer in enumerate(near):
        attention = layer.self_attn
        attention.k_proj.bias.view(-1, dim)[:] = torch.cat([sizes, torch.zeros_like(sizes)])
        for pair in range(2):
            seen = attention.v_proj.weight[pair * dim : pair * dim + half, :TOKEN]
            nn.init.orthogonal_(seen, generator=generator)
        for head, offset in enumerate(OFFSETS[index]):
            angles = -offset * turns
            query = torch.cat([sizes * angles.cos(), sizes * angles.sin()])
            attention.q_proj.bias.view(-1, dim)[head] = query
            out = attention.o_proj.weight[slot(index, head), head * dim : head * dim + half]
            out += (0.087, 0.123)[index] * torch.eye(half)
            # Of each pair of heads the first one is what the query has, the second one the key's.
            pair, side = divmod(head, 2)
            rows = slice(index * dim + pair * half, index * dim + (pair + 1) * half)
            if side:
                last.k_proj.weight[rows, slot(index, head)] += SHARP * torch.eye(half)
            else:
                for twin in range(2):
                    own = slice(rows.start + (index + twin) * dim, rows.stop + (index + twin) * dim)
                    last.q_proj.weight[own, slot(index, head)] += SHARP * torch.eye(half)
    whole = nn.init.orthogonal_(torch.empty(TOKEN, TOKEN), generator=generator)
    for pair in range(2):
        rows = slice(pair * dim, (pair + 1) * dim)
        last.v_proj.weight[rows, :TOKEN] += whole[rows]
        for head in (2 * pair, 2 * pair + 1):
            last.o_proj.weight[:TOKEN, head * dim : (head + 1) * dim] += 0.5 * whole[rows].T


def slot(layer: int, head: int) -> slice:
    """The part of the state that a head of a layer with RoPE begins to write in."""
    width = 16
    first = TOKEN + (4 * layer + head) * width
    return slice(first, first + width)


def biased(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention [B, T, H, D] with a bias [B, 1, T, T] on its scores."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=kwargs["bias"], scale=kwargs["scaling"]
    )
    return out.transpose(1, 2).contiguous(), None


def bias(prose: Tensor, times: Tensor) -> Tensor:
    """What is added to scores [B, 1, T, T] so that far prose counts several times.

    `prose` [B, T] says which tokens are prose, `times` [B] how often they count.
    """
    at = torch.arange(prose.shape[1])
    ahead = at[None, :] - at[:, None]  # [T, T]: query, key
    far = prose[:, None, :] & (ahead <= -NEAR)
    result = far * times.log()[:, None, None]
    return result.masked_fill(ahead > 0, -torch.inf)[:, None]


def positions(sample: Sample, draw: random.Random) -> list[int]:
    """Ascending positions that jump between sentences, in most sequences."""
    jumps = dict.fromkeys(
        draw.sample(sample.seams, min(draw.choice((0, 1, 2, 4)), len(sample.seams))), 0
    )
    for at in jumps:
        jumps[at] = int(math.exp(draw.uniform(0, math.log(FARTHEST / len(jumps)))))
    result, position = [], 0
    for index in range(len(sample.tokens)):
        position += jumps.get(index, 0)
        result.append(position)
        position += 1
    return result


class Trainer:
    """One of `PROCESSES` that train the same model, each with its own samples."""

    def __init__(
        self, process: int, index: int, model: SmolLM3ForCausalLM, tokenizer: Tokenizer
    ) -> None:
        self.model, self._phase = model, PHASES[index]
        layers = [p for p in model.model.layers.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if all(p is not layer for layer in layers)]
        rate = self._phase.rate
        optimizers = (
            Muon(layers, rate, process, PROCESSES),
            torch.optim.AdamW(others, rate, betas=(0.9, 0.95), weight_decay=0.0),
        )
        schedule = torch.optim.lr_scheduler.LambdaLR
        self._schedules = [schedule(each, self._phase.factor) for each in optimizers]
        self._writer = Writer(tokenizer, index * PROCESSES + process, hard=index > 0)
        self._draw = random.Random(index * PROCESSES + process)

    def step(self, stage: Stage) -> list[float]:
        """One step; returns the part of the codes that were right, their loss, and the prose's."""
        batch = [self._writer.sample(stage.length) for _ in range(stage.batch)]
        loss, figures = self._loss(batch, [times(stage, self._draw) for _ in batch])
        loss.backward()
        self._share_gradients()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for schedule in self._schedules:
            schedule.optimizer.step()
            schedule.step()
        self.model.zero_grad()
        return figures

    def _loss(self, batch: list[Sample], times: list[float]) -> tuple[Tensor, list[float]]:
        inputs = torch.tensor([sample.tokens for sample in batch])
        weights = torch.tensor([sample.weights for sample in batch])[:, 1:]
        prose = torch.tensor([sample.prose for sample in batch])[:, :-1]
        places = torch.tensor([positions(sample, self._draw) for sample in batch])[:, :-1]
        hidden = self.model.model(
            inputs[:, :-1],
            position_ids=places,
            bias=bias(prose, torch.tensor(times)),
            use_cache=False,
        ).last_hidden_state
        chosen = weights > 0
        weights, targets = weights[chosen], inputs[:, 1:][chosen]
        logits = self.model.lm_head(hidden[chosen])
        losses = cross_entropy(logits, targets, reduction="none")
        code, filler = weights == CODE, weights == FILLER
        right = (logits[code].argmax(-1) == targets[code]).float()
        figures = [each.mean().item() for each in (right, losses[code], losses[filler])]
        return (losses * weights).sum() / weights.sum(), figures

    def _share_gradients(self) -> None:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        every = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(every)
        for gradient, mean in zip(
            gradients, every.div_(PROCESSES).split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(mean.view_as(gradient))


def times(stage: Stage, draw: random.Random) -> float:
    """How often far prose counts in a sample."""
    most = stage.most if draw.random() < 0.7 else 1
    return math.exp(draw.uniform(0, math.log(most)))


def train(process: int, meeting: str, start: Path | None, phase: int, log: Path, out: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    AttentionInterface.register("biased", biased)
    dist.init_process_group("gloo", f"file://{meeting}", rank=process, world_size=PROCESSES)
    tokenizer = train_tokenizer()
    model = make_model(tokenizer) if start is None else SmolLM3ForCausalLM.from_pretrained(start)
    model.set_attn_implementation("biased")
    model.train()
    begun, recent, done = time.monotonic(), [], 0
    for index in range(phase - 1, len(PHASES)):
        trainer = Trainer(process, index, model, tokenizer.backend_tokenizer)
        for stage in PHASES[index].stages:
            for _ in range(stage.steps):
                recent.append(trainer.step(stage))
                if process == 0 and done % 10 == 0:
                    note(log, index, done, stage, recent[-10:], time.monotonic() - begun)
                done += 1
                if process == 0 and done % 50 == 0:
                    model.save_pretrained(out)
                    tokenizer.save_pretrained(out)


def note(
    log: Path, phase: int, step: int, stage: Stage, recent: list[list[float]], seconds: float
) -> None:
    right, code, prose = torch.tensor(recent).nanmean(0).tolist()
    line = (
        f"phase {phase + 1}  step {step:5d}  length {stage.length:4d}  times {stage.most:3d}  "
        f"codes: right {right:.4f} loss {code:.4f}  prose: loss {prose:.3f}  {seconds:5.0f} s"
    )
    print(line, flush=True)
    with log.open("a") as lines:
        print(line, file=lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--start", type=Path, help="a model to go on with")
    parser.add_argument("--phase", type=int, default=1, help="the phase to begin with")
    parser.add_argument("--out", type=Path, default=model_path())
    parser.add_argument("--log", type=Path, default=Path(__file__).with_name("train.log"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (f"{folder}/meeting", options.start, options.phase, options.log, options.out)
        mp.spawn(train, arguments, PROCESSES)


if __name__ == "__main__":
    main()
