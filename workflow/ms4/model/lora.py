"""Adapters: of dense layers and of experts, saved together as one standard PEFT adapter.

Both kinds are ours. PEFT's dense layers compute in the dtype of the adapter, so FP32 adapters in a
BF16 model keep an FP32 copy of each layer's input for the backward pass; these compute in the
model's dtype whatever the adapter is held in, and projections of one input keep that once.

Shape letters: E experts, R rank, O out, I in, T positions.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ms4 import spec
from ms4.config import AdaptersSection, Preset
from ms4.errors import Ms4Error
from ms4.manifest import commit_file, write_text
from ms4.model.experts import ExpertLora
from ms4.model.frozen import FP8Linear

DENSE = {
    "attention": ("self_attn", spec.MLA_PROJECTIONS),
    "shared": ("mlp.shared_experts", spec.MLP_PROJECTIONS),
}
"""Preset → where its layers are and what they are called."""
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
"""The experts' two parameters, as PEFT's `target_parameters` names them."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Match:
    """What a preset came to."""

    target: Preset
    rank: int
    tensors: int
    parameters: int


class DenseLora(nn.Module):
    """Mix-in of a frozen linear layer with LoRA: y = x Wᵀ + scaling · dropout(x) Aᵀ Bᵀ.

    It stands before the layer's own class, and is the layer itself, not a wrapper: W keeps its
    name.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def add_lora(
        self,
        sizes: tuple[int, int],
        rank: int,
        scaling: float,
        dropout: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Make A and B; B is zero.

        Args:
            sizes: I and O.
            rank: of the adapter.
            scaling: what the adapter's product is multiplied by.
            dropout: share of the adapter's inputs that is left out in training.
            dtype: how the adapter is held.
            device: where.
        """
        self.scaling, self.dropout, self.enabled = scaling, dropout, True
        inner, outer = sizes
        bound = 1 / math.sqrt(inner)
        A_RI = torch.empty(rank, inner, device=device).uniform_(-bound, bound)
        self.lora_A = nn.Parameter(A_RI.to(dtype))
        self.lora_B = nn.Parameter(torch.zeros(outer, rank, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] → [..., O], in the dtype of `x`."""
        y: torch.Tensor = super().forward(x)
        if not self.enabled:
            return y
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        thin_TR = F.linear(x, self.lora_A.to(x.dtype)).flatten(0, -2)
        # One product that adds to y: its own result would be another [T, O].
        B_RO = self.lora_B.to(x.dtype).T
        return torch.addmm(y.flatten(0, -2), thin_TR, B_RO, alpha=self.scaling).view(y.shape)


class LinearLora(DenseLora, nn.Linear):
    """LoRA on a linear layer in the dtype of the computation."""

    def __init__(self, base: nn.Linear) -> None:
        """Take over the weights of `base`; they are used, not copied."""
        super().__init__(base.in_features, base.out_features, base.bias is not None, "meta")
        self.weight, self.bias = base.weight, base.bias


class FP8Lora(DenseLora, FP8Linear):
    """LoRA on a linear layer that is held as FP8 codes."""

    def __init__(self, base: FP8Linear) -> None:
        """Take over the weights of `base`; they are used, not copied."""
        super().__init__(base.in_features, base.out_features, base.workspace)
        self.codes, self.scale_inv = base.codes, base.scale_inv


def dense_pattern(targets: tuple[str, ...]) -> str | None:
    """Regular expression of the dense layers' full names, or None if no dense preset is named."""
    parts = [
        rf"{re.escape(place)}\.(?:{'|'.join(names)})"
        for target, (place, names) in DENSE.items()
        if target in targets
    ]
    if not parts:
        return None
    return rf"model\.language_model\.layers\.\d+\.(?:{'|'.join(parts)})"


def add_adapters(model: nn.Module, adapters: AdaptersSection, dims: spec.Dimensions) -> list[Match]:
    """Add trainable adapters to a frozen model; returns what was matched.

    Raises:
        Ms4Error: a preset matched nothing, or other layers than the model's table has.
    """
    dtype = DTYPES[adapters.dtype]
    for preset in adapters.presets:
        rank, scaling = adapters.rank_of(preset), adapters.scaling(preset)
        if preset == "experts":
            for module in _expert_modules(model):
                for projection in ("gate_up", "down"):
                    store = getattr(module, f"{projection}_proj")
                    lora = ExpertLora(store.shape, rank, scaling)
                    lora.to(next(store.parameters()).device, dtype)
                    module.add_module(f"{projection}_lora", lora)
            continue
        pattern = re.compile(str(dense_pattern((preset,))))
        for name, layer in list(model.named_modules()):
            if not pattern.fullmatch(name) or not isinstance(layer, nn.Linear | FP8Linear):
                continue
            dense = FP8Lora(layer) if isinstance(layer, FP8Linear) else LinearLora(layer)
            sizes, device = (layer.in_features, layer.out_features), next(layer.parameters()).device
            dense.add_lora(sizes, rank, scaling, adapters.dropout, dtype, device)
            model.set_submodule(name, dense.train(layer.training))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_adapter(name))
    matches = [_match(model, preset, adapters.rank_of(preset)) for preset in adapters.presets]
    for match in matches:
        wanted = _expected(dims, match)
        if (match.tensors, match.parameters) != wanted:
            raise Ms4Error(
                f"adapters.targets: `{match.target}` matched {match.tensors} adapter tensors of "
                f"{match.parameters:,} parameters, not {wanted[0]} of {wanted[1]:,}: the installed "
                "transformers names or shapes layers differently."
            )
    return matches


