"""Sampling on one device: the random numbers, the filters, the penalties, the reports."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from longspan.plan import Sampled, Sampling
from longspan.worker.sampler import sample, surviving, uniform

NAN, INFINITY = float("nan"), float("inf")
POSITIONS = range(20_000)
WARPERS = {
    "temperature": TemperatureLogitsWarper,
    "min_p": MinPLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sampling(row: int = 0, seed: int = 0, position: int = 0, **options: Any) -> Sampling:
    return Sampling(f"request {row}", row, seed, position, **options)


def random_logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def draw(logits: Tensor | list[float], **options: Any) -> int:
    """The token drawn from one row of logits."""
    [sampled] = sample(torch.as_tensor(logits)[None], [sampling(**options)])
    return sampled.token_id


def report(logits: Tensor | list[float], **options: Any) -> list[tuple[int, float, int]]:
    """The logprobs reported for one row of logits."""
    [sampled] = sample(torch.as_tensor(logits)[None], [sampling(**options)])
    return [(each.token_id, each.logprob, each.rank) for each in sampled.logprobs]


def frequencies(logits: Tensor, positions: range, **options: Any) -> Counter[int]:
    """How often each token is drawn from one row of logits, over all positions."""
    samplings = [sampling(seed=7, position=position, **options) for position in positions]
    drawn = sample(logits.expand(len(positions), -1), samplings)
    return Counter(sampled.token_id for sampled in drawn)


def chi_square(counts: list[float], probabilities: list[float]) -> float:
    total = sum(counts)
    return sum(
        (count - total * probability) ** 2 / (total * probability)
        for count, probability in zip(counts, probabilities, strict=True)
    )


def chi_square_limit(degrees: int) -> float:
    """What one honest sample in a thousand exceeds (Wilson and Hilferty's approximation)."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + 3.09 * math.sqrt(spread)) ** 3


class TestUniform:
    def test_it_is_splitmix64(self) -> None:
        """The seed that mixes to 0 gives the published outputs of SplitMix64 from 0."""
        published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
        numbers = [uniform(-0x9E3779B97F4A7C15, position) for position in range(3)]
        assert numbers == [(output >> 11) / 2**53 for output in published]

    def test_it_never_changes(self) -> None:
        """Other numbers would break the promise that is made with a seed."""
        numbers = [uniform(*at) for at in ((0, 0), (0, 1), (1, 0), (-1, 9))]
        assert numbers == [
            0.6524484863740322,
            0.7012121095215252,
            0.36818951565166946,
            0.8800666774612032,
        ]

    def test_it_lies_in_the_half_open_unit_interval_on_a_grid_of_53_bits(self) -> None:
        for position in POSITIONS:
            number = uniform(3, position)
            assert 0 <= number < 1
            assert (number * 2**53).is_integer()

    @pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, -5])
    def test_it_is_uniform_over_positions(self, seed: int) -> None:
        cells = Counter(int(uniform(seed, position) * 100) for position in POSITIONS)
        assert chi_square([cells[i] for i in range(100)], [0.01] * 100) < chi_square_limit(99)

    def test_it_is_uniform_over_seeds(self) -> None:
        cells = Counter(int(uniform(seed, 11) * 100) for seed in POSITIONS)
        assert chi_square([cells[i] for i in range(100)], [0.01] * 100) < chi_square_limit(99)

    @pytest.mark.parametrize(
        ("seed_step", "position_step"), [(0, 1), (0, 2), (1, 0), (1, 1), (1, -1)]
    )
    def test_neighbours_are_independent(self, seed_step: int, position_step: int) -> None:
        pairs = Counter(
            (
                int(uniform(5, position) * 10),
                int(uniform(5 + seed_step, position + position_step) * 10),
            )
            for position in POSITIONS
        )
        counts: list[float] = [pairs[i, j] for i in range(10) for j in range(10)]
        assert chi_square(counts, [0.01] * 100) < chi_square_limit(99)

    def test_low_bits_are_random_too(self) -> None:
        low = Counter(int(uniform(0, position) * 2**53) % 64 for position in POSITIONS)
        assert chi_square([low[i] for i in range(64)], [1 / 64] * 64) < chi_square_limit(63)

    def test_no_two_positions_or_seeds_share_a_number(self) -> None:
        numbers = {uniform(seed, position) for seed in range(100) for position in range(200)}
        assert len(numbers) == 100 * 200


