"""One rank's model, pool and kernel: runs the steps that it is given."""

import os
import threading

import msgspec
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from longspan.attention.kernel import kernel_for
from longspan.config import CPU_MEMORY_UTILIZATION, GPU_MEMORY_UTILIZATION, EngineConfig
from longspan.cost.kv_shape import KVShape
from longspan.errors import ConfigError
from longspan.models import ModelSpec
from longspan.parallel.transport import Transport
from longspan.plan import UNKNOWN, RankPlan, RankResult
from longspan.worker import hf_attention
from longspan.worker.fused_layer import fuse_layers
from longspan.worker.huge_pages import move_weights
from longspan.worker.joint_step import JointStep
from longspan.worker.kv_pool import KVPool
from longspan.worker.linear import use_fast_linears
from longspan.worker.meeting import Meeting
from longspan.worker.moves import start_moves
from longspan.worker.probe import probe
from longspan.worker.sampler import sample
from longspan.worker.step import Step

# While it loads a model, transformers replaces functions of its own and of PyTorch's. If two
# threads load at once, what one has put there stays: tied weights are then never tied again.
_LOADING = threading.Lock()


class ModelRunner:
    """Loads the model whole and serves plans.

    Raises:
        UnsupportedModelError: the model does something that can't be served exactly.
        ConfigError: the memory left for the pool is less than one page.
    """

    def __init__(
        self, config: EngineConfig, spec: ModelSpec, transport: Transport, device: torch.device
    ) -> None:
        self.spec = spec
        self.transport = transport
        self.device = device
        self.dtype: torch.dtype = getattr(torch, spec.dtype)
        self.kernel = kernel_for(device)
        hf_attention.register()
        with _LOADING:
            model = AutoModelForCausalLM.from_pretrained(
                config.model,
                revision=config.revision,
                trust_remote_code=config.trust_remote_code,
                dtype=self.dtype,
                attn_implementation=hf_attention.NAME,
            )
        self.model = model.eval().to(device)
        if device.type == "cpu":
            move_weights(self.model)
            use_fast_linears(self.model)
        self.scale = [layer.scaling for layer in probe(self.model, spec.name, spec.max_model_len)]
        self.fused = fuse_layers(self.model) if device.type == "cpu" else []
        self._drawn: dict[str, int] = {}
        """The tokens that the last step drew here, by request."""
        self.meeting: Meeting | None = None
        """Where this rank meets others in joint steps, if it can."""
        self.pool = KVPool(
            spec.num_layers,
            num_pages(config, spec, transport, device),
            config.page_size,
            spec.num_kv_heads,
            spec.head_dim,
            getattr(torch, spec.kv_cache_dtype),
            device,
        )
        if config.sizes_pool:  # by default it is half of what is free, which others may want too
            self.pool.take_memory()

    @torch.inference_mode()
    def execute(self, plan: RankPlan) -> RankResult:
        """Compute this rank's part of a step and draw the tokens that it is to draw.

        The step's moves travel meanwhile; their pages are in the pool when this returns.
        """
        wait_for_moves = start_moves(plan.moves, self.pool, self.transport)
        step = self._step(self._completed(plan))
        if len(step.token_ids):
            rows = [sampling.row for sampling in plan.samplings]
            logits = self._forward(step, torch.tensor(rows, dtype=torch.int64, device=self.device))
            sampled = tuple(sample(logits, plan.samplings))
        else:
            if plan.parts:
                assert isinstance(step, Step)  # a joint one has tokens on all ranks
                self._serve(step)
            sampled = ()
        self._drawn = {one.request_id: one.token_id for one in sampled}
        wait_for_moves()
        return RankResult(sampled, self.transport.take_traffic())

    def _completed(self, plan: RankPlan) -> RankPlan:
        """The plan with the tokens that were not drawn when it was made, and have been since.

        What is computed jointly needs also those that others drew.
        """
        rank, meeting = self.transport.rank, self.meeting
        if plan.joint:
            assert meeting is not None
            meeting.begin(plan.joint)
        if UNKNOWN not in plan.token_ids[:1]:
            return plan
        segments = (part.segment for part in plan.parts)
        names = [s.request_id for s in segments if plan.joint or s.shard(rank).num_queries]
        drawn = [self._drawn.get(name, UNKNOWN) for name in names]
        if plan.joint and meeting:
            drawn = meeting.largest(drawn)
        return msgspec.structs.replace(plan, token_ids=tuple(drawn))

    def _step(self, plan: RankPlan) -> Step | JointStep:
        pool, kernel, scale = self.pool, self.kernel, self.scale
        if plan.joint is None:
            return Step(plan, pool, self.transport, kernel, scale)
        assert self.meeting is not None
        return JointStep(plan, pool, kernel, scale, self.transport.rank, self.meeting)

    @property
    def joint_row_floats(self) -> int | None:
        """What each row takes where ranks meet; None if the model can't be computed jointly."""
        if len(self.fused) < self.spec.num_layers:
            return None
        return max(layer.row_floats for layer in self.fused)

    def _forward(self, step: Step | JointStep, rows: Tensor) -> Tensor:
        """Logits [len(rows), V] of some rows of the packed batch."""
        output = self.model(
            input_ids=step.token_ids.unsqueeze(0),
            position_ids=step.positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=rows,
            step=step,
        )
        logits: Tensor = output.logits[0]
        return logits

    def _serve(self, step: Step) -> None:
        """Let other ranks attend to this one's keys; models can't run on no tokens at all."""
        spec = self.spec
        q = torch.empty(0, spec.num_heads, spec.head_dim, dtype=self.dtype, device=self.device)
        k = torch.empty(0, spec.num_kv_heads, spec.head_dim, dtype=self.dtype, device=self.device)
        for layer in range(spec.num_layers):
            step.attend(layer, q, k, k)


def num_pages(
    config: EngineConfig, spec: ModelSpec, transport: Transport, device: torch.device
) -> int:
    """How many pages this rank's pool has, by the configured size or the memory that is free."""
    page_bytes = config.page_size * KVShape.of(spec).token_bytes
    if (tokens := config.kv_cache_tokens_of(transport.rank)) is not None:
        return tokens // config.page_size
    size = config.kv_cache_memory_bytes
    if size is None:
        size = _memory_for_pool(config, transport, device)
        most = config.max_num_seqs * -(-spec.max_model_len // config.page_size)
        return _at_least_one_page(min(size // page_bytes, most), size, page_bytes)
    return _at_least_one_page(size // page_bytes, size, page_bytes)


def _at_least_one_page(pages: int, size: int, page_bytes: int) -> int:
    if pages < 1:
        raise ConfigError(
            f"the KV pool has {size} bytes, less than one page of {page_bytes} bytes; raise "
            "kv_cache_memory_bytes or lower page_size"
        )
    return pages


def _memory_for_pool(config: EngineConfig, transport: Transport, device: torch.device) -> int:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        fraction = config.gpu_memory_utilization or GPU_MEMORY_UTILIZATION
        return int(total * fraction) - (total - free)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fraction = config.gpu_memory_utilization or CPU_MEMORY_UTILIZATION
    return int(free * fraction) // transport.topology.num_ranks_beside(transport.rank)
