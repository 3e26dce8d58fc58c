"""FP8 e4m3 with a scale: weight = code × scale_inv.

Shape letters: E experts, O out, I in. A linear's scale is 0-d, the experts' is [E, 1, 1].
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import product

import numpy as np
import numpy.typing as npt
import torch

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
CHUNK = 1 << 20
"""Codes that are looked up at once: what comes and goes stays in the cache."""
TABLES = 32
"""Tables of a scale, up to 256 KiB each, that are kept: some for each thread that converts. They
lie between what comes and goes: 256 of them let the memory grow by 7 MB a layer."""

Codes = npt.NDArray[np.uint8]
"""FP8 codes as bytes, in one dimension."""


def descale_plain(codes: torch.Tensor, scale_inv: torch.Tensor) -> torch.Tensor:
    """`descale` as the product that it is: what it must give, to the bit.

    The product is taken in fp32 and rounded once; with BF16 scales that is bit-identical to the
    BF16 product for every finite code (a code has 4 significant bits, a scale 8).
    """
    return (codes.to(torch.float32) * scale_inv.to(torch.float32)).to(torch.bfloat16)


def descale(codes: torch.Tensor, scale_inv: torch.Tensor) -> torch.Tensor:
    """FP8 codes × scale → BF16, on the CPU and on as many threads as torch has.

    Args:
        codes: [O, I] or [E, O, I], float8_e4m3fn.
        scale_inv: 0-d or [E, 1, 1], bfloat16.
    """
    scales = scale_inv.reshape(-1).tolist()
    rows = codes.contiguous().view(torch.uint8).numpy().reshape(len(scales), -1)
    made = torch.empty(codes.shape, dtype=torch.bfloat16)
    values = made.view(torch.int16).numpy().view(np.uint16).reshape(len(scales), -1)

    def look_up(task: tuple[int, int]) -> None:
        row, start = task
        span = slice(start, start + CHUNK)
        descale_codes(rows[row, span], scales[row], values[row, span])

    tasks = product(range(len(scales)), range(0, rows.shape[1], CHUNK))
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(look_up, tasks))  # torch lets go of the interpreter meanwhile
    return made


def descale_codes(codes: Codes, scale: float, out: npt.NDArray[np.uint16]) -> None:
    """The bits of the BF16 products of codes with one scale, on this thread.

    There are only 256 products with a scale. A table of all pairs of them, four bytes for two
    codes, is looked up instead of multiplying: that is several times faster.

    Args:
        codes: at best not many more than `CHUNK`.
        scale: a BF16 number.
        out: of the same length.
    """
    if len(codes) % 2:
        # The first of a pair is the low half.
        out[:] = np.take(_pair_table(scale).numpy()[:256], codes).astype(np.uint16)
        return
    # torch's look-up takes 32-bit indices as they are; numpy's would widen them first.
    pairs = torch.from_numpy(codes.view(np.uint16).astype(np.int32))
    torch.index_select(_pair_table(scale), 0, pairs, out=torch.from_numpy(out.view(np.int32)))


@lru_cache(maxsize=TABLES)
def _pair_table(scale: float) -> torch.Tensor:
    """The BF16 products of each two codes by the 16 bits of the two, the first in the low byte:
    int32 [65536]."""
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)
    products = descale_plain(codes, torch.tensor(scale))
    one = products.view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    table = one[:, None] << np.uint32(16) | one[None, :]
    return torch.from_numpy(table.reshape(-1).view(np.int32))


def encode(values: npt.NDArray[np.uint16], scale: float) -> Codes:
    """The FP8 codes that are nearest to BF16 numbers under a scale; beyond the largest: that one.

    What `quantize` does once it has its scale, looked up for all BF16 numbers there are.

    Args:
        values: their bits.
        scale: a positive BF16 number.
    """
    return np.take(_code_table(scale), values)


@lru_cache(maxsize=TABLES)
def _code_table(scale: float) -> Codes:
    values = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16).view(np.int16))
    shares = values.view(torch.bfloat16).float() / scale
    codes: Codes = shares.clamp(-FP8_MAX, FP8_MAX).to(FP8).view(torch.uint8).numpy()
    return codes


def rescale(codes: Codes, before: float, after: float) -> Codes:
    """The codes under the scale `after` that are nearest to codes under the scale `before`: lossy,
    unless the scales differ by a power of two; beyond the largest: that one."""
    return np.take(_rescaling(before, after), codes)


@lru_cache(maxsize=256)
def _rescaling(before: float, after: float) -> Codes:
    values = torch.arange(256, dtype=torch.uint8).view(FP8).float() * before / after
    codes: Codes = values.clamp(-FP8_MAX, FP8_MAX).to(FP8).view(torch.uint8).numpy()
    return codes


def has_nan(codes: Codes) -> bool:
    """Whether any code is NaN (seven ones after the sign)."""
    if len(codes) % 8:
        return bool(((codes & 127) == 127).any())
    # Adding one to the seven bits carries into the eighth only from seven ones; eight codes a word.
    words = codes.view(np.uint64) & np.uint64(0x7F7F7F7F7F7F7F7F)
    words += np.uint64(0x0101010101010101)
    return bool((words & np.uint64(0x8080808080808080)).any())


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
