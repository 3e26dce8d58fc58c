"""The held-out split by content, and near-duplicates across it.

A sample's side follows from what it says and nothing else: it stays there whatever else is in the
files, in whatever order, in every run. Near-duplicates are found by MinHash over five words in a
row (Broder, "On the resemblance and containment of documents", 1997), with the usual bands to look
them up.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ms4.data.conversation import Conversation

Signature = npt.NDArray[np.uint32]

PERMUTATIONS = 128
BANDS = 32
"""A pair of similarity s meets in some band with probability 1 - (1 - s^4)^32: 0.9999999 at 0.8,
0.87 at 0.5."""
SHINGLE = 5
"""Words in a row."""
THRESHOLD = 0.8
"""Share of common shingles (Jaccard) from which two samples count as near-duplicates. The standard
deviation of the estimate is 0.035 there."""

_WORD = re.compile(r"\w+")


def _parameters() -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    # The raw stream of a bit generator, which numpy promises to keep.
    raw = np.random.PCG64(np.random.SeedSequence(61)).random_raw(2 * PERMUTATIONS)
    return raw[:PERMUTATIONS] | np.uint64(1), raw[PERMUTATIONS:]


_FACTORS, _OFFSETS = _parameters()


def held_out(key: bytes, share: float) -> bool:
    """Whether a sample belongs to the held-out share.

    Args:
        key: hash of its content, at least 8 bytes (`Conversation.key`).
        share: 0 to 1. A sample that is held out at one share is so at each larger one.
    """
    return int.from_bytes(key[:8], "big") < share * 2.0**64


def text_of(conversation: Conversation) -> str:
    """What user and assistant say, thinking included. System prompts and tools, which many samples
    have in common, would make all of them alike."""
    if conversation.plain is not None:
        return conversation.plain
    return "\n".join(
        part.text
        for message in conversation.messages
        if message.role in ("user", "assistant")
        for part in message.parts
        if part.text
    )


def signature(text: str) -> Signature:
    """uint32 [128]: the share of equal places of two signatures estimates how alike the texts are.

    Case and punctuation do not count. A text of fewer than five words is one shingle.
    """
    words = _WORD.findall(text.lower())
    # A half of a surrogate pair is no \\w, so every word can be encoded.
    hashes = np.array([zlib.crc32(word.encode()) for word in words], dtype=np.uint64)
    size = min(SHINGLE, max(len(hashes), 1))
    shingles = np.zeros(max(len(hashes) - size + 1, 1), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for place in range(min(size, len(hashes))):
            shingles = (
                shingles * np.uint64(0x9E3779B97F4A7C15) + hashes[place : place + len(shingles)]
            )
            shingles ^= shingles >> np.uint64(29)
        smallest = np.full(PERMUTATIONS, np.iinfo(np.uint32).max, dtype=np.uint32)
        for start in range(0, len(shingles), 1024):  # 1 MB at a time
            block = _FACTORS[:, None] * shingles[start : start + 1024] + _OFFSETS[:, None]
            # The upper halves, which all bits of a product reach.
            np.minimum(smallest, (block.min(axis=1) >> np.uint64(32)).astype(np.uint32), smallest)
    return smallest


class NearDuplicates:
    """Finds, for a signature, the most similar one that was added."""

    def __init__(self) -> None:
        self._places: list[str] = []
        self._signatures: list[Signature] = []
        self._bands: list[dict[bytes, list[int]]] = [{} for _ in range(BANDS)]

    def add(self, place: str, signature: Signature) -> None:
        """Note a sample, of the held-out side, by where it stands."""
        for table, key in zip(self._bands, _keys(signature), strict=True):
            table.setdefault(key, []).append(len(self._places))
        self._places.append(place)
        self._signatures.append(signature)

    def find(self, signature: Signature) -> tuple[str, float] | None:
        """Place and similarity (0 to 1) of the most similar sample; None if none is similar enough.

        Of equally similar ones the one that was added first.
        """
        candidates = {
            number
            for table, key in zip(self._bands, _keys(signature), strict=True)
            for number in table.get(key, ())
        }
        best: tuple[str, float] | None = None
        for number in sorted(candidates):
            similarity = float((self._signatures[number] == signature).mean())
            if similarity >= THRESHOLD and (best is None or similarity > best[1]):
                best = self._places[number], similarity
        return best


def _keys(signature: Signature) -> Iterator[bytes]:
    rows = PERMUTATIONS // BANDS
    return (signature[at : at + rows].tobytes() for at in range(0, PERMUTATIONS, rows))
