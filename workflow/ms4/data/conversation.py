"""JSONL records → typed conversations; whatever is wrong is named with its file and line.

A record is `{"messages": [...]}` in OpenAI's form, with `reasoning_effort` and `tools` beside
it where they are known. Content is text or a list of parts; thinking is a part of its own, or
a message's `reasoning_content` (SGLang) or `reasoning` (vLLM) string. Checks that only the
chat format can make (tool call ids, order of roles) are left to mistral-common in `chat.py`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args

from ms4.config import EFFORTS, Effort
from ms4.data.faults import Faults, SampleFault

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True)
class Image:
    """Where an image's bytes are, as the record says it; nothing of it is opened here."""

    kind: Literal["path", "url", "base64", "bytes"]
    """`base64`: the text behind the comma of a data URI, or alone."""
    value: str | bytes


@dataclass(frozen=True)
class Part:
    """A piece of a message's content."""

    kind: Literal["text", "thinking", "image"]
    text: str = ""
    """Empty for an image."""
    closed: bool = True
    """False: thinking that was cut off and gets no [/THINK]."""
    image: Image | None = None
    """Of an image, and only of one."""


@dataclass(frozen=True)
class Message:
    """One message; its meaning only, in one form whichever way it was written."""

    role: Role
    parts: tuple[Part, ...] = ()
    tool_calls: tuple[dict[str, Any], ...] = ()
    """As in OpenAI's form."""
    tool_call_id: str | None = None
    name: str | None = None
    weight: int = 1
    """0: an assistant's message that is shown and not trained."""

    @property
    def has_thinking(self) -> bool:
        """Whether a part of it is thinking."""
        return any(part.kind == "thinking" for part in self.parts)

    @property
    def text(self) -> str:
        """Its text without thinking."""
        return "".join(part.text for part in self.parts if part.kind == "text")

    def to_openai(self) -> dict[str, Any]:
        """A fresh dictionary in OpenAI's form, which mistral-common may change."""
        content = [
            {"type": "text", "text": part.text}
            if part.kind == "text"
            else {"type": "thinking", "thinking": part.text, "closed": part.closed}
            for part in self.parts
        ]
        message: dict[str, Any] = {"role": self.role, "content": content}
        if self.tool_calls:
            message["tool_calls"] = copy.deepcopy(list(self.tool_calls))
        if self.role == "tool":
            message |= {"tool_call_id": self.tool_call_id, "name": self.name}
        return message


@dataclass(frozen=True)
class Conversation:
    """A checked record: it has a user's turn first and ends with a turn of the assistant; or it is
    plain text for continued pre-training, without messages."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    effort: Effort | None = None
    """What the record says; None if it says nothing."""
    plain: str | None = None
    """Text that is trained as it is, between <s> and </s>; then `messages` is empty."""

    @property
    def assistant_turns(self) -> list[tuple[Message, ...]]:
        """The assistant's turns; several of its messages in a row are one turn."""
        turns = groupby(self.messages, key=lambda message: message.role)
        return [tuple(messages) for role, messages in turns if role == "assistant"]

    @property
    def has_thinking(self) -> bool:
        """Whether any turn holds thinking."""
        return any(message.has_thinking for message in self.messages)

    @property
    def ends_with_thinking(self) -> bool:
        """Whether the last turn holds thinking."""
        return any(message.has_thinking for message in self.assistant_turns[-1])

    def without_thinking(self) -> Conversation:
        """The same conversation as it goes without thinking in any turn."""
        return replace(
            self,
            messages=tuple(
                replace(message, parts=tuple(p for p in message.parts if p.kind == "text"))
                for message in self.messages
            ),
        )

    def key(self) -> bytes:
        """Equal exactly for conversations with the same messages, word for word."""
        said = [
            [
                message.role,
                message.text,
                [part.text for part in message.parts if part.kind == "thinking"],
                message.tool_calls,
                message.tool_call_id,
            ]
            for message in self.messages
        ]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).digest()


def _object_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise SampleFault(f"the key {twice!a} stands twice in one object; keep one of them")
    return result


