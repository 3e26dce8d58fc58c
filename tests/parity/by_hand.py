"""Weights of an FP8 checkpoint in either layout, and transformers' model filled with them, by hand:
names, transforms and products are written down here again and not taken from what is tested."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from ms4.weights import configs
from ms4.weights.convert import descale_directory
from ms4.weights.tables import Storage

TEXT = "language_model.model."
TOP = {
    "tok_embeddings": TEXT + "embed_tokens",
    "norm": TEXT + "norm",
    "output": "language_model.lm_head",
    "pre_mm_projector_norm": "multi_modal_projector.norm",
    "patch_merger.merging_layer": "multi_modal_projector.patch_merger.merging_layer",
    "vision_language_adapter.w_in": "multi_modal_projector.linear_1",
    "vision_language_adapter.w_out": "multi_modal_projector.linear_2",
    "vision_encoder.patch_conv": "vision_tower.patch_conv",
    "vision_encoder.ln_pre": "vision_tower.ln_pre",
}
TEXT_LAYER = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.wq_a": "self_attn.q_a_proj",
    "attention.q_a_norm": "self_attn.q_a_layernorm",
    "attention.wq_b": "self_attn.q_b_proj",
    "attention.wkv_a_with_mqa": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_a_norm": "self_attn.kv_a_layernorm",
    "attention.wkv_b": "self_attn.kv_b_proj",
    "attention.wo": "self_attn.o_proj",
    "gate": "mlp.gate",
    "shared_experts.w1": "mlp.shared_experts.gate_proj",
    "shared_experts.w2": "mlp.shared_experts.down_proj",
    "shared_experts.w3": "mlp.shared_experts.up_proj",
}
VISION_LAYER = {
    "attention_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
    "attention.wq": "attention.q_proj",
    "attention.wk": "attention.k_proj",
    "attention.wv": "attention.v_proj",
    "attention.wo": "attention.o_proj",
    "feed_forward.w1": "feed_forward.gate_proj",
    "feed_forward.w2": "feed_forward.down_proj",
    "feed_forward.w3": "feed_forward.up_proj",
}


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every file of weights."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def hf_name(native: str) -> str:
    """The HF name of a native module that is no routed expert."""
    if native in TOP:
        return TOP[native]
    before, _, after = native.partition("layers.")
    number, _, module = after.partition(".")
    if before:
        return f"vision_tower.transformer.layers.{number}.{VISION_LAYER[module]}"
    return f"{TEXT}layers.{number}.{TEXT_LAYER[module]}"


def product(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """fp32(q) · fp32(scale), rounded to BF16 once."""
    return (codes.to(torch.float32) * scale.to(torch.float32)).to(torch.bfloat16)


def _from_hf(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    weights = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            weights[name] = product(tensor, tensors[f"{name}_scale_inv"])
        elif not name.endswith(("_scale_inv", "activation_scale")):
            weights[name] = tensor
    return weights


def _from_native(tensors: dict[str, torch.Tensor], heads: int) -> dict[str, torch.Tensor]:
    weights, experts = {}, {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind != "weight":
            continue
        if tensor.dtype == torch.float8_e4m3fn:
            tensor = product(tensor, tensors[f"{module}.qscale_weight"])
        if ".experts." in module:
            experts[module] = tensor
            continue
        if module.endswith((".attention.wq", ".attention.wk")):
            rows, width = tensor.shape
            tensor = tensor.view(heads, rows // heads // 2, 2, width).transpose(1, 2)
            tensor = tensor.reshape(rows, width)
        weights[hf_name(module) + ".weight"] = tensor
    for layer in sorted({name.split(".")[1] for name in experts}):
        count = 1 + max(int(n.split(".")[3]) for n in experts if n.startswith(f"layers.{layer}."))
        own = [
            [experts[f"layers.{layer}.experts.{e}.w{w}"] for e in range(count)] for w in (1, 2, 3)
        ]
        at = f"{TEXT}layers.{layer}.mlp.experts."
        gate_up = [torch.cat(pair) for pair in zip(own[0], own[2], strict=True)]
        weights[at + "gate_up_proj"] = torch.stack(gate_up)
        weights[at + "down_proj"] = torch.stack(own[1])
    return weights


def bf16_weights(directory: Path) -> dict[str, torch.Tensor]:
    """The checkpoint's weights in BF16 by their names in the HF layout."""
    tensors = stored(directory)
    if (directory / "params.json").exists():
        params = json.loads((directory / "params.json").read_text())
        return _from_native(tensors, params["vision_encoder"]["num_attention_heads"])
    return _from_hf(tensors)


