"""What is known of a directory that a hub's files go to: kept beside them, and safe to share.

A file counts as whole if its content was compared with the hub's hash: by time stamp if that was
done before, else by hashing it again. A shard that was removed on purpose stays in the record, with
the pieces that were made of it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ms4 import manifest
from ms4.errors import Ms4Error
from ms4.weights.download import RemoteFile
from ms4.weights.layouts import Layout
from ms4.weights.meter import Meter
from ms4.weights.shards import writable
from ms4.weights.sources import blocks

NAME = ".fetched.json"


@dataclass
class Checked:
    """A file whose content was compared with the hub's hash."""

    size: int
    digest: str
    sha256: str
    mtime_ns: int
    pieces: list[str] = field(default_factory=list)
    """Not empty: the file was removed, and these files of a base were made of it."""


@dataclass
class State:
    """What the record's file holds."""

    repository: str = ""
    asked: str | None = None
    """The revision that was asked for when the files were fetched."""
    commit: str = ""
    layout: Layout = "hf"
    complete: bool = False
    """All files of the commit that are needed were here and checked."""
    listed: dict[str, str] = field(default_factory=dict)
    """Name → hash, as the hub gave it for the commit, of the files that are needed."""
    files: dict[str, Checked] = field(default_factory=dict)
    verified: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Piece of a base → its SHA-256 when it was compared with the source, and the errors found."""


class Record:
    """The record of a directory. Threads may share it."""

    def __init__(self, directory: Path) -> None:
        """Read it; it is empty if there is none or it is of another form."""
        self.directory, self.path = directory, directory / NAME
        self._guard = threading.Lock()
        self.state = State()
        if self.path.exists():
            with suppress(Ms4Error, TypeError, AttributeError):
                self.state = _parse(manifest.read_json(self.path))

    def write(self) -> None:
        """Write it."""
        with self._guard:
            self._write()

    def _write(self) -> None:
        with writable(self.path):
            manifest.write_json(self.path, asdict(self.state))

    def vouch(self, file: RemoteFile, sha256: str) -> None:
        """Note that the content of `file` was checked just now."""
        mtime_ns = (self.directory / file.name).stat().st_mtime_ns
        with self._guard:
            self.state.files[file.name] = Checked(file.size, file.digest, sha256, mtime_ns)
            self._write()

    def is_whole(self, file: RemoteFile) -> bool:
        """Whether the file here has the hub's content."""
        path = self.directory / file.name
        if not path.is_file() or path.stat().st_size != file.size:
            return False
        known = self.state.files.get(file.name)
        if (
            known is not None
            and known.digest == file.digest
            and not known.pieces  # a kill may have left it when it was being freed
            and known.mtime_ns == path.stat().st_mtime_ns
        ):
            return True
        hashes = file.hashes()
        with Meter(f"checking {file.name}", file.size) as meter:
            for block in blocks(path, meter):
                hashes.update(block)
        if hashes.digest() != file.digest:
            return False
        self.vouch(file, hashes.sha256())
        return True

    def is_known(self, file: RemoteFile) -> bool:
        """Whether this content was here once and was checked."""
        known = self.state.files.get(file.name)
        return known is not None and known.digest == file.digest

    def is_freed(self, file: RemoteFile) -> bool:
        """Whether the file was here whole and was removed on purpose."""
        return self.is_known(file) and bool(self.state.files[file.name].pieces)

    def remote_files(self) -> list[RemoteFile]:
        """The recorded files as the hub had described them."""
        files = self.state.files.items()
        return [RemoteFile(name, known.size, known.digest) for name, known in files]

    def is_verified(self, piece: str, sha256: str) -> bool:
        """Whether a file of a base with this content was compared with the source."""
        return self.state.verified.get(piece, {}).get("sha256") == sha256

    def verify(self, piece: str, sha256: str, errors: Mapping[str, float]) -> None:
        """Note that a file of a base was compared with the source, and with what errors."""
        with self._guard:
            self.state.verified[piece] = {"sha256": sha256, "errors": dict(errors)}
            self._write()

    def free(self, name: str, pieces: Iterable[str]) -> None:
        """Remove a file and note what was made of it.

        Raises:
            Ms4Error: it cannot be removed.
        """
        with self._guard:
            # The note first: a file that is still there when it should not be is removed later.
            self.state.files[name].pieces = sorted(pieces)
            self._write()
        with writable(self.directory / name):
            (self.directory / name).unlink(missing_ok=True)

    def content(self) -> dict[str, Any]:
        """What the manifest says of a source from a hub, but for its directory."""
        here, freed = [], []
        for name, known in sorted(self.state.files.items()):
            entry: dict[str, Any] = {"path": name, "size": known.size, "sha256": known.sha256}
            if known.pieces:
                freed.append({**entry, "pieces": known.pieces})
            else:
                here.append(entry)
        content: dict[str, Any] = {
            "files": here,
            "origin": "hub",
            "layout": self.state.layout,
            "repository": self.state.repository,
            "revision": self.state.commit,
        }
        if freed:
            pieces = {piece for entry in freed for piece in entry["pieces"]}
            errors: dict[str, float] = {}
            for piece in pieces:
                errors |= self.state.verified.get(piece, {}).get("errors", {})
            content |= {"freed": freed, "recomputed": dict(sorted(errors.items()))}
        return content


def _parse(values: Any) -> State:
    state = State(**values)
    state.files = {name: Checked(**checked) for name, checked in state.files.items()}  # type: ignore[arg-type]
    return state
