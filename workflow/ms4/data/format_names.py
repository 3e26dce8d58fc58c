"""What the formats of data are called, and which of them a record has."""

from __future__ import annotations

from typing import Any, get_args

from ms4.config_data import Format
from ms4.data.json_text import list_of

FORMATS: tuple[Format, ...] = tuple(name for name in get_args(Format) if name != "auto")

NAMES: dict[Format, str] = {
    "messages": "OpenAI messages",
    "sharegpt": "ShareGPT",
    "alpaca": "Alpaca",
    "prompt_completion": "prompt–completion",
    "question_answer": "question–answer",
    "text": "plain text",
}
"""Formats by the names that people know."""

_BY_KEYS: tuple[tuple[tuple[tuple[str, ...], ...], Format], ...] = (
    ((("instruction",), ("output", "response")), "alpaca"),
    ((("prompt",), ("completion", "response")), "prompt_completion"),
    ((("question",), ("answer", "response")), "question_answer"),
    ((("text",),), "text"),
)


def format_of(record: dict[str, Any]) -> Format | None:
    """The format that a record's keys tell, renamed ones by their new names; None: none."""
    if "messages" in record:
        return "messages"
    for key in ("conversations", "conversation"):
        turns = list_of(record.get(key))
        if turns is not None:
            first = next((turn for turn in turns if isinstance(turn, dict)), {})
            return "messages" if "role" in first and "from" not in first else "sharegpt"
    for keys, name in _BY_KEYS:
        if all(any(key in record for key in either) for either in keys):
            return name
    return None
