"""Completing paths as a shell does."""

from __future__ import annotations

import os
from pathlib import Path

from ms4.home import expand_home

MOST = 2_000
"""Entries of a directory that are looked at; a person types more where there are more."""


def candidates(typed: str, base: Path) -> list[str]:
    """What `typed` can go on as: paths that begin like it, directories with a `/` at their end.

    Args:
        typed: the beginning of a path, as a person gives it.
        base: what relative paths are relative to.
    """
    head, slash, name = typed.rpartition("/")
    prefix = head + slash
    try:
        place = base / expand_home(prefix or ".")
        found = []
        with os.scandir(place) as entries:
            for number, entry in enumerate(entries):
                if number >= MOST:
                    break
                hidden = entry.name.startswith(".") and not name.startswith(".")
                if entry.name.startswith(name) and not hidden and entry.name.isprintable():
                    found.append(prefix + entry.name + ("/" if entry.is_dir() else ""))
    except (OSError, ValueError):
        return []
    # Directories after files: data is what is looked for.
    return sorted(found, key=lambda path: (path.endswith("/"), path))


def complete(typed: str, base: Path) -> str:
    """`typed` with all that its candidates have in common."""
    found = candidates(typed, base)
    if not found:
        return typed
    # The least and the greatest differ where any two do.
    least, greatest = min(found), max(found)
    pairs = enumerate(zip(least, greatest, strict=False))
    end = next((i for i, (a, b) in pairs if a != b), min(len(least), len(greatest)))
    return least[:end] if end > len(typed) else typed