def _refuse_constant(name: str) -> Any:
    raise SampleFault(f"{name} is not valid JSON; write null or a number")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise SampleFault(f"the number {digits[:20]} is too large; write it as text")
    return value


def parse_json(text: str) -> Any:
    """Parse JSON, refusing what would silently become something else.

    Raises:
        SampleFault: not JSON, a key given twice, NaN or Infinity, half of a surrogate pair.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object_of_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
        if "\\u" in text:  # only an escape can bring in a surrogate: UTF-8 has none
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise SampleFault(
            f"not valid JSON: {error.msg} (column {error.colno}); write one JSON object a line"
        ) from error
    except UnicodeEncodeError as error:
        raise SampleFault(
            "half of a surrogate pair (\\ud800 to \\udfff), which stands for no character; "
            "remove it or write the whole pair"
        ) from error
    except RecursionError as error:
        raise SampleFault("JSON nested too deeply; flatten it") from error
    except ValueError as error:  # an integer of thousands of digits
        raise SampleFault(f"not readable as JSON ({error}); write long numbers as text") from error
    return value


def parse_record(record: object) -> Conversation:
    """Check a parsed line and return its conversation.

    Raises:
        SampleFault: what is wrong first, and what to do.
    """
    if not isinstance(record, dict):
        raise SampleFault(f'{_kind(record)} instead of an object; a line is {{"messages": [...]}}')
    messages = record.get("messages")
    if "messages" not in record:
        keys = ", ".join(f"`{key}`" for key in list(record)[:6]) or "none"
        raise SampleFault(f"no `messages` (its keys: {keys}); convert it to OpenAI messages")
    if not isinstance(messages, list):
        raise SampleFault(f"`messages` is {_kind(messages)}; it must be a list")
    if not messages:
        raise SampleFault("`messages` is empty; remove the line")
    if "functions" in record:
        raise SampleFault("`functions` is an older form that would be lost; use `tools`")
    conversation = Conversation(
        messages=tuple(_message(message, index) for index, message in enumerate(messages, 1)),
        tools=_tools(record.get("tools")),
        effort=_effort(record.get("reasoning_effort")),
    )
    _check_turns(conversation.messages)
    return conversation


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")


def _effort(value: object) -> Effort | None:
    if value is None:
        return None
    if value not in EFFORTS:
        raise SampleFault(
            f"`reasoning_effort` is {_short(value)}; this model knows `none` and `high`"
        )
    return value


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _tools(value: object) -> tuple[dict[str, Any], ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise SampleFault(f"`tools` is {_kind(value)}; it must be a list of tools")
    for tool in value:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict):
            raise SampleFault(
                'a tool without a function; write {"type": "function", "function": {...}}'
            )
    return tuple(value)


def _message(value: object, index: int) -> Message:
    where = f"message {index}"
    if not isinstance(value, dict):
        raise SampleFault(f"{where} is {_kind(value)}; it must be an object with `role`")
    role = value.get("role")
    if role not in ROLES:
        known = ", ".join(f"`{name}`" for name in ROLES)
        raise SampleFault(f"{where}: the role {_short(role)} is unknown; use {known}")
    where = f"{where} ({role})"
    _refuse_changed_meaning(value, role, where)
    parts = _parts(value.get("content"), role, where)
    if role == "assistant":
        parts = (*_reasoning(value, parts, where), *parts)
    message = Message(
        role=role,
        parts=parts,
        tool_calls=_tool_calls(value.get("tool_calls"), role, where),
        tool_call_id=value.get("tool_call_id") if role == "tool" else None,
        name=value.get("name") if role == "tool" else None,
    )
    if role == "tool" and not isinstance(message.tool_call_id, str):
        raise SampleFault(f"{where}: no `tool_call_id`; name the call that it answers")
    if role == "assistant" and not (message.text.strip() or message.tool_calls):
        if not message.has_thinking:
            raise SampleFault(f"{where}: says nothing; give it content or remove it")
        if message.text:  # white space that would stand alone after the thinking
            raise SampleFault(f"{where}: only white space after the thinking; remove it")
    return message


def _refuse_changed_meaning(value: dict[str, Any], role: str, where: str) -> None:
    """Unknown keys are ignored, but not those that would make the message mean something else."""
    if role == "assistant":
        weight = value.get("weight")
        if weight is not None and weight != 1:
            raise SampleFault(
                f"{where}: `weight` {_short(weight)}; every assistant turn is trained: remove "
                "the key, or cut the conversation before that turn"
            )
        if value.get("prefix"):
            raise SampleFault(f"{where}: `prefix` is for unfinished turns; finish it, remove it")
        if value.get("function_call") is not None:
            raise SampleFault(f"{where}: `function_call` is an older form; use `tool_calls`")
        if value.get("audio") is not None:
            raise SampleFault(f"{where}: audio is not supported; give its text as content")


def _parts(content: object, role: str, where: str) -> tuple[Part, ...]:
    if isinstance(content, str):
        return (Part("text", content),) if content else ()
    if content is None and role == "assistant":
        return ()
    if not isinstance(content, list):
        raise SampleFault(
            f"{where}: `content` is {_kind(content)}; it must be text or a list of parts"
        )
    return tuple(_part(part, role, where) for part in content)


def _part(part: object, role: str, where: str) -> Part:
    if not isinstance(part, dict):
        raise SampleFault(f"{where}: a part is {_kind(part)}; it must be an object with `type`")
    match part.get("type"):
        case "text":
            if not isinstance(part.get("text"), str):
                raise SampleFault(
                    f"{where}: the `text` of a part is {_kind(part.get('text'))}; it must be text"
                )
            return Part("text", part["text"])
        case "thinking":
            if role != "assistant":
                raise SampleFault(f"{where}: holds thinking; only the assistant thinks: remove it")
            return _thinking_part(part, where)
        case "image" | "image_url":
            raise SampleFault(f"{where}: images are not supported yet; remove the sample")
        case "input_audio" | "audio_url":
            raise SampleFault(f"{where}: audio is not supported; remove the sample")
        case other:
            raise SampleFault(
                f"{where}: the part type {_short(other)} is unknown; use `text` or `thinking`"
            )


def _thinking_part(part: dict[str, Any], where: str) -> Part:
    thinking, closed = part.get("thinking"), part.get("closed", True)
    if isinstance(thinking, list):
        for piece in thinking:
            if (
                not isinstance(piece, dict)
                or piece.get("type") != "text"
                or not isinstance(piece.get("text"), str)
            ):
                raise SampleFault(
                    f"{where}: a piece of `thinking` is not text; use "
                    '{"type": "text", "text": "..."}'
                )
        thinking = "".join(piece["text"] for piece in thinking)
    if not isinstance(thinking, str):
        raise SampleFault(
            f"{where}: `thinking` is {_kind(thinking)}; it must be text or a list of text parts"
        )
    if not isinstance(closed, bool):
        raise SampleFault(f"{where}: `closed` is {_kind(closed)}; it must be true or false")
    if not thinking.strip():
        raise SampleFault(f"{where}: the thinking is empty; fill it or remove the part")
    return Part("thinking", thinking, closed)


def _reasoning(value: dict[str, Any], parts: tuple[Part, ...], where: str) -> tuple[Part, ...]:
    """The message's `reasoning_content` or `reasoning`; exports write null or "" for none."""
    given = {
        name: value[name]
        for name in ("reasoning_content", "reasoning")
        if value.get(name) not in (None, "")
    }
    if not given:
        return ()
    name, thinking = next(iter(given.items()))
    if not isinstance(thinking, str):
        raise SampleFault(f"{where}: `{name}` is {_kind(thinking)}; it must be text")
    if len(given) == 2 and given["reasoning"] != thinking:
        raise SampleFault(f"{where}: `reasoning_content` and `reasoning` differ; keep one")
    if any(part.kind == "thinking" for part in parts):
        raise SampleFault(f"{where}: thinking in `content` and in `{name}`; keep one of them")
    return (_thinking_part({"thinking": thinking}, where),)


