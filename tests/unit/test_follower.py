"""The thread that hashes behind the writers sees what they wrote, in whatever order they write."""

from __future__ import annotations

import hashlib
import itertools
import random
import threading
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from ms4.weights.shards import Follower, Piece

SIZES = {"codes": 40_000, "more": 1_500}
ROUNDS = 60


def test_hashes_are_those_of_the_files(tmp_path: Path) -> None:
    """Writes of a few hundred bytes by several threads: a hash that read a byte too early would
    differ in one file of eight."""
    hashes: dict[str, str] = {}
    follower = Follower(lambda piece, digest: hashes.update({piece.path.name: digest}))
    wanted: dict[str, dict[str, np.ndarray]] = {}
    for number in range(ROUNDS):
        dice = np.random.default_rng(number)
        data = {name: dice.integers(0, 256, size, dtype=np.uint8) for name, size in SIZES.items()}
        piece = Piece(
            tmp_path / f"{number}.safetensors", {n: ("U8", (len(d),)) for n, d in data.items()}
        )
        follower.add(piece)
        writers = [
            threading.Thread(target=write, args=(piece, name, data[name], number)) for name in data
        ]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        wanted[piece.path.name] = data
    follower.close()
    assert len(hashes) == ROUNDS
    for name, data in wanted.items():
        path = tmp_path / name
        assert hashes[name] == hashlib.sha256(path.read_bytes()).hexdigest()
        for key, tensor in load_file(path).items():
            np.testing.assert_array_equal(tensor, data[key])


def write(piece: Piece, name: str, data: np.ndarray, seed: int) -> None:
    """Write a tensor in stretches, some of them before their predecessors."""
    dice = random.Random(seed)
    cuts = sorted({0, len(data), *(dice.randrange(len(data)) for _ in range(len(data) // 400))})
    stretches = list(itertools.pairwise(cuts))
    for at in range(0, len(stretches), 3):
        some = stretches[at : at + 3]
        dice.shuffle(some)
        for first, last in some:
            piece.write(name, first, data[first:last])
