"""What a config tells: a model's sizes, and that it can't be served exactly."""

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zoo
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoTokenizer
from zoo import DYNAMIC, FULL, LONGROPE

from longspan.config import EngineConfig
from longspan.errors import ConfigError, UnsupportedModelError
from longspan.models import ModelSpec, load_spec


def checkpoint(folder: Path, model_type: str, **fields: Any) -> Path:
    """A checkpoint with a real config, and weights in name only."""
    fields = copy.deepcopy(fields)  # configs change what they are given
    AutoConfig.for_model(model_type, **fields).save_pretrained(folder)
    save_file({"lm_head.weight": np.zeros(1, np.float32)}, folder / "model.safetensors")
    return folder


def spec(folder: Path, **options: Any) -> ModelSpec:
    return load_spec(EngineConfig(model=str(folder), **options))


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        spec(folder, **options)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


def change(folder: Path, **fields: Any) -> Path:
    """Change fields of a saved config; None takes one away."""
    file = folder / "config.json"
    merged = {**json.loads(file.read_text()), **fields}
    file.write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))
    return folder


def active_parameters(folder: Path) -> int:
    """Weights of a checkpoint that one token meets; the zoo sends it to 2 experts of a layer."""
    count = 0
    for name, tensor in load_file(folder / "model.safetensors").items():
        expert = re.search(r"\.experts\.(\d+)\.", name)
        if "embed" not in name and "lm_head" not in name and (not expert or int(expert[1]) < 2):
            count += tensor.size
    return count


@pytest.mark.parametrize("name", zoo.NAMES)
def test_the_zoo_is_accepted(name: str, tmp_path: Path) -> None:
    folder = zoo.build(name, tmp_path)
    found = spec(folder)
    assert found == ModelSpec(
        name=str(folder),
        architecture=found.architecture,
        num_layers=3,
        num_heads=4,
        num_kv_heads=1 if name == "gemma" else 2,
        head_dim=16,
        vocab_size=512,
        max_model_len=8192,
        eos_token_ids=(0,),
        dtype="float32",
        kv_cache_dtype="float32",
        num_active_parameters=active_parameters(folder),
    )
    assert found.architecture.lower() == f"{name.replace('_', '')}forcausallm"


def test_active_parameters_follow_from_the_config_alone(tmp_path: Path) -> None:
    """Also where a checkpoint's tensors have other names, and embedding and head are one."""
    fields = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    llama = checkpoint(tmp_path / "llama", "llama", tie_word_embeddings=True, **fields, **heads)
    layer = 64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 96 + 2 * 64
    assert spec(llama).num_active_parameters == 3 * layer + 64
    experts = {"num_local_experts": 8, "num_experts_per_tok": 3}
    mixtral = checkpoint(tmp_path / "mixtral", "mixtral", **fields, **heads, **experts)
    layer += 64 * 8 + 2 * 3 * 64 * 96
    assert spec(mixtral, max_model_len=100).num_active_parameters == 3 * layer + 64


def test_a_model_that_cannot_be_built(tmp_path: Path) -> None:
    folder = change(checkpoint(tmp_path, "llama"), hidden_act="none such")
    with pytest.raises(ConfigError, match=r"can't be built: .*none such") as caught:
        spec(folder)
    assert "\n" not in str(caught.value)


SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("t5", {}, "encoder-decoder"),
    ("bart", {}, "encoder-decoder"),
    ("vit", {}, "not a causal language model"),
    ("bert", {"architectures": ["BertForMaskedLM"]}, "not a causal language model"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "not a causal language model"),
    ("llama", {"architectures": ["LlamaModel"]}, "not a causal language model"),
    ("llama", {"is_causal": False}, "isn't causal"),
    ("gemma3", {}, "multimodal"),
    ("bloom", {}, "doesn't let another attention function in"),
    ("mpt", {}, "doesn't let another attention function in"),
    ("falcon", {"alibi": True}, "ALiBi"),
    ("falcon", {}, "doesn't let another attention function in"),
    ("gemma2", {}, "softcap"),
    ("vaultgemma", {}, "softcap"),
    ("gpt_oss", {}, "its attention has sinks"),
    ("llama4_text", {}, "attention temperature follows rows of the batch"),
    ("mamba", {}, "linear_attention layers"),
    ("rwkv", {}, "recurrent state"),
    ("jamba", {}, "linear_attention layers"),
    ("qwen3_next", {}, "linear_attention layers"),
    ("granitemoehybrid", {}, "linear_attention layers"),
    ("falcon_h1", {}, "hybrid layers"),
    ("lfm2", {"layer_types": ["conv", FULL], "num_hidden_layers": 2}, "conv layers"),
    ("deepseek_v32", {}, "indexed_attention layers"),
    ("deepseek_v3", {}, "keys have size 192, its values 128"),
    ("gemma3n_text", {}, "share another layer's KV"),
    ("mllama", {}, "some of its layers attend to something else than its text"),
    ("gemma4_text", {}, "its layers differ in head_dim"),
    ("llama", {"per_layer_config": {1: {"num_key_value_heads": 1}}}, "in num_key_value_heads"),
    ("llama", {"per_layer_config": {1: {"skip": ["self_attn"]}}}, "its layers differ in kind"),
    ("llama", {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "type 'spiral'"),
]


