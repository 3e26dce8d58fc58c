"""A converted base, read by parameter as BF16 or as it is stored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ms4 import spec
from ms4.errors import Ms4Error
from ms4.manifest import check_files, read_json, read_manifest
from ms4.weights import fp8, nf4
from ms4.weights.convert import INDEX, OWN_MANIFEST
from ms4.weights.layouts import Layout, matrix_scales, native_names, shard_names
from ms4.weights.shards import ITEM_BYTES, Bytes, Entry, Reader, read_header
from ms4.weights.tables import STORAGES, base_table

BF16 = npt.NDArray[np.uint16]
"""Bits of BF16 numbers, in one dimension."""

_NAMED = 5
"""Tensors that one error names."""


def manifest_of(directory: Path) -> Path:
    """Where a base's manifest is: in its directory, or beside it in a project."""
    own = directory / OWN_MANIFEST
    return own if own.exists() else directory.with_name(f"{directory.name}.json")


class Base:
    """The tensors of a converted base. A context: it keeps its files open; threads may share it."""

    def __init__(self, directory: Path) -> None:
        """Open the base in `directory`.

        Raises:
            Ms4Error: its manifest is missing, its files are not those of the manifest, or their
                tensors not exactly the model's.
        """
        self.directory = directory
        self.manifest = read_manifest(manifest_of(directory), "descale")
        self.to: str = self.manifest.get("experts", "")
        self.layout: Layout = "native" if self.manifest.get("layout") == "native" else "hf"
        if self.to not in STORAGES:
            raise Ms4Error(
                f"{manifest_of(directory)}: experts are in {self.to!r:.40}, not in one of "
                f"{', '.join(STORAGES)}; make the base again."
            )
        check_files(self.manifest, directory)
        self.config: dict[str, Any] = read_json(directory / "config.json")
        self.dims = spec.dimensions_from_config(self.config, str(directory / "config.json"))
        self.tensors = spec.tensors(self.dims)
        self.reader = Reader()
        self.entries = self._entries()
        self._scales: dict[str, list[float]] = {}

    def __enter__(self) -> Base:
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.__exit__()

    def _entries(self) -> dict[str, Entry]:
        entries: dict[str, Entry] = {}
        for file in sorted(set(shard_names(self.directory / INDEX).values())):
            entries |= read_header(self.directory / file)
        wanted = base_table(self.dims, self.to)
        faults = [f"{name} is missing" for name in sorted(wanted.keys() - entries.keys())]
        faults += [f"{name} is unexpected" for name in sorted(entries.keys() - wanted.keys())]
        faults += [
            f"{name} is {entry.dtype} {list(entry.shape)}"
            for name, entry in sorted(entries.items())
            if name in wanted and (entry.dtype, entry.shape) != wanted[name]
        ]
        if faults:
            raise Ms4Error(
                f"{self.directory}: not the tensors of this model: {len(faults)} differ "
                f"({'; '.join(faults[:_NAMED])}). Make the base again."
            )
        return entries

    def read(self, name: str, start: int = 0, count: int | None = None) -> Bytes:
        """Bytes of a stored tensor: all, or `count` elements from element `start` on."""
        entry = self.entries[name]
        item = ITEM_BYTES[entry.dtype]
        size = None if count is None else count * item
        return self.reader.read(entry, start * item, size)

    def scales(self, tensor: spec.Tensor) -> list[float]:
        """In an fp8 base: the scales of a parameter's codes, one a matrix of the HF layout."""
        if tensor.scale not in self._scales:
            bits = self.read(tensor.scale).view(np.uint16).astype(np.uint32) << 16
            self._scales[tensor.scale] = [float(value) for value in bits.view(np.float32)]
        return self._scales[tensor.scale]

    def source_scales(self, tensor: spec.Tensor) -> tuple[list[float], list[float]]:
        """Scales of an FP8 parameter's weights and activations in the source that the base was made
        from, one each a native matrix (see `layouts.matrix_scales`).

        Raises:
            Ms4Error: the manifest does not have them.
        """
        kept: dict[str, list[float]] = self.manifest.get("source_scales") or {}
        count = len(list(native_names(tensor)))
        try:
            found = matrix_scales(tensor, self.layout, kept.__getitem__)
            whole = all(len(values) == count for values in found)
        except (KeyError, TypeError, IndexError, ZeroDivisionError):
            whole = False
        if not whole:
            raise Ms4Error(
                f"{manifest_of(self.directory)}: lacks scales of {tensor.disk} under "
                "`source_scales`; make the base again from its source."
            )
        return found

    def losses(self) -> list[str]:
        """What the base lacks of its source's weights, in words; empty if nothing."""
        if self.to == "nf4":
            return [f"{self.directory}: its experts have 4 bits: lossy."]
        again = 0
        for tensor in self.tensors if self.to == "fp8" and self.layout == "native" else ():
            if tensor.transform == "stack_gate_up":
                weights, _ = self.source_scales(tensor)
                again += sum(w != v for w, v in zip(weights[::2], weights[1::2], strict=True))
        note = (
            f"{self.directory}: experts whose gate and up share a scale, which they did not in the "
            f"native layout: {again}; one of the two was rounded to FP8 again: lossy."
        )
        return [note] if again else []

    def read_bf16(self, tensor: spec.Tensor, start: int, count: int) -> BF16:
        """A stretch of a parameter as BF16: as stored, FP8 codes × scale, or dequantized NF4.

        Args:
            tensor: the parameter.
            start: first element, counted through the whole tensor of the HF layout.
            count: elements; what is read and made at a time is proportional to it.
        """
        if tensor.disk in self.entries and self.entries[tensor.disk].dtype == "BF16":
            return self.read(tensor.disk, start, count).view(np.uint16)
        made = np.empty(count, np.uint16)
        matrices = tensor.shape[0] if tensor.role == "experts" else 1
        for at, matrix, first, some in _split(start, count, tensor.numel // matrices):
            if self.to == "fp8":
                codes = self.read(tensor.disk, start + at, some)
                part = np.empty(some, np.uint16)
                fp8.descale_codes(codes, self.scales(tensor)[matrix], part)
                made[at : at + some] = part
            else:
                made[at : at + some] = self._from_nf4(tensor, matrix, first, some)
        return made

    def _from_nf4(self, tensor: spec.Tensor, expert: int, start: int, count: int) -> BF16:
        """Weights of one expert; whole groups are read, as their blocks share a scale."""
        each = tensor.numel // tensor.shape[0]
        span = nf4.BLOCK * nf4.GROUP
        first, last = start // span * span, min(each, -(-(start + count) // span) * span)
        here, size = expert * each + first, last - first
        group = expert * -(-each // span) + first // span
        codes, absmax, scale, offset = (tensor.disk + suffix for suffix in nf4.SUFFIXES)
        packed = nf4.Packed(
            torch.from_numpy(self.read(codes, here // 2, size // 2))[None],
            torch.from_numpy(self.read(absmax, here // nf4.BLOCK, size // nf4.BLOCK))[None],
            torch.from_numpy(self.read(scale, group, -(-size // span)).view(np.float32))[None],
            torch.from_numpy(self.read(offset, expert, 1).view(np.float32)),
        )
        shape = (1, (last - first) // nf4.BLOCK, nf4.BLOCK)
        weight = nf4.dequantize(packed, shape, torch.bfloat16).view(torch.int16).flatten()
        return weight.numpy().view(np.uint16)[start - first : start - first + count]


def _split(start: int, count: int, each: int) -> Iterator[tuple[int, int, int, int]]:
    """A stretch cut at the ends of its matrices of `each` elements: where a part begins in the
    stretch, its matrix, where it begins there, and its elements."""
    at = 0
    while at < count:
        matrix, first = divmod(start + at, each)
        some = min(count - at, each - first)
        yield at, matrix, first, some
        at += some
