"""NF4 with double quantization, per expert, in bitsandbytes' byte layout.

Each expert is quantized by itself (own absmax groups, own offset), so every packed tensor has the
experts as dimension 0 and can be sliced, streamed and sharded by expert.

Shape letters: E experts, O out, I in, K = O·I elements of an expert, B = K/64 blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import bitsandbytes.functional as bnb
import torch

BLOCK = 64
"""Elements that share one absmax."""
GROUP = 256
"""Blocks whose absmax codes share one scale."""
MAX_EXPERTS = 64
"""Experts in one call: bitsandbytes counts elements in int32, and 64 experts of the published model
hold 2**30 elements of gate_up_proj."""
SUFFIXES = (".nf4", ".absmax", ".absmax_scale", ".absmax_offset")


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


def packed_shapes(experts: int, elements: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Suffix → (safetensors dtype, shape) for `elements` weights an expert."""
    blocks = -(-elements // BLOCK)
    return {
        ".nf4": ("U8", (experts, -(-elements // 2))),
        ".absmax": ("U8", (experts, blocks)),
        ".absmax_scale": ("F32", (experts, -(-blocks // GROUP))),
        ".absmax_offset": ("F32", (experts,)),
    }


def quantize(weight_EOI: torch.Tensor) -> Packed:
    """Quantize the experts one by one with bitsandbytes; an expert must be whole blocks of 64."""
    if weight_EOI[0].numel() % BLOCK:
        raise ValueError(f"{weight_EOI[0].numel()} weights an expert are no multiple of {BLOCK}")
    codes, absmax, scale, offset = [], [], [], []
    for expert in weight_EOI:
        packed, state = bnb.quantize_4bit(
            expert.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        codes.append(packed.flatten())
        absmax.append(state.absmax)
        scale.append(state.state2.absmax)
        offset.append(state.offset.reshape(()))
    return Packed(
        torch.stack(codes),
        torch.stack(absmax),
        torch.stack(scale).to(torch.float32),
        torch.stack(offset).to(torch.float32),
    )


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