@pytest.mark.parametrize(("model_type", "fields", "reason"), REFUSED)
def test_a_model_is_refused_by_name_and_reason(
    model_type: str, fields: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    assert reason in refusal(checkpoint(tmp_path, model_type, **fields))


# Model, its fields, and the longest context up to which it is exact.
LIMITED: list[tuple[str, dict[str, Any], int]] = [
    ("mistral", {}, 4096),
    ("phi3", {"sliding_window": 2047}, 2047),
    ("starcoder2", {"sliding_window": 1000}, 1000),
    ("gemma3_text", {}, 4096),
    ("cohere2", {"sliding_window": 128}, 128),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, 4096),
    ("llama4_text", {"attn_temperature_tuning": False}, 8192),
    ("llama", {"rope_parameters": LONGROPE, **SMALL}, 64),
    ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32, **SMALL}, 32),
    (
        "gemma3_text",
        {"rope_parameters": {FULL: LONGROPE, "sliding_attention": DYNAMIC}, "head_dim": 16},
        64,
    ),
    ("llama", {"rope_parameters": DYNAMIC}, 2048),
]


@pytest.mark.parametrize(("model_type", "fields", "limit"), LIMITED)
def test_what_shows_only_in_long_contexts_limits_them(
    model_type: str, fields: dict[str, Any], limit: int, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path, model_type, **fields)
    assert spec(folder, max_model_len=limit).max_model_len == limit
    assert refusal(folder, max_model_len=limit + 1).endswith(f"set max_model_len<={limit}")
    if AutoConfig.from_pretrained(folder).max_position_embeddings > limit:
        assert f"set max_model_len<={limit}" in refusal(folder)


def test_a_limit_says_why(tmp_path: Path) -> None:
    window = checkpoint(tmp_path / "window", "mistral")
    assert "its sliding_attention layers see only 4096 tokens;" in refusal(window)
    chunks = checkpoint(tmp_path / "chunks", "llama4_text", attn_temperature_tuning=False)
    assert "its chunked_attention layers see only 8192 tokens;" in refusal(chunks)
    rope = checkpoint(tmp_path / "rope", "llama", rope_parameters=LONGROPE, **SMALL)
    assert "its RoPE (longrope) follows the longest position in a batch;" in refusal(rope)


ACCEPTED: list[tuple[str, dict[str, Any], tuple[int, int]]] = [
    ("gpt2", {"n_head": 4, "n_embd": 64}, (4, 16)),
    ("gpt_bigcode", {"n_head": 4, "n_embd": 64}, (1, 16)),
    ("gpt_neox", {"num_attention_heads": 4, "hidden_size": 64}, (4, 16)),
    ("glm4_moe_lite", {}, (20, 256)),
    ("mistral", {"sliding_window": None}, (8, 128)),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 64}, (32, 128)),
    ("qwen3_moe", {"use_sliding_window": False, "sliding_window": 64}, (4, 64)),
    ("lfm2", {"layer_types": [FULL, FULL], "num_hidden_layers": 2}, (8, 80)),
    ("granitemoehybrid", {"layer_types": [FULL] * 32}, (32, 128)),
    ("ministral3", {}, (8, 128)),
]


@pytest.mark.parametrize(("model_type", "fields", "shape"), ACCEPTED)
def test_what_looks_like_a_fault_but_is_none_is_accepted(
    model_type: str, fields: dict[str, Any], shape: tuple[int, int], tmp_path: Path
) -> None:
    found = spec(checkpoint(tmp_path, model_type, **fields))
    assert (found.num_kv_heads, found.head_dim) == shape


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        {"rope_type": "proportional", "partial_rotary_factor": 0.5},
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rope_that_follows_a_tokens_own_position_is_accepted(
    rope: dict[str, Any], tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path, "llama", rope_parameters={"rope_theta": 1e4, **rope})
    assert spec(folder).max_model_len == 2048