def _tool_calls(value: object, role: str, where: str) -> tuple[dict[str, Any], ...]:
    if value is None or value == []:
        return ()
    if role != "assistant":
        raise SampleFault(f"{where}: `tool_calls` belong to the assistant; remove them")
    if not isinstance(value, list):
        raise SampleFault(f"{where}: `tool_calls` is {_kind(value)}; it must be a list")
    for call in value:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise SampleFault(
                f"{where}: a tool call without a function's name; write "
                '{"id": ..., "function": {"name": ..., "arguments": ...}}'
            )
        arguments = function.get("arguments")
        if isinstance(arguments, str) and arguments:
            try:
                arguments = parse_json(arguments)
            except SampleFault as fault:
                raise SampleFault(f"{where}: arguments of {function['name']!a}: {fault}") from fault
        if not isinstance(arguments, dict) and arguments not in (None, ""):
            raise SampleFault(
                f"{where}: the arguments of {function['name']!a} are {_kind(arguments)}; "
                "they must be an object"
            )
    return tuple(value)


def _check_turns(messages: tuple[Message, ...]) -> None:
    """What the conversation as a whole must be to be trained on."""
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise SampleFault("no assistant turn, so nothing to learn; add one or remove the line")
    first = next(role for role in roles if role != "system")
    if first != "user":
        # Tools and reasoning effort stand in the user's first turn: without one they are lost.
        raise SampleFault(
            f"begins with a turn of the role `{first}`; put a user's turn, empty if need be, first"
        )
    if roles[-1] != "assistant":
        raise SampleFault(f"ends with a turn of the role `{roles[-1]}`; cut it off")
    written: list[Part] = []
    for index, message in enumerate(messages, 1):
        if message.role != "assistant":
            written = []
            continue
        where = f"message {index} (assistant)"
        for part in message.parts:
            if written and not written[-1].closed:
                raise SampleFault(
                    f"{where}: content after thinking that is not closed; remove `closed`"
                )
            if part.kind == "thinking" and written:
                raise SampleFault(
                    f"{where}: thinking after other content of the same turn; "
                    "a turn thinks once, first: join its thinking"
                )
            written.append(part)
        if message.tool_calls and written and not written[-1].closed:
            raise SampleFault(
                f"{where}: tool calls after thinking that is not closed; remove `closed`"
            )


