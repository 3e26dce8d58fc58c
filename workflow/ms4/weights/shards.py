"""Safetensors read without mapping and written as a stream, with bounded memory.

Reading goes by `pread`: a mapped file of 49 GB counts as resident memory while it is read, and a
disk that fails in the middle of it ends the process. A header is checked before anything in it is
believed. Writing takes the pieces of a file in any order; one thread follows behind, hashes what is
complete, and pushes it to the disk while the rest is still being made.

The format: 8 bytes of length, a JSON header (name → dtype, shape, offsets into the data), the data.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ms4.errors import Ms4Error
from ms4.manifest import sync_directory

Bytes = npt.NDArray[np.uint8]
Table = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name → (dtype as safetensors writes it, shape)."""

ITEM_BYTES: Mapping[str, int] = {"F8_E4M3": 1, "U8": 1, "BF16": 2, "F16": 2, "F32": 4}
"""Dtypes that a checkpoint of this model may hold."""
MOST_HEADER = 1 << 25
"""Bytes of a header, at most: seven times those of this model with every expert's matrices in one
file. The format's own limit is three times more, and would let a header that was made to do harm
take gigabytes once it is parsed."""
SYNC_BYTES = 1 << 27
"""Written bytes after which a growing file is synced. What waits for the disk is throttled by the
kernel, at a high price: without this, writing took four times as long."""
_BLOCK = 1 << 22


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn an OSError of reading `path` into an Ms4Error."""
    try:
        yield
    except OSError as error:
        raise Ms4Error(f"{path}: cannot be read ({error.strerror}).") from error


@contextmanager
def writable(path: Path) -> Iterator[None]:
    """Turn an OSError of writing `path` into an Ms4Error that says what was kept."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fault = f"the disk is full or a limit is reached ({error.strerror})"
        raise Ms4Error(
            f"{path}: {fault if full else f'cannot be written ({error.strerror})'}. Mend that and "
            "run the same command again: what is whole is kept."
        ) from error


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    """Offset of its first byte in the file."""
    size: int
    """Bytes."""


def _counts(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(type(item) is int and 0 <= item < 1 << 62 for item in value)
    )


def read_header(path: Path, items: Mapping[str, int] = ITEM_BYTES) -> dict[str, Entry]:
    """The tensors of a safetensors file, in the order of their data.

    Args:
        path: the file.
        items: bytes of an element of each dtype that it may hold.

    Raises:
        Ms4Error: it cannot be read, or its header cannot be true of a file of its size.
    """
    advice = "the file is damaged or cut short; fetch it again"
    with readable(path):
        if path.exists() and not path.is_file():  # a pipe, say, would never end
            raise Ms4Error(f"{path}: is not a regular file; replace it by one.")
    with readable(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MOST_HEADER):
            raise Ms4Error(
                f"{path}: its header should be {length} bytes long, the file has {size}; {advice}."
            )
        text = file.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=partial(_each_once, path))
    except (ValueError, RecursionError) as error:
        raise Ms4Error(f"{path}: its header is not JSON; {advice}.") from error
    if not isinstance(header, dict):
        raise Ms4Error(f"{path}: its header is no table of tensors; {advice}.")
    header.pop("__metadata__", None)
    begin, room = 8 + length, size - 8 - length
    entries = [_entry(path, name, value, begin, room, items) for name, value in header.items()]
    entries.sort(key=lambda entry: (entry.start, entry.size))
    end = begin
    for entry in entries:
        if entry.start != end:
            fault = "overlaps the tensor before it" if entry.start < end else "leaves a gap"
            raise Ms4Error(f"{path}: {entry.name}: its data {fault}; {advice}.")
        end = entry.start + entry.size
    if end != size:
        raise Ms4Error(f"{path}: {size - end} bytes at its end belong to no tensor; {advice}.")
    return {entry.name: entry for entry in entries}


