"""Draws tokens from logits: filters in vLLM's order, one counter-based random number a token.

Shape letters: N rows, one for each token to draw; V vocabulary size; M tokens that the filters
leave. A draw is a function of its row of logits and its Sampling alone, so it does not depend on
the batch it came in, on the rank that made it or on what was drawn before.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from longspan.plan import Sampled, Sampling, TokenLogprob

_IMPOSSIBLE = float("-inf")
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def sample(logits: Tensor, samplings: Sequence[Sampling]) -> list[Sampled]:
    """Draw one token for each row of `logits` [N, V], any floating dtype, as `samplings[i]` says.

    Logprobs are of the logits as they came, before bans, penalties and temperature. A NaN counts
    as -inf. Where nothing is left to draw from, the token is 0.
    """
    assert logits.shape[0] == len(samplings), (logits.shape, len(samplings))
    greedy = [row for row, sampling in enumerate(samplings) if _is_plain_greedy(sampling)]
    token_ids = dict(zip(greedy, _likeliest(logits, greedy), strict=True))
    sampled = []
    for row, sampling in enumerate(samplings):
        token_id = token_ids[row] if row in token_ids else _choose(logits[row], sampling)
        logprobs = _report(logits[row], token_id, sampling.logprobs)
        sampled.append(Sampled(sampling.request_id, token_id, logprobs))
    return sampled


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1), a multiple of 2^-53, for one position under one seed.

    It is output `position` of the SplitMix64 generator (Steele, Lea and Flood, OOPSLA 2014) that
    starts at the mixed seed. Seeds count modulo 2^64.
    """
    start = _mix(seed + _GOLDEN_GAMMA)
    return (_mix(start + (position + 1) * _GOLDEN_GAMMA) >> 11) * 2.0**-53


def surviving(scores: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """What temperature, `min_p`, `top_k` and `top_p`, in this order, leave of `scores`.

    `scores` [V] is float64 with a finite maximum, the temperature above 0. Returns token ids [M]
    int64, ascending, and their weights [M] float64: probabilities up to one common factor.
    Ties: all tokens that equal the last of `top_k` stay; `top_p` takes the lowest ids first.
    """
    # The maximum goes first, so that no temperature overflows and the likeliest weighs exactly 1.
    weights = ((scores - scores.max()) / sampling.temperature).exp()
    ids = ((weights > 0) & (weights >= sampling.min_p)).nonzero().flatten()
    weights = weights[ids]
    if 0 < sampling.top_k < len(ids):
        kept = weights >= weights.topk(sampling.top_k).values[-1]
        ids, weights = ids[kept], weights[kept]
    if sampling.top_p < 1:
        total = weights.cumsum(0)[-1]  # sum() would round as the number of threads has it
        # Tokens below this weigh less than 1 - top_p together, so they need no sorting. The
        # likeliest, whose weight is 1, is never among them.
        likely = weights >= (1 - sampling.top_p) * total / len(weights)
        ids, weights = ids[likely], weights[likely]
        ranked, order = weights.sort(descending=True, stable=True)
        size = 1 + int((ranked.cumsum(0)[:-1] < sampling.top_p * total).sum())
        kept = order[:size].sort().values
        ids, weights = ids[kept], weights[kept]
    return ids, weights


def _choose(logits: Tensor, sampling: Sampling) -> int:
    """Draw from one row [V], by inverting the distribution function in vocabulary order."""
    scores = _penalised(logits, sampling)
    if sampling.temperature == 0 or scores.max() == _IMPOSSIBLE:
        return int(scores.argmax())
    ids, weights = surviving(scores, sampling)
    mass = weights.cumsum(0)
    # uniform() < 1 and rounding down keep the target below mass[-1], so an index is found.
    target = mass[-1] * uniform(sampling.seed, sampling.position)
    return int(ids[torch.searchsorted(mass, target, right=True)])


def _penalised(logits: Tensor, sampling: Sampling) -> Tensor:
    """One row [V] after bans and penalties, float64, without NaN or +inf."""
    scores = _without_nan(logits.double())
    if sampling.banned_ids:
        scores[list(sampling.banned_ids)] = _IMPOSSIBLE
    counts = sampling.output_counts
    if sampling.repetition_penalty != 1:
        ids = sorted({*sampling.prompt_ids, *counts})
        seen = torch.tensor(ids, dtype=torch.long, device=scores.device)
        old, penalty = scores[seen], sampling.repetition_penalty
        scores[seen] = torch.where(old > 0, old / penalty, old * penalty)
    if counts and (sampling.frequency_penalty or sampling.presence_penalty):
        times = scores.new_tensor(list(counts.values()))
        penalties = sampling.frequency_penalty * times + sampling.presence_penalty * (times > 0)
        scores[list(counts)] -= penalties
    return scores.clamp_(max=torch.finfo(scores.dtype).max)


def _is_plain_greedy(sampling: Sampling) -> bool:
    return (
        sampling.temperature == 0
        and not sampling.banned_ids
        and sampling.repetition_penalty == 1
        and not sampling.frequency_penalty
        and not sampling.presence_penalty
    )


def _likeliest(logits: Tensor, rows: list[int]) -> list[int]:
    """The likeliest token, with the lowest id among equals, of each of `rows` of logits [N, V]."""
    if not rows:
        return []
    chosen = logits if len(rows) == len(logits) else logits[rows]
    best = chosen.max(dim=-1)
    if best.values.isnan().any():
        best = _without_nan(chosen).max(dim=-1)
    token_ids: list[int] = best.indices.tolist()
    return token_ids


def _report(logits: Tensor, token_id: int, count: int | None) -> tuple[TokenLogprob, ...]:
    """From one row [V] the drawn token, then the `count` likeliest; no token twice."""
    if count is None:
        return ()
    logprobs = _without_nan(logits.float()).log_softmax(-1)
    logprobs = _without_nan(logprobs)  # which a row without any possible token makes
    drawn = logprobs[token_id]
    first = TokenLogprob(token_id, float(drawn), 1 + int((logprobs > drawn).sum()))
    top = _top(logprobs, len(logprobs) if count == -1 else min(count, len(logprobs)))
    return first, *(token for token in top if token.token_id != token_id)


def _top(logprobs: Tensor, count: int) -> list[TokenLogprob]:
    """The `count` likeliest tokens of logprobs [V], likeliest first, then by id."""
    if count == 0:
        return []
    # topk alone would choose among equals at the border as it likes.
    ids = (logprobs >= logprobs.topk(count).values[-1]).nonzero().flatten()
    values, order = logprobs[ids].sort(descending=True, stable=True)
    top: list[TokenLogprob] = []
    pairs = zip(ids[order[:count]].tolist(), values[:count].tolist(), strict=True)
    for index, (token_id, logprob) in enumerate(pairs):
        tied = index > 0 and logprob == top[-1].logprob
        top.append(TokenLogprob(token_id, logprob, top[-1].rank if tied else index + 1))
    return top


def _without_nan(values: Tensor) -> Tensor:
    """A copy with -inf for NaN and the largest finite number for +inf, so that exp works."""
    largest = torch.finfo(values.dtype).max
    return values.nan_to_num(nan=_IMPOSSIBLE, posinf=largest, neginf=_IMPOSSIBLE)


def _mix(state: int) -> int:
    """The finaliser of SplitMix64: a bijection of 64-bit numbers that looks random."""
    state &= _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)