class TestDistribution:
    def test_tokens_are_drawn_as_often_as_softmax_says(self) -> None:
        logits = random_logits(8, scale=1.0)
        counts = frequencies(logits, POSITIONS)
        expected = logits.double().softmax(-1).tolist()
        assert chi_square([counts[i] for i in range(8)], expected) < chi_square_limit(7)

    def test_filters_leave_the_other_tokens_their_proportions(self) -> None:
        options: dict[str, Any] = {"temperature": 1.7, "top_k": 6, "top_p": 0.9, "min_p": 0.05}
        logits = random_logits(8, seed=1, scale=1.0)
        counts = frequencies(logits, range(5000), **options)
        ids, weights = surviving(logits.double(), sampling(**options))
        assert 2 < len(ids) < 8
        assert set(counts) == set(ids.tolist())
        expected = (logits.double() / 1.7)[ids].softmax(-1)
        torch.testing.assert_close(weights / weights.sum(), expected)
        limit = chi_square_limit(len(ids) - 1)
        assert chi_square([counts[i] for i in ids.tolist()], expected.tolist()) < limit

    def test_the_draw_inverts_the_distribution_function_in_vocabulary_order(self) -> None:
        probabilities = torch.tensor([0.3, 0.0, 0.5, 0.2], dtype=torch.float64)
        borders = probabilities.cumsum(0).tolist()
        for position in range(300):
            number = uniform(4, position)
            expected = next(i for i, border in enumerate(borders) if number < border)
            assert draw(probabilities.log(), seed=4, position=position) == expected

    def test_a_number_on_a_border_belongs_to_the_token_after_it(self) -> None:
        at: dict[str, int] = {"seed": -0x9E3779B97F4A7C15, "position": 12490294465583272049}
        assert uniform(**at) == 0.5
        assert draw([0.0, 0.0], **at) == 1


class TestIndependence:
    OPTIONS: tuple[dict[str, Any], ...] = (
        {},
        {"temperature": 0.0},
        {"temperature": 0.7, "top_p": 0.9, "logprobs": 3},
        {"temperature": 1.5, "top_k": 20, "min_p": 0.01},
        {"temperature": 0.0, "repetition_penalty": 1.3, "prompt_ids": (1, 2, 3)},
        {"presence_penalty": 0.5, "output_counts": {4: 2}, "banned_ids": (0,)},
    )

    def batch(self) -> tuple[Tensor, list[Sampling]]:
        samplings = [
            sampling(row, seed=row % 5, position=row, **self.OPTIONS[row % len(self.OPTIONS)])
            for row in range(30)
        ]
        return random_logits(30, 500), samplings

    def test_a_draw_is_the_same_alone_and_in_any_batch(self) -> None:
        logits, samplings = self.batch()
        together = sample(logits, samplings)
        alone = [sample(logits[i : i + 1], samplings[i : i + 1])[0] for i in range(30)]
        order = torch.randperm(30, generator=torch.Generator().manual_seed(1)).tolist()
        shuffled = sample(logits[order], [samplings[i] for i in order])
        assert together == alone
        assert shuffled == [together[i] for i in order]

    def test_a_draw_is_the_same_with_another_number_of_threads(self) -> None:
        logits = random_logits(4, 100_003)
        samplings = [sampling(row, top_p=0.99, logprobs=2) for row in range(4)]
        weights = surviving(logits[0].double(), samplings[0])[1]
        drawn = sample(logits, samplings)
        torch.set_num_threads(2)
        assert torch.equal(surviving(logits[0].double(), samplings[0])[1], weights)
        assert sample(logits, samplings) == drawn

    def test_a_draw_depends_on_seed_and_position(self) -> None:
        logits = torch.zeros(1000)
        by_position = {draw(logits, position=position) for position in range(50)}
        by_seed = {draw(logits, seed=seed) for seed in range(50)}
        assert len(by_position) > 40
        assert len(by_seed) > 40

    def test_the_global_generator_is_left_alone(self) -> None:
        logits, samplings = self.batch()
        before = torch.get_rng_state()
        sample(logits, samplings)
        assert torch.equal(torch.get_rng_state(), before)

    def test_logits_are_left_as_they_were(self) -> None:
        logits, samplings = self.batch()
        for kept in (logits, logits.double()):
            before = kept.clone()
            sample(kept, samplings)
            assert torch.equal(kept, before)

    def test_no_rows_make_no_tokens(self) -> None:
        assert sample(torch.empty(0, 10), []) == []


