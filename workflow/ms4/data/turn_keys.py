"""Keys of a conversation's turns that nothing is made of: what they mean would be lost unseen."""

from __future__ import annotations

from typing import Any

from ms4.data.conversation import THINKING, WEIGHTS

_TURN = {*THINKING, *WEIGHTS}
_SHAREGPT = {"from", "value", *_TURN}
_MESSAGE = {"role", "content", "tool_calls", "prefix", "function_call", "audio", *_TURN}
_RESULT = {"tool_call_id", "name", *_MESSAGE}
"""What is read of a turn, or refused."""


def unused_in_turns(turns: list[Any], fields: dict[Any, str], roles: dict[str, str]) -> set[str]:
    """Keys that hold something, and of which nothing is made.

    Args:
        turns: as the record has them.
        fields: field → what the data calls it (`data.fields`).
        roles: what the data calls a role → the role (`data.roles`).
    """
    unused: set[str] = set()
    for turn in turns:
        if not isinstance(turn, dict) or turn.keys() <= _MESSAGE or turn.keys() <= _SHAREGPT:
            continue
        role = turn.get(fields.get("role", "role"))
        role = roles.get(role, role) if isinstance(role, str) else role
        known = _RESULT if role == "tool" else _SHAREGPT if role is None else _MESSAGE
        for key in turn.keys() - known:
            if turn[key] not in (None, "", [], {}) and key not in fields.values():
                unused.add(str(key))
    return unused
