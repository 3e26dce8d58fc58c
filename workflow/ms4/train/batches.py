"""Packed documents → the batches of an optimizer step, a pure function of seed and step.

Shape letters: B rows (bins), T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ms4.data.packed import PackedData
from ms4.data.packing import Order, share
from ms4.model.module import IGNORED, PAD, Batch, PackedLoss

if TYPE_CHECKING:  # it brings an image library, which text has no use for
    from ms4.data.image_store import ImageStore

__all__ = ["IGNORED", "PAD", "Batch", "Batches", "collate", "load_images", "loss_sum"]


def collate(rows: list[list[tuple[np.ndarray, np.ndarray]]]) -> Batch:
    """Rows of documents (tokens, trained mask) → a padded batch."""
    T = max(sum(len(tokens) for tokens, _ in row) for row in rows)
    tokens_BT = torch.full((len(rows), T), PAD, dtype=torch.long)
    positions_BT = torch.zeros((len(rows), T), dtype=torch.long)
    targets_BT = torch.full((len(rows), T), IGNORED, dtype=torch.long)
    for b, row in enumerate(rows):
        at = 0
        for tokens, trained in row:
            size = len(tokens)
            here = slice(at, at + size)
            ids = torch.from_numpy(tokens.astype(np.int64))
            tokens_BT[b, here] = ids
            positions_BT[b, here] = torch.arange(size)
            # Position t predicts token t+1; a document's last position predicts nothing.
            wanted = torch.from_numpy(trained[1:].astype(bool))
            targets_BT[b, at : at + size - 1] = torch.where(wanted, ids[1:], IGNORED)
            at += size
        positions_BT[b, at:] = torch.arange(T - at)
    return Batch.of(tokens_BT, positions_BT, targets_BT)


class Batches:
    """The batches of every optimizer step, a function of seed and step alone.

    The bins of all epochs, each shuffled by seed and epoch, form one endless row; a step takes the
    next ranks × micro_batch × accumulation of them. So the data position is the step, and nothing
    else.
    """

    def __init__(
        self,
        data: PackedData,
        micro_batch: int,
        accumulation: int,
        seed: int,
        *,
        images: ImageStore | None = None,
        grouped: bool = False,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """Prepare to read.

        Args:
            data: the packed data.
            micro_batch: bins of a batch.
            accumulation: batches of a step, on each rank.
            seed: of the order.
            images: those of the documents, if they have any.
            grouped: keep bins of like length in one batch, as `length_grouped` sorts them.
            rank: whose batches these are, of `ranks`.
            ranks: which share each step.
        """
        self._data, self._images = data, images
        self._micro_batch, self._per_step = micro_batch, ranks * micro_batch * accumulation
        self._order = Order(data.bins, seed, micro_batch if grouped else 1)
        self._rank, self._ranks = rank, ranks

    def step(self, step: int) -> list[Batch]:
        """The batches of optimizer step `step`, from 0."""
        size = self._micro_batch
        bins = self._order.at(step * self._per_step, self._per_step)
        bins = share(bins, self._rank, self._ranks, size)
        return [self._batch(bins[at : at + size]) for at in range(0, len(bins), size)]

    def _batch(self, bins: list[int]) -> Batch:
        numbers = [self._data.bin(number).tolist() for number in bins]
        batch = collate([[self._data.document(d) for d in row] for row in numbers])
        store = self._images
        if store is None:
            return batch
        uses = [image for row in numbers for document in row for image in store.document(document)]
        images, shown = load_images(store, uses)
        return replace(batch, images=images, shown=shown)


def load_images(
    store: ImageStore, uses: Sequence[int]
) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
    """The distinct images of a batch, BF16 on the CPU, and which of them stands where.

    Args:
        store: where their pixels are.
        uses: their numbers in it, in the order of the tokens.
    """
    distinct = list(dict.fromkeys(uses))
    place = {image: number for number, image in enumerate(distinct)}
    pixels = [torch.from_numpy(store.pixels(image).view(np.int16).copy()) for image in distinct]
    images = tuple(image.view(torch.bfloat16) for image in pixels)
    return images, tuple(place[image] for image in uses)


def loss_sum(model: Any, batch: Batch, chunk: int) -> torch.Tensor:
    """Sum of the cross-entropy over a batch's targets, fp32; differentiable in the adapters."""
    loss: torch.Tensor = PackedLoss(model, chunk)(batch)
    return loss
