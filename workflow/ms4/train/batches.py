"""Packed documents → the batches of an optimizer step, a pure function of seed and step.

Shape letters: B rows (bins), T positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ms4.data.dataset import PackedData
from ms4.data.packing import epoch_order
from ms4.model.attention import document_mask
from ms4.model.loss import cross_entropy_sum

PAD = 11
"""The model's padding id."""
IGNORED = -100
"""Target of a position that is not trained."""


@dataclass(frozen=True)
class Batch:
    """One forward pass."""

    tokens_BT: torch.Tensor
    positions_BT: torch.Tensor
    """Restart at each document: the query scaling depends on them."""
    documents_BT: torch.Tensor
    """Number of each position's document in its row; padding is a document of its own."""
    targets_BT: torch.Tensor
    """The next token of the same document where it is trained, else -100."""

    @property
    def trained(self) -> int:
        """Positions with a target."""
        return int((self.targets_BT != IGNORED).sum())

    @property
    def tokens(self) -> int:
        """Positions that are no padding."""
        return int((self.tokens_BT != PAD).sum())

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))


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
    return Batch(tokens_BT, positions_BT, documents_BT, targets_BT)


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
    hidden_BTH = model.model(
        input_ids=batch.tokens_BT,
        position_ids=batch.positions_BT,
        attention_mask=document_mask(batch.documents_BT),
        use_cache=False,
    ).last_hidden_state
    trained = batch.targets_BT != IGNORED
    return cross_entropy_sum(
        hidden_BTH[trained], model.lm_head.weight, batch.targets_BT[trained], chunk
    )
