"""The probe passes what is exact and finds, in real models, every way of not being so."""

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from zoo import DYNAMIC, FULL, LONGROPE

from longspan.errors import UnsupportedModelError
from longspan.worker.probe import LayerShape, probe

# Sizes by the names that architectures have for them.
SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "intermediate_size_mlp": 96,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "kv_channels": 16,
}
TWO_FULL = {"layer_types": [FULL, FULL]}


def make(model_type: str, **fields: Any) -> PreTrainedModel:
    """A tiny random model, whose config nobody has looked at."""
    known = AutoConfig.for_model(model_type)
    names = {*known.to_dict(), *known.attribute_map}
    sizes = {name: size for name, size in SMALL.items() if name in names}
    config = AutoConfig.for_model(model_type, **{**sizes, **fields})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms, biases, sinks: as they are made they do little
            parameter.data += 0.2 * torch.randn(parameter.shape)
    return model


def refusal(model: PreTrainedModel, max_model_len: int | None = None) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        probe(model, "some/model", max_model_len)
    message = str(caught.value)
    assert message.startswith(
        f"model='some/model' ({type(model).__name__}) can't be served exactly"
    )
    assert "\n" not in message
    return message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", zoo.NAMES)
def test_the_zoo_passes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(zoo.build(name, tmp_path), dtype=dtype)
    groups = 1 if name == "gemma" else 2
    scaling = 0.3 if name == "granite" else 0.25
    assert probe(model, name) == [LayerShape(4, groups, 16, scaling)] * 3


@pytest.mark.parametrize("name", zoo.NAMES)
def test_greedy_text_of_the_zoo_varies(name: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(zoo.build(name, tmp_path))
    prompts = torch.randint(512, (2, 20), generator=torch.Generator().manual_seed(0))
    texts = [
        model.generate(prompt[None], max_new_tokens=24, do_sample=False, eos_token_id=None)
        for prompt in prompts
    ]
    first, second = (text[0, 20:].tolist() for text in texts)
    assert first != second
    assert len({*first, *second}) > 16


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("gpt2", {}),
        ("gpt_bigcode", {}),
        ("glm4_moe_lite", {"num_key_value_heads": 4}),
        ("gemma3_text", TWO_FULL),
        ("granitemoehybrid", TWO_FULL),
        ("qwen2_moe", {}),
        ("ministral3", {}),
        ("llama4_text", {**TWO_FULL, "attn_temperature_tuning": False}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    ],
)
def test_other_exact_models_pass(model_type: str, fields: dict[str, Any]) -> None:
    assert len(probe(make(model_type, **fields), model_type)) == 2


def test_the_scale_of_each_layer_is_found() -> None:
    model = make("gpt2", scale_attn_by_inverse_layer_idx=True)
    assert [shape.scaling for shape in probe(model, "gpt2")] == [0.25, 0.125]


