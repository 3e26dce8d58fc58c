"""Documents → bins of at most `capacity` tokens, and the order in which an epoch reads them."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]


def pack(lengths: Int64s, capacity: int) -> tuple[Int64s, Int64s]:
    """Best fit, longest first: each document goes where it leaves the least room.

    Args:
        lengths: tokens of each document, 1 to `capacity`.
        capacity: tokens that a bin may hold.

    Returns:
        `bin_documents` and `bin_starts`: bin b holds
        `bin_documents[bin_starts[b]:bin_starts[b + 1]]`.
    """
    if lengths.size and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"documents must have 1 to {capacity} tokens, not {lengths.max()}")
    order = np.argsort(-lengths, kind="stable")  # ties by document number
    smallest = int(lengths.min(initial=capacity))
    bins: list[list[int]] = []
    # Bins by the room that they have left. Bins that even the smallest document does not fit
    # in leave the search, which keeps `rooms` short: its insertions are what costs.
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for document, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        position = bisect_left(rooms, length)
        if position < len(rooms):
            room = rooms[position]
            number = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[position]
        else:
            room, number = capacity, len(bins)
            bins.append([])
        bins[number].append(document)
        room -= length
        if room >= smallest:
            if room not in by_room:
                by_room[room] = []
                insort(rooms, room)
            by_room[room].append(number)
    starts = np.zeros(len(bins) + 1, dtype=np.int64)
    np.cumsum([len(documents) for documents in bins], out=starts[1:])
    return np.array([d for documents in bins for d in documents], dtype=np.int64), starts


def epoch_order(bins: int, seed: int, epoch: int) -> Int64s:
    """The order in which an epoch reads the bins: a permutation that seed and epoch decide.

    numpy promises the raw stream of a bit generator, but not `Generator.permutation`, to stay
    as it is: a run that resumes under another numpy must read on in the same order.
    """
    generator = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    return np.argsort(generator.random_raw(bins), kind="stable").astype(np.int64)
