"""Starts an engine: its model, its tokenizer, its ranks."""

import logging

from longspan.config import EngineConfig
from longspan.cost.calibration import Calibration
from longspan.engine.engine import Engine
from longspan.worker.forker import Forker

logger = logging.getLogger(__name__)


def start_engine(config: EngineConfig) -> Engine:
    """An engine whose ranks run and have the model; `engine.executor.close()` ends them.

    Raises:
        ConfigError: the model or an option's file can't be found, or doesn't fit.
        UnsupportedModelError: the model can't be served exactly.
        RankFailedError: a rank could not start.
    """
    rates = None if config.calibration is None else Calibration.load(config.calibration).rates
    if config.executor == "mp":
        Forker.prepare()
    from longspan.models import load_spec  # imports torch and transformers, which takes seconds
    from longspan.tokenizer import load_tokenizer
    from longspan.worker.fleet import start_fleet

    spec = load_spec(config)
    if config.executor == "mp":
        Forker.current()
    tokenizer = load_tokenizer(config)
    engine = Engine(config, spec, start_fleet(config, spec), tokenizer, rates=rates)
    limit, asked = engine.context_limit, config.max_model_len
    if asked is not None and limit < asked:
        logger.warning(
            "all KV pools together hold %d tokens, less than max_model_len=%d: that is the "
            "longest context",
            limit,
            asked,
        )
    return engine
