"""The command `longspan plan`: how many devices a context needs, without weights or devices."""

import dataclasses
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longspan.config import Dtype, EngineConfig, KVCacheDtype, option
from longspan.cost.devices import DEVICES, planned_device
from longspan.errors import ConfigError, LongspanError
from longspan.token_count import parse_tokens

if TYPE_CHECKING:
    from longspan.cost.capacity_plan import CapacityPlan
    from longspan.models import ModelSpec

__all__ = ["plan"]


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The model, the devices and the load to plan for."""

    model: str = dataclasses.field(
        metadata={"help": "A config.json, a folder with one, or a model's id on the hub."}
    )
    device: str | None = option(
        None, f"Kind of device, by its vendor's figures: {', '.join(DEVICES)}."
    )
    calibration: str | None = option(
        None,
        "File that 'longspan calibrate' made: rates as measured, instead of the vendor's. Needs "
        "--memory or --device.",
    )
    memory: float | None = option(
        None,
        "GB (10^9 bytes) of memory of each device, instead of what its kind has; on CPUs what is "
        "free for each rank.",
    )
    count: int = option(8, "Devices in each node; each is one rank.")
    nodes: int = option(1, "Nodes (hosts).")
    context: str | None = option(
        None,
        "Longest context in tokens, prompt and output: 131072, 128K (x 1024) or 100k (x 1000). "
        "The model's own limit if not given.",
    )
    batch: int = option(1, "Requests of that length at the same time.")
    dtype: Dtype = option("auto", "Number type of weights and activations.")
    kv_cache_dtype: KVCacheDtype = option("auto", "Number type of the KV cache.")
    ttft: float | None = option(None, "Target: most seconds to the first token.")
    tpot: float | None = option(None, "Target: most seconds for each token after it.")


def plan(
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Show the numbers behind the choice of ranks and strategy."),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw TTFT and TPOT against context length into this PNG file."),
    ] = None,
    *,
    options: PlanOptions,
) -> None:
    """Plan capacity from a model's config.

    Tells what fits, how long the first token and each further one will take, the fewest devices
    that serve the context and batch, and what limits. Weights are not needed. Times are predicted:
    from a calibration, or from vendors' figures and the part of them that is assumed to be reached;
    no GPU was measured.
    """
    if plot is not None:
        from longspan.plot import check_plot, save_plot

        check_plot(plot)
    answer = _answer(options)
    if plot is not None:
        save_plot(answer, plot)
    if json:
        typer.echo(answer.to_json())
    else:
        from rich.console import Console

        from longspan.capacity_table import print_plan

        print_plan(answer, Console(), explain)


def _answer(options: PlanOptions) -> "CapacityPlan":
    from longspan.cost.capacity import Planner, Wanted

    context = None if options.context is None else parse_tokens("context", options.context)
    wanted = Wanted(
        device=planned_device(options.device, options.calibration, options.memory),
        count=options.count,
        nodes=options.nodes,
        batch=options.batch,
        ttft=options.ttft,
        tpot=options.tpot,
    )
    spec, num_parameters = _read(options, context)
    return Planner(spec, num_parameters, wanted).plan(context or spec.max_model_len)


def _read(options: PlanOptions, context: int | None) -> tuple["ModelSpec", int]:
    """A model's spec, with its own limit where it has one that can be served."""
    from longspan.models import read_spec

    config = EngineConfig(
        model=options.model, dtype=options.dtype, kv_cache_dtype=options.kv_cache_dtype
    )
    try:
        spec, num_parameters = read_spec(config)
    except LongspanError as error:
        if "max_model_len" not in str(error):
            raise
        if context is None:
            raise type(error)(str(error).replace("max_model_len", "context")) from None
        return read_spec(replace(config, max_model_len=context))
    if context is not None and context > spec.max_model_len:
        raise ConfigError(
            f"context={context:,} is above the {spec.max_model_len:,} tokens of "
            f"model={config.model!r}; give less, or a config.json with a higher "
            "max_position_embeddings"
        )
    return spec, num_parameters
