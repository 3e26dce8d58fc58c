"""Frozen parts of the text model that are held in less memory than they compute in, exactly.

Shape letters: O out, I in, V vocabulary, H hidden, T positions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from ms4.model.stores import Workspace, decode_fp8


class _Product(torch.autograd.Function):
    """x Wᵀ with W made when it is used, forward and backward: nothing is saved."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: FP8Linear) -> torch.Tensor:
        ctx.layer = layer
        return F.linear(x, layer.take(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        return g @ ctx.layer.take(g.dtype), None


class FP8Linear(nn.Module):
    """A frozen linear layer held as its published FP8 codes and scale: y = x (codes · scale)ᵀ.

    The products are those of the BF16 weights, to the bit, in half of their memory.
    """

    def __init__(self, in_features: int, out_features: int, workspace: Workspace) -> None:
        """A layer on the meta device; no such layer of this model has a bias.

        Args:
            in_features: I.
            out_features: O.
            workspace: the memory that its weight is dequantized to, shared with the experts.
        """
        super().__init__()
        self.in_features, self.out_features, self.workspace = in_features, out_features, workspace
        # Bytes, and not float8: few operations take that.
        codes = torch.empty(out_features, in_features, dtype=torch.uint8, device="meta")
        scale = torch.empty((), dtype=torch.bfloat16, device="meta")
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scale_inv = nn.Parameter(scale, requires_grad=False)

    def take(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight as [O, I] in `dtype`, in the workspace's memory: good until the next."""
        out = self.workspace.take(self.codes.shape, dtype, self.codes.device)
        return decode_fp8(self.codes, self.scale_inv, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] → [..., O], in the dtype of `x`."""
        y: torch.Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return y


class HostEmbedding(nn.Module):
    """A frozen embedding [V, H] that stays in host memory; its rows go to where the tokens are.

    A step takes T of its rows, 8 KiB each at the model's real size: 16 MiB over the bus for 2,048
    positions, for which the whole table would take 1 GiB of the device.
    """

    def __init__(self, vocabulary: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        table = torch.empty(vocabulary, hidden, dtype=dtype, device="meta")
        self.weight = nn.Parameter(table, requires_grad=False)

    def _apply(self, fn: Any, recurse: bool = True) -> HostEmbedding:
        """Stay where it is when the model is moved."""
        return self

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 [...] → [..., H] on the device of `tokens`."""
        if self.weight.device == tokens.device:
            return F.embedding(tokens, self.weight)
        wanted = tokens.to("cpu").flatten()
        # Pinned memory is copied while the host goes on; torch's allocator keeps it until then.
        rows = torch.empty(
            wanted.numel(),
            self.weight.shape[1],
            dtype=self.weight.dtype,
            pin_memory=tokens.is_cuda,
        )
        torch.index_select(self.weight, 0, wanted, out=rows)
        return rows.to(tokens.device, non_blocking=True).view(*tokens.shape, -1)