def read_conversations(
    path: str, faults: Faults, on_bytes: Callable[[int], None] = lambda count: None
) -> Iterator[tuple[int, Conversation]]:
    """Yield line number (from 1) and conversation of each good line of a JSONL file.

    Args:
        path: the file, as the user named it.
        faults: gets all that is wrong with the file and its lines.
        on_bytes: called with the number of bytes of each line, for a progress display.
    """
    lines = 0
    bad_lines: list[int] = []
    try:
        with Path(path).open("rb") as file:
            for number, raw in enumerate(file, 1):
                on_bytes(len(raw))
                try:
                    text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                except UnicodeDecodeError:
                    bad_lines.append(number)
                    continue
                if not text:
                    continue
                lines += 1
                if lines == 1 and (text[0] == "[" or text == "{"):
                    faults.add(
                        path,
                        None,
                        "one JSON text over all lines instead of one object a line; "
                        "convert it to JSONL (`jq -c '.[]'` does it for a list)",
                    )
                    return
                try:
                    yield number, parse_record(parse_json(text))
                except SampleFault as fault:
                    faults.add(path, number, str(fault))
    except FileNotFoundError:
        faults.add(path, None, "no such file; correct data.train or data.test")
    except IsADirectoryError:
        faults.add(path, None, "a directory; name the JSONL files in it")
    except OSError as error:
        faults.add(path, None, f"cannot be read ({error.strerror}); correct it")
    else:
        if bad_lines:
            more = f" (nor are {len(bad_lines) - 1} lines after it)" if len(bad_lines) > 1 else ""
            faults.add(path, bad_lines[0], f"not UTF-8{more}; convert the file with `iconv`")
        elif not lines:
            faults.add(path, None, "holds no samples; remove it from the configuration")
