"""Runners in one process don't disturb each other, nor what comes after them."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import zoo
from transformers import AutoModelForCausalLM, PreTrainedModel

from longspan.config import EngineConfig
from longspan.models import load_spec
from longspan.parallel.transport import ThreadTransport
from longspan.topology import Topology
from longspan.worker.model_runner import ModelRunner

RANKS = 4
ROUNDS = 3


def test_threads_that_load_at_once_leave_transformers_as_it_was(tmp_path: Path) -> None:
    folder = zoo.build("llama", tmp_path, tie_word_embeddings=True)
    config = EngineConfig(model=str(folder), context_parallel_size=RANKS, kv_cache_tokens=64)
    spec, before = load_spec(config), PreTrainedModel.tie_weights

    def load(transport: ThreadTransport) -> ModelRunner:
        return ModelRunner(config, spec, transport, torch.device("cpu"))

    with ThreadPoolExecutor(RANKS) as threads:
        for _ in range(ROUNDS):
            transports = ThreadTransport.connect(Topology.of_hosts([RANKS]))
            assert len(list(threads.map(load, transports))) == RANKS
    assert PreTrainedModel.tie_weights is before
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
