"""A wrong option is refused with a line that names the option, its value and its limit."""

import dataclasses
from typing import Any

import pytest

from longspan.config import EngineConfig
from longspan.errors import ConfigError

COUNTS = (
    "context_parallel_size",
    "max_model_len",
    "kv_cache_tokens",
    "kv_cache_memory_bytes",
    "page_size",
    "max_num_batched_tokens",
    "max_num_seqs",
    "min_tokens_per_rank",
    "nnodes",
    "context_parallel_size_local",
)

CHOICES = {
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "device": ("auto", "cpu", "cuda"),
    "attention_strategy": ("auto", "pass_kv", "gather_kv", "pass_q", "tree"),
    "distributed_executor_backend": (None, "mp", "uni", "ray"),
}


def refusal(**options: Any) -> str:
    """The one line with which these options are refused."""
    with pytest.raises(ConfigError) as caught:
        EngineConfig.from_options(model="m", **options)
    line = str(caught.value)
    assert "\n" not in line
    return line


def accepted(**options: Any) -> EngineConfig:
    return EngineConfig.from_options(model="m", **options)


def test_a_model_is_all_that_must_be_given() -> None:
    config = EngineConfig(model="m")
    assert (config.num_ranks, config.executor) == (1, "uni")
    assert config.kv_cache_tokens_of(0) is None


def test_a_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig(model="m").page_size = 8  # type: ignore[misc]


def test_every_option_but_the_model_has_a_default_and_all_have_help() -> None:
    for option in dataclasses.fields(EngineConfig):
        assert option.metadata["help"].endswith(".")
        assert (option.default is dataclasses.MISSING) == (option.name == "model")


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [0, -1, 1.0, 2.5, "8", True], ids=repr)
def test_sizes_are_whole_numbers_of_at_least_one(name: str, value: object) -> None:
    assert refusal(**{name: value}) == f"{name}={value!r} must be a whole number of at least 1"


@pytest.mark.parametrize("name", COUNTS[:-2])
def test_sizes_may_be_large(name: str) -> None:
    assert getattr(accepted(**{name: 10**6}), name) == 10**6


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("value", ["", "fp8", "AUTO", 1], ids=repr)
def test_choices_are_refused_with_the_list_of_all(name: str, value: object) -> None:
    assert refusal(**{name: value}) == f"{name}={value!r} must be one of {CHOICES[name]}"


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in CHOICES.items() for v in vs])
def test_every_choice_is_accepted(name: str, value: object) -> None:
    assert getattr(accepted(**{name: value}), name) == value


@pytest.mark.parametrize("value", [0, 0.0, -0.5, 1.01, float("nan"), float("inf")], ids=repr)
def test_a_fraction_of_memory_is_above_0_and_at_most_1(value: float) -> None:
    assert refusal(gpu_memory_utilization=value) == (
        f"gpu_memory_utilization={value!r} must be above 0 and at most 1"
    )


@pytest.mark.parametrize("value", [1e-9, 0.5, 1, 1.0], ids=repr)
def test_the_limits_of_a_fraction_of_memory_are_accepted(value: float) -> None:
    assert accepted(gpu_memory_utilization=value).gpu_memory_utilization == value


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("kv_cache_tokens", "kv_cache_memory_bytes"),
        ("kv_cache_tokens", "gpu_memory_utilization"),
        ("kv_cache_memory_bytes", "gpu_memory_utilization"),
    ],
)
def test_only_one_size_of_the_pool_is_given(one: str, other: str) -> None:
    values = {"kv_cache_tokens": 64, "kv_cache_memory_bytes": 9999, "gpu_memory_utilization": 0.5}
    line = refusal(**{one: values[one], other: values[other]})
    first, second = (f"{name}={values[name]}" for name in (one, other))
    assert line == f"{first} and {second} contradict each other; give only one"


def test_a_pool_has_at_least_one_page() -> None:
    assert refusal(kv_cache_tokens=15) == (
        "kv_cache_tokens=15 is less than one page (page_size=16)"
    )
    assert refusal(context_parallel_size=2, kv_cache_tokens=[64, 7], page_size=8) == (
        "kv_cache_tokens=7 is less than one page (page_size=8)"
    )
    assert accepted(kv_cache_tokens=16).kv_cache_tokens_of(0) == 16


def test_each_rank_is_given_its_own_size_or_all_the_same() -> None:
    own = accepted(context_parallel_size=3, kv_cache_tokens=[64, 32, 48])
    assert own.kv_cache_tokens == (64, 32, 48)
    assert [own.kv_cache_tokens_of(rank) for rank in range(3)] == [64, 32, 48]
    same = accepted(context_parallel_size=3, kv_cache_tokens=64)
    assert [same.kv_cache_tokens_of(rank) for rank in range(3)] == [64, 64, 64]