def _each_once(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A table of a header; a name that stands twice in it could mean two places in the file."""
    table = dict(pairs)
    if len(table) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise Ms4Error(
            f"{path}: {name[:200]}: is twice in the header; the file is damaged; fetch it again."
        )
    return table


def _entry(
    path: Path, name: str, value: Any, begin: int, room: int, items: Mapping[str, int]
) -> Entry:
    where = f"{path}: {name[:200]}"
    if not isinstance(value, dict):
        raise Ms4Error(f"{where}: the header does not describe it; fetch the file again.")
    dtype: Any = value.get("dtype")
    shape: Any = value.get("shape")
    offsets: Any = value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in items:
        raise Ms4Error(
            f"{where}: has the dtype {str(dtype)[:20]!r}, which no tensor of this model has."
        )
    if not (_counts(shape) and _counts(offsets) and len(offsets) == 2):
        raise Ms4Error(f"{where}: its shape or place is no list of whole numbers; fetch it again.")
    first, last = offsets
    if not first <= last <= room:
        raise Ms4Error(
            f"{where}: its data should lie at {first} to {last} of {room} bytes; the file is "
            "damaged or cut short; fetch it again."
        )
    if last - first != items[dtype] * math.prod(shape):
        raise Ms4Error(
            f"{where}: {last - first} bytes cannot hold {dtype} {shape}; fetch the file again."
        )
    return Entry(name, dtype, tuple(shape), path, begin + first, last - first)


class Reader:
    """Files that are read by offset, each opened once; safe to share between threads."""

    def __init__(self) -> None:
        self._handles: dict[Path, int] = {}
        self._guard = threading.Lock()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def _handle(self, path: Path) -> int:
        with self._guard:
            if path not in self._handles:
                with readable(path):
                    self._handles[path] = os.open(path, os.O_RDONLY)
            return self._handles[path]

    def close(self, path: Path) -> None:
        """Close one file, which nobody may be reading."""
        with self._guard:
            handle = self._handles.pop(path, None)
        if handle is not None:
            os.close(handle)

    def read_into(self, entry: Entry, offset: int, buffer: Bytes) -> None:
        """Fill `buffer` with the bytes of a tensor from `offset` on.

        Raises:
            Ms4Error: the file fails, or ends before its header said.
        """
        handle, view = self._handle(entry.path), buffer.data.cast("B")
        at = entry.start + offset
        with readable(entry.path):
            while view:
                count = os.preadv(handle, [view], at)
                if not count:
                    raise Ms4Error(
                        f"{entry.path}: {entry.name}: the file ends within it; fetch it again."
                    )
                at, view = at + count, view[count:]

    def read(self, entry: Entry, offset: int = 0, size: int | None = None) -> Bytes:
        """Bytes of a tensor, all of them or `size` from `offset` on."""
        buffer = np.empty(entry.size - offset if size is None else size, np.uint8)
        self.read_into(entry, offset, buffer)
        return buffer


def layout(table: Table) -> tuple[bytes, dict[str, int]]:
    """Head of a safetensors file (length and header), and where each tensor's data begin in it.

    The order is that of safetensors itself: wider dtypes first, then by name, so that every tensor
    is aligned. Metadata: {"format": "pt"}.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    offset = 0
    for name, (dtype, shape) in sorted(
        table.items(), key=lambda item: (-ITEM_BYTES[item[1][0]], item[0])
    ):
        end = offset + ITEM_BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        starts[name], offset = offset, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + start for name, start in starts.items()}


def table_bytes(table: Table) -> int:
    """Bytes of a safetensors file with these tensors."""
    return len(layout(table)[0]) + sum(
        ITEM_BYTES[dtype] * math.prod(shape) for dtype, shape in table.values()
    )


def sweep(directory: Path) -> None:
    """Remove what writers that were killed left in a directory under temporary names.

    Nobody may be writing there: the caller holds its lock.
    """
    with writable(directory):
        for path in directory.glob(".*.tmp"):
            path.unlink()


def temporary(path: Path) -> Path:
    """Where a file grows before it gets its name."""
    return path.with_name(f".{path.name}.tmp")


