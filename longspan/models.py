"""What a model is, and whether Longspan can serve it exactly, as far as its config tells.

Longspan replaces a model's attention function and nothing else. So a request's tokens may meet
only there, and attention must be plain: each query sees every earlier key, and scores are scaled,
nothing more. `load_spec` refuses what a config shows to be otherwise, before any worker starts.
What no config shows, `longspan.worker.probe` sees once the model is loaded.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from longspan.checkpoint import check_weights
from longspan.config import Dtype, EngineConfig
from longspan.errors import ConfigError, UnsupportedModelError

__all__ = ["ModelSpec", "kv_shape", "load_spec", "read_spec"]

# RoPE types whose angles depend on nothing but a token's position (see modeling_rope_utils.py).
_STATIC_ROPE = {"default", "linear", "yarn", "llama3", "proportional"}
_KNOWN_ROPE = _STATIC_ROPE | {"dynamic", "longrope"}

_CAUSAL_LMS = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())

# Layer types that are full attention while a context is not longer than a field of the config.
_WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}

# Fields of a config that, when set, change what attention computes.
_ATTENTION_FIELDS = {
    "alibi": "it adds ALiBi biases to attention scores",
    "attn_logit_softcapping": "it caps attention scores (softcap)",
    "attn_temperature_tuning": "its attention temperature follows rows of the batch, not positions",
    "num_kv_shared_layers": "some of its layers share another layer's KV",
    "cross_attention_layers": "some of its layers attend to something else than its text",
}


@dataclass(frozen=True)
class ModelSpec:
    """What the engine knows of a model; `max_model_len` is the longest context to be served.

    `num_active_parameters` are the weights that every token is multiplied with: no embedding, no
    head, which only sampled tokens meet, and of a layer's experts as many as a token is sent to.
    """

    name: str
    architecture: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    kv_cache_dtype: str
    num_active_parameters: int


@dataclass(frozen=True)
class _Model:
    """A model's config, that of its language part, and its class."""

    config: Any
    text: Any
    cls: Any


def load_spec(config: EngineConfig) -> ModelSpec:
    """Read what a model is, from its folder or the hub, and check that Longspan can serve it.

    Raises:
        ConfigError: there is no such model, a file of it is missing, or an option contradicts it.
        UnsupportedModelError: it can't be served exactly, at all or up to this max_model_len.
    """
    folder = Path(config.model)
    if folder.is_file():
        raise ConfigError(f"model={config.model!r} is a file; give the folder that it is in")
    if folder.is_dir():
        check_weights(folder, config.model)
    return read_spec(config)[0]


def read_spec(config: EngineConfig) -> tuple[ModelSpec, int]:
    """The same from a config alone, without weights; and the number of all the model's weights.

    The model is a folder, an id on the hub, or the file with the config itself.
    """
    hf = _read_config(config)
    model = _Model(hf, hf.get_text_config(decoder=True), _model_class(config, hf))
    for fault in _faults(model):
        raise _unsupported(config, model.cls.__name__, fault)
    built = _built(config, model)
    num_kv_heads, head_dim, _ = kv_shape(model.text)
    spec = ModelSpec(
        name=config.model,
        architecture=model.cls.__name__,
        num_layers=model.text.num_hidden_layers,
        num_heads=model.text.num_attention_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=model.text.vocab_size,
        max_model_len=_max_model_len(config, model),
        eos_token_ids=_eos_token_ids(config, model),
        dtype=(dtype := _dtype(config, model)),
        kv_cache_dtype=dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype,
        num_active_parameters=_num_active_parameters(model, built),
    )
    return spec, sum(weight.numel() for weight in built.parameters())  # shared ones count once


