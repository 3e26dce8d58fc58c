"""`<think>…</think>` and `[THINK]…[/THINK]` inside an assistant's text → thinking parts.

As tokens, thinking stands between two control ids; the tags written out would be plain text that
no server takes for thinking. A tag right behind a backtick is a mention and stays text.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

_OPENINGS = ("<think>", "[THINK]")
_CLOSINGS = ("</think>", "[/THINK]")
_OPENING = re.compile(r"(?<!`)(?:<think>|\[THINK\])")
_CLOSING = re.compile(r"(?<!`)(?:</think>|\[/THINK\])")

_OTHER = re.compile(
    r"(?<!`)(?:</?(?:think|thinking|thoughts?|reasoning)>|\[/?(?:think|thinking)\])", re.IGNORECASE
)


def _may_have_tags(text: str) -> bool:
    """Cheap, and true of few texts: the patterns are twenty times slower."""
    return "think>" in text or "THINK]" in text


class Piece(NamedTuple):
    """A piece of a text."""

    kind: Literal["text", "thinking"]
    text: str
    closed: bool = True
    """False: thinking without an end."""


def split_tags(text: str) -> list[Piece]:
    """Pieces of an assistant's text. White space around thinking, which only sets the tags apart,
    goes. Thinking without an end is not closed; an end without a beginning stays in the text."""
    if not _may_have_tags(text):
        return [Piece("text", text)] if text else []
    pieces: list[Piece] = []
    at = 0
    while opening := _OPENING.search(text, at):
        before = text[at : opening.start()]
        if before.strip():
            pieces.append(Piece("text", before))
        # Each way to write it has its own end.
        end = _CLOSINGS[_OPENINGS.index(opening.group())]
        stop = text.find(end, opening.end())
        if stop < 0:
            pieces.append(Piece("thinking", text[opening.end() :].strip(), closed=False))
            return pieces
        pieces.append(Piece("thinking", text[opening.end() : stop].strip()))
        at = stop + len(end)
    rest = text[at:]
    if at:  # behind thinking
        rest = rest.lstrip()
    if rest:
        pieces.append(Piece("text", rest))
    return pieces


def begins_with_tag(text: str) -> bool:
    """Whether a text begins as thinking does."""
    return text.lstrip().startswith(_OPENINGS)


def unwrap(thinking: str) -> str:
    """Thinking that carries its own pair of tags, without them."""
    text = thinking.strip()
    for opening, closing in zip(_OPENINGS, _CLOSINGS, strict=True):
        inner = text[len(opening) : -len(closing)]
        if text.startswith(opening) and text.endswith(closing) and closing not in inner:
            return inner.strip()
    return thinking


def split_at_end(text: str) -> tuple[str, str] | None:
    """What stands before and after the first end of thinking in a text, or None."""
    found = _CLOSING.search(text) if _may_have_tags(text) else None
    return (text[: found.start()].strip(), text[found.end() :].lstrip()) if found else None


def has_other_tag(text: str) -> bool:
    """Whether a tag of thinking stands in a text that is none of those which are read."""
    if "<" not in text and "[" not in text:
        return False
    known = (*_OPENINGS, *_CLOSINGS)
    return any(found.group() not in known for found in _OTHER.finditer(text))


def has_opening(text: str) -> bool:
    """Whether a beginning of thinking stands in a text."""
    return _OPENING.search(text) is not None


def without_openings(text: str) -> str:
    """The text without the beginnings of thinking in it."""
    return _OPENING.sub("", text).strip()
