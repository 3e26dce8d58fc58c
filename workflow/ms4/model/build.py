"""The base on disk → a transformers model on the device, exact key for key."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from ms4 import spec
from ms4.config import Dense, RunSection
from ms4.errors import Ms4Error
from ms4.manifest import read_json
from ms4.model import attention, experts, stores, vision
from ms4.model.frozen import FP8Linear, HostEmbedding
from ms4.weights import fp8, nf4
from ms4.weights.base import Base
from ms4.weights.meter import Meter
from ms4.weights.shards import Entry, Reader, read_header

STRETCH = 1 << 22
"""Elements that are read at once."""
EMBEDDING = "model.language_model.embed_tokens.weight"
LOADERS = 4
"""Threads that read: enough for a disk that answers several requests at a time."""
STORED: dict[str, torch.dtype] = {
    "U8": torch.uint8,
    "F8_E4M3": torch.uint8,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
}
"""Dtype of a base's tensor, as safetensors writes it → torch's; FP8 codes are held as bytes."""

STORES: dict[str, type[stores.ExpertStore]] = {
    "nf4": stores.NF4Store,
    "fp8": stores.FP8Store,
    "bf16": stores.BF16Store,
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
    # Before cuBLAS is first used, or it refuses to be deterministic; 32 MiB of workspaces.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory finds reads of what was never written; it costs 8 % here.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(seed)


def held_as_fp8(tensor: spec.Tensor) -> bool:
    """Whether a parameter can be held as its published codes: the text model's dense layers."""
    return tensor.dtype == "F8_E4M3" and tensor.role != "experts"


def _parameter_names(dims: spec.Dimensions, kind: str, dense: Dense) -> dict[str, str]:
    """Name in the base → name of the parameter in the model."""
    names: dict[str, str] = {}
    for tensor in spec.tensors(dims):
        if tensor.role != "experts":
            packed = dense == "fp8" and held_as_fp8(tensor)
            names[tensor.disk] = _codes_of(tensor) if packed else tensor.transformers
        elif kind == "nf4":
            for suffix in nf4.SUFFIXES:
                names[tensor.disk + suffix] = tensor.transformers + suffix
        elif kind == "fp8":
            names[tensor.disk] = f"{tensor.transformers}.codes"
            names[tensor.scale] = f"{tensor.transformers}.scale_inv"
        else:
            names[tensor.disk] = f"{tensor.transformers}.weight"
    return names


def _codes_of(tensor: spec.Tensor) -> str:
    """Name of the codes of a dense layer in the model."""
    return f"{tensor.transformers.removesuffix('.weight')}.codes"


def _dense_scales(
    base: Path, dims: spec.Dimensions, kind: str, stored: dict[str, Entry]
) -> dict[str, torch.Tensor]:
    """Names of the dense layers' tensors → their scales, BF16 0-d: an FP8 base's own, else those
    of its source, which its manifest keeps."""
    wanted = [tensor for tensor in spec.tensors(dims) if held_as_fp8(tensor)]
    if kind == "fp8":
        with Reader() as reader:
            bits = {t.disk: reader.read(stored[t.scale], 0, 2) for t in wanted}
        return {name: torch.from_numpy(b).view(torch.bfloat16)[0] for name, b in bits.items()}
    with Base(base) as opened:
        found = {t.disk: opened.source_scales(t)[0][0] for t in wanted}
    return {name: torch.tensor(scale, dtype=torch.bfloat16) for name, scale in found.items()}


