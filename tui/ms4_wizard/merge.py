"""A file that a person edited, with the changes that new answers make to it: a merge by lines."""

from __future__ import annotations

from difflib import SequenceMatcher

Edit = tuple[int, int, tuple[str, ...]]
"""Lines of the base, from and to, and what stands in their place."""


def _edits(base: list[str], other: list[str]) -> list[Edit]:
    found = SequenceMatcher(None, base, other, autojunk=False).get_opcodes()
    return [(i, j, tuple(other[k:m])) for what, i, j, k, m in found if what != "equal"]


def _meet(a: Edit, b: Edit) -> bool:
    """Whether two edits touch the same lines, or insert at the same place."""
    if a[0] == a[1] or b[0] == b[1]:  # an insertion: inside the other, or at the same place
        return a[0] == b[0] or (a[0] < b[0] < a[1]) or (b[0] < a[0] < b[1])
    return a[0] < b[1] and b[0] < a[1]


def merge(base: str, edited: str, new: str) -> str | None:
    """`edited` with the changes from `base` to `new`; None if both change the same lines."""
    lines = base.splitlines(keepends=True)
    mine = _edits(lines, edited.splitlines(keepends=True))
    theirs = _edits(lines, new.splitlines(keepends=True))
    if any(_meet(a, b) for a in mine for b in theirs if a != b):
        return None
    merged: list[str] = []
    at = 0
    for first, last, text in sorted(set(mine) | set(theirs)):
        merged += [*lines[at:first], *text]
        at = last
    return "".join(merged + lines[at:])
