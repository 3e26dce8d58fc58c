"""Cross-entropy of a frozen head, in chunks: the logits of all tokens are never held.

Shape letters: T positions, N rows with a target, C rows of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

CPU_ROWS = 2
"""Rows of logits that a CPU passes over at a time: all passes find them in its cache."""


def _softmax(logits_CV: torch.Tensor, targets_C1: torch.Tensor, gradient: bool) -> torch.Tensor:
    """Log-probability of each row's target, [C, 1]; the logits become d -log p / d logits, which is
    softmax - one-hot, or lose their meaning where no gradient is wanted."""
    logits_CV.sub_(logits_CV.amax(dim=-1, keepdim=True))
    wanted_C1 = logits_CV.gather(1, targets_C1)
    sum_C1 = logits_CV.exp_().sum(dim=-1, keepdim=True)
    log_C1 = wanted_C1 - sum_C1.log()
    if gradient:
        logits_CV.div_(sum_C1).scatter_(1, targets_C1, torch.expm1(log_C1))
    return log_C1


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
        kind = torch.promote_types(hidden_TH.dtype, torch.float32)
        total = torch.zeros((), dtype=kind, device=hidden_TH.device)
        gradient_TH = torch.zeros_like(hidden_TH) if wanted else None
        # The memory of a chunk is taken once and everything is done in it: on a CPU fresh memory of
        # this size costs more than what is computed in it.
        rows, V = min(chunk, rows_N.shape[0]), head_VH.shape[0]
        made_CV = hidden_TH.new_empty(rows, V)
        wide_CV = made_CV if made_CV.dtype == kind else hidden_TH.new_empty(rows, V, dtype=kind)
        at_once = CPU_ROWS if hidden_TH.device.type == "cpu" else chunk
        for start in range(0, rows_N.shape[0], chunk):
            rows_C = rows_N[start : start + chunk]
            targets_C1 = targets_N[start : start + chunk, None]
            product_CV, logits_CV = made_CV[: len(rows_C)], wide_CV[: len(rows_C)]
            torch.mm(hidden_TH.index_select(0, rows_C), head_VH.T, out=product_CV)
            if logits_CV.dtype != product_CV.dtype:
                logits_CV.copy_(product_CV)
            parts = zip(logits_CV.split(at_once), targets_C1.split(at_once), strict=True)
            total -= torch.cat([_softmax(*part, wanted) for part in parts]).sum()
            if gradient_TH is not None:
                if logits_CV.dtype != product_CV.dtype:
                    product_CV.copy_(logits_CV)
                gradient_TH[rows_C] = product_CV @ head_VH
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
