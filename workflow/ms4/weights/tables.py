"""What a base holds: its files, their tensors, dtypes and shapes. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

from ms4 import spec
from ms4.weights.shards import Table, table_bytes

Storage = Literal["bf16", "nf4", "fp8"]
STORAGES: tuple[Storage, ...] = ("bf16", "nf4", "fp8")
NF4_BLOCK = 64
"""Weights that share one absmax."""
NF4_GROUP = 256
"""Blocks whose absmax codes share one scale."""
NF4_SUFFIXES = (".nf4", ".absmax", ".absmax_scale", ".absmax_offset")


def packed_shapes(experts: int, elements: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Suffix → (safetensors dtype, shape) of NF4 with `elements` weights an expert."""
    blocks = -(-elements // NF4_BLOCK)
    shapes = (
        ("U8", (experts, -(-elements // 2))),
        ("U8", (experts, blocks)),
        ("F32", (experts, -(-blocks // NF4_GROUP))),
        ("F32", (experts,)),
    )
    return dict(zip(NF4_SUFFIXES, shapes, strict=True))


def base_tensors(tensor: spec.Tensor, to: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What a parameter becomes in a base: name → (dtype, shape)."""
    if to == "fp8" and tensor.dtype == "F8_E4M3":
        shape = next(iter(tensor.scales().values()))
        return {tensor.disk: ("F8_E4M3", tensor.shape), tensor.scale: ("BF16", shape)}
    if to == "nf4" and tensor.role == "experts":
        count, out, inner = tensor.shape
        shapes = packed_shapes(count, out * inner)
        return {tensor.disk + suffix: value for suffix, value in shapes.items()}
    return {tensor.disk: ("BF16", tensor.shape)}


def base_table(dims: spec.Dimensions, to: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, dtypes and shapes of all of a base's tensors."""
    table: dict[str, tuple[str, tuple[int, ...]]] = {}
    for tensor in spec.tensors(dims):
        table |= base_tensors(tensor, to)
    return table


@lru_cache(maxsize=8)  # asked for again and again; of the published model it takes 40 ms
def pieces(dims: spec.Dimensions) -> Mapping[str, Sequence[spec.Tensor]]:
    """The base's files and the parameters in each, in the order in which they are made.

    The last norm stands with the last layer: in the published order of names it comes after the
    layers and not with embedding and head, and a piece should need few of the source's files.
    """
    table = spec.tensors(dims)
    seen = [t for t in table if t.role in ("vision", "projector")]
    text = [t for t in table if t not in seen]
    layers = {
        f"layer-{n:02d}.safetensors": [t for t in text if t.layer == n] for n in range(dims.layers)
    }
    layers[f"layer-{dims.layers - 1:02d}.safetensors"] += [
        t for t in text if t.layer is None and t.role == "norm"
    ]
    return {
        "text.safetensors": [t for t in text if t.role in ("embedding", "head")],
        **layers,
        "vision.safetensors": seen,
    }


def piece_table(dims: spec.Dimensions, name: str, to: str) -> Table:
    """The tensors of a piece."""
    table: dict[str, tuple[str, tuple[int, ...]]] = {}
    for tensor in pieces(dims)[name]:
        table |= base_tensors(tensor, to)
    return table


def piece_bytes(dims: spec.Dimensions, to: str) -> dict[str, int]:
    """Sizes of the base's files in bytes."""
    return {name: table_bytes(piece_table(dims, name, to)) for name in pieces(dims)}


def bytes_missing(directory: Path, dims: spec.Dimensions, to: str) -> int:
    """Bytes that the base in `directory` still takes, as far as its files' sizes tell."""
    missing = 0
    for name, size in piece_bytes(dims, to).items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != size:
            missing += size
    return missing
