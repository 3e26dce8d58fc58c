"""What the configuration calls data → files and data sets of the hub, in a fixed order."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ms4.config import expand_home
from ms4.errors import Ms4Error

HUB = "hub:"
FAULTS_FILE = "ms4-data-faults.txt"
"""What `ms4 data` writes beside the data that it reads. It is no data."""
_HUB = re.compile(
    r"hub:(?P<id>[\w.-]+/[\w.-]+)(?:/(?P<subset>[\w.-]+))?"
    r"@(?P<revision>[A-Za-z0-9][\w./-]*)(?:#(?P<split>[\w.\[\]:%+-]+))?"
)
_PATTERN = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class HubData:
    """A data set of the hub."""

    id: str
    revision: str
    subset: str | None
    split: str


@dataclass(frozen=True)
class Source:
    """One file, or one data set of the hub."""

    name: str
    """What messages call it: the path, or the hub's entry."""
    entry: str
    """The entry of the configuration that it comes from."""
    hub: HubData | None = None

    @property
    def path(self) -> Path:
        """The file, if it is not on the hub."""
        return expand_home(self.name)


def is_hub(entry: str) -> bool:
    """Whether an entry names a data set of the hub."""
    return entry.startswith(HUB)


def is_pattern(entry: str) -> bool:
    """Whether an entry may stand for several files."""
    return _PATTERN.search(entry) is not None


def expand(entries: Iterable[str]) -> list[Source]:
    """The sources of these entries: patterns become the files that they match, sorted by name. A
    pattern that matches nothing stays, and will be reported as a missing file.

    Raises:
        Ms4Error: an entry for the hub cannot be read, or names no revision.
    """
    sources: dict[str, Source] = {}
    for entry in entries:
        if is_hub(entry):
            sources.setdefault(entry, Source(entry, entry, _hub_data(entry)))
            continue
        for name in matches(entry) or [entry]:
            sources.setdefault(name, Source(name, entry))
    return list(sources.values())


def matches(entry: str, start: Path = Path()) -> list[str]:
    """The files that a pattern matches, sorted; none if it is no pattern but a file's name.

    Args:
        entry: as the configuration has it.
        start: what a relative path is relative to.
    """
    path = start / expand_home(entry)
    if not is_pattern(entry) or path.exists():
        return []
    pattern = entry if start == Path() else str(path)
    # Path.glob takes no pattern that begins at the root.
    found = glob.glob(str(expand_home(pattern)), recursive=True)  # noqa: PTH207
    return sorted(n for n in found if Path(n).is_file() and Path(n).name != FAULTS_FILE)


def repeated(entries: Iterable[str]) -> list[str]:
    """What these entries name more than once, a line each: a file that two entries match is taken
    once, one that has two names (by a link) under each of them."""
    entries = list(entries)
    by: dict[str, list[str]] = {}
    for entry in entries:
        for source in expand([entry]):
            by.setdefault(source.name, []).append(entry)
    lines = [
        f"{name}: named {len(given)} times ({', '.join(dict.fromkeys(given))}); taken once"
        for name, given in by.items()
        if len(given) > 1
    ]
    files: dict[tuple[int, int], list[str]] = {}
    for source in expand(entries):
        if source.hub is None and source.path.is_file():
            status = source.path.stat()
            files.setdefault((status.st_dev, status.st_ino), []).append(source.name)
    lines += [
        f"{' and '.join(names)} are one file: its samples are taken {len(names)} times"
        for names in files.values()
        if len(names) > 1
    ]
    return lines


def local_files(entries: Iterable[str]) -> list[str]:
    """The files of these entries, for rules that depend on them; what is on the hub is left out:
    its revision stands in the configuration."""
    return [source.name for source in expand(entries) if source.hub is None]


def _hub_data(entry: str) -> HubData:
    found = _HUB.fullmatch(entry)
    if found is None:
        raise Ms4Error(
            f"{entry}: not a data set of the hub with a revision; write "
            "hub:OWNER/NAME@REVISION or hub:OWNER/NAME/SUBSET@REVISION#SPLIT (the commit stands "
            "under Files on its page): without one, the data could change between two runs."
        )
    return HubData(found["id"], found["revision"], found["subset"], found["split"] or "train")
