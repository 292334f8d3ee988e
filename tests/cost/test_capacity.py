"""Capacity of two well-known models, with every figure written out by hand."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from longspan.config import EngineConfig
from longspan.cost.capacity import MAX_DEVICES, Planner, Wanted, ladder
from longspan.cost.capacity_plan import CapacityPlan
from longspan.cost.devices import device_named
from longspan.errors import ConfigError
from longspan.models import ModelSpec, read_spec

K, M = 1024, 1024 * 1024

# Parameters of a layer: q and o, k and v, three matrices of the MLP, two norms.
LAYER_8B = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
LAYER_70B = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}


def write_config(folder: Path, *, max_position_embeddings: int = 16 * M, **fields: Any) -> Path:
    """A config.json like that of a Llama 3.1, and nothing else."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128_256,
        "max_position_embeddings": max_position_embeddings,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **fields,
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSpec, int]:
    folder = write_config(tmp_path_factory.mktemp("llama") / "8b", **LLAMA_8B)
    return read_spec(EngineConfig(model=str(folder)))


@pytest.fixture(scope="module")
def llama_70b(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelSpec, int]:
    folder = write_config(tmp_path_factory.mktemp("llama") / "70b", **LLAMA_70B)
    return read_spec(EngineConfig(model=str(folder)))


def planned(
    model: tuple[ModelSpec, int], device: str, context: int, count: int = 8, **wanted: Any
) -> CapacityPlan:
    options = Wanted(device=device_named(device), count=count, **wanted)
    return Planner(*model, options).plan(context)


# By hand


def test_llama_8b_on_h200s(llama_8b: tuple[ModelSpec, int]) -> None:
    plan = planned(llama_8b, "h200", 10 * M, nodes=2)
    assert plan.parameters == 2 * 128_256 * 4096 + 32 * LAYER_8B + 4096 == 8_030_261_248
    assert plan.weights_bytes == 16_060_522_496  # 2 bytes each: 16.06 GB
    assert plan.kv_bytes_per_token == 32 * 2 * 8 * 128 * 2 == 131_072
    # 90 % of 141 GB, less weights.
    assert plan.kv_pool_bytes == 126_900_000_000 - 16_060_522_496 == 110_839_477_504
    # Pages of 16 tokens: 110,839,477,504 / 2,097,152 = 52,852.4.
    assert plan.tokens_per_rank == 52_852 * 16 == 845_632
    assert plan.tokens_in_all == 16 * 845_632
    assert plan.tokens_per_request == 13_530_112
    rows = {row.context: row for row in plan.rows}
    assert rows[128 * K].kv_bytes == 131_072 * 131_072 == 17_179_869_184
    assert rows[1 * M].kv_bytes == 1_048_576 * 131_072 == 137_438_953_472
    assert rows[10 * M].kv_bytes == 10_485_760 * 131_072 == 1_374_389_534_720
    # 8,192, 65,536 and 655,360 pages over 52,852 on each: 0.2, 1.2, 12.4.
    assert [rows[length].devices for length in (128 * K, 1 * M, 10 * M)] == [1, 2, 13]
    assert plan.fewest.for_memory == 13
    assert all(row.fits for row in plan.rows)


def test_llama_70b_does_not_fit_an_h200(llama_70b: tuple[ModelSpec, int]) -> None:
    spec, parameters = llama_70b
    assert parameters == 2 * 128_256 * 8192 + 80 * LAYER_70B + 8192 == 70_553_706_496
    with pytest.raises(ConfigError) as caught:
        planned(llama_70b, "h200", 128 * K)
    message = str(caught.value)
    assert "\n" not in message
    assert message == (
        f"model={spec.name!r} in bfloat16 needs 141.1 GB for weights, all of them on every rank, "
        "and device='h200' has 141 GB, of which 90% are filled. Longspan has no tensor "
        "parallelism; take larger devices: 2 mi300x or 3 b200 hold 128K tokens"
    )


def test_llama_70b_on_b200s(llama_70b: tuple[ModelSpec, int]) -> None:
    plan = planned(llama_70b, "b200", 10 * M, nodes=3)
    assert plan.weights_bytes == 141_107_412_992
    assert plan.kv_bytes_per_token == 80 * 2 * 8 * 128 * 2 == 327_680
    # 90 % of 180 GB: 162 - 141.1 GB. A page has 5,242,880 bytes: 3,984.9 of them.
    assert plan.kv_pool_bytes == 162_000_000_000 - 141_107_412_992 == 20_892_587_008
    assert plan.tokens_per_rank == 3_984 * 16 == 63_744
    rows = {row.context: row for row in plan.rows}
    assert rows[128 * K].kv_bytes == 131_072 * 327_680 == 42_949_672_960
    assert rows[1 * M].kv_bytes == 1_048_576 * 327_680 == 343_597_383_680
    assert rows[10 * M].kv_bytes == 10_485_760 * 327_680 == 3_435_973_836_800
    # 8,192, 65,536 and 655,360 pages over 3,984: 2.1, 16.4, 164.5.
    assert [rows[length].devices for length in (128 * K, 1 * M, 10 * M)] == [3, 17, 165]
    assert rows[1 * M].fits
    assert rows[1 * M].degree is not None
    assert rows[1 * M].degree >= 17
    assert not rows[10 * M].fits
    assert rows[10 * M].ttft is rows[10 * M].tpot is None
    assert plan.choices == [], "there is nothing to choose where it does not fit"


