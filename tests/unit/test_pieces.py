"""Safetensors files that are written: in any order, hashed, synced and named behind the writers."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ms4.errors import Ms4Error
from ms4.weights import shards
from ms4.weights.shards import Follower, Piece, sweep
from tests.commands import wait_for
from tests.small_source import TABLE, random_bits, save


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save(random_bits(), tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def parts(seed: int) -> list[tuple[str, int, np.ndarray[Any, Any]]]:
    """Tensors cut into stretches, in random order."""
    dice, cut = random.Random(seed), []
    for name, stored in random_bits().items():
        at = 0
        while at < len(stored.bits):
            size = dice.randint(1, 9)
            cut.append((name, at, stored.bits[at : at + size]))
            at += size
    dice.shuffle(cut)
    return cut


@pytest.mark.parametrize("seed", range(5))
def test_a_piece_is_byte_for_byte_what_safetensors_writes(
    tmp_path: Path, file: Path, seed: int
) -> None:
    piece = Piece(tmp_path / "y.safetensors", TABLE)
    for name, offset, data in parts(seed):
        assert piece.complete < piece.size
        piece.write(name, offset, data)
        piece.write(name, offset, data[:0])  # nothing to write is nothing lost
    assert piece.complete == piece.size
    assert not piece.path.exists()
    piece.finish()
    assert piece.path.read_bytes() == file.read_bytes()
    assert not piece.temporary.exists()


@contextmanager
def limit(size: int) -> Iterator[None]:
    """Limit the size of files. Not as a fixture: pytest's own output may go to a larger one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 100])
def test_a_disk_that_is_full_at_the_header_leaves_nothing(tmp_path: Path, size: int) -> None:
    full = r"y\.safetensors: the disk is full or a limit is reached"
    with limit(size), pytest.raises(Ms4Error, match=full):
        Piece(tmp_path / "y.safetensors", TABLE)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_within_a_tensor(tmp_path: Path) -> None:
    piece = Piece(tmp_path / "y.safetensors", {"a": ("U8", (100_000,))})
    with limit(50_000), pytest.raises(Ms4Error, match="the disk is full or a limit is reached"):
        piece.write("a", 0, np.zeros(100_000, np.uint8))
    piece.discard()
    assert list(tmp_path.iterdir()) == []


def test_sweep_takes_temporary_files_only(tmp_path: Path) -> None:
    for name in (".x.safetensors.tmp", ".config.json.17.tmp", "x.safetensors", ".hidden", "a.tmp"):
        (tmp_path / name).touch()
    sweep(tmp_path)
    sweep(tmp_path / "none")
    assert {path.name for path in tmp_path.iterdir()} == {"x.safetensors", ".hidden", "a.tmp"}


# Hashing, syncing and renaming behind.


def fill(piece: Piece, seed: int, threads: int = 3) -> None:
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda part: piece.write(*part), parts(seed)))


def test_follower_hashes_and_names_pieces_in_their_order(tmp_path: Path, file: Path) -> None:
    wanted = hashlib.sha256(file.read_bytes()).hexdigest()
    done: list[tuple[str, str]] = []
    follower = Follower(lambda piece, digest: done.append((piece.path.name, digest)))
    pieces = [Piece(tmp_path / f"{n}.safetensors", TABLE) for n in range(5)]
    for piece in pieces:
        follower.add(piece)
    for piece in reversed(pieces):  # the first is whole last
        fill(piece, 1)
    follower.close()
    assert done == [(piece.path.name, wanted) for piece in pieces]
    assert all(piece.path.read_bytes() == file.read_bytes() for piece in pieces)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Writes, syncs and renames in their order, each with the file's name."""
    seen: list[tuple[str, str]] = []

    def watch(name: str) -> None:
        plain = getattr(os, name)

        def call(*args: Any) -> Any:
            link = args[0] if name == "replace" else f"/proc/self/fd/{args[0]}"
            seen.append((name, Path(link).resolve().name))
            return plain(*args)

        monkeypatch.setattr(os, name, call)

    for name in ("pwrite", "fsync", "fdatasync", "replace"):
        watch(name)
    return seen


def test_a_file_is_synced_before_its_name_and_the_name_before_the_news(
    tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    follower = Follower(lambda piece, _: calls.append(("news", piece.path.name)))
    piece = Piece(tmp_path / "y.safetensors", TABLE)
    follower.add(piece)
    fill(piece, 1)
    follower.close()
    temporary = ".y.safetensors.tmp"
    assert {call for call in calls if call[0] == "pwrite"} == {("pwrite", temporary)}
    assert [call for call in calls if call[0] != "pwrite"] == [
        ("fsync", temporary),
        ("replace", temporary),
        ("fsync", tmp_path.name),
        ("news", "y.safetensors"),
    ]
    assert calls[-5][0] == "pwrite"  # none after the sync


def test_syncs_on_the_way_do_not_come_upon_a_closed_file(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow disk, and writers that are held up: meanwhile the file is hashed and gets its name."""
    plain = os.fdatasync

    def slow(handle: int) -> None:
        time.sleep(0.005)
        plain(handle)

    def held_up(tell: Callable[[], None]) -> Callable[[], None]:
        def tell_and_wait() -> None:
            tell()
            time.sleep(0.02)

        return tell_and_wait

    monkeypatch.setattr(os, "fdatasync", slow)
    monkeypatch.setattr(shards, "SYNC_BYTES", 8)
    follower = Follower(lambda *_: None)
    pieces = [Piece(tmp_path / f"{n}.safetensors", TABLE) for n in range(3)]
    for number, piece in enumerate(pieces):
        follower.add(piece)
        piece.on_progress = held_up(piece.on_progress)
        fill(piece, number, threads=6)
    follower.close()
    assert all(piece.path.read_bytes() == file.read_bytes() for piece in pieces)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_fault_behind_is_raised_in_front(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    done: list[str] = []
    follower = Follower(lambda piece, _: done.append(piece.path.name))
    pieces = [Piece(tmp_path / f"{n}.safetensors", TABLE) for n in range(3)]
    for piece in pieces:
        follower.add(piece)
    fill(pieces[0], 1)
    while not done:
        time.sleep(0.001)
    monkeypatch.setattr(os, call, fail)
    for piece in pieces[1:]:
        with suppress(Ms4Error):  # the file may be closed already
            fill(piece, 1)
    with pytest.raises(Ms4Error, match=r"1\.safetensors: the disk is full"):
        follower.close()
    monkeypatch.undo()
    for piece in pieces:
        piece.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["0.safetensors"]


def test_what_the_news_raise_is_raised_in_front(tmp_path: Path) -> None:
    def refuse(piece: Piece, _: str) -> None:
        raise Ms4Error(f"no record of {piece.path.name}")

    follower = Follower(refuse)
    piece = Piece(tmp_path / "y.safetensors", TABLE)
    follower.add(piece)
    fill(piece, 1)
    with pytest.raises(Ms4Error, match="no record of y"):
        follower.close()


def test_abandoned_pieces_get_no_name(tmp_path: Path) -> None:
    before = threading.active_count()
    follower = Follower(lambda *_: None)
    pieces = [Piece(tmp_path / f"{n}.safetensors", TABLE) for n in range(2)]
    for piece in pieces:
        follower.add(piece)
    fill(pieces[1], 1)
    pieces[0].write(*parts(1)[0])
    follower.abandon()
    for piece in pieces:
        piece.discard()
    assert list(tmp_path.iterdir()) == []
    wait_for(lambda: threading.active_count() == before, "the thread's end")
