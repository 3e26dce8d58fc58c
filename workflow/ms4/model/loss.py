"""Cross-entropy of a frozen head, in chunks: the logits of all tokens are never held.

Shape letters: T positions, N rows with a target, C rows of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: torch.Tensor,
        head_VH: torch.Tensor,
        rows_N: torch.Tensor,
        targets_N: torch.Tensor,
        chunk: int,
        wanted: bool,
    ) -> torch.Tensor:
        wide = torch.promote_types(hidden_TH.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden_TH.device)
        gradient_TH = torch.zeros_like(hidden_TH) if wanted else None
        for start in range(0, rows_N.shape[0], chunk):
            rows_C = rows_N[start : start + chunk]
            targets_C1 = targets_N[start : start + chunk, None]
            logits_CV = (hidden_TH.index_select(0, rows_C) @ head_VH.T).to(wide)
            normalizer_C1 = logits_CV.logsumexp(dim=-1, keepdim=True)
            log_C1 = logits_CV.gather(1, targets_C1) - normalizer_C1
            total -= log_C1.sum()
            if gradient_TH is not None:
                # d loss / d logits = softmax - one-hot; taken here, in place, while they exist.
                share_CV = logits_CV.sub_(normalizer_C1).exp_()
                share_CV.scatter_(1, targets_C1, torch.expm1(log_C1))
                gradient_TH[rows_C] = share_CV.to(hidden_TH.dtype) @ head_VH
                del share_CV
            del logits_CV  # or the next chunk's would stand beside it
        ctx.save_for_backward(gradient_TH)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient_TH,) = ctx.saved_tensors
        return gradient_TH * g.to(gradient_TH.dtype), *(None,) * 5


def cross_entropy_sum(
    hidden_TH: torch.Tensor,
    head_VH: torch.Tensor,
    rows_N: torch.Tensor,
    targets_N: torch.Tensor,
    chunk: int,
) -> torch.Tensor:
    """Sum of the cross-entropy over the rows that have a target, in fp32 at least; gradient for
    `hidden_TH` only.

    Args:
        hidden_TH: last hidden states of all positions.
        head_VH: the head's weight; frozen.
        rows_N: the positions that have a target, each once. The others cost nothing.
        targets_N: their token ids.
        chunk: rows whose logits are held at once.
    """
    wanted = torch.is_grad_enabled() and hidden_TH.requires_grad
    total: torch.Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_TH, head_VH, rows_N, targets_N, chunk, wanted
    )
    return total
