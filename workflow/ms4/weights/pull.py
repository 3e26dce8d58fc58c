"""From a hub to a directory: which files, whether they fit, several at a time.

huggingface_hub reads its variables when it is imported, and this module imports it: `hub` does so
only for a source that is on a hub.
"""

from __future__ import annotations

import importlib
import queue
import shutil
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode

from ms4.errors import Ms4Error
from ms4.weights.download import RemoteFile, Repository, Snapshot
from ms4.weights.layouts import INDEX, SETTINGS, Layout, read_dimensions, read_settings
from ms4.weights.meter import Display, Meter, gigabytes, say
from ms4.weights.patience import Halted
from ms4.weights.record import Record
from ms4.weights.shards import writable
from ms4.weights.sources import NEEDED, OPTIONAL, Place, Target, missing, shards_of
from ms4.weights.tables import bytes_missing

CONNECTIONS = 4
"""Files that are fetched at a time, at most: enough for a fast line, and polite to the hub."""


@dataclass(frozen=True)
class Wanted:
    """What is to be fetched."""

    repository: str
    revision: str | None
    layout: Layout


def fetch(wanted: Wanted, place: Place, target: Target | None) -> dict[str, Any]:
    """Bring a repository's files in and, if the target says so, convert them meanwhile.

    Args:
        wanted: what to fetch.
        place: where to.
        target: the base that it will be converted to, if any: it has to fit on the disk too.

    Returns:
        What the manifest says of the source, but for its directory.

    Raises:
        Ms4Error: the source is missing, not this model, not reachable or damaged, or does not fit.
    """
    errand = Errand(wanted, place)
    files = errand.list_files()
    weights = [file for file in files if file.name.endswith(".safetensors")]
    errand.bring([file for file in files if file not in weights])
    if target is not None and target.at_once:
        # By name, and only here: converting needs torch, and nothing else in fetching does.
        arrival = importlib.import_module("ms4.weights.arrival")
        arrival.fetch_and_convert(errand, weights, target)
    else:
        errand.bring(weights, target)
    errand.finish(files)
    return errand.record.content()