class TestGreedy:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_it_is_argmax_with_the_lowest_id_among_equals(self, dtype: torch.dtype) -> None:
        logits = random_logits(40, 300).to(dtype)
        logits[:, [7, 200]] = 50.0
        assert [each.token_id for each in self.greedy(logits)] == [7] * 40

    def test_it_is_the_same_with_penalties_that_touch_nothing(self) -> None:
        logits = random_logits(40, 300).bfloat16()
        by_batch = [each.token_id for each in self.greedy(logits)]
        by_row = [each.token_id for each in self.greedy(logits, repetition_penalty=1.5)]
        assert by_batch == by_row == logits.argmax(-1).tolist()

    def test_filters_and_seed_do_not_matter(self) -> None:
        logits = random_logits(40, 300)
        filtered = self.greedy(logits, top_k=3, top_p=0.2, min_p=0.5)
        assert filtered == self.greedy(logits)

    def greedy(self, logits: Tensor, **options: Any) -> list[Sampled]:
        samplings = [sampling(row, temperature=0.0, **options) for row in range(len(logits))]
        return sample(logits, samplings)

    def test_a_tiny_temperature_is_greedy_without_overflow(self) -> None:
        logits = random_logits(300)
        for temperature in (1e-6, 1e-300, 5e-324):
            assert draw(logits, temperature=temperature) == int(logits.argmax())


class TestFilters:
    """The tokens that stay are those that transformers' filters leave, in vLLM's order."""

    @pytest.mark.parametrize(
        "options",
        [
            {"min_p": 0.1},
            {"min_p": 1.0},
            {"top_k": 1},
            {"top_k": 10},
            {"top_k": 1000},
            {"top_p": 1e-9},
            {"top_p": 0.3},
            {"top_p": 0.9},
            {"top_p": 0.999},
            {"temperature": 2.5, "top_p": 0.7},
            {"temperature": 1.3, "min_p": 0.02, "top_k": 12, "top_p": 0.8},
        ],
        ids=str,
    )
    def test_support(self, options: dict[str, Any]) -> None:
        warpers = [WARPERS[name](value) for name, value in options.items()]
        for seed in range(30):
            logits = random_logits(1, 200, seed=seed)
            scores = logits
            for warper in warpers:
                scores = warper(torch.empty(1, 0, dtype=torch.long), scores)
            ids, weights = surviving(logits[0].double(), sampling(**options))
            assert ids.tolist() == scores[0].isfinite().nonzero().flatten().tolist()
            expected = scores[0, ids].double().softmax(-1)
            torch.testing.assert_close(weights / weights.sum(), expected, rtol=1e-4, atol=1e-7)

    def test_no_filter_leaves_every_token(self) -> None:
        ids, _ = surviving(random_logits(200).double(), sampling(top_k=-1))
        assert ids.tolist() == list(range(200))

    def test_top_k_keeps_all_equals_of_the_last_token(self) -> None:
        scores = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0], dtype=torch.float64)
        assert surviving(scores, sampling(top_k=2))[0].tolist() == [1, 2, 3, 4]

    def test_top_p_takes_the_lowest_ids_of_equals(self) -> None:
        scores = torch.zeros(1000, dtype=torch.float64)
        assert surviving(scores, sampling(top_p=0.35))[0].tolist() == list(range(350))
        assert surviving(scores, sampling(top_p=1e-300))[0].tolist() == [0]

    def test_top_p_counts_what_top_k_left_as_the_whole(self) -> None:
        scores = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
        assert surviving(scores, sampling(top_p=0.5))[0].tolist() == [0, 1]
        assert surviving(scores, sampling(top_k=2, top_p=0.5))[0].tolist() == [0]