class Piece:
    """A safetensors file that grows under another name, written in any order by many threads."""

    def __init__(self, path: Path, table: Table) -> None:
        """Begin the file of `path` as `.NAME.tmp`; its tensors' names, dtypes and shapes are
        `table`."""
        self.path = path
        self.temporary = temporary(path)
        head, self._starts = layout(table)
        self.size = table_bytes(table)
        self._done: dict[int, int] = {}
        self._complete = 0
        self._fresh = 0
        self._guard, self._syncing, self._writing = (threading.Lock() for _ in range(3))
        self.on_progress: Callable[[], None] = lambda: None
        with writable(self.temporary):
            self._handle = os.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            self._write(0, memoryview(head))
        except BaseException:
            self.discard()
            raise

    def write(self, name: str, offset: int, data: npt.NDArray[Any]) -> None:
        """Write bytes of a tensor at a byte offset within it.

        Raises:
            Ms4Error: the disk is full or fails.
        """
        self._write(self._starts[name] + offset, np.ascontiguousarray(data).data.cast("B"))

    def _write(self, at: int, view: memoryview) -> None:
        begin, end = at, at + len(view)
        if begin == end:
            return
        with self._writing, writable(self.path):
            while view:
                count = os.pwrite(self._handle, view, at)
                at, view = at + count, view[count:]
        with self._guard:
            self._fresh += end - begin
            due = self._fresh >= SYNC_BYTES
            if due:
                self._fresh = 0
            self._done[begin] = end
            while self._complete in self._done:
                self._complete = self._done.pop(self._complete)
        self.on_progress()
        if due:
            # One at a time: a thread that meets another's sync waits, so that nobody runs ahead.
            with self._syncing, writable(self.path):
                if self._handle >= 0:  # else it is whole meanwhile, and synced
                    os.fdatasync(self._handle)

    @property
    def complete(self) -> int:
        """Bytes from the beginning on that are all written."""
        return self._complete

    def read_back(self, at: int, buffer: bytearray) -> int:
        """Fill `buffer` with what was written at `at`; the number of bytes."""
        with readable(self.temporary):
            return os.preadv(self._handle, [buffer], at)

    def close(self) -> None:
        """Let go of the file; what is not finished stays under its temporary name."""
        # Not under a writer: the number of its file could be another's the next moment.
        with self._writing, self._syncing:
            if self._handle >= 0:
                os.close(self._handle)
                self._handle = -1

    def discard(self) -> None:
        """Give up: nothing is left of it, unless the disk does not even remove."""
        self.close()
        with suppress(OSError):
            self.temporary.unlink(missing_ok=True)

    def finish(self) -> None:
        """Sync the whole file and give it its name."""
        with writable(self.path):
            os.fsync(self._handle)
            self.close()
            self.temporary.replace(self.path)
            sync_directory(self.path.parent)


Finished = Callable[[Piece, str], None]
"""What is called with a finished piece and its SHA-256."""


class Follower:
    """One thread that hashes pieces behind their writers, syncs and renames them, in order.

    Hashing is the slowest part of writing here, so it must not wait for a piece to be whole; and a
    piece is read again from the page cache, which holds it anyway.
    """

    def __init__(self, finished: Finished) -> None:
        self._finished = finished
        self._pieces: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
        self._news = threading.Condition()
        self._error: BaseException | None = None
        self._abandoned = False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hash and sync", daemon=True)
        self._thread.start()

    def add(self, piece: Piece) -> None:
        """Follow this piece, after those that were added before."""
        self.check()
        piece.on_progress = self._tell
        self._pieces.put(piece)

    def check(self) -> None:
        """Raise here what went wrong there."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Wait until every piece is finished.

        Raises:
            Ms4Error: one of them could not be.
        """
        self._pieces.put(None)
        self._ended.wait()
        self.check()

    def abandon(self) -> None:
        """Stop, leaving pieces unfinished: something else went wrong."""
        self._abandoned = True
        self._tell()
        self._pieces.put(None)
        # No `join`: one that an interrupt ended believes from then on that the thread has ended.
        self._ended.wait()

    def _tell(self) -> None:
        with self._news:
            self._news.notify()

    def _run(self) -> None:
        while (piece := self._pieces.get()) is not None:
            try:
                if self._error is None and not self._abandoned:
                    self._follow(piece)
            except BaseException as error:  # noqa: BLE001 - handed over, and raised by `check`
                self._error = error
            finally:
                piece.close()
        self._ended.set()

    def _follow(self, piece: Piece) -> None:
        digest, buffer = hashlib.sha256(), bytearray(_BLOCK)
        hashed = 0
        while hashed < piece.size:
            with self._news:
                while piece.complete == hashed and not self._abandoned:
                    self._news.wait()
            if self._abandoned:
                return
            # Taken before the bytes are read: what is completed meanwhile was read too early.
            complete = piece.complete
            while hashed < complete:
                count = min(piece.read_back(hashed, buffer), complete - hashed)
                digest.update(memoryview(buffer)[:count])
                hashed += count
        piece.finish()
        self._finished(piece, digest.hexdigest())