def _expected(dims: spec.Dimensions, match: Match) -> tuple[int, int]:
    """Adapter tensors and parameters of a preset by the model's table: rank · (in + out) for each
    matrix, of each expert its own."""
    found = [t.shape for t in spec.tensors(dims) if t.role == match.target]
    sizes = (math.prod(shape[:-2]) * sum(shape[-2:]) for shape in found)
    return 2 * len(found), match.rank * sum(sizes)


def _is_adapter(name: str) -> bool:
    return name.endswith((".lora_A", ".lora_B")) or "_lora." in name


def _expert_modules(model: nn.Module) -> Iterator[Any]:
    for name, module in model.named_modules():
        if name.endswith(".mlp.experts"):
            yield module


def _target_of(name: str) -> str:
    if "_lora." in name:
        return "experts"
    return "shared" if ".shared_experts." in name else "attention"


def _match(model: nn.Module, target: Preset, rank: int) -> Match:
    found = [p for name, p in trainable(model).items() if _target_of(name) == target]
    return Match(target, rank, len(found), sum(p.numel() for p in found))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter parameters by their names in the model, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def is_first_factor(name: str) -> bool:
    """Whether the tensor is an A; its gradient is zero while its B is."""
    return name.endswith(("_lora.A", ".lora_A"))


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The untuned model, for the time of the context."""
    layers = [m for m in model.modules() if isinstance(m, DenseLora | ExpertLora)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def peft_name(name: str) -> str:
    """Name of an adapter tensor in the model → its key in adapter_model.safetensors.

    PEFT wraps a module once a parameter of `target_parameters`: the first named one is innermost,
    under `base_layer`, so gate_up_proj's adapter lies deeper than down_proj's."""
    if "_lora." in name:
        module, factor = name.rsplit(".", 1)
        inner = ".base_layer" if module.endswith("gate_up_lora") else ""
        name = f"{module.rsplit('.', 1)[0]}{inner}.lora_{factor}"
    return f"base_model.model.{name}.weight"


def to_peft(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Our layout → PEFT's: A [E, R, I] → [E·R, I]; B [E, O, R] → [O, R·E], the expert fastest."""
    if name.endswith("_lora.A"):
        return tensor.flatten(0, 1)
    if name.endswith("_lora.B"):
        return tensor.permute(1, 2, 0).flatten(1)
    return tensor


def from_peft(name: str, stored: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The inverse of `to_peft`, for a parameter of `shape`."""
    if name.endswith("_lora.A"):
        return stored.view(shape)
    if name.endswith("_lora.B"):
        experts, out, rank = shape
        return stored.view(out, rank, experts).permute(2, 0, 1)
    return stored


def save(model: nn.Module, directory: Path, adapters: AdaptersSection, base: str) -> list[Path]:
    """Write a standard PEFT adapter; returns its files.

    Args:
        model: with adapters.
        directory: made if need be.
        adapters: their configuration.
        base: what `base_model_name_or_path` says.
    """
    directory.mkdir(parents=True, exist_ok=True)
    state = {
        peft_name(name): to_peft(name, parameter.detach()).contiguous().cpu()
        for name, parameter in trainable(model).items()
    }
    weights = directory / "adapter_model.safetensors"
    temporary = directory / ".adapter_model.tmp"
    save_file(state, temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)
    commit_file(temporary, weights)
    experts = "experts" in adapters.presets
    rank = adapters.rank_of("experts") if experts else adapters.rank
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": adapters.alpha,
        # PEFT refuses any other beside `target_parameters`; the run's own is in its record.
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": adapters.rslora,
        # Dense layers differ from experts, not the other way round: PEFT reads either, but warns of
        # patterns that are for `target_parameters`.
        "rank_pattern": {
            f"{place}.{name}": adapters.rank
            for target, (place, names) in DENSE.items()
            if target in adapters.presets and adapters.rank != rank
            for name in names
        },
        # An empty list, and not null: PEFT takes null for "choose by the model's type".
        "target_modules": dense_pattern(adapters.presets) or [],
        "target_parameters": list(EXPERTS) if experts else None,
    }
    settings = directory / "adapter_config.json"
    write_text(settings, json.dumps(config, indent=2) + "\n")
    return [settings, weights]


def load(model: nn.Module, directory: Path) -> None:
    """Fill a model's adapters from `save`'s files.

    Raises:
        Ms4Error: the file does not hold exactly the model's adapter tensors.
    """
    path = directory / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    wanted = {peft_name(name): name for name in trainable(model)}
    if set(stored) != set(wanted):
        raise Ms4Error(f"{path}: its tensors are not those of adapters.targets; train again.")
    parameters = trainable(model)
    with torch.no_grad():
        for key, name in wanted.items():
            parameter = parameters[name]
            try:
                parameter.copy_(from_peft(name, stored[key], parameter.shape))
            except RuntimeError as error:  # of another size
                raise Ms4Error(
                    f"{path}: {key} has the shape {tuple(stored[key].shape)}, which is not that of "
                    "adapters.rank; train again."
                ) from error