class TestPenalties:
    """What penalties do to logits shows in the token that a greedy draw takes."""

    def test_repetition_penalty_is_that_of_transformers(self) -> None:
        prompt_ids, output_ids = (1, 2, 2, 40), (3, 40, 3, 3)
        logits = random_logits(50, 64)
        logits[:, [1, 2, 3, 40]] += 5.0
        penalise = RepetitionPenaltyLogitsProcessor(penalty=1.8)
        expected = penalise(torch.tensor(prompt_ids + output_ids).expand(50, -1), logits)
        options: dict[str, Any] = {"prompt_ids": prompt_ids, "output_counts": Counter(output_ids)}
        drawn = [draw(row, temperature=0.0, repetition_penalty=1.8, **options) for row in logits]
        assert drawn == expected.argmax(-1).tolist()
        assert drawn != logits.argmax(-1).tolist()

    def test_repetition_penalty_pushes_negative_logits_down(self) -> None:
        options: dict[str, Any] = {"temperature": 0.0, "prompt_ids": (1,)}
        assert draw([-5.0, -1.0, -1.5], repetition_penalty=2.0, **options) == 2
        assert draw([-5.0, -1.0, -1.5], repetition_penalty=1.4, **options) == 1
        assert draw([-5.0, -1.0, -0.9], repetition_penalty=0.8, **options) == 1

    def test_frequency_penalty_counts_and_presence_penalty_does_not(self) -> None:
        options: dict[str, Any] = {"temperature": 0.0, "output_counts": {0: 3, 1: 1}}
        logits = [3.0, 2.0, 1.25]
        assert draw(logits, frequency_penalty=0.4, **options) == 0
        assert draw(logits, frequency_penalty=0.6, **options) == 1
        assert draw(logits, frequency_penalty=1.0, **options) == 2
        assert draw(logits, presence_penalty=1.7, **options) == 0
        assert draw(logits, presence_penalty=1.8, **options) == 2
        assert draw(logits, presence_penalty=-1.8, **options) == 0

    def test_prompt_tokens_have_neither_frequency_nor_presence(self) -> None:
        options: dict[str, Any] = {"prompt_ids": (0,), "output_counts": {2: 1}}
        penalties = {"frequency_penalty": 2.0, "presence_penalty": 2.0}
        assert draw([3.0, 2.5, 3.5], temperature=0.0, **penalties, **options) == 0

    def test_repetition_penalty_comes_first(self) -> None:
        """4 / 2 - 1 = 1, while (4 - 1) / 2 would be 1.5."""
        options: dict[str, Any] = {"presence_penalty": 1.0, "output_counts": {0: 1}}
        assert draw([4.0, 1.2], temperature=0.0, repetition_penalty=2.0, **options) == 1

    def test_penalties_come_before_the_filters(self) -> None:
        options: dict[str, Any] = {"presence_penalty": 2.0, "output_counts": {0: 1}}
        drawn = {draw([3.0, 2.0, 0.0], position=i, top_k=1, **options) for i in range(50)}
        assert drawn == {1}

    def test_banned_tokens_are_never_drawn(self) -> None:
        logits = torch.zeros(5)
        for temperature in (0.0, 1.0, 100.0):
            drawn = {
                draw(logits, temperature=temperature, position=i, banned_ids=(0, 3))
                for i in range(60)
            }
            assert drawn == ({1} if temperature == 0 else {1, 2, 4})


