"""Adapters: dense layers through PEFT, experts through our own parameters, saved as one.

Shape letters: E experts, R rank, O out, I in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ms4 import spec
from ms4.config import AdaptersSection
from ms4.errors import Ms4Error
from ms4.manifest import commit_file, write_text
from ms4.model.experts import ExpertLora

DENSE = {
    "attention": ("self_attn", spec.MLA_PROJECTIONS),
    "shared": ("mlp.shared_experts", spec.MLP_PROJECTIONS),
}
"""Target → where its layers are and what they are called."""


@dataclass(frozen=True)
class Match:
    """What a target came to."""

    target: str
    tensors: int
    parameters: int


def dense_pattern(targets: tuple[str, ...]) -> str | None:
    """Regular expression of the dense layers' full names, or None if no dense target is named."""
    parts = [
        rf"{re.escape(place)}\.(?:{'|'.join(names)})"
        for target, (place, names) in DENSE.items()
        if target in targets
    ]
    if not parts:
        return None
    return rf"model\.language_model\.layers\.\d+\.(?:{'|'.join(parts)})"


def add_adapters(model: nn.Module, adapters: AdaptersSection, dims: spec.Dimensions) -> list[Match]:
    """Add trainable adapters, in fp32, to a frozen model; returns what was matched.

    Raises:
        Ms4Error: a target matched another number of layers than the model's table has.
    """
    scaling = adapters.alpha / adapters.rank
    pattern = dense_pattern(adapters.targets)
    if pattern is not None:
        inject_adapter_in_model(
            LoraConfig(r=adapters.rank, lora_alpha=adapters.alpha, target_modules=pattern), model
        )
    if "experts" in adapters.targets:
        for module in _expert_modules(model):
            for projection in ("gate_up", "down"):
                store = getattr(module, f"{projection}_proj")
                lora = ExpertLora(store.shape, adapters.rank, scaling)
                lora.to(next(store.parameters()).device)
                module.add_module(f"{projection}_lora", lora)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_adapter(name))
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    matches = [_match(model, target) for target in adapters.targets]
    for match in matches:
        layers = 2 if match.target == "experts" else len(DENSE[match.target][1])
        wanted = 2 * layers * dims.layers
        if match.tensors != wanted:
            raise Ms4Error(
                f"adapters.targets: `{match.target}` matched {match.tensors} adapter tensors, "
                f"not {wanted}: the installed peft or transformers names layers differently."
            )
    return matches


def _is_adapter(name: str) -> bool:
    return "lora_" in name or "_lora." in name


def _expert_modules(model: nn.Module) -> Iterator[Any]:
    for name, module in model.named_modules():
        if name.endswith(".mlp.experts"):
            yield module


def _target_of(name: str) -> str:
    if "_lora." in name:
        return "experts"
    return "shared" if ".shared_experts." in name else "attention"


def _match(model: nn.Module, target: str) -> Match:
    found = [p for name, p in trainable(model).items() if _target_of(name) == target]
    return Match(target, len(found), sum(p.numel() for p in found))


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter parameters by their names in the model, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def is_first_factor(name: str) -> bool:
    """Whether the tensor is an A; its gradient is zero while its B is."""
    return name.endswith("_lora.A") or ".lora_A." in name


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The untuned model, for the time of the context."""
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    experts = [m for m in model.modules() if isinstance(m, ExpertLora)]
    for layer in layers:
        layer.enable_adapters(False)
    for lora in experts:
        lora.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for lora in experts:
            lora.enabled = True


def peft_name(name: str) -> str:
    """Name of an adapter tensor in the model → its key in adapter_model.safetensors.

    PEFT wraps a module once a parameter of `target_parameters`: the first named one is innermost,
    under `base_layer`, so gate_up_proj's adapter lies deeper than down_proj's."""
    name = name.replace(".default.", ".")
    if "_lora." in name:
        module, factor = name.rsplit(".", 1)
        inner = ".base_layer" if module.endswith("gate_up_lora") else ""
        name = f"{module.rsplit('.', 1)[0]}{inner}.lora_{factor}.weight"
    return f"base_model.model.{name}"


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
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": adapters.rank,
        "lora_alpha": adapters.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        # An empty list, and not null: PEFT takes null for "choose by the model's type".
        "target_modules": dense_pattern(adapters.targets) or [],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        if "experts" in adapters.targets
        else None,
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
            parameter.copy_(from_peft(name, stored[key], parameter.shape))
