"""The model as one table of tensors, from which planner, converter, loader and exporter all read.

A row says what a tensor is called on disk in the HF layout, in Mistral's native layout (with the
transform from there), and in transformers; its shape, its role, and the dtype it is stored in.
Tests assert the table against `Mistral3ForConditionalGeneration` on the meta device.

Shape letters: V vocabulary, H hidden, E routed experts, I expert width, S shared width, A heads,
Q query rank, K key-value rank, N/R nope and rope dims of a head, W value dim of a head,
U vision hidden, F vision width, P patch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ms4.errors import Ms4Error
from ms4.manifest import read_json

Role = Literal[
    "experts", "shared", "attention", "router", "norm", "embedding", "head", "vision", "projector"
]
Dtype = Literal["F8_E4M3", "BF16"]
Transform = Literal["same", "rope_rows", "stack_experts", "stack_gate_up"]
"""How the HF tensor comes from the native one(s): as it is; vision q/k rows regrouped from
interleaved pairs to halves; experts' w2 stacked; experts' w1 over w3, stacked."""

DTYPE_BYTES: Mapping[str, int] = {"F8_E4M3": 1, "BF16": 2}
SHARD_LIMIT = 50_000_000_000
"""Bytes of tensor data in one published shard, at most."""
MOST, MOST_LAYERS = 10_000_000, 1000
"""Sizes beyond these are a damaged file and not a model."""
PUBLISHED_PARAMETERS = 119_401_298_944
MLA_PROJECTIONS = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
EXPERT_PROJECTIONS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Dimensions:
    """The sizes that shape the model; the defaults are Mistral Small 4's."""

    vocabulary: int = 131072
    hidden: int = 4096
    layers: int = 36
    experts: int = 128
    experts_per_token: int = 4
    expert_width: int = 2048
    shared_experts: int = 1
    heads: int = 32
    q_rank: int = 1024
    kv_rank: int = 256
    nope: int = 64
    rope: int = 64
    value: int = 128
    vision_hidden: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16
    vision_head: int = 64
    vision_width: int = 4096
    patch: int = 14
    merge: int = 2

    @property
    def head(self) -> int:
        """Query and key dimension of one attention head."""
        return self.nope + self.rope

    def softmax_scales(self, rope_parameters: Mapping[str, Any]) -> dict[str, float]:
        """The candidates for attention's softmax scale, by the configuration's name for them.

        `yarn` is DeepSeek's mscale: (0.1 · mscale_all_dim · ln(factor) + 1)² / sqrt(head)."""
        plain = self.head**-0.5
        factor = float(rope_parameters.get("factor", 1.0))
        # What the published model has, also where `plain` was written out and this is 0.
        all_dim = float(rope_parameters.get("mscale_all_dim") or 1.0)
        mscale = 0.1 * all_dim * math.log(factor) + 1.0 if factor > 1 else 1.0
        return {"plain": plain, "yarn": plain * mscale * mscale}


TINY = Dimensions(
    vocabulary=4096,
    hidden=128,
    layers=4,
    experts=8,
    experts_per_token=2,
    expert_width=64,
    heads=4,
    q_rank=64,
    kv_rank=48,
    nope=16,
    rope=16,
    value=32,
    vision_hidden=32,
    vision_layers=2,
    vision_heads=2,
    vision_head=16,
    vision_width=64,
    patch=14,
    merge=2,
)
"""The built-in tiny model (`ms4.tiny`): 2 million parameters."""

_TEXT_KEYS = {
    "vocabulary": "vocab_size",
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "experts": "n_routed_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_width": "moe_intermediate_size",
    "shared_experts": "n_shared_experts",
    "heads": "num_attention_heads",
    "q_rank": "q_lora_rank",
    "kv_rank": "kv_lora_rank",
    "nope": "qk_nope_head_dim",
    "rope": "qk_rope_head_dim",
    "value": "v_head_dim",
}
_VISION_KEYS = {
    "vision_hidden": "hidden_size",
    "vision_layers": "num_hidden_layers",
    "vision_heads": "num_attention_heads",
    "vision_head": "head_dim",
    "vision_width": "intermediate_size",
    "patch": "patch_size",
}