def test_llama_70b_on_mi300xs(llama_70b: tuple[ModelSpec, int]) -> None:
    planner = Planner(*llama_70b, Wanted(device=device_named("mi300x"), count=8))
    # 90 % of 192 GB: 172.8 - 141.1 GB are 6,044.9 pages.
    assert planner.pages_per_rank == 6_044
    # 8,192, 65,536 and 655,360 pages over 6,044: 1.4, 10.8, 108.4.
    assert [planner.devices_for(length) for length in (128 * K, 1 * M, 10 * M)] == [2, 11, 109]


def test_a_batch_shares_the_pages(llama_8b: tuple[ModelSpec, int]) -> None:
    plan = planned(llama_8b, "h200", 1 * M, batch=7)
    # 8 x 52,852 pages over 7 requests: 60,402.3 each; 7 x 65,536 pages need 8.7 devices.
    assert plan.tokens_per_request == 60_402 * 16
    assert plan.fewest.for_memory == 9
    assert plan.rows[-1].kv_bytes == 7 * 137_438_953_472
    assert not plan.rows[-1].fits
    assert plan.rows[-2].fits


def test_half_of_what_weights_leave_on_a_cpu(llama_8b: tuple[ModelSpec, int]) -> None:
    plan = planned(llama_8b, "cpu", 128 * K, count=1)
    assert plan.kv_pool_bytes == (64_000_000_000 - 16_060_522_496) // 2
    assert not any("No cpu" in note for note in plan.notes)


def test_single_precision_is_twice_as_large(llama_8b: tuple[ModelSpec, int]) -> None:
    spec, parameters = llama_8b
    plan = planned(
        (dataclasses.replace(spec, dtype="float32", kv_cache_dtype="float32"), parameters),
        "h200",
        128 * K,
    )
    assert plan.weights_bytes == 4 * 8_030_261_248
    assert plan.kv_bytes_per_token == 262_144
    narrow = planned(llama_8b, "h200", 128 * K)
    slow, fast = plan.rows[-1].ttft, narrow.rows[-1].ttft
    assert slow is not None
    assert fast is not None
    assert slow > 5 * fast, "an h200 does 989e12 flops/s in bfloat16 and 67e12 in float32"


# What a config tells