def load_model(
    base: Path, kind: str, device: torch.device, dtype: torch.dtype, dense: Dense = "full"
) -> Mistral3ForConditionalGeneration:
    """Build the model without memory and fill it from the base's pieces.

    Args:
        base: directory of the converted base.
        kind: how it is stored, `nf4`, `fp8` or `bf16`.
        device: where the weights go.
        dtype: of the computation, and of everything that is not held packed: the experts stay as
            they are stored.
        dense: how the text model's other linear layers are held, in `dtype` or as FP8 codes.

    Returns:
        The model, frozen, in evaluation mode.

    Raises:
        Ms4Error: a tensor is missing, left over or of another shape, or a file is damaged.
    """
    dims = spec.read_dimensions(base)
    model = empty_model(read_json(base / "config.json"), dims, kind, device, dtype, dense)
    stored, wanted = _stored(base), _parameter_names(dims, kind, dense)
    beside = [t.scale for t in spec.tensors(dims) if kind == "fp8" and held_as_fp8(t)]
    entries = _entries(base, stored, wanted, beside, dict(model.named_parameters()))
    packed = "fp8" in (kind, dense)
    scales = _dense_scales(base, dims, kind, stored) if packed else {}
    # What is stored otherwise than it is held is multiplied, or divided, on the way.
    factors = {wanted[n]: s for n, s in scales.items() if (kind == "fp8") != (dense == "fp8")}
    places = {EMBEDDING: torch.device("cpu")} if device.type == "cuda" else {}
    with Reader() as reader:
        state = _read(reader, entries, factors, device, dtype, places)
    if dense == "fp8":
        for name, scale in scales.items():
            state[wanted[name].removesuffix("codes") + "scale_inv"] = scale.to(device)
    model.load_state_dict(state, strict=False, assign=True)
    model.requires_grad_(False)
    model.to(device)  # what is left: the rotary tables
    return model.eval()