class Errand:
    """One fetch: what is wanted, what is known of the place, and the hub once it must be asked."""

    def __init__(self, wanted: Wanted, place: Place) -> None:
        self.wanted, self.place = wanted, place
        self.record = Record(place.directory)
        self._hub: Repository | None = None
        self._brought: set[str] = set()

    def hub(self) -> Repository:
        """The hub, and a clear error where it must not be asked."""
        if is_offline_mode():
            words, revision = self.place.words, self.wanted.revision
            raise Ms4Error(
                f"{words.source}: HF_HUB_OFFLINE is set and {self.place.directory} does not hold "
                f"all of {self.wanted.repository} at {revision or 'its main branch'}. Unset it, or "
                "give a local directory."
            )
        if self._hub is None:
            self._hub = Repository(self.wanted.repository, self.place.words)
        return self._hub

    def list_files(self) -> list[RemoteFile]:
        """The files that are needed, the shards last; those that tell which are brought in.

        Raises:
            Ms4Error: the repository is not there, not reachable or not of this model.
        """
        state, wanted = self.record.state, self.wanted
        # A commit never changes, so one that was here whole need not be asked for. A branch does,
        # and what it stood for at the last fetch is the best that can be had offline.
        current = state.commit == wanted.revision or (
            is_offline_mode() and state.asked == wanted.revision
        )
        same = (state.repository, state.layout) == (wanted.repository, wanted.layout)
        if state.complete and same and current:
            return self.record.remote_files()
        snapshot = self.hub().snapshot(wanted.revision)
        with writable(self.place.directory):
            self.place.directory.mkdir(parents=True, exist_ok=True)
        if (state.repository, state.commit) == (wanted.repository, snapshot.commit):
            self._check_pin(snapshot)
        elif same and state.commit and state.asked == wanted.revision:
            say(
                f"{wanted.revision or 'the main branch'} of {wanted.repository} is "
                f"{snapshot.commit[:12]} now; it was {state.commit[:12]} when it was fetched"
            )
        before = (state.repository, state.commit, state.layout)
        if before != (wanted.repository, snapshot.commit, wanted.layout):
            state.complete, state.verified, state.listed = False, {}, {}
        state.repository, state.asked = wanted.repository, wanted.revision
        state.commit, state.layout = snapshot.commit, wanted.layout
        names = self._names(snapshot)
        self._sweep(snapshot, names)
        files = [snapshot.file(name) for name in names]
        state.listed = {file.name: file.digest for file in files}
        return files

    def _check_pin(self, snapshot: Snapshot) -> None:
        """Whether the hub says of a commit what it said before: a commit never changes.

        Raises:
            Ms4Error: it gives another hash for a file, or has one no more.
        """
        for name, digest in self.record.state.listed.items():
            found = snapshot.file(name).digest if name in snapshot.files else "none"
            if found != digest:
                raise Ms4Error(
                    f"{name}: changed under the pin: for commit {snapshot.commit[:12]} of "
                    f"{self.wanted.repository} {self.hub().host} had given the hash {digest}, and "
                    f"gives {found} now. Nothing here was touched. A commit never changes, so one "
                    "of the two answers is wrong: ask another hub (HF_ENDPOINT), or name another "
                    f"commit ({self.place.words.revision}). To take what is given now, remove "
                    f"{self.record.path} and run the same command again."
                )

    def _names(self, snapshot: Snapshot) -> list[str]:
        layout, directory = self.wanted.layout, self.place.directory
        settings, index = SETTINGS[layout], INDEX[layout]
        there = [name for name in (settings, index) if name in snapshot.files]
        self.bring([snapshot.file(name) for name in there])
        if settings in there:
            read_settings(directory, layout)
        shards = shards_of(directory, layout) if index in there else []
        if absent := [name for name in (*NEEDED[layout], *shards) if name not in snapshot.files]:
            where = f"{self.wanted.repository} at {snapshot.commit[:12]}"
            raise missing(where, absent, layout, self.place.words)
        # The shards last: whatever else is wrong shows before the long part.
        optional = [name for name in OPTIONAL[layout] if name in snapshot.files]
        return [*NEEDED[layout], *optional, *shards]

    def _sweep(self, snapshot: Snapshot, names: Sequence[str]) -> None:
        """Remove what is left of other commits: whole files and partial ones that nothing needs."""
        stale = [name for name in self.record.state.files if name not in names]
        if stale:
            self._retract()
        wanted = {snapshot.file(name).partial(self.place.directory).name for name in names}
        parts = [path.name for path in self.place.directory.glob("*.part")]
        self._remove([*stale, *(name for name in parts if name not in wanted)])
        for name in stale:
            del self.record.state.files[name]

    def bring(self, files: Sequence[RemoteFile], target: Target | None = None) -> None:
        """Fetch those of the files that are not here whole.

        Args:
            files: of the repository.
            target: the base that has to fit on the disk beside them.

        Raises:
            Ms4Error: they do not fit, or the hub fails.
        """
        absent = self.clear([file for file in files if not self.record.is_whole(file)])
        if not absent:
            return
        needs, advice = [self.need(absent)], ""
        if target is not None:
            dims = read_dimensions(self.place.directory, self.wanted.layout)
            size = bytes_missing(target.directory, dims, target.to)
            needs.append(Need(target.directory, size, f"the base ({target.to}) that comes of it"))
            advice = f", or take less at a time: {self.place.words.free}"
        check_room(needs, advice)
        self.announce(absent)
        with self.meter(absent) as meter, Downloads(self, meter) as downloads:
            for file in absent:
                downloads.start(file)
            while downloads.under_way:
                downloads.wait()
            downloads.check()

    def clear(self, absent: Sequence[RemoteFile]) -> list[RemoteFile]:
        """Make way for files that are not here whole; nothing vouches for them from now on."""
        if absent:
            self.hub()
            self._retract()
            self.drop(absent)
        if freed := [file.name for file in absent if self.record.is_freed(file)]:
            say(f"{', '.join(freed)}: had been freed, and must be fetched again")
        return list(absent)

    def _retract(self) -> None:
        # The old manifest vouches for content that is about to be replaced.
        with writable(self.place.manifest):
            self.place.manifest.unlink(missing_ok=True)
        self.record.state.complete = False

    def drop(self, absent: Sequence[RemoteFile]) -> None:
        """Remove what stands in the place of these files.

        Raises:
            Ms4Error: in a directory of the user's, something that we did not fetch.
        """
        for file in absent:
            path = self.place.directory / file.name
            ours = self.place.ours or file.name in self.record.state.files
            if path.exists() and not ours:
                raise Ms4Error(
                    f"{path}: is there, with another content than in {self.wanted.repository}, and "
                    "was not fetched by ms4. Remove it, or give another directory."
                )
        self._remove(file.name for file in absent)

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            with writable(self.place.directory / name):
                (self.place.directory / name).unlink(missing_ok=True)

    def come(self, file: RemoteFile) -> int:
        """Bytes of a file that is not whole that are here already."""
        part = file.partial(self.place.directory)
        return min(part.stat().st_size, file.size) if part.is_file() else 0

    def need(self, absent: Sequence[RemoteFile]) -> Need:
        """What fetching the rest of these files takes."""
        rest = sum(file.size - self.come(file) for file in absent)
        what = f"fetching the rest of {self.wanted.repository}"
        return Need(self.place.directory, rest, what)

    def announce(self, absent: Sequence[RemoteFile]) -> None:
        """Say what is about to be fetched."""
        rest, hub = gigabytes(self.need(absent).size), self.hub()
        files = "1 file" if len(absent) == 1 else f"{len(absent)} files"
        say(f"fetching {files}, {rest}, of {hub.name} from {hub.host}")

    def meter(self, absent: Sequence[RemoteFile], display: Display | None = None) -> Meter:
        """Progress over these files."""
        total, come = sum(file.size for file in absent), sum(map(self.come, absent))
        return Meter("fetched", total, come, display)

    def fetch_one(self, file: RemoteFile, meter: Meter, halt: threading.Event) -> None:
        """Bring one file in and note that it is whole; in any thread.

        Raises:
            Ms4Error: the hub fails, or the file is not what it announced.
            Halted: `halt` was set.
        """
        if halt.is_set():
            raise Halted
        commit, directory = self.record.state.commit, self.place.directory
        self.record.vouch(file, self.hub().fetch(file, commit, directory, meter, halt))
        self._brought.add(file.name)

    def finish(self, files: Sequence[RemoteFile]) -> None:
        """Note that all is here."""
        state, where = self.record.state, self.place.directory
        state.files = {file.name: state.files[file.name] for file in files}
        state.complete = True
        self.record.write()
        name, size = self.wanted.repository, gigabytes(sum(file.size for file in files))
        freed = sum(self.record.is_freed(file) for file in files)
        whole = f"whole, {freed} of them freed" if freed else "whole"
        nothing = "" if self._brought else ", nothing to fetch"
        at = f"{name} at {state.commit[:12]}"
        say(f"{where}: {len(files)} files, {size}, {whole}{nothing} ({at})")


