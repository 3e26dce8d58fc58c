"""What mistral-common's rules change about a conversation, counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from ms4.data.conversation import Conversation, Message
from ms4.data.json_text import without_halves

WORDS = {
    "trailing_spaces": "trailing spaces of turns are stripped",
    "joined": "messages are joined to the one before, of the same role",
    "surrogates": "halves of surrogate pairs become U+FFFD",
    "image_first": "images of turns go before their text",
    "results_reordered": "tool results go in the order of their calls",
}
"""Kinds of changes, and how they are told."""


def changes(conversation: Conversation) -> Counter[str]:
    """How often each kind of change in `WORDS` happens to a conversation; 0 is left out."""
    counts: Counter[str] = Counter()
    texts: list[str] = [] if conversation.plain is None else [conversation.plain]
    asked: list[str] = []
    for role, group in groupby(conversation.messages, key=lambda message: message.role):
        messages = list(group)
        if role in ("user", "assistant"):
            counts["joined"] += len(messages) - 1
        for message in messages:
            texts += [part.text for part in message.parts if part.text]
            if message.tool_calls:
                texts.append(json.dumps(message.tool_calls, ensure_ascii=False))
        if role == "assistant":
            counts["trailing_spaces"] += _strips(messages)
            asked += [str(call.get("id")) for m in messages for call in m.tool_calls]
        elif role == "user":
            kinds = [p.kind for m in messages for p in m.parts if p.kind == "image" or p.text]
            counts["image_first"] += (
                len(kinds) > 1 and kinds[-1] == "image" and kinds.count("image") == 1
            )
        elif role == "tool":
            answered = [message.tool_call_id for message in messages]
            counts["results_reordered"] += answered != [id_ for id_ in asked if id_ in answered]
            asked = []
    if conversation.tools:
        texts.append(json.dumps(conversation.tools, ensure_ascii=False))
    counts["surrogates"] = sum(without_halves(text)[1] for text in texts)
    return +counts


def _strips(messages: Sequence[Message]) -> bool:
    """Whether a turn ends in spaces that are not encoded: only beside no thinking."""
    if any(part.kind == "thinking" for message in messages for part in message.parts):
        return False
    for message in reversed(messages):
        for part in reversed(message.parts):
            if part.text:
                return part.text.endswith(" ")
    return False
