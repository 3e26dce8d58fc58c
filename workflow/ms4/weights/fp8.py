"""FP8 e4m3 with a scale: weight = code × scale_inv.

Shape letters: E experts, O out, I in. A linear's scale is 0-d, the experts' is [E, 1, 1].
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import numpy.typing as npt
import torch

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
CHUNK = 1 << 20
"""Pairs of codes that are looked up at once: what comes and goes stays in the cache."""


def descale_plain(codes: torch.Tensor, scale_inv: torch.Tensor) -> torch.Tensor:
    """`descale` as the product that it is: what it must give, to the bit.

    The product is taken in fp32 and rounded once; with BF16 scales that is bit-identical to the
    BF16 product for every finite code (a code has 4 significant bits, a scale 8).
    """
    return (codes.to(torch.float32) * scale_inv.to(torch.float32)).to(torch.bfloat16)


def descale(codes: torch.Tensor, scale_inv: torch.Tensor) -> torch.Tensor:
    """FP8 codes × scale → BF16, on the CPU and on as many threads as torch has.

    There are only 256 products with a scale. A table of all pairs of them, four bytes for two
    codes, is looked up instead of multiplying: that is several times faster.

    Args:
        codes: [O, I] or [E, O, I], float8_e4m3fn.
        scale_inv: 0-d or [E, 1, 1], bfloat16.
    """
    scales = scale_inv.reshape(-1)
    if codes.numel() % (2 * scales.numel()):
        return descale_plain(codes, scale_inv)
    pairs = codes.contiguous().view(torch.uint8).numpy().reshape(len(scales), -1).view(np.uint16)
    made = torch.empty(codes.shape, dtype=torch.bfloat16)
    values = made.view(torch.int16).numpy().reshape(len(scales), -1).view(np.uint32)
    tables = [_pair_table(scale) for scale in scales]

    def look_up(task: tuple[int, int]) -> None:
        row, start = task
        span = slice(start, start + CHUNK)
        # `wrap` never wraps here, but spares a copy that guards against bad indices.
        np.take(tables[row], pairs[row, span], out=values[row, span], mode="wrap")

    tasks = product(range(len(scales)), range(0, pairs.shape[1], CHUNK))
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(look_up, tasks))  # numpy lets go of the interpreter meanwhile
    return made


def _pair_table(scale: torch.Tensor) -> npt.NDArray[np.uint32]:
    """The BF16 products of each two codes by the 16 bits of the two, the first in the low byte."""
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)
    one = descale_plain(codes, scale).view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    table: npt.NDArray[np.uint32] = one[:, None] << np.uint32(16) | one[None, :]
    return table.reshape(-1)


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight → FP8 codes and BF16 scale_inv, the largest magnitude on the largest code.

    Args:
        weight: [O, I] (one scale) or [E, O, I] (one scale an expert).

    Returns:
        codes of the same shape, and the scale: 0-d or [E, 1, 1].
    """
    weight = weight.to(torch.float32)
    largest = weight.abs().amax(dim=(-2, -1), keepdim=weight.dim() == 3)
    scale = (largest / FP8_MAX).to(torch.bfloat16)
    # An all-zero weight has no scale of its own; any positive one gives zero codes.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = (weight / scale.to(torch.float32)).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return codes, scale
