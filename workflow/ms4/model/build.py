"""The base on disk → a transformers model on the device, exact key for key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from ms4 import spec
from ms4.config import RunSection
from ms4.errors import Ms4Error
from ms4.manifest import read_json
from ms4.model import attention, experts
from ms4.progress import track
from ms4.weights import nf4

STORES: dict[str, type[experts.ExpertStore]] = {
    "nf4": experts.NF4Store,
    "bf16": experts.BF16Store,
}


def choose_device(run: RunSection) -> tuple[torch.device, torch.dtype, str]:
    """Device, dtype of the computation, and why: chosen once, printed, passed down.

    Raises:
        Ms4Error: CUDA is asked for and not there.
    """
    available = torch.cuda.is_available()
    if run.device == "cuda" and not available:
        raise Ms4Error("run.device: no CUDA device is visible to torch; use `cpu` or `auto`.")
    if run.device == "cpu" or not available:
        why = "configured" if run.device == "cpu" else "no CUDA device is visible"
        # bf16 products are slower than fp32 on most CPUs.
        return torch.device("cpu"), torch.float32, f"CPU in fp32 ({why})"
    name = torch.cuda.get_device_name()
    return torch.device("cuda"), torch.bfloat16, f"{name} in bf16"


def prepare_torch(run: RunSection, seed: int) -> None:
    """Seed, thread count and deterministic algorithms: what a bit-identical rerun takes."""
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory finds reads of what was never written; it costs 8 % here.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(seed)


def _parameter_names(dims: spec.Dimensions, kind: str) -> dict[str, str]:
    """Name in the base → name of the parameter in the model."""
    names: dict[str, str] = {}
    for tensor in spec.tensors(dims):
        if tensor.role != "experts":
            names[tensor.disk] = tensor.transformers
        elif kind == "nf4":
            for suffix in nf4.SUFFIXES:
                names[tensor.disk + suffix] = tensor.transformers + suffix
        else:
            names[tensor.disk] = f"{tensor.transformers}.weight"
    return names


def load_model(
    base: Path, kind: str, device: torch.device, dtype: torch.dtype
) -> Mistral3ForConditionalGeneration:
    """Build the model without memory and fill it from the base's pieces.

    Args:
        base: directory of the converted base.
        kind: how its experts are stored, `nf4` or `bf16`.
        device: where the weights go.
        dtype: of everything but the packed experts, which stay as they are stored.

    Returns:
        The model, frozen, in evaluation mode.

    Raises:
        Ms4Error: a tensor is missing or left over.
    """
    config = Mistral3Config(**read_json(base / "config.json"))
    dims = spec.read_dimensions(base)
    with init_empty_weights(include_buffers=False):
        model = Mistral3ForConditionalGeneration(config)
    for tensor in spec.tensors(dims):
        if tensor.role == "experts" and tensor.transformers.endswith("gate_up_proj"):
            count, double_width, hidden = tensor.shape
            module = model.get_submodule(tensor.transformers.removesuffix(".gate_up_proj"))
            store = STORES[kind]
            experts.install(
                module,
                store((count, double_width, hidden)),
                store((count, hidden, double_width // 2)),
            )
    text: Any = model.model.language_model
    text.set_attn_implementation(attention.IMPLEMENTATION)
    text.set_experts_implementation(experts.IMPLEMENTATION)
    text.config.use_cache = False
    state = _read(base, _parameter_names(dims, kind), device, dtype)
    expected = set(dict(model.named_parameters()))
    if expected != set(state):
        missing, extra = sorted(expected - set(state)), sorted(set(state) - expected)
        raise Ms4Error(
            f"{base}: {len(missing)} tensors missing ({', '.join(missing[:5])}), "
            f"{len(extra)} unexpected ({', '.join(extra[:5])}); run `ms4 descale` again."
        )
    model.load_state_dict(state, strict=False, assign=True)
    model.requires_grad_(False)
    model.to(device)  # what is left: the rotary tables
    model.generation_config.pad_token_id = config.text_config.pad_token_id
    return model.eval()


def _read(
    base: Path, names: dict[str, str], device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for path in track(sorted(base.glob("*.safetensors")), "load the base"):
        with safe_open(path, framework="pt", device=str(device)) as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name not in names:
                    raise Ms4Error(f"{path}: {name} is no tensor of this model.")
                tensor = file.get_tensor(name)
                packed = ".mlp.experts." in name
                state[names[name]] = tensor if packed else tensor.to(dtype)
    return state