def empty_model(
    config: dict[str, Any],
    dims: spec.Dimensions,
    kind: str,
    device: torch.device,
    dtype: torch.dtype,
    dense: Dense,
) -> Mistral3ForConditionalGeneration:
    """The model without memory for its parameters; its attention and experts ours, and what is held
    in less than it computes in.

    Args:
        config: a base's config.json.
        dims: its sizes.
        kind: how its experts are stored.
        device: where it will compute.
        dtype: of the computation.
        dense: how the text model's linear layers are held.

    Raises:
        Ms4Error: the experts' activation is not SiLU.
    """
    settings = Mistral3Config(**config)
    text_settings = settings.text_config
    if text_settings.hidden_act != "silu":
        raise Ms4Error(
            f"config.json: text_config.hidden_act is {text_settings.hidden_act!r}; the experts of "
            "this model have `silu`. Take the published config.json."
        )
    with init_empty_weights(include_buffers=False):
        model = Mistral3ForConditionalGeneration(settings)
    workspace, store = stores.Workspace.on(device), STORES[kind]
    for tensor in spec.tensors(dims):
        if tensor.role == "experts" and tensor.transformers.endswith("gate_up_proj"):
            count, double_width, hidden = tensor.shape
            module = model.get_submodule(tensor.transformers.removesuffix(".gate_up_proj"))
            experts.install(
                module,
                store((count, double_width, hidden)),
                store((count, hidden, double_width // 2)),
                workspace,
            )
        elif dense == "fp8" and held_as_fp8(tensor):
            outer, inner = tensor.shape
            name = tensor.transformers.removesuffix(".weight")
            model.set_submodule(name, FP8Linear(inner, outer, workspace))
    text: Any = model.model.language_model
    if device.type != "cpu":
        text.set_input_embeddings(HostEmbedding(dims.vocabulary, dims.hidden, dtype))
    way, why = attention.choose(device, dtype, (dims.head, dims.value))
    print(f"attention: {why}")
    text.set_attn_implementation(way)
    model.model.vision_tower.set_attn_implementation(vision.ATTENTION)
    text.set_experts_implementation(experts.IMPLEMENTATION)
    text.config.use_cache = False
    model.generation_config.pad_token_id = text_settings.pad_token_id
    return model


def _stored(base: Path) -> dict[str, Entry]:
    """Every tensor of a base by its name."""
    return {
        name: entry
        for path in sorted(base.glob("*.safetensors"))
        for name, entry in read_header(path).items()
    }


def _entries(
    base: Path,
    stored: dict[str, Entry],
    names: dict[str, str],
    scales: list[str],
    parameters: dict[str, torch.nn.Parameter],
) -> dict[str, Entry]:
    """Name of each parameter → where it is stored; exactly the model's, and the scales."""
    expected = {name: tuple(parameters[inside].shape) for name, inside in names.items()}
    expected |= dict.fromkeys(scales, ())
    missing, extra = (
        sorted(expected.keys() - stored.keys()),
        sorted(stored.keys() - expected.keys()),
    )
    other = [n for n in sorted(expected.keys() & stored.keys()) if stored[n].shape != expected[n]]
    if missing or extra or other:
        faults = {"missing": missing, "unexpected": extra, "of another shape": other}
        told = "; ".join(f"{len(n)} {what} ({', '.join(n[:5])})" for what, n in faults.items() if n)
        raise Ms4Error(f"{base}: not the tensors of this model: {told}. Run `ms4 descale` again.")
    return {inside: stored[name] for name, inside in names.items()}


def _read(
    reader: Reader,
    entries: dict[str, Entry],
    scales: dict[str, torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
    places: dict[str, torch.device],
) -> dict[str, torch.Tensor]:
    """Parameters by their names in the model, filled from the pieces straight where they stay.

    A tensor is made on the device first and filled a stretch at a time: there is no second copy of
    the model, and on the CPU, where nothing changes its dtype, no copy of a stretch either.
    Parameters that have a scale here are FP8 codes and become their exact BF16 products, or are
    such products and become their codes again. Those that have a place go there.

    Raises:
        Ms4Error: a tensor is not the products of its source's codes.
    """
    state: dict[str, torch.Tensor] = {}
    stretches: list[tuple[Entry, torch.Tensor, int, torch.Tensor | None]] = []
    scales = {name: scale.to(device) for name, scale in scales.items()}
    for name, entry in entries.items():
        kind = STORED[entry.dtype] if ".mlp.experts." in name else dtype
        kind = torch.uint8 if name.endswith(".codes") else kind
        place = places.get(name, device)
        made = state[name] = torch.empty(entry.shape, dtype=kind, device=place)
        flat, scale = made.view(-1), scales.get(name)
        stretches += [(entry, flat, at, scale) for at in range(0, made.numel(), STRETCH)]
    size = sum(entry.size for entry in entries.values())
    with (
        Meter("load the base", size) as meter,
        ThreadPoolExecutor(LOADERS) as threads,
    ):
        buffers: dict[int, torch.Tensor] = {}

        def fill(stretch: tuple[Entry, torch.Tensor, int, torch.Tensor | None]) -> None:
            entry, made, at, scale = stretch
            stored = STORED[entry.dtype]
            part = made[at : at + STRETCH]
            offset, count = at * stored.itemsize, part.numel() * stored.itemsize
            if part.device.type == "cpu" and part.dtype == stored:
                reader.read_into(entry, offset, part.view(torch.uint8).numpy())
            else:
                own = threading.get_ident()
                if own not in buffers:
                    # Pinned memory is copied to a GPU several times faster.
                    pinned = device.type == "cuda"
                    buffers[own] = torch.empty(STRETCH * 4, dtype=torch.uint8, pin_memory=pinned)
                read = buffers[own][:count]
                reader.read_into(entry, offset, read.numpy())
                if scale is None:
                    part.copy_(read.view(stored))
                elif stored == torch.uint8:  # a byte a weight goes over the bus
                    part.copy_(fp8.descale_plain(read.to(device).view(fp8.FP8), scale))
                else:
                    _encode(read.view(stored).to(device), scale, part, entry)
            meter.add(count)

        for _ in threads.map(fill, stretches):
            pass
    return state


def _encode(values: torch.Tensor, scale: torch.Tensor, codes: torch.Tensor, entry: Entry) -> None:
    """BF16 products of FP8 codes and a scale → the codes they were made of, into `codes`.

    A product's rounding moves it by 2⁻⁹ of its size, and codes are 2⁻⁴ apart: the nearest is it.
    """
    found = (values.float() / scale.float()).to(fp8.FP8)
    if not torch.equal(fp8.descale_plain(found, scale), values):
        raise Ms4Error(
            f"{entry.path}: {entry.name} is not the product of FP8 codes and the scale that the "
            "base's manifest has; run `ms4 descale` again, or set model.dense to `full`."
        )
    codes.copy_(found.view(torch.uint8))
