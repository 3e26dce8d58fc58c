"""What is wrong with a data set: collected, and reported all together."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ms4 import manifest
from ms4.errors import Ms4Error

LISTED = 20
"""So many faults stand in the error message; the file beside the data has all."""


KEPT = 100_000
"""So many are kept: a file of another kind than it seems can have millions."""
_SPECIAL = re.compile(r"`[^`]*`|'[^']*'|\d+")


def count(number: int, noun: str) -> str:
    """`1 sample`, `1,200 samples`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _of_each_kind(lines: list[str]) -> list[str]:
    """At most `LISTED` of the lines, in their order: the first of each kind, then the first ones.
    What differs in numbers or in what is quoted is of one kind."""
    kinds: dict[str, int] = {}
    for number, line in enumerate(lines):
        kinds.setdefault(_SPECIAL.sub("", line.partition(": ")[2]), number)
    chosen = dict.fromkeys([*kinds.values(), *range(len(lines))])
    return [lines[number] for number in sorted(list(chosen)[:LISTED])]


class SampleFault(Exception):
    """What is wrong with one sample, and what to do; its place is added by who reads the file."""


class SampleDropped(Exception):
    """A sample that a policy leaves out, with the reason; no fault stops because of it."""


@dataclass(order=True)
class _Fault:
    file_number: int
    line: int
    file: str = field(compare=False)
    reason: str = field(compare=False)

    @property
    def text(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.reason}"


class Faults:
    """Collects all faults of a data set, to be reported together in the order of `files`."""

    def __init__(self, files: Iterable[str] = ()) -> None:
        self._faults: list[_Fault] = []
        self._files: dict[str, int] = {}
        self._count = 0
        for path in files:
            self._files.setdefault(path, len(self._files))

    def add(self, path: str, line: int | None, text: str) -> None:
        """Note a fault: `text` says what is wrong; what to do."""
        number = self._files.setdefault(path, len(self._files))
        self._count += 1
        if self._count <= KEPT:
            self._faults.append(_Fault(number, line or 0, path, text))

    def __len__(self) -> int:
        return self._count

    def entries(self) -> list[dict[str, object]]:
        """File, line (None: the whole file) and reason of each, in order."""
        return [
            {"file": fault.file, "line": fault.line or None, "reason": fault.reason}
            for fault in sorted(self._faults)
        ]

    def first(self) -> list[str]:
        """The first ones, of as many kinds as can be."""
        return _of_each_kind(self._lines())

    def _lines(self) -> list[str]:
        return [" ".join(fault.text.splitlines()) for fault in sorted(self._faults)]

    def write(self, path: Path) -> list[str]:
        """Write all of them to a file, a line each, or remove it if there are none; returns the
        first ones and how many more there are."""
        if not self._count:
            path.unlink(missing_ok=True)
            return []
        lines = self._lines()
        unlisted = self._count - len(lines)
        rest = [f"and {unlisted} more that are not listed"] if unlisted else []
        manifest.write_text(path, "\n".join(lines + rest) + "\n")
        listed = _of_each_kind(lines)
        if self._count > LISTED:
            listed.append(f"and {self._count - LISTED} more (all in {path})")
        return listed

    def raise_any(self, all_of_them: Path, summary: str = "") -> None:
        """Write the faults to `all_of_them` and raise if there are any.

        Raises:
            Ms4Error: lists the first ones in the order of files and lines, then `summary`.
        """
        listed = self.write(all_of_them)
        if not listed:
            return
        if summary:
            listed.append(summary)
        faults = "a fault" if self._count == 1 else f"{self._count} faults"
        raise Ms4Error(f"the data has {faults}:\n  " + "\n  ".join(listed))
