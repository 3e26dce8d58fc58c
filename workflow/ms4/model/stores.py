"""Packed, frozen weights of all experts of a projection, and the memory they are dequantized to.

Shape letters: E experts of a slice or of all, O out, I in.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import bitsandbytes.functional as bnb
import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ms4.weights import nf4
from ms4.weights.tables import packed_shapes

MOST_ELEMENTS = 2**31 - 1
"""Of a slice: kernels count in int32. gate_up_proj of the published model has one more."""
CUDA_EXPERTS = 16
"""Experts of a slice on CUDA: dequantized, 16 of the published model take half a GiB and 64 take
two."""
CPU_BYTES = 4 << 20
"""Of a slice on a CPU: what is dequantized should still be in its cache when it is multiplied."""

Which = slice | torch.Tensor
"""Experts: a range, or the numbers of some (int64 [E])."""


def _to_list(tensor: torch.Tensor) -> list[int]:
    found: list[int] = tensor.tolist()
    return found


@dataclass
class Workspace:
    """How slices of experts are dequantized, and the memory for one of them: a model has one, and
    its layers use it in turn.

    A slice is used up before the next is taken, in the forward and again in the backward pass, and
    autograd never saves it. So one piece of memory is enough, also when activations are recomputed.
    It must not be shared between threads or streams that run at the same time.
    """

    experts: int = nf4.MAX_EXPERTS
    """Of a slice, at most; fewer take less memory and more calls."""
    most_bytes: int | None = None
    """Of a slice, at most (but it has one expert at least); None: no bound."""
    held: bool = True
    """Whether kernels write into memory that is held. bitsandbytes' CPU kernel cannot; there slices
    are so small that the allocator hands out the same memory again."""
    read: Callable[[torch.Tensor], list[int]] = _to_list
    """Reads where the rows of each expert end. Shapes follow from it, so an account of memory
    without numbers puts the routing here that it assumes."""
    _rows_E: npt.NDArray[np.int64] | None = field(default=None, repr=False)
    _memory: torch.Tensor | None = field(default=None, repr=False)
    _dynamic: torch.Tensor | None = field(default=None, repr=False)

    @classmethod
    def on(cls, device: torch.device) -> Workspace:
        """The one for a device."""
        if device.type == "cpu":
            return cls(most_bytes=CPU_BYTES, held=False)
        return cls(experts=CUDA_EXPERTS)

    def size(self, elements: int, dtype: torch.dtype) -> int:
        """Experts of a slice, of `elements` weights each."""
        bound = min(self.experts, MOST_ELEMENTS // elements)
        if self.most_bytes is not None:
            bound = min(bound, self.most_bytes // (elements * dtype.itemsize))
        return max(1, bound)

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory that is not initialized; what was taken before must be used up."""
        count, memory = math.prod(shape), self._memory
        if (
            memory is None
            or (memory.dtype, memory.device) != (dtype, device)
            or memory.numel() < count
        ):
            self._memory = memory = None  # first, or the two would stand beside each other
            with torch.inference_mode(False):  # training may follow generation
                self._memory = memory = torch.empty(count, dtype=dtype, device=device)
        return memory[:count].view(*shape)

    def count(self, ends: Sequence[int]) -> None:
        """Note how many rows came to each expert of a layer.

        Args:
            ends: where each expert's rows end, as `read` gave them: the host knows them anyway.
        """
        rows_E = np.diff(np.asarray(ends, dtype=np.int64), prepend=0)
        self._rows_E = rows_E if self._rows_E is None else self._rows_E + rows_E

    def take_load(self) -> list[float]:
        """Each expert's share of the rows since the last call, over all layers; none, no list.

        Shares, because a layer that is computed again in the backward pass counts twice."""
        rows_E, self._rows_E = self._rows_E, None
        if rows_E is None or not rows_E.any():
            return []
        shares: list[float] = (rows_E / rows_E.sum()).tolist()
        return shares

    def dynamic(self, device: torch.device) -> torch.Tensor:
        """The 256 values that bitsandbytes' 8-bit codes stand for."""
        if self._dynamic is None or self._dynamic.device != device:
            self._dynamic = bnb.create_dynamic_map().to(device)
        return self._dynamic


