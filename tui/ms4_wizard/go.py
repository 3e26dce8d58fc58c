"""From one screen to another."""

from __future__ import annotations

from textual.message import Message


class Go(Message):
    """A screen asks for another one, by the step's number; the one after the last is the review."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
