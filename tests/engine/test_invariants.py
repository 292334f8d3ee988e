"""What the ledger and the scheduler never do, in a hundred thousand steps with everything at once.

Crowds of prompts that begin alike, with several sequences, priorities and aborts, run over ranks
with tiny unequal pools and a prefix cache. Every step is audited in full (see `audit.py`): no page
is owned twice or lost, reference counts are exact, every token's key is on exactly one rank, the
home is a holder, no budget is exceeded, and every request that was admitted comes to its end.
"""

import os
from collections import Counter
from itertools import count
from random import Random

import pytest
from audit import FAST_LINKS, SLOW, Arrival, Fleet, Service
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from simulated import VOCAB_SIZE

from longspan.cost.rates import CPU_THREAD
from longspan.sampling_params import SamplingParams

STEPS = int(os.environ.get("LONGSPAN_SOAK_STEPS", "100_000"))


def text(kind: int, length: int) -> tuple[int, ...]:
    """The beginning of one of a few texts, each of which begins like another one."""
    return tuple((i * i + (kind * 17 if i > 5 * kind else 0)) % VOCAB_SIZE for i in range(length))


@st.composite
def fleets(draw: st.DrawFn) -> Fleet:
    page_size = draw(st.sampled_from((1, 2, 3, 4, 8)))
    num_pages = draw(st.lists(st.integers(2, 14), min_size=1, max_size=5))
    return Fleet(
        tuple(num_pages),
        page_size,
        {
            "enable_prefix_caching": True,
            "max_num_batched_tokens": draw(st.integers(1, 6) | st.integers(1, 40)),
            "max_num_seqs": draw(st.integers(2, 9)),
            "min_tokens_per_rank": draw(st.sampled_from((None, None, 1, 5, 12))),
            "max_step_time": draw(st.sampled_from((None, 0.2, 0.005))),
            "rates": draw(st.sampled_from((CPU_THREAD, FAST_LINKS, SLOW))),
            "joins": draw(st.booleans()),
            "async_scheduling": draw(st.booleans()),
        },
    )


def crowd(fleet: Fleet, number: int, seed: int) -> list[Arrival]:
    random = Random(seed)
    longest, gap = fleet.num_tokens - 1, random.choice((1, 4, 12))
    return [
        Arrival(
            step=random.randrange(number * gap),
            prompt_token_ids=text(
                random.randrange(3), random.randint(1, min(random.choice((9, 50)), longest))
            ),
            params=SamplingParams(
                n=random.choice((1, 1, 1, 2, 3)),
                seed=random.randrange(9),
                max_tokens=random.choice((1, 9, 40, 100)),
                ignore_eos=random.random() < 0.5,
            ),
            aborted_after=random.choice((None, None, None, None, random.randrange(40))),
            in_a_step=random.random() < 0.5,
            priority=random.choice((0, 0, 0, -1, 3)),
        )
        for _ in range(number)
    ]


@pytest.mark.long
@pytest.mark.timeout(STEPS // 100)  # it takes a minute or two, on a busy machine several times that
def test_no_invariant_breaks_in_a_hundred_thousand_steps() -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=25)
    @given(fleets(), st.integers(1, 50), st.integers(0, 10**6))
    def serve(fleet: Fleet, number: int, crowd_seed: int) -> None:
        service = Service(fleet, crowd(fleet, number, crowd_seed)).run()
        seen.update(service.audit.seen)
        seen["preemptions"] += sum(r.metrics.num_preemptions for r in service.requests)
        seen["requests"] += len(service.requests)

    # Each round has a seed of its own: in CI hypothesis would draw the same examples each time.
    for number in count():
        seed(number)(serve)()
        if seen["steps"] >= STEPS:
            break
    print(dict(seen))
    for event in (
        "homes moved",
        "joint steps",
        "pages evicted",
        "pages found in the cache",
        "pages gathered",
        "pages shared",
        "preemptions",
        "requests over all ranks",
        "steps ahead",
        "victims doomed",
    ):
        assert seen[event] > STEPS / 20_000, f"{event}: too seldom to show anything"
