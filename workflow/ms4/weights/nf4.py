"""NF4 with double quantization, per expert, in bitsandbytes' byte layout.

Each expert is quantized by itself (own absmax groups, own offset), so every packed tensor has the
experts as dimension 0 and can be sliced, streamed and sharded by expert.

Shape letters: E experts, O out, I in, K = O·I elements of an expert, B = K/64 blocks.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import torch

from ms4.weights import fp8
from ms4.weights.tables import NF4_BLOCK, NF4_GROUP, NF4_SUFFIXES

BLOCK, GROUP, SUFFIXES = NF4_BLOCK, NF4_GROUP, NF4_SUFFIXES
MAX_EXPERTS = 64
"""Experts in one call: bitsandbytes counts elements in int32, and 64 experts of the published model
hold 2**30 elements of gate_up_proj."""
CHUNK = 1 << 20
"""Weights that are looked up at once: what comes and goes stays in the cache."""


@dataclass(frozen=True)
class Packed:
    """The four tensors of one projection of all experts."""

    codes: torch.Tensor
    """uint8 [E, K/2]: two 4-bit codes a byte, the first element in the high half."""
    absmax: torch.Tensor
    """uint8 [E, B]: dynamic 8-bit codes of (absmax - offset) / scale."""
    scale: torch.Tensor
    """float32 [E, ceil(B/256)]."""
    offset: torch.Tensor
    """float32 [E]: mean absmax of the expert."""

    def by_suffix(self) -> dict[str, torch.Tensor]:
        """The tensors by the suffixes of their names on disk."""
        return dict(zip(SUFFIXES, (self.codes, self.absmax, self.scale, self.offset), strict=True))


def quantize(weight_EOI: torch.Tensor) -> Packed:
    """Quantize the experts one by one with bitsandbytes; an expert must be whole blocks of 64."""
    _check_blocks(weight_EOI)
    codes, absmax = [], []
    for expert in weight_EOI:
        packed, state = bnb.quantize_4bit(expert.contiguous(), blocksize=BLOCK, quant_type="nf4")
        codes.append(packed.flatten())
        absmax.append(state.absmax)
    return _with_packed_absmax(torch.stack(codes), torch.stack(absmax))


def quantize_fp8(codes_EOI: torch.Tensor, scale_E11: torch.Tensor) -> Packed:
    """FP8 codes with a scale an expert → the NF4 that `quantize` makes of the BF16 products, to the
    bit, but without them; on the CPU and on as many threads as torch has.

    Args:
        codes_EOI: float8_e4m3fn; an expert must be whole blocks of 64.
        scale_E11: bfloat16, positive.
    """
    _check_blocks(codes_EOI)
    experts = codes_EOI.shape[0]
    rows = codes_EOI.contiguous().view(torch.uint8).numpy().reshape(experts, -1)
    codes = torch.empty(experts, rows.shape[1] // 2, dtype=torch.uint8)
    packed = codes.numpy()
    largest = np.empty((experts, rows.shape[1] // BLOCK), np.uint8)
    scales = scale_E11.flatten().tolist()

    def convert(expert: int) -> None:
        table = pair_table(scales[expert])
        for start in range(0, rows.shape[1], CHUNK):
            end = start + CHUNK
            largest[expert, start // BLOCK : end // BLOCK] = quantize_codes(
                rows[expert, start:end], table, packed[expert, start // 2 : end // 2]
            )

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(convert, range(experts)))
    absmax = [block_magnitudes(row, scale) for row, scale in zip(largest, scales, strict=True)]
    return _with_packed_absmax(codes, torch.stack(absmax))


def quantize_codes(codes: fp8.Codes, table: torch.Tensor, out: fp8.Codes) -> fp8.Codes:
    """FP8 codes with one scale → NF4 codes, on this thread; returns each block's largest code.

    A block's largest magnitude is that of one of its codes, so which NF4 value is nearest to a
    weight depends on nothing but the block's largest code and the weight's: with a given scale that
    is a table of 128 · 256 entries, here for two codes at once.

    Args:
        codes: whole blocks of 64, at best not many more than `CHUNK`.
        table: `pair_table` of their scale.
        out: half as long; the first of two codes goes to the high half of a byte.
    """
    largest = _largest(codes)
    pairs = codes.view(np.uint16).reshape(-1, BLOCK // 2)
    index = largest.astype(np.int32)[:, None] << np.int32(16) | pairs
    # torch's look-up takes 32-bit indices as they are; numpy's would widen them first.
    torch.index_select(table, 0, torch.from_numpy(index.reshape(-1)), out=torch.from_numpy(out))
    return largest


def _largest(codes: fp8.Codes) -> fp8.Codes:
    """The largest code without its sign of each block of 64.

    Maxima along short rows are slow. So blocks are laid side by side: the eight words of each
    become eight long rows, whose maximum leaves a word a block, of which the halves go the same
    way.
    """
    left = codes & np.uint8(127)
    for word, words in ((np.uint64, 8), (np.uint32, 2), (np.uint16, 2), (np.uint8, 2)):
        rows = np.ascontiguousarray(left.view(word).reshape(-1, words).T)
        left = rows.view(np.uint8).max(axis=0)
    return left


def block_magnitudes(largest: fp8.Codes, scale: float) -> torch.Tensor:
    """The largest magnitude of each block, float32, from its largest code."""
    return _products(scale)[torch.from_numpy(largest).int()]


def pack_absmax(absmax_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The blocks' magnitudes of one expert in 8 bits, as bitsandbytes does it: less their mean.

    Returns:
        uint8 [B], float32 [⌈B/256⌉] and the mean, float32 0-d.
    """
    offset = absmax_B.mean()
    quantized, state = bnb.quantize_blockwise(absmax_B - offset, blocksize=GROUP)
    return quantized.flatten(), state.absmax.to(torch.float32), offset


