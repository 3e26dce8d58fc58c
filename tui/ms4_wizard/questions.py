"""What a question is. Nothing else is imported here: the first screen waits for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Choice:
    """One of the answers to choose from."""

    value: str
    meaning: str
    """What choosing it does, in a line."""


Form = Literal["text", "number", "lines", "named_lines", "named_numbers", "choice", "several"]
"""How an answer is given: a line of text; a number; a list, one a line; `name = value` lines;
`name = number` lines; one of the choices; any of the choices."""

NAMED: tuple[Form, ...] = ("named_lines", "named_numbers")
LINES: tuple[Form, ...] = ("lines", *NAMED)


@dataclass(frozen=True)
class Question:
    """A question for one field of the answers."""

    field: str
    """Dotted name, as in an answers file."""
    form: Form
    ask: str
    advice: str
    """What it is, and what most people choose: two lines of a narrow screen at most."""
    choices: tuple[Choice, ...] = ()
    only_if: tuple[str, str] | None = None
    """Asked only if that field has that value, or holds it among others."""
    label: str = ""
    """What a list of answers calls it, if that is not what is asked."""

    @property
    def name(self) -> str:
        """A few words for a list of answers."""
        return self.label or self.ask


@dataclass(frozen=True)
class Step:
    """Questions that stand on one screen."""

    key: str
    title: str
    questions: tuple[Question, ...]