def test_a_model_that_is_nowhere() -> None:
    with pytest.raises(ConfigError) as caught:
        load_spec(EngineConfig(model="foo"))
    # Tests run offline.
    assert str(caught.value) == "model='foo': no such folder, and the hub can't be reached"
    with pytest.raises(ConfigError, match=r"^model='/no/such/model': no such folder"):
        load_spec(EngineConfig(model="/no/such/model"))


def test_files_that_are_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        spec(tmp_path)
    folder = checkpoint(tmp_path / "model", "llama")
    weights = folder / "model.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ConfigError, match="its weights can't be read"):
        spec(folder)
    with pytest.raises(ConfigError, match="is a file; give the folder that it is in"):
        spec(weights)
    weights.unlink()
    with pytest.raises(ConfigError, match="has no safetensors weights"):
        spec(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"lm_head.weight": "model-1-of-2.safetensors"}}')
    with pytest.raises(ConfigError, match=r"has no model-1-of-2\.safetensors"):
        spec(folder)
    shutil.copy(checkpoint(tmp_path / "other", "llama") / weights.name, folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"its config\.json can't be read"):
        spec(folder)


def test_config_values_that_no_model_can_have(tmp_path: Path) -> None:
    folder = change(checkpoint(tmp_path, "llama"), hidden_size="wide")
    with pytest.raises(
        ConfigError, match=r"its config\.json is not valid: .*hidden_size"
    ) as caught:
        spec(folder)
    assert "\n" not in str(caught.value)


def test_max_model_len(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "llama")
    assert spec(folder).max_model_len == 2048
    assert spec(folder, max_model_len=100).max_model_len == 100
    with pytest.raises(ConfigError, match="max_model_len=2049 is above the 2048 tokens of model="):
        spec(folder, max_model_len=2049)
    change(folder, max_position_embeddings=-1)
    assert spec(folder, max_model_len=2049).max_model_len == 2049
    with pytest.raises(ConfigError, match="has no longest context; set max_model_len"):
        spec(folder)


@pytest.mark.parametrize(
    ("generation", "eos", "found"),
    [
        ({"eos_token_id": [7, 9]}, 2, (7, 9)),
        ({"eos_token_id": 7}, 2, (7,)),
        ({}, 2, ()),
        (None, 2, (2,)),
        (None, [2, 3], (2, 3)),
        (None, 0, (0,)),
    ],
)
def test_eos_is_that_of_generate(
    generation: dict[str, Any] | None, eos: Any, found: tuple[int, ...], tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path, "llama", eos_token_id=eos)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    assert spec(folder).eos_token_ids == found


def test_dtype(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "llama", dtype="bfloat16")
    assert spec(folder).dtype == "bfloat16"
    assert spec(folder, dtype="float16").dtype == "float16"
    change(folder, dtype="float64")
    with pytest.raises(ConfigError, match="has dtype='float64'; set one of"):
        spec(folder)
    change(folder, dtype=None)
    assert spec(folder).dtype == "float32"


def test_a_model_type_that_transformers_does_not_know(tmp_path: Path) -> None:
    folder = change(checkpoint(tmp_path, "llama"), model_type="llama99")
    assert "has no model_type='llama99'; update transformers" in refusal(folder)
    change(folder, auto_map={"AutoConfig": "code.Config"})
    with pytest.raises(ConfigError, match="brings its own code; set trust_remote_code=True"):
        spec(folder)


def test_own_code_runs_when_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    folder = checkpoint(tmp_path / "model", "llama", architectures=["OwnForCausalLM"])
    own = {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnForCausalLM"}
    change(folder, model_type="own_llama", auto_map=own)
    (folder / "own_code.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    assert spec(folder, trust_remote_code=True).architecture == "OwnForCausalLM"


def test_the_tokenizer_of_the_zoo(tmp_path: Path) -> None:
    zoo.build_tokenizer(zoo.build("llama", tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "An assignment's target is a list.\n\tdef f(été): 日本"
    token_ids = tokenizer.encode(text)
    assert tokenizer.decode(token_ids) == text
    assert len(tokenizer) == zoo.VOCAB_SIZE
    assert len(token_ids) < len(text.encode())
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (zoo.END, zoo.END_ID)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "user: Hi\nassistant:"