class ExpertStore(nn.Module, ABC):
    """One projection of all experts, [E, O, I], frozen; every tensor has E as dimension 0."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape = shape

    @abstractmethod
    def take(self, which: Which, dtype: torch.dtype, workspace: Workspace) -> torch.Tensor:
        """Some experts as [E, O, I] in `dtype`, in the workspace's memory: good until the next."""

    def dequantize(self, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        """Experts `first` to `last` (exclusive) as [last - first, O, I] in `dtype`, to keep."""
        held = Workspace.on(next(self.parameters()).device)
        return self.take(slice(first, last), dtype, held)


def _frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _select(tensor: torch.Tensor, which: Which) -> torch.Tensor:
    return tensor[which] if isinstance(which, slice) else tensor.index_select(0, which)


class BF16Store(ExpertStore):
    """Weights as they are."""

    def __init__(self, shape: tuple[int, int, int], device: torch.device | str = "meta") -> None:
        super().__init__(shape)
        self.weight = _frozen(torch.empty(shape, dtype=torch.bfloat16, device=device))

    def take(self, which: Which, dtype: torch.dtype, workspace: Workspace) -> torch.Tensor:
        """A range in BF16 is the weight itself."""
        weight = _select(self.weight, which)
        if dtype == weight.dtype:
            return weight
        return workspace.take(weight.shape, dtype, weight.device).copy_(weight)


def decode_fp8(codes: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """FP8 codes × scale into `out`: the BF16 products in whatever dtype it has. A code has 4
    significant bits and a scale 8, so they are rounded once.

    Args:
        codes: e4m3 as uint8, of any shape.
        scale: bfloat16, broadcastable to it.
        out: of the shape of `codes`.
    """
    values = codes.view(torch.float8_e4m3fn)
    if out.dtype == torch.bfloat16:
        return out.copy_(values).mul_(scale)
    return out.copy_(values.to(torch.bfloat16).mul_(scale))


class FP8Store(ExpertStore):
    """FP8 codes (e4m3) with a BF16 scale an expert, as published."""

    def __init__(self, shape: tuple[int, int, int], device: torch.device | str = "meta") -> None:
        super().__init__(shape)
        # Bytes, and not float8: few operations take that.
        self.codes = _frozen(torch.empty(shape, dtype=torch.uint8, device=device))
        scales = (shape[0], 1, 1)
        self.scale_inv = _frozen(torch.empty(scales, dtype=torch.bfloat16, device=device))

    def take(self, which: Which, dtype: torch.dtype, workspace: Workspace) -> torch.Tensor:
        """The BF16 products, in whatever dtype."""
        codes = _select(self.codes, which)
        scale = _select(self.scale_inv, which)
        out = workspace.take(codes.shape, dtype, codes.device)
        if dtype == torch.bfloat16:
            return decode_fp8(codes, scale, out)
        for expert, code, factor in zip(out, codes, scale, strict=True):
            decode_fp8(code, factor, expert)
        return out


class NF4Store(ExpertStore):
    """Weights in NF4 with double quantization (see `ms4.weights.nf4`)."""

    def __init__(self, shape: tuple[int, int, int], device: torch.device | str = "meta") -> None:
        super().__init__(shape)
        sizes = packed_shapes(shape[0], shape[1] * shape[2])
        for suffix, (dtype, size) in sizes.items():
            kind = torch.uint8 if dtype == "U8" else torch.float32
            setattr(self, suffix[1:], _frozen(torch.empty(size, dtype=kind, device=device)))

    def take(self, which: Which, dtype: torch.dtype, workspace: Workspace) -> torch.Tensor:
        packed = nf4.Packed(*(_select(getattr(self, s[1:]), which) for s in nf4.SUFFIXES))
        shape = (packed.codes.shape[0], *self.shape[1:])
        kernel = dtype if dtype != torch.float64 else torch.float32
        if not workspace.held:
            return nf4.dequantize(packed, shape, kernel).to(dtype)
        out = workspace.take(shape, kernel, packed.codes.device)
        rows = out.view(-1, nf4.BLOCK)
        state = bnb.QuantState(
            absmax=_magnitudes(packed, workspace).flatten(),
            shape=rows.shape,
            blocksize=nf4.BLOCK,
            quant_type="nf4",
            dtype=kernel,
        )
        bnb.dequantize_4bit(packed.codes.reshape(-1, 1), state, out=rows)
        return out.to(dtype)


def _magnitudes(packed: nf4.Packed, workspace: Workspace) -> torch.Tensor:
    """`nf4.dequantize_absmax` by bitsandbytes' kernel where groups are whole: it makes one tensor
    of this size and not five, which for 64 experts of the published model are 64 MiB each."""
    if packed.absmax.shape[1] % nf4.GROUP:
        return nf4.dequantize_absmax(packed)
    found: torch.Tensor = bnb.dequantize_blockwise(
        packed.absmax,
        absmax=packed.scale.flatten(),
        code=workspace.dynamic(packed.absmax.device),
        blocksize=nf4.GROUP,
    )
    return found.add_(packed.offset[:, None])
