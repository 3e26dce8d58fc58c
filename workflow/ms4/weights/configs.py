"""The model's settings in the two layouts: `config.json` and Mistral's `params.json`.

Names and defaults of `params.json` are those that the public converter of transformers reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ms4 import spec
from ms4.errors import Ms4Error


def hf_config(dims: spec.Dimensions) -> dict[str, Any]:
    """`config.json` as the published checkpoint has it, with these dimensions."""
    return {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "dtype": "bfloat16",
        "image_token_index": 10,
        "model_type": "mistral3",
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": dims.merge,
        "tie_word_embeddings": False,
        "vision_feature_layer": -1,
        "text_config": {
            "model_type": "mistral4",
            "vocab_size": dims.vocabulary,
            "hidden_size": dims.hidden,
            "intermediate_size": 3 * dims.hidden,
            "moe_intermediate_size": dims.expert_width,
            "num_hidden_layers": dims.layers,
            "num_attention_heads": dims.heads,
            "num_key_value_heads": dims.heads,
            "n_shared_experts": dims.shared_experts,
            "n_routed_experts": dims.experts,
            "num_experts_per_tok": dims.experts_per_token,
            "first_k_dense_replace": 0,
            "q_lora_rank": dims.q_rank,
            "kv_lora_rank": dims.kv_rank,
            "qk_nope_head_dim": dims.nope,
            "qk_rope_head_dim": dims.rope,
            "v_head_dim": dims.value,
            "hidden_act": "silu",
            "initializer_range": 0.05,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 1048576,
            "tie_word_embeddings": False,
            "rope_interleave": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "type": "yarn",
                "rope_theta": 10000.0,
                "factor": 128.0,
                "original_max_position_embeddings": 8192,
                "max_position_embeddings": 1048576,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": dims.vision_hidden,
            "intermediate_size": dims.vision_width,
            "num_hidden_layers": dims.vision_layers,
            "num_attention_heads": dims.vision_heads,
            "head_dim": dims.vision_head,
            "patch_size": dims.patch,
            "image_size": 1540,
            "hidden_act": "silu",
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "quantization_config": fp8_quantization(),
    }


def fp8_quantization() -> dict[str, Any]:
    """The block of `config.json` that says how the published checkpoint is in FP8."""
    return {
        "quant_method": "fp8",
        "activation_scheme": "static",
        "weight_block_size": None,
        "modules_to_not_convert": [
            "model.vision_tower",
            "model.multi_modal_projector",
            "lm_head",
        ],
    }


def base_config(config: Mapping[str, Any], dims: spec.Dimensions, scale: str) -> dict[str, Any]:
    """The base's config.json: no quantization block, and the softmax scale written out.

    `plain` is written as yarn parameters that every version of transformers reads as
    1/sqrt(head): mscale_all_dim 0 switches the factor off, and attention_factor 1 keeps cos and sin
    from being multiplied instead. `softmax_scale` is what our own attention uses.
    """
    made = {key: value for key, value in config.items() if key != "quantization_config"}
    text = dict(made["text_config"])
    rope = dict(text.get("rope_parameters") or {})
    text["softmax_scale"] = dims.softmax_scales(rope)[scale]
    rope |= {"mscale_all_dim": 0.0 if scale == "plain" else 1.0, "attention_factor": 1.0}
    text["rope_parameters"] = rope
    return {**made, "text_config": text, "dtype": "bfloat16"}


def to_params(config: Mapping[str, Any], *, fp8: bool) -> dict[str, Any]:
    """`config.json` → `params.json`.

    Args:
        config: of a Mistral Small 4.
        fp8: whether the weights beside it are in FP8 with scales, or in BF16.
    """
    dims = spec.dimensions_from_config(config, "config.json")
    text, vision = config["text_config"], config.get("vision_config") or {}
    rope = text.get("rope_parameters") or {}
    params: dict[str, Any] = {
        "dim": dims.hidden,
        "n_layers": dims.layers,
        "head_dim": dims.head,
        "hidden_dim": text.get("intermediate_size", 3 * dims.hidden),
        "n_heads": dims.heads,
        "n_kv_heads": dims.heads,
        "norm_eps": text.get("rms_norm_eps", 1e-6),
        "vocab_size": dims.vocabulary,
        "tied_embeddings": False,
        "rope_theta": rope.get("rope_theta", 10000.0),
        "max_position_embeddings": text.get("max_position_embeddings", 1048576),
        "q_lora_rank": dims.q_rank,
        "kv_lora_rank": dims.kv_rank,
        "qk_nope_head_dim": dims.nope,
        "qk_rope_head_dim": dims.rope,
        "v_head_dim": dims.value,
        "llama_4_scaling": {
            "original_max_position_embeddings": rope.get("original_max_position_embeddings", 8192),
            "beta": rope.get("llama_4_scaling_beta", 0.1),
        },
        "yarn": {
            "factor": rope.get("factor", 128.0),
            "original_max_position_embeddings": rope.get("original_max_position_embeddings", 8192),
            "alpha": rope.get("beta_slow", 1.0),
            "beta": rope.get("beta_fast", 32.0),
            "apply_scale": False,
        },
        "moe": {
            "num_experts": dims.experts,
            "num_experts_per_tok": dims.experts_per_token,
            "num_shared_experts": dims.shared_experts,
            "expert_hidden_dim": dims.expert_width,
            "first_k_dense_replace": 0,
            "routed_scale": text.get("routed_scaling_factor", 1.0),
            "num_expert_groups": text.get("n_group", 1),
            "num_expert_groups_per_tok": text.get("topk_group", 1),
        },
        "vision_encoder": {
            "hidden_size": dims.vision_hidden,
            "num_hidden_layers": dims.vision_layers,
            "num_attention_heads": dims.vision_heads,
            "head_dim": dims.vision_head,
            "intermediate_size": dims.vision_width,
            "num_channels": 3,
            "patch_size": dims.patch,
            "image_size": vision.get("image_size", 1540),
            "max_image_size": vision.get("image_size", 1540),
            "rope_theta": (vision.get("rope_parameters") or {}).get("rope_theta", 10000.0),
            "spatial_merge_size": dims.merge,
            "mm_projector_id": "patch_merge",
            "add_pre_mm_projector_layer_norm": True,
            "adapter_bias": False,
            "image_token_id": 10,
            "image_break_token_id": 12,
            "image_end_token_id": 13,
        },
    }
    if fp8:
        params["quantization"] = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
    return params


_SIZES = {
    "vocabulary": ("vocab_size",),
    "hidden": ("dim",),
    "layers": ("n_layers",),
    "experts": ("moe", "num_experts"),
    "experts_per_token": ("moe", "num_experts_per_tok"),
    "expert_width": ("moe", "expert_hidden_dim"),
    "shared_experts": ("moe", "num_shared_experts"),
    "heads": ("n_heads",),
    "q_rank": ("q_lora_rank",),
    "kv_rank": ("kv_lora_rank",),
    "nope": ("qk_nope_head_dim",),
    "rope": ("qk_rope_head_dim",),
    "value": ("v_head_dim",),
    "vision_hidden": ("vision_encoder", "hidden_size"),
    "vision_layers": ("vision_encoder", "num_hidden_layers"),
    "vision_heads": ("vision_encoder", "num_attention_heads"),
    "vision_head": ("vision_encoder", "head_dim"),
    "vision_width": ("vision_encoder", "intermediate_size"),
    "patch": ("vision_encoder", "patch_size"),
    "merge": ("vision_encoder", "spatial_merge_size"),
}
"""Dimension → where `params.json` has it."""
_MOST = 1e12
"""Of a setting that is no size: beyond is damage."""
_DERIVED = {"vision_head": ("vision_hidden", "vision_heads")}
"""Dimension that `params.json` may leave out → whose quotient it is."""


def _section(table: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    section = table.get(key) or {}
    if not isinstance(section, Mapping):
        raise Ms4Error(f"{where}: {key} is {section!r:.40}; it must be a table of settings.")
    return section


def _number(table: Mapping[str, Any], key: str, default: float, where: str) -> float:
    value = table.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST:
        raise Ms4Error(f"{where}: {key} is {value!r:.40}; it must be a number from 0 to {_MOST:g}.")
    return float(value)


def check_rotary(config: Mapping[str, Any], where: str) -> None:
    """Check what the softmax scale is computed from, before hours are spent on weights for it.

    Raises:
        Ms4Error: it is no number.
    """
    rope = _section(config["text_config"], "rope_parameters", where)
    for key in ("factor", "mscale_all_dim"):
        _number(rope, key, 1.0, where)


def from_params(params: Any, where: str) -> dict[str, Any]:
    """`params.json` → `config.json`, by the rules of the public converter.

    Args:
        params: what the file holds.
        where: what error messages call it.

    Raises:
        Ms4Error: a size is missing or of the wrong kind, or it is another model.
    """
    sizes: dict[str, int] = {}
    for name, path in _SIZES.items():
        value = params
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is None and name in _DERIVED:
            over, under = (sizes[part] for part in _DERIVED[name])
            value = over // under
        if type(value) is not int or not 1 <= value <= spec.MOST:
            raise Ms4Error(
                f"{where}: {'.'.join(path)} is {value!r:.40}, not the size of a Mistral Small 4; "
                "give the params.json that belongs to the weights."
            )
        sizes[name] = value
    if params["moe"].get("first_k_dense_replace", 0):
        raise Ms4Error(f"{where}: moe.first_k_dense_replace must be 0: all layers are MoE.")
    config = hf_config(spec.Dimensions(**sizes))
    text, vision = config["text_config"], config["vision_config"]
    encoder = params["vision_encoder"]
    yarn = _section(params, "yarn", where)
    scaling = _section(params, "llama_4_scaling", where)
    text |= {
        "intermediate_size": params.get("hidden_dim", text["intermediate_size"]),
        "rms_norm_eps": params.get("norm_eps", text["rms_norm_eps"]),
        "routed_scaling_factor": params["moe"].get("routed_scale", 1.0),
        "n_group": params["moe"].get("num_expert_groups", 1),
        "topk_group": params["moe"].get("num_expert_groups_per_tok", 1),
    }
    length = params.get("max_position_embeddings", params.get("max_seq_len"))
    if length is not None:
        text["max_position_embeddings"] = length
    text["rope_parameters"] |= {
        "rope_theta": _number(params, "rope_theta", 10000.0, where),
        "factor": _number(yarn, "factor", 128.0, where),
        "original_max_position_embeddings": yarn.get("original_max_position_embeddings", 8192),
        "max_position_embeddings": text["max_position_embeddings"],
        "beta_fast": _number(yarn, "beta", 32.0, where),
        "beta_slow": _number(yarn, "alpha", 1.0, where),
        "llama_4_scaling_beta": scaling.get("beta", 0.1),
    }
    vision["image_size"] = encoder.get("image_size", vision["image_size"])
    vision["rope_parameters"]["rope_theta"] = _number(encoder, "rope_theta", 10000.0, where)
    if not params.get("quantization"):
        del config["quantization_config"]
    return config