@pytest.mark.parametrize("sizes", [[], [64], [64, 64, 64]], ids=repr)
def test_there_are_as_many_sizes_as_ranks(sizes: list[int]) -> None:
    assert refusal(context_parallel_size=2, kv_cache_tokens=sizes) == (
        f"kv_cache_tokens={sizes} names {len(sizes)} ranks; context_parallel_size=2"
    )


@pytest.mark.parametrize("size", [0, -16, 32.0, "64"], ids=repr)
def test_each_rank_s_size_is_a_whole_number_of_at_least_one(size: object) -> None:
    assert refusal(context_parallel_size=2, kv_cache_tokens=[64, size]) == (
        f"kv_cache_tokens={size!r} must be a whole number of at least 1"
    )


def test_several_ranks_run_in_processes_of_their_own_unless_told_otherwise() -> None:
    assert accepted().executor == "uni"
    assert accepted(context_parallel_size=2).executor == "mp"
    assert accepted(distributed_executor_backend="mp").executor == "mp"
    assert accepted(context_parallel_size=2, distributed_executor_backend="uni").executor == "uni"


def test_an_unknown_option_is_refused_with_the_nearest_name() -> None:
    line = refusal(max_num_batched_token=4)
    assert line == (
        "unknown option max_num_batched_token=4; did you mean 'max_num_batched_tokens'?"
    )


def test_an_unknown_option_like_no_other_is_refused_with_all_names() -> None:
    line = refusal(xyzzy=None)
    assert line.startswith("unknown option xyzzy=None; known options: ['model', ")
    for option in dataclasses.fields(EngineConfig):
        assert repr(option.name) in line


def test_errors_are_value_errors() -> None:
    with pytest.raises(ValueError, match="page_size=0"):
        accepted(page_size=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", "7"),
        ("seed", None),
        ("seed", 0.5),
        ("trust_remote_code", "false"),
        ("trust_remote_code", 1),
        ("tokenizer", 5),
        ("revision", 5),
    ],
)
def test_options_of_other_types_are_checked_too(name: str, value: object) -> None:
    assert f"{name}={value!r}" in refusal(**{name: value})


def test_a_fraction_of_memory_is_a_number() -> None:
    assert "gpu_memory_utilization='0.5'" in refusal(gpu_memory_utilization="0.5")


def test_no_rank_s_size_is_left_out() -> None:
    assert "kv_cache_tokens" in refusal(context_parallel_size=2, kv_cache_tokens=[None, 64])


def test_a_list_of_sizes_is_kept_as_a_tuple_however_it_came() -> None:
    sizes: Any = [64, 32]
    config = EngineConfig(model="m", context_parallel_size=2, kv_cache_tokens=sizes)
    assert config.kv_cache_tokens_of(1) == 32


def test_ranks_are_shared_evenly_by_nodes_or_as_each_says() -> None:
    even = accepted(context_parallel_size=4, nnodes=2)
    assert (even.executor, even.num_local_ranks) == ("mp", 2)
    uneven = accepted(context_parallel_size=3, nnodes=2, context_parallel_size_local=1)
    assert uneven.num_local_ranks == 1
    assert accepted(context_parallel_size=3).num_local_ranks == 3
    line = refusal(context_parallel_size=3, nnodes=2)
    assert line.startswith("context_parallel_size=3 can't be shared evenly by nnodes=2; set")
    line = refusal(context_parallel_size=3, nnodes=2, context_parallel_size_local=3)
    assert line.startswith("context_parallel_size_local=3 leaves less than a rank for each other")
    line = refusal(context_parallel_size=3, context_parallel_size_local=2)
    assert line.startswith("context_parallel_size_local=2 is not context_parallel_size=3")


def test_a_node_that_lends_says_only_what_it_brings() -> None:
    accepted(nnodes=2, node_rank=1)
    accepted(nnodes=2, node_rank=1, context_parallel_size_local=8)


@pytest.mark.parametrize(
    ("name", "value", "limits"),
    [
        ("node_rank", 2, "from 0 to 1"),
        ("node_rank", -1, "from 0 to 1"),
        ("node_rank", "1", "from 0 to 1"),
        ("master_port", 0, "from 1 to 65535"),
        ("master_port", 65536, "from 1 to 65535"),
    ],
)
def test_numbers_of_nodes_and_ports_have_limits(name: str, value: object, limits: str) -> None:
    line = refusal(nnodes=2, context_parallel_size=2, **{name: value})
    assert line == f"{name}={value!r} must be a whole number {limits}"


@pytest.mark.parametrize("value", ["", None, 127])
def test_node_0_has_an_address(value: object) -> None:
    assert refusal(master_addr=value).endswith("must be an address or a host's name")


@pytest.mark.parametrize("backend", ["uni", "ray"])
def test_nodes_are_processes(backend: str) -> None:
    line = refusal(nnodes=2, context_parallel_size=2, distributed_executor_backend=backend)
    assert line.startswith(f"nnodes=2 and distributed_executor_backend={backend!r} contradict")
