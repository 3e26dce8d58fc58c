"""Tensors of a base recomputed from the source by another path than the converter's.

FP8 codes are decoded by their bits with numpy, products are rounded to BF16 by bits, and an NF4
code has to be the value nearest to its weight: no table of `fp8` or `nf4` is used here. Experts are
taken one at a time and in stretches, so that memory does not grow with the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import numpy.typing as npt

from ms4 import spec
from ms4.errors import Ms4Error
from ms4.weights.layouts import Segment, Source
from ms4.weights.shards import Bytes, Entry, Reader, read_header
from ms4.weights.tables import base_tensors, pieces

Floats = npt.NDArray[np.float32]

STRETCH = 1 << 20
"""Elements that are compared at a time: whole blocks of NF4, and of groups of them."""
BLOCK, GROUP = 64, 256
"""Weights that share one absmax, and absmax codes that share one scale."""
TIE = 1e-6
"""Distance of a number in ±1 from the middle of two values of a code within which either is right:
the quotient is rounded differently on different machines."""
ABSMAX_TIE = 5e-5
"""The same of absmax: bitsandbytes' own 8-bit codes are that far from the nearest, around zero."""


def decode_e4m3(codes: npt.NDArray[np.uint8]) -> Floats:
    """FP8 e4m3fn codes → values by their bits: sign, 4 of exponent (bias 7), 3 of mantissa."""
    exponent, mantissa = (codes >> 3 & 15).astype(np.int32), (codes & 7).astype(np.float32)
    value = np.where(
        exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * np.exp2((exponent - 10).astype(float))
    )
    value = np.where((codes & 127) == 127, np.nan, value)
    return np.where(codes & 128, -value, value).astype(np.float32)


def round_to_bf16(values: Floats) -> Floats:
    """Round finite numbers to the nearest BF16, ties to even, and back."""
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return rounded.astype(np.uint32).view(np.float32)


def _from_bf16(data: Bytes) -> Floats:
    return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


class _Error:
    """A norm-wise error that is gathered stretch by stretch."""

    def __init__(self) -> None:
        self._wrong = self._whole = 0.0

    def add(self, found: Floats, wanted: Floats) -> None:
        difference = (found - wanted).astype(np.float64)
        self._wrong += float(difference @ difference)
        self._whole += float(np.square(wanted, dtype=np.float64).sum())

    @property
    def value(self) -> float:
        if not self._whole:
            return float("inf") if self._wrong else 0.0
        return float((self._wrong / self._whole) ** 0.5)


class _Base:
    """The stored parts of one parameter in a base."""

    def __init__(self, reader: Reader, target: Path, tensor: spec.Tensor, to: str, piece: str):
        self.reader = reader
        self.path = target / piece
        header = read_header(self.path)
        self.entries: dict[str, Entry] = {}
        for name, (dtype, shape) in base_tensors(tensor, to).items():
            entry = header.get(name)
            if entry is None or (entry.dtype, entry.shape) != (dtype, shape):
                fault = "missing" if entry is None else f"{entry.dtype} {list(entry.shape)}"
                raise Ms4Error(
                    f"{self.path}: {name} is {fault}, not {dtype} {list(shape)}. Remove the file "
                    "and run `ms4 descale` again."
                )
            self.entries[name] = entry

    def read(self, name: str, offset: int, size: int) -> Bytes:
        return self.reader.read(self.entries[name], offset, size)

    def fault(self, tensor: spec.Tensor, what: str) -> Ms4Error:
        return Ms4Error(
            f"{self.path}: {tensor.disk}: differs from source × scale: {what}. Remove the file and "
            "run `ms4 descale` again."
        )


def _stretches(segment: Segment) -> Iterator[tuple[int, int]]:
    for start in range(0, segment.count, STRETCH):
        yield start, min(STRETCH, segment.count - start)


