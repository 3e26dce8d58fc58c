"""Documents → bins of at most `capacity` tokens, and the order in which an epoch reads them."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Literal

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]

_BLOCK = 1 << 16

Way = Literal["best_fit", "length_grouped", "none"]
"""How documents share bins: `best_fit` fills them, the others put one document in each."""


def pack(lengths: Int64s, capacity: int, way: Way = "best_fit") -> tuple[Int64s, Int64s]:
    """Put every document into a bin.

    Args:
        lengths: tokens of each document, 1 to `capacity`.
        capacity: tokens that a bin may hold.
        way: `best_fit`: longest first, each where it leaves the least room; `length_grouped`: one
            document a bin, the shortest first; `none`: one document a bin, in their order.

    Returns:
        `bin_documents` and `bin_starts`: bin b holds
        `bin_documents[bin_starts[b]:bin_starts[b + 1]]`.
    """
    if lengths.size and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"documents must have 1 to {capacity} tokens, not {lengths.max()}")
    if way == "best_fit":
        return _best_fit(lengths, capacity)
    one_each = np.arange(len(lengths) + 1, dtype=np.int64)
    if way == "none":
        return one_each[:-1].copy(), one_each
    return np.argsort(lengths, kind="stable").astype(np.int64), one_each


def _best_fit(lengths: Int64s, capacity: int) -> tuple[Int64s, Int64s]:
    order = np.argsort(-lengths, kind="stable")  # ties by document number
    smallest = int(lengths.min(initial=capacity))
    # Bins by the room that they have left. Bins that even the smallest document does not fit
    # in leave the search, which keeps `rooms` short: its insertions are what costs.
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    bins = 0
    placed = np.empty(len(order), dtype=np.int64)  # the bin of each document, as `order` has them
    for start in range(0, len(order), _BLOCK):  # lists of millions of numbers take gigabytes
        block = []
        for length in lengths[order[start : start + _BLOCK]].tolist():
            position = bisect_left(rooms, length)
            if position < len(rooms):
                room = rooms[position]
                number = by_room[room].pop()
                if not by_room[room]:
                    del by_room[room], rooms[position]
            else:
                room, number = capacity, bins
                bins += 1
            block.append(number)
            room -= length
            if room >= smallest:
                if room not in by_room:
                    by_room[room] = []
                    insort(rooms, room)
                by_room[room].append(number)
        placed[start : start + len(block)] = block
    starts = np.zeros(bins + 1, dtype=np.int64)
    np.cumsum(np.bincount(placed, minlength=bins), out=starts[1:])
    return order[np.argsort(placed, kind="stable")].astype(np.int64), starts


def epoch_order(bins: int, seed: int, epoch: int, group: int = 1) -> Int64s:
    """The order in which an epoch reads the bins: a permutation that seed and epoch decide.

    numpy promises the raw stream of a bit generator, but not `Generator.permutation`, to stay
    as it is: a run that resumes under another numpy must read on in the same order.

    Args:
        bins: their number.
        seed: of the run.
        epoch: from 0.
        group: so many bins that follow each other are read together, as one batch takes them:
            where they are sorted by length, a batch then holds bins of like length. Batches go
            over the ends of epochs; those there take the shortest bins.
    """
    generator = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    begun = -epoch * bins % group  # what the batch that the epoch before began still takes
    if group == 1 or bins < begun + group:
        return np.argsort(generator.random_raw(bins), kind="stable").astype(np.int64)
    left = (bins - begun) % group
    groups = np.arange(begun + left, bins, dtype=np.int64).reshape(-1, group)
    groups = groups[np.argsort(generator.random_raw(len(groups)), kind="stable")]
    return np.concatenate([np.arange(begun), groups.ravel(), np.arange(begun, begun + left)])


class Order:
    """The bins of all epochs as one endless row. A position in it is a number: a run that stops
    before position p goes on there with the same bins."""

    def __init__(self, bins: int, seed: int, group: int = 1) -> None:
        """As in `epoch_order`; there is at least one bin."""
        if bins < 1:
            raise ValueError("no bins to read")
        self.bins, self.seed, self.group = bins, seed, group
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def at(self, start: int, count: int) -> list[int]:
        """The numbers of the bins at positions `start` … `start + count - 1`."""
        found: list[int] = []
        while len(found) < count:
            epoch, within = divmod(start + len(found), self.bins)
            if epoch != self._epoch:
                self._order = epoch_order(self.bins, self.seed, epoch, self.group)
                self._epoch = epoch
            found += self._order[within : within + count - len(found)].tolist()
        return found


def share(numbers: list[int], rank: int, ranks: int, together: int) -> list[int]:
    """A rank's part of what a step reads, which is the same for any number of ranks.

    Args:
        numbers: of all bins of the step; a multiple of ranks × together.
        rank: from 0.
        ranks: their number.
        together: bins of a batch, which stay together.
    """
    if len(numbers) % (ranks * together):
        raise ValueError(f"{len(numbers)} bins do not go into {ranks} ranks × {together}")
    batches = [numbers[at : at + together] for at in range(0, len(numbers), together)]
    return [number for batch in batches[rank::ranks] for number in batch]
