"""Drafts: the answers as they are typed, kept outside of any project until they are written.

Each change is written at once, without waiting for the disk: a closed terminal loses nothing, a
power cut perhaps the last key strokes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the first screen does not wait for the configuration
    from ms4_wizard.draft import Draft

VERSION = 1


def state_directory() -> Path:
    """Where the wizard keeps what is of no project: `$XDG_STATE_HOME/ms4`."""
    base = os.environ.get("XDG_STATE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".local/state") / "ms4"


@dataclass(frozen=True)
class Kept:
    """A draft that was found."""

    draft: Draft
    directory: str
    """Where its project was to be written."""
    when: datetime

    @property
    def count(self) -> int:
        """How many fields were given."""
        given = {field for field in _fields(self.draft.values) if self.draft.given(field)}
        return len(given | set(self.draft.typed))

    def adds_to(self, draft: Draft, directory: Path) -> bool:
        """Whether it says something else than other answers for a directory: in a value, in what
        was typed and is no value yet, or in where the project is to be written."""
        place, own = (os.path.normpath(Path.cwd() / where) for where in (directory, self.directory))
        same = (self.draft.values, self.draft.typed) == (draft.values, draft.typed)
        return not same or place != own


def _fields(tree: Any, prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, value in tree.items():
        if isinstance(value, dict) and f"{prefix}{name}" in _SECTIONS:
            found += _fields(value, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}")
    return found


_SECTIONS = {"model", "data", "adapters", "train", "evaluate", "run", "where"}


class Store:
    """The draft of one project directory, from one current directory: paths depend on it."""

    def __init__(self, directory: Path, place: Path | None = None) -> None:
        """
        Args:
            directory: of the project.
            place: where drafts are kept; None: `state_directory()`.
        """
        self._place = place or state_directory()
        key = f"{Path.cwd()}\0{Path(os.path.normpath(Path.cwd() / directory))}"
        name = hashlib.sha256(os.fsencode(key)).hexdigest()[:32]
        self._path = self._place / "drafts" / f"{name}.json"

    def of(self, directory: Path) -> Store:
        """The draft of another project directory, beside this one."""
        return Store(directory, self._place)

    def save(self, draft: Draft, directory: str) -> None:
        """Keep a draft; where that cannot be (no room, no right), go on without."""
        tree = {
            "version": VERSION,
            "directory": directory,
            "values": draft.values,
            "typed": draft.typed,
            "computed": sorted(draft.computed),
        }
        temporary = self._path.with_suffix(f".{os.getpid()}.tmp")
        with contextlib.suppress(OSError):
            # What was typed may name what is nobody else's business.
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            temporary.write_text(json.dumps(tree), encoding="ascii")
            temporary.replace(self._path)

    def is_empty(self) -> bool:
        """Whether no draft is kept."""
        return not self._path.exists()

    def load(self) -> Kept | None:
        """The draft, or None if there is none or it cannot be read."""
        if self.is_empty():
            return None
        from ms4_wizard.draft import Draft

        try:
            tree = json.loads(self._path.read_text(encoding="ascii"))
            if tree["version"] != VERSION:
                return None
            draft = Draft(tree["values"], tree["typed"], set(tree["computed"]))
            for field in draft.typed:
                draft.get(field)
            when = datetime.fromtimestamp(self._path.stat().st_mtime)
            return Kept(draft, str(tree["directory"]), when)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def forget(self) -> None:
        """Remove the draft: its answers were written, or nobody wants them."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
