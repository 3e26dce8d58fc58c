"""Packed documents → the batches of an optimizer step, a pure function of seed and step.

Shape letters: B rows (bins), T positions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ms4.data.packing import epoch_order
from ms4.model.module import IGNORED, PAD, Batch, PackedLoss

if TYPE_CHECKING:  # it brings the tokenizer, which a batch has no use for
    from ms4.data.dataset import PackedData

__all__ = ["IGNORED", "PAD", "Batch", "collate", "loss_sum", "step_batches"]


def collate(rows: list[list[tuple[np.ndarray, np.ndarray]]]) -> Batch:
    """Rows of documents (tokens, trained mask) → a padded batch."""
    T = max(sum(len(tokens) for tokens, _ in row) for row in rows)
    tokens_BT = torch.full((len(rows), T), PAD, dtype=torch.long)
    positions_BT = torch.zeros((len(rows), T), dtype=torch.long)
    documents_BT = torch.zeros((len(rows), T), dtype=torch.long)
    targets_BT = torch.full((len(rows), T), IGNORED, dtype=torch.long)
    for b, row in enumerate(rows):
        at = 0
        for number, (tokens, trained) in enumerate(row, start=1):
            size = len(tokens)
            here = slice(at, at + size)
            ids = torch.from_numpy(tokens.astype(np.int64))
            tokens_BT[b, here] = ids
            positions_BT[b, here] = torch.arange(size)
            documents_BT[b, here] = number
            # Position t predicts token t+1; a document's last position predicts nothing.
            wanted = torch.from_numpy(trained[1:].astype(bool))
            targets_BT[b, at : at + size - 1] = torch.where(wanted, ids[1:], IGNORED)
            at += size
    return Batch.of(tokens_BT, positions_BT, documents_BT, targets_BT)


def step_batches(
    data: PackedData, step: int, micro_batch: int, accumulation: int, seed: int
) -> list[Batch]:
    """The batches of optimizer step `step` (from 0).

    The bins of all epochs, each shuffled by seed and epoch, form one endless row; a step takes the
    next micro_batch × accumulation of them. So the data position is the step, and nothing else.
    """
    per_step = micro_batch * accumulation
    wanted = range(step * per_step, (step + 1) * per_step)
    orders = {index // data.bins for index in wanted}
    by_epoch = {epoch: epoch_order(data.bins, seed, epoch) for epoch in orders}
    bins = [int(by_epoch[index // data.bins][index % data.bins]) for index in wanted]
    rows = [[data.document(int(d)) for d in data.bin(number)] for number in bins]
    return [collate(rows[at : at + micro_batch]) for at in range(0, per_step, micro_batch)]


def loss_sum(model: Any, batch: Batch, chunk: int) -> torch.Tensor:
    """Sum of the cross-entropy over a batch's targets, fp32; differentiable in the adapters."""
    loss: torch.Tensor = PackedLoss(model, chunk)(batch)
    return loss