class Downloads:
    """Files on their way, at most `CONNECTIONS` at a time. A context: what is still under way when
    it is left stops, and its partial files stay."""

    def __init__(self, errand: Errand, meter: Meter) -> None:
        self._errand, self._meter = errand, meter
        self._pool = ThreadPoolExecutor(CONNECTIONS, "fetch")
        self._halt = threading.Event()
        self._ended: queue.SimpleQueue[tuple[RemoteFile, Future[None]]] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self.under_way: set[str] = set()
        self.come: set[str] = set()
        """Names of those that are whole."""

    def __enter__(self) -> Downloads:
        return self

    def __exit__(self, *_: object) -> None:
        self._halt.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def start(self, file: RemoteFile) -> None:
        """Fetch this file as soon as a connection is free."""
        self.under_way.add(file.name)
        future = self._pool.submit(self._errand.fetch_one, file, self._meter, self._halt)
        future.add_done_callback(partial(self._end, file))

    def wait(self) -> None:
        """Wait until one more has ended. If one fails, all stop; `check` says why."""
        self._note(*self._ended.get())

    def look(self) -> None:
        """Note what has ended meanwhile."""
        while not self._ended.empty():
            self._note(*self._ended.get())

    def check(self) -> None:
        """Raise what the first that failed had to say."""
        if self._error is not None:
            raise self._error

    @property
    def failed(self) -> bool:
        """Whether one failed."""
        return self._error is not None

    def _end(self, file: RemoteFile, ended: Future[None]) -> None:
        """In the thread that fetched it: no other file is begun after a failure."""
        if not ended.cancelled() and ended.exception() is not None:
            self._halt.set()
        self._ended.put((file, ended))

    def _note(self, file: RemoteFile, ended: Future[None]) -> None:
        self.under_way.discard(file.name)
        error = ended.exception()
        if error is None:
            self.come.add(file.name)
        elif self._error is None and not isinstance(error, Halted):
            self._error = error


@dataclass(frozen=True)
class Need:
    """Room on a disk."""

    path: Path
    size: int
    """Bytes."""
    what: str
    """What takes it."""


def on_disk(path: Path) -> int:
    """The number of the disk that `path` is on, or will be."""
    while not path.exists():
        path = path.absolute().parent
    return path.stat().st_dev


def check_room(needs: Sequence[Need], advice: str = "") -> None:
    """Compare what is needed with the free room of each disk.

    Raises:
        Ms4Error: there is too little; says all that is needed there.
    """
    disks: dict[int, list[Need]] = {}
    for need in needs:
        disks.setdefault(on_disk(need.path), []).append(need)
    for group in disks.values():
        where = group[0].path
        while not where.exists():
            where = where.absolute().parent
        free, total = shutil.disk_usage(where).free, sum(need.size for need in group)
        if total > free:
            parts = [f"{need.what} takes {gigabytes(need.size)}" for need in group]
            together = f", together {gigabytes(total)}" if len(group) > 1 else ""
            raise Ms4Error(
                f"{group[0].path}: {', '.join(parts)}{together}; the disk has {gigabytes(free)} "
                f"free. Free some, or use a larger disk{advice}. What was fetched is kept."
            )
