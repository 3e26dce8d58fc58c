"""Stage verify: is the base what the model's table says, and is it the source times its scales?

Keys, dtypes and shapes are compared exactly, for every tensor. A sample of the tensors, some of
each role, is recomputed from the source by another path than the converter's: FP8 codes decoded by
their bits with numpy, scales from the manifest, and for NF4 the nearest-value rule itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

from ms4 import spec
from ms4.config import RunConfig
from ms4.errors import Ms4Error
from ms4.manifest import check_files, read_manifest, write_manifest
from ms4.weights import nf4
from ms4.weights.convert import BASE, INDEX, MANIFEST, SOURCE, Source, base_tensors

OUTPUT = Path("results/verify.json")
NF4_MAX_ERROR = 0.12
"""Norm-wise error of NF4 that is still quantization and not a fault: 0.0924 for normal weights."""

Floats = npt.NDArray[np.float32]


def check_keys(dims: spec.Dimensions, experts: str) -> int:
    """Compare the headers of the base's files with the table; returns the number of tensors.

    Raises:
        Ms4Error: a tensor is missing, left over, or of another dtype or shape; each is named.
    """
    expected = base_tensors(dims, experts)
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in sorted(BASE.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                view = file.get_slice(name)
                found[name] = (view.get_dtype(), tuple(view.get_shape()))
    faults = [f"missing: {name}" for name in sorted(expected.keys() - found.keys())]
    faults += [f"unexpected: {name}" for name in sorted(found.keys() - expected.keys())]
    faults += [
        f"{name}: {found[name]} instead of {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    if faults:
        shown = "\n  ".join(faults[:20])
        raise Ms4Error(
            f"{BASE}: {len(faults)} tensors are not the model's:\n  {shown}\n"
            f"Remove {MANIFEST} and {BASE} and run again."
        )
    return len(found)


def decode_e4m3(codes: npt.NDArray[np.uint8]) -> Floats:
    """FP8 e4m3fn codes → values by their bits: sign, 4 of exponent (bias 7), 3 of mantissa."""
    exponent, mantissa = (codes >> 3 & 15).astype(np.int32), (codes & 7).astype(np.float32)
    value = np.where(
        exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * np.exp2((exponent - 10).astype(float))
    )
    value = np.where((codes & 127) == 127, np.nan, value)
    return np.where(codes & 128, -value, value).astype(np.float32)


def _to_bf16(values: Floats) -> Floats:
    """Round to the nearest BF16, ties to even, and back."""
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32)


def _sample(dims: spec.Dimensions) -> list[spec.Tensor]:
    """First and last FP8 tensor of each kind: both ends of the model, every projection."""
    kinds: dict[str, list[spec.Tensor]] = {}
    for tensor in spec.tensors(dims):
        if tensor.dtype == "F8_E4M3":
            kinds.setdefault(tensor.disk.split(".", 4)[-1], []).append(tensor)
    return [tensor for group in kinds.values() for tensor in {group[0], group[-1]}]


def recompute(
    source: Source, scales: dict[str, list[float]], tensor: spec.Tensor, experts: str
) -> float:
    """Norm-wise error of one tensor of the base against the source; its last expert if it has some.

    Raises:
        Ms4Error: a code is NaN, or the base differs by more than its storage explains.
    """
    raw = source.read(tensor.disk)
    scale = scales[tensor.scale]
    last = (raw[-1], scale[-1]) if tensor.role == "experts" else (raw, scale[0])
    wanted = decode_e4m3(last[0].view(torch.uint8).numpy()) * np.float32(last[1])
    if np.isnan(wanted).any():
        raise Ms4Error(f"{tensor.disk}: the source holds NaN codes; fetch it again.")
    packed = tensor.role == "experts" and experts == "nf4"
    if packed:
        shape = (1, tensor.shape[1], tensor.shape[2])
        parts = [_read_base(tensor.disk + suffix)[-1:] for suffix in nf4.SUFFIXES]
        found = nf4.dequantize_plain(nf4.Packed(*parts), shape, torch.float32)[0].numpy()
        limit = NF4_MAX_ERROR
    else:
        stored = _read_base(tensor.disk).to(torch.float32)
        found = (stored[-1] if tensor.role == "experts" else stored).numpy()
        wanted, limit = _to_bf16(wanted), 0.0
    norm = float(np.linalg.norm(wanted))
    error = float(np.linalg.norm(found - wanted)) / norm if norm else float(np.abs(found).max())
    if not error <= limit:
        raise Ms4Error(
            f"{tensor.disk}: differs from source × scale by {error:.1%} (allowed: {limit:.0%}). "
            f"Remove {MANIFEST} and {BASE} and run again."
        )
    return error


def _read_base(name: str) -> torch.Tensor:
    for path in sorted(BASE.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118 - not a mapping
                found: torch.Tensor = file.get_tensor(name)
                return found
    raise Ms4Error(f"{BASE / INDEX}: {name} is missing.")


def run_stage(config: RunConfig) -> None:
    """Check `weights/base/` and write `results/verify.json`."""
    base, origin = read_manifest(MANIFEST, "descale"), read_manifest(SOURCE, "fetch")
    check_files(base, BASE, hashes=True)
    dims = spec.read_dimensions(BASE)
    count = check_keys(dims, base["experts"])
    source = Source(Path(origin["directory"]))
    errors: dict[str, Any] = {
        tensor.disk: recompute(source, base["source_scales"], tensor, base["experts"])
        for tensor in _sample(dims)
    }
    write_manifest(
        OUTPUT,
        "verify",
        config_hash=config.part_hash("verify"),
        inputs=[MANIFEST],
        tensors=count,
        parameters=base["parameters"],
        recomputed=errors,
    )
    worst = max(errors.values())
    print(
        f"verify: {count} tensors as the table has them; {len(errors)} recomputed from FP8 × scale,"
    )
    print(f"        largest error {worst:.2%} ({base['experts']} experts, everything else exact)")
