"""Cross-entropy of a frozen head, in chunks: the logits of all tokens are never held.

Shape letters: N rows with a target, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        head_VH: torch.Tensor,
        targets_N: torch.Tensor,
        chunk: int,
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden_NH.device)
        wanted = ctx.needs_input_grad[0]
        gradient_NH = torch.empty_like(hidden_NH) if wanted else None
        for start in range(0, hidden_NH.shape[0], chunk):
            rows = slice(start, start + chunk)
            targets = targets_N[rows, None]
            logits = (hidden_NH[rows] @ head_VH.T).float()
            normalizer = logits.logsumexp(dim=-1, keepdim=True)
            total += (normalizer - logits.gather(1, targets)).sum()
            if gradient_NH is not None:
                # d loss / d logits = softmax - one-hot; taken here, while the logits exist.
                probabilities = (logits - normalizer).exp_()
                probabilities.scatter_add_(1, targets, -torch.ones_like(normalizer))
                gradient_NH[rows] = probabilities.to(hidden_NH.dtype) @ head_VH
        ctx.save_for_backward(gradient_NH)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient_NH,) = ctx.saved_tensors
        return gradient_NH * gradients[0].to(gradient_NH.dtype), None, None, None


def cross_entropy_sum(
    hidden_NH: torch.Tensor, head_VH: torch.Tensor, targets_N: torch.Tensor, chunk: int
) -> torch.Tensor:
    """Sum of the cross-entropy over the rows, fp32; gradient for `hidden_NH` only.

    Args:
        hidden_NH: last hidden states of the rows that have a target (the others never come here).
        head_VH: the head's weight; frozen.
        targets_N: token ids.
        chunk: rows whose logits are held at once.
    """
    total: torch.Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_NH, head_VH, targets_N, chunk
    )
    return total
