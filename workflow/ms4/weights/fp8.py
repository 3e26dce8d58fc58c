"""FP8 e4m3 with a scale: weight = code × scale_inv.

Shape letters: E experts, O out, I in. A linear's scale is 0-d, the experts' is [E, 1, 1].
"""

from __future__ import annotations

import torch

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max


def descale(codes: torch.Tensor, scale_inv: torch.Tensor) -> torch.Tensor:
    """FP8 codes × scale → BF16.

    The product is taken in fp32 and rounded once; with BF16 scales that is bit-identical to the
    BF16 product for every finite code (a code has 4 significant bits, a scale 8).

    Args:
        codes: [O, I] or [E, O, I], float8_e4m3fn.
        scale_inv: 0-d or [E, 1, 1], bfloat16.
    """
    return (codes.to(torch.float32) * scale_inv.to(torch.float32)).to(torch.bfloat16)


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