class TestLogprobs:
    def test_none_are_reported_unless_asked_for(self) -> None:
        assert report(random_logits(50)) == []

    def test_they_are_of_the_untouched_logits(self) -> None:
        logits = random_logits(50)
        expected = logits.log_softmax(-1)
        [(token_id, logprob, rank)] = report(
            logits,
            temperature=0.3,
            top_k=5,
            logprobs=0,
            repetition_penalty=3.0,
            prompt_ids=(3, 4),
            banned_ids=(int(logits.argmax()),),
        )
        assert logprob == float(expected[token_id])
        assert rank == 1 + int((expected > expected[token_id]).sum()) > 1

    @pytest.mark.parametrize("count", [1, 3, 49, 50, -1])
    def test_the_drawn_token_comes_first_then_the_likeliest(self, count: int) -> None:
        logits = random_logits(50)
        expected = logits.log_softmax(-1)
        likeliest = expected.argsort(descending=True).tolist()
        for position in range(10):
            first, *others = report(logits, position=position, temperature=3.0, logprobs=count)
            assert first[0] == draw(logits, position=position, temperature=3.0)
            top = likeliest[: 50 if count == -1 else count]
            assert [each[0] for each in others] == [each for each in top if each != first[0]]
            for token_id, logprob, rank in (first, *others):
                assert logprob == float(expected[token_id])
                assert rank == likeliest.index(token_id) + 1

    def test_equals_share_a_rank_and_come_in_order_of_their_ids(self) -> None:
        reported = report([1.0, 2.0, 2.0, 0.0, 1.0, 1.0], temperature=0.0, logprobs=4)
        assert [(token_id, rank) for token_id, _, rank in reported] == [
            (1, 1),
            (2, 1),
            (0, 3),
            (4, 3),
        ]

    def test_low_precision_logits_are_reported_in_float32(self) -> None:
        logits = random_logits(50).bfloat16()
        expected = logits.float().log_softmax(-1)
        for token_id, logprob, _ in report(logits, logprobs=-1):
            assert logprob == float(expected[token_id])


class TestDegenerateRows:
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    @pytest.mark.parametrize(
        "logits",
        [
            [-INFINITY] * 4,
            [NAN] * 4,
            [NAN, -INFINITY, NAN, -INFINITY],
        ],
        ids=str,
    )
    def test_a_row_without_possible_tokens_gives_token_0(
        self, logits: list[float], temperature: float
    ) -> None:
        reported = report(logits, temperature=temperature, logprobs=-1)
        assert [each[0] for each in reported] == [0, 1, 2, 3]
        assert all(each[1:] == (-INFINITY, 1) for each in reported)

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_so_does_a_row_with_every_token_banned(self, temperature: float) -> None:
        banned_ids = (0, 1, 2, 3)
        assert draw([0.0, 1.0, 2.0, 3.0], temperature=temperature, banned_ids=banned_ids) == 0

    @pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, {"top_p": 0.5}, {"top_k": 2}])
    def test_nan_is_never_drawn_and_never_reported(self, options: dict[str, Any]) -> None:
        reported = report([NAN, 1.0, NAN, 0.0], logprobs=-1, **options)
        assert reported[0][0] in (1, 3)
        assert not any(math.isnan(logprob) for _, logprob, _ in reported)

    def test_infinite_logits_share_the_draw(self) -> None:
        logits = [INFINITY, 5.0, INFINITY, -INFINITY]
        assert {draw(logits, position=i) for i in range(50)} == {0, 2}
        reported = report(logits, temperature=0.0, logprobs=-1)
        assert [each[1] for each in reported[:2]] == [pytest.approx(math.log(0.5))] * 2
        assert not any(math.isnan(logprob) for _, logprob, _ in reported)

    def test_extreme_penalties_do_not_overflow(self) -> None:
        options: dict[str, Any] = {"prompt_ids": (0, 1), "output_counts": {1: 10**6}}
        for penalty in (5e-324, 1.7e308):
            for temperature in (0.0, 1.0):
                token_id = draw(
                    [100.0, 50.0, -100.0],
                    temperature=temperature,
                    repetition_penalty=penalty,
                    frequency_penalty=-2.0,
                    **options,
                )
                assert token_id in (0, 1)
