"""Starts the ranks of a config: in this process, in one of their own each, or as Ray actors."""

from typing import Protocol

from longspan.config import EngineConfig
from longspan.cost.samples import Samples
from longspan.engine.executor import Executor
from longspan.errors import ConfigError
from longspan.models import ModelSpec


class Fleet(Executor, Protocol):
    """Ranks that can measure themselves."""

    def measure(self) -> list[Samples]:
        """What each rank measures of itself, all at the same time; before any plan."""
        ...


def start_fleet(config: EngineConfig, spec: ModelSpec) -> Fleet:
    """Start all ranks and load the model.

    Raises:
        ConfigError, UnsupportedModelError: a rank can't be what the config asks for.
        RankFailedError: a rank could not start.
    """
    if config.executor == "uni":
        from longspan.worker.in_process import InProcessExecutor

        return InProcessExecutor(config, spec)
    if config.executor == "ray":
        try:
            from longspan.worker.ray_executor import RayExecutor
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "ray":
                raise
            raise ConfigError(
                "distributed_executor_backend='ray' needs Ray; install it with: "
                "pip install 'longspan[ray]'"
            ) from None
        return RayExecutor(config, spec)
    from longspan.worker.processes import ProcessExecutor

    return ProcessExecutor(config, spec)