@pytest.mark.parametrize(
    ("model_type", "fields", "limit", "reason"),
    [
        ("mistral", {"sliding_window": 99}, 99, "has a window of 99; set max_model_len<=99"),
        ("cohere2", {"sliding_window": 99}, 99, "has a window of 99"),
        ("llama4_text", {"attention_chunk_size": 99}, 99, "sees less than 100 tokens"),
        (
            "llama",
            {"rope_parameters": DYNAMIC, "max_position_embeddings": 64},
            64,
            "when packed with other prompts",
        ),
        ("llama", {"rope_parameters": LONGROPE}, 64, "when packed with other prompts"),
        ("phi3", {"sliding_window": 99}, 99, "has a window of 99"),
    ],
)
def test_what_shows_only_in_long_contexts(
    model_type: str, fields: dict[str, Any], limit: int, reason: str
) -> None:
    model = make(model_type, **{"num_key_value_heads": 4, **fields})
    probe(model, model_type, max_model_len=limit)
    assert reason in refusal(model, max_model_len=limit + 1)


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("gemma2", TWO_FULL, "it hands softcap to its attention"),
        ("gpt_oss", TWO_FULL, "it hands s_aux to its attention"),
        ("doge", {}, "it hands a mask or bias to its attention"),
        ("bert", {}, "its attention isn't causal"),
        ("llama", {"is_causal": False}, "isn't causal"),
        ("falcon", {}, "its attention function can't be replaced"),
        ("nemotron", {}, "doesn't pass its keyword arguments on"),
        ("diffllama", {}, "its layers don't attend once each, in order"),
        ("hrm_text", {"num_key_value_heads": 4}, "its layers don't attend once each, in order"),
        ("lfm2", {"layer_types": ["conv", FULL]}, "its layers don't attend once each, in order"),
        (
            "deepseek_v3",
            {"num_key_value_heads": 4, "v_head_dim": 16},
            "its keys have size 32, its values 16",
        ),
        ("jetmoe", {}, "KV heads have number and size (4, 16), in its config (2, 16)"),
        ("mamba", {"state_size": 8}, "0 of its 2 layers attend"),
        ("zaya", {"num_experts_per_tok": 1}, "when packed with other prompts"),
        (
            "llama4_text",
            {**TWO_FULL, "no_rope_layers": [1, 0]},
            "when told a cache's length",
        ),
    ],
)
def test_a_fault_is_found(model_type: str, fields: dict[str, Any], reason: str) -> None:
    assert reason in refusal(make(model_type, **fields))


def test_a_model_that_ignores_logits_to_keep_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda logits_to_keep=0, **inputs: forward(**inputs))
    assert "it ignores logits_to_keep" in refusal(model)


def test_layers_that_differ_are_found() -> None:
    model = make("llama")
    model.model.layers[1] = make("llama", num_key_value_heads=4).model.layers[1]
    model.model.layers[1].self_attn.config = model.config
    assert "its layers differ in the number or size of their heads" in refusal(model)


def test_layers_that_don_t_attend_are_found() -> None:
    model = make("llama")
    model.config.num_hidden_layers = 3
    assert "2 of its 3 layers attend" in refusal(model)


def shift(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Every token sees a bit of the one before it in the row."""
    return (inputs[0] + 0.2 * inputs[0].roll(1, dims=1),)


def normalise(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0] - inputs[0].mean(dim=1, keepdim=True),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mix", [shift, normalise])
def test_tokens_that_meet_outside_attention_are_found(mix: Any, dtype: torch.dtype) -> None:
    model = make("llama").to(dtype)
    probe(model, "llama")
    model.model.layers[1].mlp.register_forward_pre_hook(mix)
    assert "when packed with other prompts" in refusal(model)


def test_a_cache_that_would_round_keys_is_found() -> None:
    model = make("llama").bfloat16()
    attention = model.model.layers[1].self_attn
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection.register_forward_hook(lambda module, inputs, output: output.float())
    attention.o_proj.register_forward_pre_hook(lambda module, inputs: (inputs[0].bfloat16(),))
    assert "its keys and values aren't all torch.bfloat16, as its weights" in refusal(model)


def test_a_close_choice_that_rounding_turns_is_forgiven() -> None:
    model = make("llama")
    calls: list[int] = []

    def disturb(module: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
        calls.append(1)
        return logits.flip(-1) if len(calls) == 3 else logits

    model.lm_head.register_forward_hook(disturb)
    probe(model, "llama")
    assert len(calls) == 3 + 6


def test_the_model_is_left_as_it_was() -> None:
    for model in (make("llama"), make("mistral", sliding_window=99)):
        model.set_attn_implementation("sdpa")
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        random = torch.get_rng_state()
        if model.config.model_type == "llama":
            assert probe(model, "a") == probe(model, "a")
        else:
            refusal(model)
        assert model.config._attn_implementation == "sdpa"
        assert torch.equal(torch.get_rng_state(), random)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_running_out_of_memory_is_no_fault_of_the_model() -> None:
    def fail(module: nn.Module, inputs: Any) -> None:
        raise torch.OutOfMemoryError("full")

    model = make("llama")
    model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        probe(model, "llama")
