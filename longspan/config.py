"""One frozen configuration of an engine. Command-line options are derived from its fields."""

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard, get_args

from longspan.errors import ConfigError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
KVCacheDtype = Literal["auto", "float32", "bfloat16", "float16", "int8"]
Strategy = Literal["auto", "pass_kv", "gather_kv", "pass_q", "tree"]
Backend = Literal["mp", "uni", "ray"]
Communication = Literal["auto", "mpi", "gloo"]

GPU_MEMORY_UTILIZATION = 0.9
"""Fraction of a GPU's memory for weights and KV pool, if nothing else is said."""
CPU_MEMORY_UTILIZATION = 0.5
"""Fraction of a host's free memory for the KV pools of all its ranks, if nothing else is said."""


def option(default: Any, help: str) -> Any:
    """A field of a config that is an option of the command line too (`options.py`)."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything that is fixed for the life of an engine.

    Names are vLLM's where the meaning is the same. Sizes are in tokens unless the name says bytes.

    Raises:
        ConfigError: a value is outside its limits; the message names field, value and limit.
    """

    model: str = dataclasses.field(
        metadata={"help": "Path of a Hugging Face model folder, or its id on the hub."}
    )
    tokenizer: str | None = option(None, "Path or id of the tokenizer, if not the model's own.")
    revision: str | None = option(None, "Branch, tag or commit of a model on the hub.")
    trust_remote_code: bool = option(False, "Run Python code that comes with the model.")
    dtype: Dtype = option(
        "auto", "Number type of weights and activations; 'auto' takes the model's own."
    )
    kv_cache_dtype: KVCacheDtype = option(
        "auto",
        "Number type of the KV cache; 'auto' takes that of dtype. A narrower one holds more tokens "
        "and is no longer exact; int8 keeps a scale for each token and head.",
    )
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "Kind of device, one for each rank; 'auto' takes cuda where there is one."
    )
    context_parallel_size: int = option(
        1, "Number of ranks: worker processes, each with one device, that share long contexts."
    )
    max_model_len: int | None = option(
        None, "Longest context (prompt and output); the model's own limit if not given."
    )
    kv_cache_tokens: int | tuple[int, ...] | None = option(
        None, "Capacity of each rank's KV pool: one number, or one for each rank."
    )
    kv_cache_memory_bytes: int | None = option(
        None, "Size of each rank's KV pool in bytes, instead of kv_cache_tokens."
    )
    gpu_memory_utilization: float | None = option(
        None,
        "Fraction of a device's memory that weights and KV pool may fill, if neither size is "
        "given (default 0.9); on CPU the fraction of the host's free memory that all KV pools "
        "together may fill (default 0.5).",
    )
    page_size: int = option(16, "Tokens in one page of the KV pool.")
    enable_prefix_caching: bool = option(
        True, "Keep full pages of ended requests for those that begin alike."
    )
    max_num_batched_tokens: int = option(
        2048, "Most tokens that one rank computes in one step; longer prompts go in chunks."
    )
    max_num_seqs: int = option(256, "Most requests that run at the same time.")
    max_step_time: float | None = option(
        0.1,
        "Predicted seconds after which no more prompt tokens are put into a step, so that others "
        "are not kept waiting (eight times as many for a prompt that is alone, sixteen times over "
        "several ranks); None: no limit.",
    )
    min_tokens_per_rank: int | None = option(
        None,
        "Spread every prompt over one rank for each so many tokens, instead of where it is "
        "predicted to be faster.",
    )
    attention_strategy: Strategy = option(
        "auto",
        "How ranks share attention; 'auto' picks for each request and step, and lets ranks of one "
        "host on CPU decode together.",
    )
    async_scheduling: bool = option(
        True, "Plan the next decode step while ranks that are processes compute the last one."
    )
    calibration: str | None = option(
        None,
        "File that 'longspan calibrate' made: what devices and links were measured to do. Without "
        "it, figures for the kind of device, and links as ranks measure them at the start.",
    )
    distributed_executor_backend: Backend | None = option(
        None,
        "'mp': one process for each rank; 'uni': all in this one; 'ray': actors of a Ray cluster. "
        "Default: mp from 2 ranks.",
    )
    communication_backend: Communication = option(
        "auto",
        "What ranks on CPUs exchange tensors over; 'auto' takes mpi for ranks of one host where "
        "longspan[mpi] is installed, else gloo. GPUs use NCCL.",
    )
    nnodes: int = option(1, "Number of nodes: hosts that bring ranks, each started by itself.")
    node_rank: int = option(0, "Number of this node; node 0 runs the engine.")
    master_addr: str = option(
        "127.0.0.1", "Address of node 0 where the other nodes reach it; it listens there only."
    )
    master_port: int = option(29500, "Port of node 0 where the other nodes join.")
    context_parallel_size_local: int | None = option(
        None, "Ranks that this node brings; context_parallel_size / nnodes if not given."
    )
    seed: int = option(0, "Seed of the requests that bring none of their own.")

    @classmethod
    def from_options(cls, **options: Any) -> "EngineConfig":
        """Make a config from keyword options; an unknown one is refused with the nearest name."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known options: {known}"
                raise ConfigError(f"unknown option {name}={options[name]!r}; {hint}")
        return cls(**options)

    def __post_init__(self) -> None:
        if isinstance(self.kv_cache_tokens, list):
            object.__setattr__(self, "kv_cache_tokens", tuple(self.kv_cache_tokens))
        self._check_types()
        for name in (
            "context_parallel_size",
            "page_size",
            "max_num_batched_tokens",
            "max_num_seqs",
            "nnodes",
        ):
            self._check_at_least_one(name, getattr(self, name))
        for name in (
            "max_model_len",
            "kv_cache_memory_bytes",
            "min_tokens_per_rank",
            "context_parallel_size_local",
        ):
            if getattr(self, name) is not None:
                self._check_at_least_one(name, getattr(self, name))
        if self.max_step_time is not None and not self.max_step_time > 0:
            raise ConfigError(f"max_step_time={self.max_step_time!r} must be above 0")
        self._check_choices()
        self._check_kv_capacity()
        self._check_nodes()

    @property
    def num_ranks(self) -> int:
        return self.context_parallel_size

    @property
    def num_local_ranks(self) -> int:
        """How many of the ranks node 0 brings."""
        return self.context_parallel_size_local or self.num_ranks // self.nnodes

    @property
    def executor(self) -> Backend:
        several = self.num_ranks > 1 or self.nnodes > 1
        return self.distributed_executor_backend or ("mp" if several else "uni")

    @property
    def sizes_pool(self) -> bool:
        """Whether it says how large the KV pool is, which else follows from free memory."""
        return self.kv_cache_tokens is not None or self.kv_cache_memory_bytes is not None

    def kv_cache_tokens_of(self, rank: int) -> int | None:
        """Capacity asked for on one rank in tokens, or None if it follows from memory."""
        if isinstance(self.kv_cache_tokens, tuple):
            return self.kv_cache_tokens[rank]
        return self.kv_cache_tokens

    def _check_types(self) -> None:
        for name, kind, meaning in (
            ("model", str, "a path or an id"),
            ("tokenizer", str | None, "a path or an id"),
            ("revision", str | None, "a branch, tag or commit"),
            ("calibration", str | None, "a path"),
            ("trust_remote_code", bool, "True or False"),
            ("enable_prefix_caching", bool, "True or False"),
            ("async_scheduling", bool, "True or False"),
            ("gpu_memory_utilization", float | int | None, "a number"),
            ("max_step_time", float | int | None, "a number of seconds or None"),
            ("master_addr", str, "an address or a host's name"),
        ):
            if not isinstance(getattr(self, name), kind):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be {meaning}")
        if not self.model:
            raise ConfigError("model='' must be a path or an id")
        if not _is_whole(self.seed):
            raise ConfigError(f"seed={self.seed!r} must be a whole number")

    def _check_at_least_one(self, name: str, value: object) -> None:
        if not (_is_whole(value) and value >= 1):
            raise ConfigError(f"{name}={value!r} must be a whole number of at least 1")

    def _check_choices(self) -> None:
        for name, choices in (
            ("dtype", get_args(Dtype)),
            ("kv_cache_dtype", get_args(KVCacheDtype)),
            ("device", ("auto", "cpu", "cuda")),
            ("attention_strategy", get_args(Strategy)),
            ("distributed_executor_backend", (None, *get_args(Backend))),
            ("communication_backend", get_args(Communication)),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be one of {choices}")

    def _check_kv_capacity(self) -> None:
        given = [
            name
            for name in ("kv_cache_tokens", "kv_cache_memory_bytes", "gpu_memory_utilization")
            if getattr(self, name) is not None
        ]
        if len(given) > 1:
            first, second = (f"{name}={getattr(self, name)!r}" for name in given[:2])
            raise ConfigError(f"{first} and {second} contradict each other; give only one")
        fraction = self.gpu_memory_utilization
        if fraction is not None and not 0 < fraction <= 1:
            raise ConfigError(f"gpu_memory_utilization={fraction!r} must be above 0 and at most 1")
        if isinstance(self.kv_cache_tokens, Sequence):
            if len(self.kv_cache_tokens) != self.num_ranks:
                raise ConfigError(
                    f"kv_cache_tokens={list(self.kv_cache_tokens)} names "
                    f"{len(self.kv_cache_tokens)} ranks; context_parallel_size={self.num_ranks}"
                )
            capacities = self.kv_cache_tokens
        else:
            capacities = () if self.kv_cache_tokens is None else (self.kv_cache_tokens,)
        for capacity in capacities:
            self._check_at_least_one("kv_cache_tokens", capacity)
            if capacity < self.page_size:
                raise ConfigError(
                    f"kv_cache_tokens={capacity} is less than one page (page_size={self.page_size})"
                )

    def _check_nodes(self) -> None:
        for name, least, most in (("node_rank", 0, self.nnodes - 1), ("master_port", 1, 65535)):
            value = getattr(self, name)
            if not (_is_whole(value) and least <= value <= most):
                raise ConfigError(f"{name}={value!r} must be a whole number from {least} to {most}")
        if not self.master_addr:
            raise ConfigError("master_addr='' must be an address or a host's name")
        if self.nnodes > 1 and self.executor != "mp":
            raise ConfigError(
                f"nnodes={self.nnodes} and distributed_executor_backend={self.executor!r} "
                "contradict each other; leave one of them out"
            )
        if self.node_rank == 0:
            self._check_local_size()

    def _check_local_size(self) -> None:
        local, size, nodes = self.context_parallel_size_local, self.num_ranks, self.nnodes
        if local is None and size % nodes:
            raise ConfigError(
                f"context_parallel_size={size} can't be shared evenly by nnodes={nodes}; "
                "set context_parallel_size_local on each node"
            )
        if local is not None and nodes == 1 and local != size:
            raise ConfigError(
                f"context_parallel_size_local={local} is not context_parallel_size={size}, and "
                "there is one node; leave it out"
            )
        if local is not None and local > size - (nodes - 1):
            raise ConfigError(
                f"context_parallel_size_local={local} leaves less than a rank for each other node "
                f"of nnodes={nodes}; context_parallel_size={size}"
            )


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