def test_weights_of_all_experts_count_and_shared_ones_once(tmp_path: Path) -> None:
    fields = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
    }
    attention = 2 * 64 * 64 + 2 * 64 * 32
    tied = write_config(tmp_path / "tied", **fields | {"tie_word_embeddings": True})
    spec, parameters = read_spec(EngineConfig(model=str(tied)))
    assert parameters == 512 * 64 + 3 * (attention + 3 * 64 * 96 + 2 * 64) + 64
    assert spec.num_active_parameters == parameters - 512 * 64
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}
    mixtral = write_config(
        tmp_path / "mixtral",
        **fields | experts | {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
    )
    spec, parameters = read_spec(EngineConfig(model=str(mixtral)))
    layer = attention + 64 * 8 + 2 * 64
    assert parameters == 2 * 512 * 64 + 3 * (layer + 8 * 3 * 64 * 96) + 64
    assert spec.num_active_parameters == 3 * (layer + 2 * 3 * 64 * 96) + 64


def test_the_models_own_limit_bounds_what_fits(tmp_path: Path) -> None:
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    scaled |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    folder = write_config(
        tmp_path / "m", max_position_embeddings=131_072, rope_scaling=scaled, **LLAMA_8B
    )
    model = read_spec(EngineConfig(model=str(folder / "config.json")))
    plan = planned(model, "h200", 128 * K)
    assert plan.max_model_len == plan.max_context == 131_072
    assert plan.tokens_per_request == 8 * 845_632
    assert plan.notes[-1] == (
        "The model's own limit of 131,072 tokens is less than the 6,765,056 that fit."
    )
    assert len(planned(model, "h200", 128 * K, batch=64).notes) == 1


# Targets


@pytest.mark.parametrize(
    ("context", "batch", "targets"),
    [
        (1 * M, 1, {"ttft": 60.0}),
        (1 * M, 2, {"ttft": 100.0, "tpot": 0.02}),
        (256 * K, 4, {"tpot": 0.0125}),
    ],
)
def test_the_fewest_that_meet_targets_are_found(
    llama_8b: tuple[ModelSpec, int], context: int, batch: int, targets: dict[str, float]
) -> None:
    """As if every number of devices had been tried."""
    h200 = device_named("h200")
    planner = Planner(*llama_8b, Wanted(device=h200, count=64, batch=batch, **targets))
    found = planner.fewest(context)
    meeting = []
    for count in range(found.for_memory, 65):
        ttft, tpot = planner.seconds(context, count)
        if ttft <= targets.get("ttft", 1e9) and tpot <= targets.get("tpot", 1e9):
            meeting.append((count, ttft, tpot))
    assert 1 < len(meeting) < 65 - found.for_memory
    assert (found.for_targets, found.ttft, found.tpot) == meeting[0]
    assert found.nearest == found.for_targets


def test_targets_that_no_number_meets(llama_8b: tuple[ModelSpec, int]) -> None:
    fewest = planned(llama_8b, "h200", 1 * M, ttft=1e-3).fewest
    assert fewest.for_memory == 2
    assert fewest.for_targets is None
    assert fewest.searched == MAX_DEVICES
    assert fewest.nearest is not None
    assert fewest.ttft is not None
    assert fewest.ttft > 1e-3


# Wrong numbers


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"count": 0}, "count=0 must be at least 1"),
        ({"count": 1, "nodes": -1}, "nodes=-1 must be at least 1"),
        ({"count": 1, "batch": 0}, "batch=0 must be at least 1"),
        ({"count": 1, "batch": 1025}, "batch=1025 is above 1024"),
        ({"count": 1, "ttft": 0.0}, "ttft=0.0 must be above 0 seconds"),
        ({"count": 1, "ttft": float("inf")}, "ttft=inf must be above 0 seconds and finite"),
        ({"count": 1, "tpot": float("nan")}, "tpot=nan must be above 0 seconds"),
        ({"count": 600, "nodes": 2}, "count=600 x nodes=2 are 1200 devices; plan with no more"),
    ],
)
def test_wrong_numbers_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=f"^{complaint}"):
        Wanted(device=device_named("h200"), **options)


def test_lengths_double() -> None:
    assert ladder(8 * K) == [1 * K, 2 * K, 4 * K, 8 * K]
    assert ladder(5000) == [1 * K, 2 * K, 4 * K, 5000]
    assert ladder(1024) == [1024]
    assert ladder(10) == [10]


# The document


def test_the_json_document_is_stable(llama_8b: tuple[ModelSpec, int]) -> None:
    """Programs read it: names may be added, but none changes or goes away."""
    plan = planned(llama_8b, "h200", 128 * K, ttft=5.0)
    document = json.loads(plan.to_json())
    assert msgspec.json.decode(plan.to_json(), type=CapacityPlan) == plan
    assert list(document) == [
        "model",
        "architecture",
        "dtype",
        "device",
        "devices_per_node",
        "nodes",
        "ranks",
        "context",
        "batch",
        "max_model_len",
        "parameters",
        "active_parameters",
        "weights_bytes",
        "kv_bytes_per_token",
        "kv_pool_bytes",
        "tokens_per_rank",
        "tokens_in_all",
        "tokens_per_request",
        "max_context",
        "fewest",
        "rows",
        "choices",
        "notes",
    ]
    assert document["device"] == {
        "name": "h200",
        "memory_bytes": 141_000_000_000,
        "calibration": None,
        "rates": msgspec.to_builtins(device_named("h200").rates("bfloat16")),
    }
    assert list(document["fewest"]) == [
        "for_memory",
        "ttft_target",
        "tpot_target",
        "for_targets",
        "searched",
        "nearest",
        "ttft",
        "ttft_limit",
        "tpot",
        "tpot_limit",
    ]
    assert {tuple(row) for row in document["rows"]} == {
        (
            "context",
            "kv_bytes",
            "devices",
            "fits",
            "degree",
            "prefill_strategies",
            "decode_strategy",
            "ttft",
            "ttft_limit",
            "tpot",
            "tpot_limit",
        )
    }
    assert {tuple(choice) for choice in document["choices"]} == {
        (
            "phase",
            "degree",
            "strategy",
            "chosen",
            "new_tokens",
            "cached_tokens",
            "launches",
            "weights",
            "linear",
            "attention",
            "exchange",
            "hidden",
            "total",
            "near_bytes",
            "far_bytes",
            "ttft",
        )
    }
