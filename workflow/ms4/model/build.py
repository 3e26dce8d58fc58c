"""The base on disk → a transformers model on the device, exact key for key."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from ms4 import spec
from ms4.config import RunSection
from ms4.errors import Ms4Error
from ms4.manifest import read_json
from ms4.model import attention, experts
from ms4.weights import nf4
from ms4.weights.meter import Meter
from ms4.weights.shards import Entry, Reader, read_header

STRETCH = 1 << 22
"""Elements that are read at once."""
LOADERS = 4
"""Threads that read: enough for a disk that answers several requests at a time."""
STORED: dict[str, torch.dtype] = {"U8": torch.uint8, "F32": torch.float32, "BF16": torch.bfloat16}
"""Dtype of a base's tensor, as safetensors writes it → torch's."""

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
        Ms4Error: a tensor is missing, left over or of another shape, or a file is damaged.
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
    entries = _entries(base, _parameter_names(dims, kind), dict(model.named_parameters()))
    state = _read(entries, device, dtype)
    model.load_state_dict(state, strict=False, assign=True)
    model.requires_grad_(False)
    model.to(device)  # what is left: the rotary tables
    model.generation_config.pad_token_id = config.text_config.pad_token_id
    return model.eval()


def _entries(
    base: Path, names: dict[str, str], parameters: dict[str, torch.nn.Parameter]
) -> dict[str, Entry]:
    """Name of each parameter → where it is stored; exactly the model's."""
    stored = {
        name: entry
        for path in sorted(base.glob("*.safetensors"))
        for name, entry in read_header(path).items()
    }
    expected = {name: tuple(parameters[inside].shape) for name, inside in names.items()}
    missing, extra = (
        sorted(expected.keys() - stored.keys()),
        sorted(stored.keys() - expected.keys()),
    )
    other = [n for n in sorted(expected.keys() & stored.keys()) if stored[n].shape != expected[n]]
    if missing or extra or other:
        faults = {"missing": missing, "unexpected": extra, "of another shape": other}
        told = "; ".join(f"{len(n)} {what} ({', '.join(n[:5])})" for what, n in faults.items() if n)
        raise Ms4Error(f"{base}: not the tensors of this model: {told}. Run `ms4 descale` again.")
    return {names[name]: entry for name, entry in stored.items()}


def _read(
    entries: dict[str, Entry], device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Parameters by their names in the model, filled from the pieces straight where they stay.

    A tensor is made on the device first and filled a stretch at a time: there is no second copy of
    the model, and on the CPU, where nothing changes its dtype, no copy of a stretch either.
    """
    state: dict[str, torch.Tensor] = {}
    stretches: list[tuple[Entry, torch.Tensor, int]] = []
    for name, entry in entries.items():
        kind = STORED[entry.dtype] if ".mlp.experts." in name else dtype
        made = state[name] = torch.empty(entry.shape, dtype=kind, device=device)
        stretches += [(entry, made.view(-1), at) for at in range(0, made.numel(), STRETCH)]
    size = sum(entry.size for entry in entries.values())
    with (
        Reader() as reader,
        Meter("load the base", size) as meter,
        ThreadPoolExecutor(LOADERS) as threads,
    ):
        buffers: dict[int, torch.Tensor] = {}

        def fill(stretch: tuple[Entry, torch.Tensor, int]) -> None:
            entry, made, at = stretch
            stored = STORED[entry.dtype]
            part = made[at : at + STRETCH]
            offset, count = at * stored.itemsize, part.numel() * stored.itemsize
            if device.type == "cpu" and part.dtype == stored:
                reader.read_into(entry, offset, part.view(torch.uint8).numpy())
            else:
                own = threading.get_ident()
                if own not in buffers:
                    # Pinned memory is copied to a GPU several times faster.
                    pinned = device.type == "cuda"
                    buffers[own] = torch.empty(STRETCH * 4, dtype=torch.uint8, pin_memory=pinned)
                read = buffers[own][:count]
                reader.read_into(entry, offset, read.numpy())
                part.copy_(read.view(stored))
            meter.add(count)

        for _ in threads.map(fill, stretches):
            pass
    return state