def native_checkpoint(directory: Path, weights: dict[str, torch.Tensor], config: dict) -> Path:
    """Write weights in the native layout and in FP8, every matrix under a scale of its own.

    Args:
        directory: is made.
        weights: in BF16, by their names in the HF layout.
        config: of the HF layout.
    """
    directory.mkdir()
    top, layer, vision = (
        {after: before for before, after in table.items()}
        for table in (TOP, TEXT_LAYER, VISION_LAYER)
    )
    tensors = {}

    def put(module: str, weight: torch.Tensor, coded: bool) -> None:
        if coded:
            scale = (weight.abs().amax().float() / 448).bfloat16()
            scale = torch.where(scale > 0, scale, torch.ones_like(scale))
            tensors[f"{module}.qscale_weight"] = scale
            tensors[f"{module}.qscale_act"] = (scale * 3).bfloat16()
            weight = (weight.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        tensors[f"{module}.weight"] = weight.contiguous()

    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        number, _, inside = module.partition("layers.")[2].partition(".")
        if ".mlp.experts." in name:
            for expert, matrix in enumerate(weight):
                parts = {"w2": matrix}
                if name.endswith("gate_up_proj"):
                    parts = dict(zip(("w1", "w3"), matrix.chunk(2), strict=True))
                for w, part in parts.items():
                    put(f"layers.{number}.experts.{expert}.{w}", part, coded=True)
        elif module in top:
            put(top[module], weight, coded=False)
        elif module.startswith(TEXT):
            coded = weight.dim() == 2 and inside != "mlp.gate"
            put(f"layers.{number}.{layer[inside]}", weight, coded)
        else:
            if inside in ("attention.q_proj", "attention.k_proj"):
                heads = config["vision_config"]["num_attention_heads"]
                rows, width = weight.shape
                weight = weight.view(heads, 2, rows // heads // 2, width).transpose(1, 2)
                weight = weight.reshape(rows, width)
            put(f"vision_encoder.transformer.layers.{number}.{vision[inside]}", weight, coded=False)
    save_file(tensors, directory / "consolidated.safetensors")
    params = configs.to_params(config, fp8=True)
    (directory / "params.json").write_text(json.dumps(params))
    return directory


def transformers_name(name: str) -> str:
    """Name in the model of a tensor of the HF layout."""
    for before, after in (
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ):
        if name.startswith(before):
            return after + name.removeprefix(before)
    raise AssertionError(name)


def model(weights: dict[str, torch.Tensor], config: dict, dtype: torch.dtype):
    """transformers' own model with these weights, eager experts, eager attention and the plain
    softmax scale.

    Args:
        weights: by their names in the HF layout.
        config: of the checkpoint.
        dtype: of all weights.
    """
    config = json.loads(json.dumps(config))
    config.pop("quantization_config", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    config["text_config"]["rope_parameters"] |= {"mscale_all_dim": 0.0, "attention_factor": 1.0}
    made = Mistral3ForConditionalGeneration._from_config(
        Mistral3Config(**config), attn_implementation="eager", experts_implementation="eager"
    )
    state = {transformers_name(name): tensor.to(dtype) for name, tensor in weights.items()}
    made.load_state_dict(state, strict=True)
    return made.eval()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    )


def assert_same_tensors(
    found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], but: Collection[str] = ()
) -> None:
    """The same names, and the same bits except for those of `but`."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert name in but or same_bits(found[name], tensor), name


def file_names(directory):
    """Names of the files in a directory, without those of directories, as of locks."""
    return sorted(path.name for path in directory.iterdir() if path.is_file())


def assert_same_files(found: Path, wanted: Path, names: Iterable[str]) -> None:
    """Byte for byte."""
    for name in names:
        assert (found / name).read_bytes() == (wanted / name).read_bytes(), name


def based(source: Path, to: Storage = "bf16", scale: str = "plain") -> Path:
    """A base of a checkpoint, beside it."""
    target = source.with_name(f"{source.name}-{to}-{scale}")
    descale_directory(source, target, to, scale)
    return target


def edit(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of each file of weights; their sizes stay what they were."""
    for path in directory.glob("*.safetensors"):
        size, tensors = path.stat().st_size, load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
        assert path.stat().st_size == size