def _values(source: Source, segment: Segment, start: int, count: int) -> Floats:
    """Exact BF16 weights of a stretch of the source."""
    data = source.read(segment, start, count)
    if segment.entry.dtype == "BF16":
        return _from_bf16(data)
    values = _decoded()[data]
    if np.isnan(values).any():
        raise Ms4Error(
            f"{segment.entry.path}: {segment.entry.name}: holds FP8 codes that are not a number; "
            "fetch it again."
        )
    return round_to_bf16(values * np.float32(segment.scale))


@lru_cache(maxsize=1)
def _decoded() -> Floats:
    return decode_e4m3(np.arange(256, dtype=np.uint8))


def sampled_experts(experts: int) -> list[int]:
    """First, middle and last."""
    return sorted({0, experts // 2, experts - 1})


def recompute(
    source: Source, target: Path, tensor: spec.Tensor, to: str, *, every_expert: bool = False
) -> float:
    """Norm-wise error of a parameter of the base in `target`; of a few experts where it has some.

    Args:
        source: the FP8 checkpoint, in either layout; the parameter's files must be here.
        target: directory of the base.
        tensor: the parameter.
        to: how the base stores FP8 tensors: `bf16`, `nf4` or `fp8`.
        every_expert: look at all of them.

    Returns:
        0 where the storage is exact; of NF4, the error against the exact BF16 weights.

    Raises:
        Ms4Error: the source holds NaN codes or senseless scales, or the base differs from it by
            more than its storage explains. Names file and tensor.
    """
    segments = source.segments(tensor)
    piece = next(name for name, held in pieces(source.dims).items() if tensor in held)
    if tensor.role == "experts":
        each = len(segments) // tensor.shape[0]
        count = tensor.shape[0]
        groups = [
            (expert, segments[expert * each : (expert + 1) * each])
            for expert in (range(count) if every_expert else sampled_experts(count))
        ]
    else:
        groups = [(0, segments)]
    error = _Error()
    with Reader() as reader:
        base = _Base(reader, target, tensor, to, piece)
        for number, group in groups:
            if to == "nf4" and tensor.role == "experts":
                _check_nf4(source, base, tensor, number, group, error)
            elif to == "fp8" and tensor.dtype == "F8_E4M3":
                _check_fp8(source, base, tensor, number, group, error)
            else:
                _check_bf16(source, base, tensor, group, error)
    return error.value


def _check_bf16(
    source: Source, base: _Base, tensor: spec.Tensor, group: Sequence[Segment], error: _Error
) -> None:
    for segment in group:
        for start, count in _stretches(segment):
            wanted = _values(source, segment, start, count)
            found = _from_bf16(base.read(tensor.disk, 2 * (segment.at + start), 2 * count))
            error.add(found, wanted)
            if wrong := int((found.view(np.uint32) != wanted.view(np.uint32)).sum()):
                at = segment.at + start
                raise base.fault(
                    tensor, f"{wrong} of the {count} values from number {at} on are not the product"
                )


def _check_fp8(
    source: Source,
    base: _Base,
    tensor: spec.Tensor,
    number: int,
    group: Sequence[Segment],
    error: _Error,
) -> None:
    wanted_scale = max(segment.scale for segment in group)
    scale = float(_from_bf16(base.read(tensor.scale, 2 * number, 2))[0])
    if scale != wanted_scale:
        raise base.fault(tensor, f"its scale is {scale} and not {wanted_scale}")
    decoded = _decoded()
    for segment in group:
        # Code of the source, code of the base → whether one may become the other.
        if segment.scale == scale:
            allowed = np.eye(256, dtype=bool)
        else:
            exact = decoded * np.float32(segment.scale)
            distance = np.abs(decoded[None, :] * np.float32(scale) - exact[:, None])
            distance = np.nan_to_num(distance, nan=np.inf)
            allowed = distance <= distance.min(axis=1, keepdims=True)
        for start, count in _stretches(segment):
            codes = source.read(segment, start, count)
            found = base.read(tensor.disk, segment.at + start, count)
            wanted = _values(source, segment, start, count)
            error.add(round_to_bf16(decoded[found] * np.float32(scale)), wanted)
            if wrong := int((~allowed[codes, found]).sum()):
                at = segment.at + start
                raise base.fault(
                    tensor, f"{wrong} of the {count} codes from number {at} on are not the source's"
                )


def _check_nf4(
    source: Source,
    base: _Base,
    tensor: spec.Tensor,
    expert: int,
    group: Sequence[Segment],
    error: _Error,
) -> None:
    """Codes nearest to the weights, absmax as near as 8 bits allow: one expert."""
    blocks = tensor.numel // tensor.shape[0] // BLOCK
    groups = -(-blocks // GROUP)
    absmax_codes = base.read(f"{tensor.disk}.absmax", expert * blocks, blocks)
    scale = base.read(f"{tensor.disk}.absmax_scale", 4 * expert * groups, 4 * groups)
    offset = base.read(f"{tensor.disk}.absmax_offset", 4 * expert, 4).view(np.float32)
    dynamic = bnb.create_dynamic_map().numpy()
    scales = np.repeat(scale.view(np.float32), GROUP)[:blocks]
    absmax = dynamic[absmax_codes] * scales + offset
    values = bnb.get_4bit_type("nf4", device="cpu").numpy()
    largest = np.empty(blocks, np.float32)
    first = group[0].at
    for segment in group:
        for start, count in _stretches(segment):
            wanted = _values(source, segment, start, count)
            at = segment.at + start
            packed = base.read(f"{tensor.disk}.nf4", at // 2, count // 2)
            found = values[np.stack([packed >> 4, packed & 15], axis=-1).reshape(-1, BLOCK)]
            span = slice((at - first) // BLOCK, (at - first + count) // BLOCK)
            weights = wanted.reshape(-1, BLOCK)
            largest[span] = np.abs(weights).max(axis=1)
            # A block of zeros has no largest; each of its weights is 0 of it.
            share = weights / np.where(largest[span] > 0, largest[span], 1)[:, None]
            if wrong := int((np.abs(found - share) > _nearest(values, share) + TIE).sum()):
                raise base.fault(
                    tensor,
                    f"expert {expert}: {wrong} of the {count} NF4 codes from number {at - first} "
                    "on are not the nearest",
                )
            error.add((found * absmax[span, None]).reshape(-1), wanted)
    _check_absmax(base, tensor, expert, largest, absmax_codes, scales, offset[0], dynamic)


def _nearest(values: Floats, share: Floats) -> Floats:
    """Distance to the nearest NF4 value."""
    above = np.searchsorted(values, share).clip(1, len(values) - 1)
    distance: Floats = np.minimum(np.abs(values[above] - share), np.abs(values[above - 1] - share))
    return distance


def _check_absmax(
    base: _Base,
    tensor: spec.Tensor,
    expert: int,
    largest: Floats,
    codes: Bytes,
    scales: Floats,
    offset: np.float32,
    dynamic: Floats,
) -> None:
    mean = float(largest.mean(dtype=np.float64))
    if not np.isclose(offset, mean, rtol=1e-4, atol=1e-30):
        raise base.fault(tensor, f"expert {expert}: the mean of its absmax is {mean}, not {offset}")
    groups = [np.abs(largest[i : i + GROUP] - offset).max() for i in range(0, len(largest), GROUP)]
    if not np.allclose(scales[::GROUP], groups, rtol=1e-4, atol=1e-6 * mean):
        raise base.fault(tensor, f"expert {expert}: the scales of its absmax are not the largest")
    # The 8-bit codes of what is left, as shares of the largest; of nothing any code is right.
    share = (largest - offset) / np.where(scales > 0, scales, 1)
    distance = np.where(scales > 0, np.abs(dynamic[codes] - share), 0)
    if wrong := int((distance > _nearest(np.sort(dynamic), share) + ABSMAX_TIE).sum()):
        raise base.fault(
            tensor, f"expert {expert}: {wrong} of the codes of its absmax are not the nearest"
        )
