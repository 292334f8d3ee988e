"""The answer of `longspan plan`. Plain data."""

import msgspec

from longspan.cost.explain import Choice
from longspan.cost.limits import Limit
from longspan.cost.rates import Rates
from longspan.plan import Strategy


class DeviceFigures(msgspec.Struct, frozen=True):
    """One device, and the rates that times are predicted from; the file they are from, if any."""

    name: str
    memory_bytes: int
    calibration: str | None
    rates: Rates


class Row(msgspec.Struct, frozen=True):
    """One context length: the fewest devices that hold the batch, and what those planned will do.

    `kv_bytes` are those of the batch. Times are in seconds, and None where it does not fit.
    `degree` is the most ranks of one request; of a prefill's chunks, the first and the last one's
    strategies are named.
    """

    context: int
    kv_bytes: int
    devices: int
    fits: bool
    degree: int | None = None
    prefill_strategies: list[Strategy] = []
    decode_strategy: Strategy | None = None
    ttft: float | None = None
    ttft_limit: Limit | None = None
    tpot: float | None = None
    tpot_limit: Limit | None = None


class Fewest(msgspec.Struct, frozen=True):
    """The fewest devices for the context and batch: by memory, and for the targets in seconds.

    `for_targets` is None without targets, and if no number of devices up to `searched` meets them.
    `ttft` and `tpot` and what limits them are those of `for_targets`, or else of the number that
    comes nearest.
    """

    for_memory: int
    ttft_target: float | None = None
    tpot_target: float | None = None
    for_targets: int | None = None
    searched: int | None = None
    nearest: int | None = None
    ttft: float | None = None
    ttft_limit: Limit | None = None
    tpot: float | None = None
    tpot_limit: Limit | None = None


class CapacityPlan(msgspec.Struct, frozen=True):
    """What `longspan plan` answers. Lengths are in tokens, times in seconds.

    `tokens_per_request` is what fits if all of the batch are as long, `max_context` the same but
    no more than `max_model_len`.
    """

    model: str
    architecture: str
    dtype: str
    device: DeviceFigures
    devices_per_node: int
    nodes: int
    ranks: int
    context: int
    batch: int
    max_model_len: int
    parameters: int
    active_parameters: int
    weights_bytes: int
    kv_bytes_per_token: int
    kv_pool_bytes: int
    tokens_per_rank: int
    tokens_in_all: int
    tokens_per_request: int
    max_context: int
    fewest: Fewest
    rows: list[Row]
    choices: list[Choice]
    notes: list[str]

    def to_json(self) -> str:
        return msgspec.json.encode(self).decode()
