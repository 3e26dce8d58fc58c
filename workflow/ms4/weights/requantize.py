"""Back to FP8: the codes and scales of a base's matrices, the source's own where nothing changed.

A matrix here is what has one scale in the HF layout: a linear layer, or a projection of one expert.
In the native layout gate and up of an expert are two, each with a scale of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from ms4 import spec
from ms4.errors import Ms4Error
from ms4.weights import fp8
from ms4.weights.base import BF16, Base
from ms4.weights.layouts import Segment, Source
from ms4.weights.shards import Bytes, Piece
from ms4.weights.stream import Task

_NAMED = 3
"""Matrices that one note names."""
_INFINITE = 0x7F80
"""Bits of BF16's infinity; above it is what is not a number."""


def bf16_bits(values: Sequence[float]) -> BF16:
    """The bits of numbers rounded to BF16."""
    bits: BF16 = torch.tensor(values, dtype=torch.float64).bfloat16().view(torch.int16).numpy()
    return bits.view(np.uint16)


def _numbers(bits: BF16) -> npt.NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round(value: float) -> float:
    return float(_numbers(bf16_bits([value]))[0])


def _round_up(value: float) -> float:
    """The smallest BF16 number that is not below a positive one."""
    bits = bf16_bits([value])
    return float(_numbers(bits + np.uint16(_round(value) < value))[0])


@dataclass(frozen=True)
class _Plan:
    """How a matrix is coded."""

    scale: float
    untouched: tuple[bool, ...]
    """Of each of its native matrices: whether the codes are those that it had in the source."""
    outgrown: bool
    """Its largest magnitude is beyond the scale that it had."""
    shared: bool
    """Its native matrices had different scales."""