def _read_config(config: EngineConfig) -> Any:
    name, trusted = config.model, config.trust_remote_code
    try:
        raw, _ = PreTrainedConfig.get_config_dict(name, revision=config.revision)
    except OSError as error:
        raise ConfigError(f"model={name!r}: {_why_no_config(config, error)}") from error
    model_type = raw.get("model_type")
    own_code = "AutoConfig" in (raw.get("auto_map") or {})
    if model_type not in CONFIG_MAPPING and own_code and not trusted:
        raise ConfigError(f"model={name!r} brings its own code; set trust_remote_code=True")
    if model_type not in CONFIG_MAPPING and not own_code:
        raise UnsupportedModelError(
            f"model={name!r}: transformers {transformers.__version__} has no "
            f"model_type={model_type!r}; update transformers"
        )
    try:
        return AutoConfig.from_pretrained(name, revision=config.revision, trust_remote_code=trusted)
    except Exception as error:  # config classes raise errors of many kinds
        reason = " ".join(str(error).split())
        raise ConfigError(f"model={name!r}: its config.json is not valid: {reason}") from error


def _why_no_config(config: EngineConfig, error: OSError) -> str:
    if Path(config.model).exists():
        return "its config.json can't be read"
    if isinstance(error.__cause__, GatedRepoError):
        return "gated on the hub; ask for access there, then log in"
    if isinstance(error.__cause__, LocalEntryNotFoundError):
        return "no such folder, and the hub can't be reached"
    revision = f" at revision={config.revision!r}" if config.revision else ""
    return f"no such folder, and not found on the hub{revision}"