@lru_cache(maxsize=16)
def _products(scale: float) -> torch.Tensor:
    """The BF16 products of all 256 codes with a scale, as float32."""
    return fp8.descale(
        torch.arange(256, dtype=torch.uint8).view(fp8.FP8), torch.tensor(scale)
    ).float()


def pair_table(scale: float) -> torch.Tensor:
    """A byte of two NF4 codes by (largest code of the block, second code, first code): 8 MiB, made
    in 2 ms, for one positive BF16 scale."""
    values, _ = _tables(torch.device("cpu"))
    weight = _products(scale)
    # Codes above the block's largest do not occur in it. bitsandbytes multiplies by the inverse,
    # and takes the nearest value by comparing with the middles between them.
    inverse = torch.where(weight[:128] > 0, 1.0 / weight[:128], 0.0)
    share = (weight * inverse[:, None]).nan_to_num().clamp(-1, 1)
    nearest = torch.bucketize(share, (values[1:] + values[:-1]) / 2).to(torch.uint8)
    return (nearest[:, None, :] << 4 | nearest[:, :, None]).view(-1)


def _check_blocks(weight_EOI: torch.Tensor) -> None:
    if weight_EOI[0].numel() % BLOCK:
        raise ValueError(f"{weight_EOI[0].numel()} weights an expert are no multiple of {BLOCK}")


def _with_packed_absmax(codes: torch.Tensor, absmax_EB: torch.Tensor) -> Packed:
    packed, scale, offset = zip(*map(pack_absmax, absmax_EB), strict=True)
    return Packed(codes, torch.stack(packed), torch.stack(scale), torch.stack(offset))


_TABLES: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}


def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The 16 NF4 values and the 256 dynamic values, as bitsandbytes itself gives them."""
    if device not in _TABLES:
        _, state = bnb.quantize_4bit(
            torch.ones(1, BLOCK), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        _TABLES[device] = (state.code.to(device), state.state2.code.to(device))
    return _TABLES[device]


def dequantize_absmax(packed: Packed) -> torch.Tensor:
    """The blocks' largest magnitudes, float32 [E, B]."""
    _, dynamic = _tables(packed.absmax.device)
    blocks = packed.absmax.shape[1]
    scale_EB = packed.scale.repeat_interleave(GROUP, dim=1)[:, :blocks]
    return dynamic[packed.absmax.int()] * scale_EB + packed.offset[:, None]


def dequantize(packed: Packed, shape: tuple[int, int, int], dtype: torch.dtype) -> torch.Tensor:
    """Packed experts → [E, O, I] in `dtype`, with bitsandbytes' kernel, at most 64 at a time."""
    experts = shape[0]
    if experts > MAX_EXPERTS:
        raise ValueError(f"{experts} experts in one call; slice them by {MAX_EXPERTS}")
    values, _ = _tables(packed.codes.device)
    state: Any = bnb.QuantState(
        absmax=dequantize_absmax(packed).flatten(),
        # Rows of one block: bitsandbytes' CPU kernel gives wrong values for rows shorter than it.
        shape=torch.Size((experts * shape[1] * shape[2] // BLOCK, BLOCK)),
        code=values,
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
    )
    weight: torch.Tensor = bnb.dequantize_4bit(packed.codes.reshape(-1, 1), state)
    return weight.view(shape)


def dequantize_plain(
    packed: Packed, shape: tuple[int, int, int], dtype: torch.dtype
) -> torch.Tensor:
    """`dequantize` in plain torch: what it must give, to the bit in float32."""
    values, _ = _tables(packed.codes.device)
    nibbles = torch.stack([packed.codes >> 4, packed.codes & 15], dim=-1).flatten(1)
    blocks_EBW = values[nibbles.int()].unflatten(1, (-1, BLOCK))
    weight: torch.Tensor = blocks_EBW * dequantize_absmax(packed)[..., None]
    return weight.to(dtype).view(shape)
