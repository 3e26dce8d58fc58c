"""Files of weights made by all cores, in order: what converter and writers share.

Tasks read, compute and write a few megabytes each; a bounded number of them waits, so that memory
does not grow with the checkpoint. One thread follows behind, hashes and syncs.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ms4.errors import Ms4Error
from ms4.weights.meter import Meter, gigabytes
from ms4.weights.shards import Finished, Follower, Piece, Table, temporary, writable

STRETCH = 1 << 24
"""Elements of one task, at most: what a thread reads, converts and writes at a time is a part of
it."""

Task = Callable[[], None]


@dataclass(frozen=True)
class Work:
    """A file that is to be made."""

    path: Path
    table: Table
    """Its tensors."""
    tasks: Callable[[Piece], Iterable[tuple[Task, int]]]
    """What fills it: tasks that any thread may take, each with its elements, for the progress."""


def make(works: Iterable[Work], threads: int, finished: Finished, meter: Meter) -> None:
    """Make files one after the other, with as many threads.

    Args:
        works: what to make; the next one is asked for when the tasks of the one before are out.
        threads: that read, compute and write.
        finished: called with each file that is whole, in order, and its SHA-256.
        meter: counts elements.

    Raises:
        Ms4Error: what a task or the disk has to say; whole files are kept, the others removed.
    """
    begun: list[Piece] = []
    growing: list[Path] = []
    follower = Follower(finished)
    slots = threading.BoundedSemaphore(4 * threads)
    failed: list[BaseException] = []

    def ended(size: int, future: Future[None]) -> None:
        slots.release()
        error = future.exception() if not future.cancelled() else None
        if error is not None:
            failed.append(error)
        meter.add(size)

    def check() -> None:
        # The follower's fault first: it closes the file, and then its writers fail too.
        follower.check()
        if failed:
            raise failed[0]

    pool = ThreadPoolExecutor(threads)
    try:
        for work in works:
            growing.append(temporary(work.path))  # first: an interrupt may come in between
            piece = Piece(work.path, work.table)
            begun.append(piece)
            follower.add(piece)
            for task, size in work.tasks(piece):
                slots.acquire()
                check()
                pool.submit(task).add_done_callback(partial(ended, size))
        pool.shutdown(wait=True)
        check()
        follower.close()
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        follower.abandon()
        for piece in begun:
            piece.discard()
        with suppress(OSError):  # the one that it ends with was raised before
            for path in growing:
                path.unlink(missing_ok=True)
        raise


def check_room(target: Path, needed: int, what: str) -> None:
    """Compare the free disk space with what will be written.

    Args:
        target: a directory on that disk.
        needed: bytes.
        what: what takes them, for the message.

    Raises:
        Ms4Error: there is too little.
    """
    free = shutil.disk_usage(target).free
    if needed > free:
        raise Ms4Error(
            f"{target}: {what} takes {gigabytes(needed)} more and the disk has {gigabytes(free)} "
            "free. Free some, or use another disk; what is whole is kept."
        )


def drop_others(target: Path, records: Path, names: Collection[str]) -> None:
    """Remove the pieces of a base of more layers that stood here before: whoever reads all files of
    a directory would take them for a part of this one.

    Args:
        target: directory of the base.
        records: directory of the pieces' records: only what has one was made here.
        names: pieces that belong here.

    Raises:
        Ms4Error: one cannot be removed.
    """
    with writable(target):
        for record in records.glob("*.json"):
            if record.stem not in names:
                (target / record.stem).unlink(missing_ok=True)
                record.unlink()