def _model_class(config: EngineConfig, hf: Any) -> Any:
    """The class that AutoModelForCausalLM loads for a config."""
    listed: list[str] = getattr(hf, "architectures", None) or []
    architecture = listed[0] if listed else hf.model_type
    if hf.is_encoder_decoder:
        raise _unsupported(config, architecture, "it is an encoder-decoder")
    own_code = (getattr(hf, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if own_code and config.trust_remote_code:
        return get_class_from_dynamic_module(own_code, config.model, revision=config.revision)
    # The weights of a classifier or an encoder would load too, with a random language head.
    other = hasattr(transformers, architecture) and architecture not in _CAUSAL_LMS
    if other or type(hf) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _unsupported(config, architecture, "it is not a causal language model")
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(hf)]


def _unsupported(config: EngineConfig, architecture: str, fault: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"model={config.model!r} ({architecture}) can't be served exactly: {fault}"
    )


def _faults(model: _Model) -> Iterator[str]:
    """Why a model can't be served exactly, whatever the length of a context."""
    text, cls = model.text, model.cls
    if text is not model.config and cls.config_class is not type(text):
        yield "it is multimodal; use a checkpoint of its language part"
    if getattr(text, "is_heterogeneous", False):
        yield f"its layers differ in {', '.join(sorted(text.per_layer_attributes)) or 'kind'}"
    if getattr(text, "is_causal", True) is False:
        yield "its attention isn't causal"
    layer_types = getattr(text, "layer_types", None)
    for layer_type in sorted(set(layer_types or ()) - {"full_attention", *_WINDOWS}):
        yield f"it has {layer_type} layers, where tokens meet otherwise than by full attention"
    if cls._is_stateful and layer_types is None:
        yield "its layers keep a recurrent state"
    for field, fault in _ATTENTION_FIELDS.items():
        if getattr(text, field, None):
            yield fault
    if not cls._supports_attention_backend:
        yield "its code doesn't let another attention function in"
    for field in ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size"):
        if not hasattr(text, field):
            yield f"its config has no {field}"
    _, key_dim, value_dim = kv_shape(text)
    if key_dim != value_dim:
        yield f"its keys have size {key_dim}, its values {value_dim}"
    for rope_type in sorted({_rope_type(rope) for rope in _ropes(text)} - _KNOWN_ROPE):
        yield f"its RoPE type {rope_type!r} is unknown to Longspan"


def _limits(text: Any) -> Iterator[tuple[int, str]]:
    """Context lengths up to which a model is exact, each with what is inexact beyond."""
    layer_types = getattr(text, "layer_types", None)
    if layer_types is None:
        layer_types = _WINDOWS if getattr(text, "use_sliding_window", True) is not False else ()
    for layer_type in {*layer_types} & {*_WINDOWS}:
        window = getattr(text, _WINDOWS[layer_type], None)
        if window:
            yield window, f"its {layer_type} layers see only {window} tokens"
    for rope in _ropes(text):
        if _rope_type(rope) == "longrope":
            limit = rope["original_max_position_embeddings"]
            yield limit, "its RoPE (longrope) follows the longest position in a batch"
        elif _rope_type(rope) == "dynamic":
            limit = text.max_position_embeddings
            yield limit, "its RoPE (dynamic) follows the longest position in a batch"


def _ropes(text: Any) -> list[dict[str, Any]]:
    """The RoPE parameters of a config, or of each layer type in it."""
    rope: dict[str, Any] = getattr(text, "rope_parameters", None) or {}
    return [each for each in rope.values() if isinstance(each, dict)] or [rope]


def _rope_type(rope: dict[str, Any]) -> str:
    rope_type: str = rope.get("rope_type") or rope.get("type") or "default"
    return rope_type


def kv_shape(text: Any) -> tuple[int, int, int]:
    """Number of KV heads that a config tells of, and the size of a key and of a value."""
    num_heads: int = text.num_attention_heads
    if getattr(text, "kv_lora_rank", None):  # MLA, as attention sees it: one key for each head
        return num_heads, text.qk_nope_head_dim + text.qk_rope_head_dim, text.v_head_dim
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // num_heads
    num_kv_heads = getattr(text, "num_key_value_heads", None) or num_heads
    if getattr(text, "multi_query", False):
        num_kv_heads = 1
    return num_kv_heads, head_dim, getattr(text, "v_head_dim", None) or head_dim


def _max_model_len(config: EngineConfig, model: _Model) -> int:
    longest: int = getattr(model.text, "max_position_embeddings", None) or -1
    wanted = config.max_model_len or longest
    if wanted < 1:
        raise ConfigError(f"model={config.model!r} has no longest context; set max_model_len")
    for limit, fault in sorted(_limits(model.text)):
        if wanted > limit:
            fault = f"{fault}; set max_model_len<={limit}"
            raise _unsupported(config, model.cls.__name__, fault)
    if 0 < longest < wanted:
        raise ConfigError(
            f"max_model_len={wanted} is above the {longest} tokens of model={config.model!r}"
        )
    return wanted


def _eos_token_ids(config: EngineConfig, model: _Model) -> tuple[int, ...]:
    """The tokens that end a text, as `generate` finds them."""
    try:
        generation = GenerationConfig.from_pretrained(
            config.model, revision=config.revision or "main"
        )
        eos = generation.eos_token_id
    except OSError:
        eos = getattr(model.text, "eos_token_id", None)
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (eos,)


def _dtype(config: EngineConfig, model: _Model) -> str:
    if config.dtype != "auto":
        return config.dtype
    found = getattr(model.text, "dtype", None) or getattr(model.config, "dtype", None) or "float32"
    dtype = str(found).removeprefix("torch.")
    served = get_args(Dtype)[1:]
    if dtype not in served:
        raise ConfigError(f"model={config.model!r} has dtype={dtype!r}; set one of {served}")
    return dtype


def _built(config: EngineConfig, model: _Model) -> Any:
    """The model without memory for its weights; a checkpoint's may have other names and types."""
    try:
        with torch.device("meta"):
            built = model.cls(model.text)
    except Exception as error:  # models raise errors of many kinds
        reason = " ".join(str(error).split())
        raise ConfigError(f"model={config.model!r} can't be built: {reason}") from error
    if any("sink" in name.rpartition(".")[2] for name, _ in built.named_parameters()):
        raise _unsupported(config, model.cls.__name__, "its attention has sinks")
    return built


def _num_active_parameters(model: _Model, built: Any) -> int:
    active: int | None = getattr(model.text, "num_experts_per_tok", None)
    head, count = built.get_output_embeddings(), 0
    for name, module in built.named_modules():
        if module is not head and not isinstance(module, torch.nn.Embedding):
            for weight in module.parameters(recurse=False):
                met = weight[:active] if name.endswith(".experts") else weight  # [experts, ...]
                count += met.numel()
    return count