def dimensions_from_config(config: Mapping[str, Any], where: str) -> Dimensions:
    """The dimensions that a `config.json` gives; a key that it leaves out has the published value.

    Raises:
        Ms4Error: it is not a Mistral Small 4, or a size is not a positive whole number.
    """
    if not isinstance(config, Mapping):
        raise Ms4Error(f"{where}: not a Mistral Small 4: it holds no settings.")
    text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
    if not (isinstance(text, Mapping) and isinstance(vision, Mapping)):
        raise Ms4Error(f"{where}: text_config and vision_config must be mappings.")
    if config.get("model_type") != "mistral3" or text.get("model_type") != "mistral4":
        raise Ms4Error(f"{where}: not a Mistral Small 4 (mistral3 around a mistral4 text model).")
    if text.get("first_k_dense_replace", 0):
        raise Ms4Error(f"{where}: text_config.first_k_dense_replace must be 0: all layers are MoE.")
    found: dict[str, int] = {}
    for table, keys in ((text, _TEXT_KEYS), (vision, _VISION_KEYS)):
        found.update({name: table[key] for name, key in keys.items() if table.get(key) is not None})
    if config.get("spatial_merge_size") is not None:
        found["merge"] = config["spatial_merge_size"]
    for name, value in found.items():
        most = MOST_LAYERS if name.endswith("layers") else MOST
        if not isinstance(value, int) or not 1 <= value <= most:
            raise Ms4Error(
                f"{where}: the size `{name}` is {value!r:.40}; it must be a whole number from 1 to "
                f"{most}."
            )
    if vision.get("head_dim") is None and vision:
        heads = found.get("vision_heads", Dimensions.vision_heads)
        found["vision_head"] = max(1, found.get("vision_hidden", Dimensions.vision_hidden) // heads)
    return Dimensions(**found)


def read_dimensions(directory: Path) -> Dimensions:
    """The dimensions of the checkpoint in `directory`.

    Raises:
        Ms4Error: config.json is missing, unreadable or of another model.
    """
    path = directory / "config.json"
    if not path.is_file():  # a pipe, say, would never end
        raise Ms4Error(f"{path}: cannot be read (no such file).")
    return dimensions_from_config(read_json(path), str(path))


@dataclass(frozen=True)
class Tensor:
    """One parameter of the model."""

    disk: str
    """Name in the HF layout."""
    native: str
    """Name in the native layout; `{E}` stands for the expert, `{w}` for w1 and w3."""
    transform: Transform
    transformers: str
    """Name in `Mistral3ForConditionalGeneration`."""
    shape: tuple[int, ...]
    role: Role
    dtype: Dtype
    layer: int | None
    """Number of the decoder or vision layer, None outside the layers."""

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def scales(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the BF16 scales that stand beside an FP8 tensor on disk:
        first the weight's, then the activation's."""
        if self.dtype != "F8_E4M3":
            return {}
        if self.role == "experts":
            experts = self.shape[0]
            return {
                f"{self.disk}_scale_inv": (experts, 1, 1),
                f"{self.disk}_activation_scale": (experts,),
            }
        stem = self.disk.removesuffix(".weight")
        return {f"{stem}.weight_scale_inv": (), f"{stem}.activation_scale": ()}

    @property
    def scale(self) -> str:
        """Name of the weight's scale on disk."""
        return next(iter(self.scales()))


def tensors(dims: Dimensions) -> list[Tensor]:
    """All parameters, in the order of the model: embedding, layers, norm, head, vision."""
    return [*_text(dims), *_vision(dims)]


def _text(dims: Dimensions) -> Iterator[Tensor]:
    H, E, I = dims.hidden, dims.experts, dims.expert_width  # noqa: E741
    S, A = dims.expert_width * dims.shared_experts, dims.heads
    disk, tf = "language_model.model.", "model.language_model."

    def row(
        name: str,
        native: str,
        shape: tuple[int, ...],
        role: Role,
        dtype: Dtype = "BF16",
        layer: int | None = None,
        transform: Transform = "same",
    ) -> Tensor:
        return Tensor(disk + name, native, transform, tf + name, shape, role, dtype, layer)

    yield row("embed_tokens.weight", "tok_embeddings.weight", (dims.vocabulary, H), "embedding")
    attention = {
        "q_a_proj": ("wq_a", (dims.q_rank, H)),
        "q_b_proj": ("wq_b", (A * dims.head, dims.q_rank)),
        "kv_a_proj_with_mqa": ("wkv_a_with_mqa", (dims.kv_rank + dims.rope, H)),
        "kv_b_proj": ("wkv_b", (A * (dims.nope + dims.value), dims.kv_rank)),
        "o_proj": ("wo", (H, A * dims.value)),
    }
    shared = {"gate_proj": ("w1", (S, H)), "up_proj": ("w3", (S, H)), "down_proj": ("w2", (H, S))}
    for n in range(dims.layers):
        at, nat = f"layers.{n}.", f"layers.{n}."
        for name, (native, shape) in attention.items():
            yield row(
                f"{at}self_attn.{name}.weight",
                f"{nat}attention.{native}.weight",
                shape,
                "attention",
                "F8_E4M3",
                n,
            )
        norms = {
            "self_attn.q_a_layernorm": ("attention.q_a_norm", dims.q_rank),
            "self_attn.kv_a_layernorm": ("attention.kv_a_norm", dims.kv_rank),
            "input_layernorm": ("attention_norm", H),
            "post_attention_layernorm": ("ffn_norm", H),
        }
        for name, (native, size) in norms.items():
            yield row(f"{at}{name}.weight", f"{nat}{native}.weight", (size,), "norm", "BF16", n)
        yield row(f"{at}mlp.gate.weight", f"{nat}gate.weight", (E, H), "router", "BF16", n)
        yield row(
            f"{at}mlp.experts.gate_up_proj",
            f"{nat}experts.{{E}}.{{w}}.weight",
            (E, 2 * I, H),
            "experts",
            "F8_E4M3",
            n,
            "stack_gate_up",
        )
        yield row(
            f"{at}mlp.experts.down_proj",
            f"{nat}experts.{{E}}.w2.weight",
            (E, H, I),
            "experts",
            "F8_E4M3",
            n,
            "stack_experts",
        )
        for name, (native, shape) in shared.items():
            yield row(
                f"{at}mlp.shared_experts.{name}.weight",
                f"{nat}shared_experts.{native}.weight",
                shape,
                "shared",
                "F8_E4M3",
                n,
            )
    yield row("norm.weight", "norm.weight", (H,), "norm")
    yield Tensor(
        "language_model.lm_head.weight",
        "output.weight",
        "same",
        "lm_head.weight",
        (dims.vocabulary, H),
        "head",
        "BF16",
        None,
    )


def _vision(dims: Dimensions) -> Iterator[Tensor]:
    U, F, B = dims.vision_hidden, dims.vision_width, dims.vision_heads * dims.vision_head

    def row(
        name: str,
        native: str,
        shape: tuple[int, ...],
        role: Role = "vision",
        layer: int | None = None,
        transform: Transform = "same",
    ) -> Tensor:
        return Tensor(name, native, transform, f"model.{name}", shape, role, "BF16", layer)

    tower, encoder = "vision_tower.", "vision_encoder."
    yield row(
        f"{tower}patch_conv.weight", f"{encoder}patch_conv.weight", (U, 3, dims.patch, dims.patch)
    )
    yield row(f"{tower}ln_pre.weight", f"{encoder}ln_pre.weight", (U,))
    for n in range(dims.vision_layers):
        at, nat = f"{tower}transformer.layers.{n}.", f"{encoder}transformer.layers.{n}."
        for letter, shape in (("q", (B, U)), ("k", (B, U)), ("v", (B, U)), ("o", (U, B))):
            yield row(
                f"{at}attention.{letter}_proj.weight",
                f"{nat}attention.w{letter}.weight",
                shape,
                "vision",
                n,
                "rope_rows" if letter in "qk" else "same",
            )
        for name, (native, shape) in {
            "gate_proj": ("w1", (F, U)),
            "up_proj": ("w3", (F, U)),
            "down_proj": ("w2", (U, F)),
        }.items():
            yield row(
                f"{at}feed_forward.{name}.weight",
                f"{nat}feed_forward.{native}.weight",
                shape,
                "vision",
                n,
            )
        for name in ("attention_norm", "ffn_norm"):
            yield row(f"{at}{name}.weight", f"{nat}{name}.weight", (U,), "vision", n)
    projector = "multi_modal_projector."
    rows: tuple[tuple[str, str, tuple[int, ...]], ...] = (
        ("norm.weight", "pre_mm_projector_norm.weight", (U,)),
        (
            "patch_merger.merging_layer.weight",
            "patch_merger.merging_layer.weight",
            (U, U * dims.merge**2),
        ),
        ("linear_1.weight", "vision_language_adapter.w_in.weight", (dims.hidden, U)),
        ("linear_2.weight", "vision_language_adapter.w_out.weight", (dims.hidden, dims.hidden)),
    )
    for name, native, size in rows:
        yield row(f"{projector}{name}", native, size, "projector")


def parameters_by_role(dims: Dimensions) -> dict[Role, int]:
    """Parameters of each part of the model."""
    total: dict[Role, int] = {}
    for tensor in tensors(dims):
        total[tensor.role] = total.get(tensor.role, 0) + tensor.numel
    return total


def disk_tensors(dims: Dimensions) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor of the FP8 checkpoint in the HF layout: name → (dtype, shape), scales included,
    in natural sort order of the names (`layers.2` before `layers.10`)."""
    table: dict[str, tuple[str, tuple[int, ...]]] = {}
    for tensor in tensors(dims):
        table[tensor.disk] = (tensor.dtype, tensor.shape)
        table.update({name: ("BF16", shape) for name, shape in tensor.scales().items()})
    return dict(sorted(table.items(), key=lambda item: natural(item[0])))


def natural(name: str) -> list[tuple[int, str]]:
    """Key of the natural sort order of names: `layers.2` before `layers.10`."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def plan_shards(
    table: Mapping[str, tuple[str, tuple[int, ...]]], limit: int = SHARD_LIMIT
) -> list[list[str]]:
    """Split tensors into shards of at most `limit` bytes of data, in the table's order."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, (dtype, shape) in table.items():
        size = DTYPE_BYTES[dtype] * math.prod(shape)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
