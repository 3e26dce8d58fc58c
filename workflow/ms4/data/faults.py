"""What is wrong with a data set: collected, and reported all together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ms4 import manifest
from ms4.errors import Ms4Error

LISTED = 20
"""So many faults stand in the error message; the file beside the data has all."""


class SampleFault(Exception):
    """What is wrong with one sample, and what to do; its place is added by who reads the file."""


@dataclass(order=True)
class _Fault:
    file_number: int
    line: int
    text: str = field(compare=False)


class Faults:
    """Collects all faults of a data set, to be reported together in the order of `files`."""

    def __init__(self, files: Iterable[str] = ()) -> None:
        self._faults: list[_Fault] = []
        self._files: dict[str, int] = {}
        for path in files:
            self._files.setdefault(path, len(self._files))

    def add(self, path: str, line: int | None, text: str) -> None:
        """Note a fault: `text` says what is wrong; what to do."""
        number = self._files.setdefault(path, len(self._files))
        place = path if line is None else f"{path}:{line}"
        self._faults.append(_Fault(number, line or 0, f"{place}: {text}"))

    def __len__(self) -> int:
        return len(self._faults)

    def raise_any(self, all_of_them: Path, summary: str = "") -> None:
        """Write the faults to `all_of_them` and raise if there are any.

        Raises:
            Ms4Error: lists the first ones in the order of files and lines, then `summary`.
        """
        if not self._faults:
            all_of_them.unlink(missing_ok=True)
            return
        lines = [fault.text for fault in sorted(self._faults)]
        manifest.write_text(all_of_them, "\n".join(lines) + "\n")
        listed = lines[:LISTED]
        if len(lines) > LISTED:
            listed.append(f"and {len(lines) - LISTED} more (all in {all_of_them})")
        if summary:
            listed.append(summary)
        faults = "a fault" if len(lines) == 1 else f"{len(lines)} faults"
        raise Ms4Error(f"the data has {faults}:\n  " + "\n  ".join(listed))