class Requantizer:
    """Makes the FP8 tensors of the HF layout from a base in fp8 or bf16, and knows afterwards what
    was not exact. Threads may share it."""

    def __init__(self, base: Base, source: Source | None) -> None:
        """Take the scales of `source`, or those that the base has kept.

        Raises:
            Ms4Error: the source is not what the base was made from.
        """
        self._base, self._source = base, source
        if source is not None:
            self._check(source)
        origin = base if source is None else source
        self._tensors = {t.disk: t for t in base.tensors if t.dtype == "F8_E4M3"}
        self._scales = {name: origin.source_scales(t) for name, t in self._tensors.items()}
        self._segments: dict[str, list[Segment]] = {}
        self._plans: dict[tuple[str, int], _Plan] = {}
        self._errors: dict[tuple[str, int], tuple[float, float]] = {}

    def _check(self, source: Source) -> None:
        if source.dims != self._base.dims:
            raise Ms4Error(
                f"{source.directory}: another model than {self._base.directory}; give the "
                "checkpoint that the base was made from."
            )
        source.check_here()
        for tensor in self._base.tensors if source.layout == self._base.layout else ():
            if tensor.dtype == "F8_E4M3" and (
                source.source_scales(tensor) != self._base.source_scales(tensor)
            ):
                raise Ms4Error(
                    f"{source.directory}: {tensor.disk}: its scales are not those of the "
                    f"checkpoint that {self._base.directory} was made from; give that one."
                )

    # What the writer asks for.

    def tasks(self, tensor: spec.Tensor, piece: Piece) -> Iterator[tuple[Task, int]]:
        """The tasks that write a parameter's codes, one a matrix, with the elements of each."""
        count = _matrices(tensor)
        for matrix in range(count):
            make = self._copy if self._base.to == "fp8" else self._encode
            yield partial(make, tensor, matrix, piece), tensor.numel // count

    def weight_scales(self, tensor: spec.Tensor) -> list[float]:
        """The scales of a parameter's matrices."""
        if self._base.to == "fp8":
            return self._base.scales(tensor)
        return [self._plan(tensor, matrix).scale for matrix in range(_matrices(tensor))]

    def activation_scales(self, tensor: spec.Tensor) -> list[float]:
        """The activation scales of a parameter's matrices: of gate and up the larger."""
        return [max(own) for own in _by_matrix(tensor, self._scales[tensor.disk][1])]

    def notes(self) -> list[str]:
        """What was not exact beyond the base's own loss, once all is written."""
        shared = [key for key in self._errors if self._plans[key].shared]
        changed = [key for key in self._errors if not self._plans[key].shared]
        outgrown = sorted(key for key, plan in self._plans.items() if plan.outgrown)
        notes = []
        if shared:
            notes.append(
                "experts whose gate and up share a scale here and not in the native layout: "
                f"{len(shared)}; rounded to FP8 again: lossy, norm-wise error "
                f"{self._error(shared):.2%}. BF16 has no such loss."
            )
        if changed:
            notes.append(
                f"matrices that were changed and rounded to FP8: {len(changed)}, norm-wise error "
                f"{self._error(changed):.2%}."
            )
        if outgrown:
            named = ", ".join(f"{name}[{matrix}]" for name, matrix in outgrown[:_NAMED])
            more = ", …" if len(outgrown) > _NAMED else ""
            notes.append(
                f"matrices that outgrew their scale and got a larger one: {len(outgrown)} "
                f"({named}{more})."
            )
        return notes

    def _error(self, matrices: Sequence[tuple[str, int]]) -> float:
        """Norm-wise, of those of their native matrices that are not exact."""
        squares = np.sum([self._errors[key] for key in matrices], axis=0)
        return float(np.sqrt(squares[0] / squares[1]))

    # One matrix.

    def _copy(self, tensor: spec.Tensor, matrix: int, piece: Piece) -> None:
        each = tensor.numel // _matrices(tensor)
        for start, count in _stretches(matrix * each, each):
            piece.write(tensor.disk, start, self._base.read(tensor.disk, start, count))

    def _plan(self, tensor: spec.Tensor, matrix: int) -> _Plan:
        """Reads the matrix once; two threads that ask at the same time find the same."""
        key = (tensor.disk, matrix)
        if key not in self._plans:
            self._plans[key] = self._scan(tensor, matrix)
        return self._plans[key]

    def _scan(self, tensor: spec.Tensor, matrix: int) -> _Plan:
        own = _by_matrix(tensor, self._scales[tensor.disk][0])[matrix]
        each = tensor.numel // _matrices(tensor) // len(own)
        largest, untouched = 0, []
        for number, scale in enumerate(own):
            same = True
            for start, count in _stretches((matrix * len(own) + number) * each, each):
                bits = self._base.read_bf16(tensor, start, count)
                largest = max(largest, int((bits & np.uint16(0x7FFF)).max()))
                if same:
                    codes = self._codes(tensor, start, bits, scale)
                    same = np.array_equal(_products(codes, scale), bits)
            untouched.append(same)
        if largest >= _INFINITE:
            raise Ms4Error(
                f"{self._base.directory}: {tensor.disk}[{matrix}] holds weights that are not "
                "finite numbers; FP8 cannot be made of it."
            )
        kept, magnitude = max(own), float(_numbers(np.array([largest], np.uint16))[0])
        # The largest code times the scale was rounded, too: up, it may be.
        outgrown = not magnitude <= _round(fp8.FP8_MAX * kept)
        scale = _round_up(magnitude / fp8.FP8_MAX) if outgrown else kept
        return _Plan(scale, tuple(untouched), outgrown, len(set(own)) > 1)

    def _encode(self, tensor: spec.Tensor, matrix: int, piece: Piece) -> None:
        plan = self._plan(tensor, matrix)
        own = _by_matrix(tensor, self._scales[tensor.disk][0])[matrix]
        each = tensor.numel // _matrices(tensor) // len(own)
        error, norm = 0.0, 0.0
        for number, scale in enumerate(own):
            exact = plan.untouched[number] and scale == plan.scale
            for start, count in _stretches((matrix * len(own) + number) * each, each):
                bits = self._base.read_bf16(tensor, start, count)
                if plan.untouched[number]:
                    codes = self._codes(tensor, start, bits, scale)
                    codes = codes if exact else fp8.rescale(codes, scale, plan.scale)
                else:
                    codes = fp8.encode(bits, plan.scale)
                piece.write(tensor.disk, start, codes)
                if not exact:
                    made, wanted = _numbers(_products(codes, plan.scale)), _numbers(bits)
                    error += _square(made - wanted, plan.scale)
                    norm += _square(wanted, plan.scale)
        if error:
            self._errors[tensor.disk, matrix] = (error, norm)

    def _codes(self, tensor: spec.Tensor, start: int, bits: BF16, scale: float) -> Bytes:
        """Codes that a stretch of a native matrix has, if nobody touched it: the source's, or else
        the nearest under its scale."""
        if self._source is None:
            return fp8.encode(bits, scale)
        if tensor.disk not in self._segments:
            self._segments[tensor.disk] = self._source.segments(tensor)
        return self._source.read_across(self._segments[tensor.disk], start, len(bits))


def _square(numbers: npt.NDArray[np.float32], scale: float) -> float:
    """The sum of the numbers' squares, taken in units of a scale: large ones have no square in
    float32."""
    shares = numbers / np.float32(scale)
    return float(np.dot(shares, shares)) * scale**2


def _matrices(tensor: spec.Tensor) -> int:
    return tensor.shape[0] if tensor.role == "experts" else 1


def _by_matrix(tensor: spec.Tensor, values: list[float]) -> list[list[float]]:
    """Values of a parameter's native matrices, by its matrices in the HF layout."""
    each = len(values) // _matrices(tensor)
    return [values[at : at + each] for at in range(0, len(values), each)]


def _stretches(start: int, count: int) -> Iterator[tuple[int, int]]:
    for at in range(start, start + count, fp8.CHUNK):
        yield at, min(fp8.CHUNK, start + count - at)


def _products(codes: Bytes, scale: float) -> BF16:
    made = np.empty(len(codes), np.uint16)
    fp8.descale_codes(codes, scale, made)
    return made
