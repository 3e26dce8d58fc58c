"""Records in OpenAI's form → typed conversations; whatever is wrong is named.

A record is `{"messages": [...]}` in OpenAI's form, with `reasoning_effort` and `tools` beside
it where they are known. Content is text or a list of parts; thinking is a part of its own, or
a message's `reasoning_content` (SGLang), `reasoning` (vLLM) or `thinking` (Ollama) string, or
stands in the text between tags. `formats.py` brings other forms into this one. Checks that only
the chat format can make (tool call ids, order of roles) are left to mistral-common; whether
thinking is in order is decided by `reasoning.py`.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal, get_args
from urllib.parse import unquote

from ms4.config_data import EFFORTS, Effort, Role
from ms4.data.faults import SampleFault
from ms4.data.json_text import kind_of, parse_json, short
from ms4.data.think_tags import begins_with_tag, split_tags, unwrap

__all__ = ["Conversation", "Image", "Message", "Part", "Role", "parse_json", "parse_record"]

ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True)
class Image:
    """Where an image's bytes are, as the record says it; nothing of it is opened here."""

    kind: Literal["path", "url", "base64", "bytes"]
    """`base64`: the text behind the comma of a data URI, or alone. `url`: with its scheme, `file`
    among them."""
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


def _openai_part(part: Part) -> dict[str, Any]:
    if part.kind == "text":
        return {"type": "text", "text": part.text}
    if part.kind == "thinking":
        return {"type": "thinking", "thinking": part.text, "closed": part.closed}
    if part.image is None:
        raise ValueError("an image part without an image")
    kind, value = part.image.kind, part.image.value
    if isinstance(value, bytes):
        kind, value = "base64", base64.b64encode(value).decode()
    url = f"data:image/*;base64,{value}" if kind == "base64" else value
    return {"type": "image_url", "image_url": {"url": url}}


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

    def without_thinking(self) -> Message:
        """The same message as it goes without thinking."""
        return replace(self, parts=tuple(p for p in self.parts if p.kind != "thinking"))

    def to_openai(self) -> dict[str, Any]:
        """A fresh dictionary in OpenAI's form, which mistral-common may change."""
        content = [_openai_part(part) for part in self.parts]
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
        turns = self.assistant_turns
        return bool(turns) and any(message.has_thinking for message in turns[-1])

    @property
    def images(self) -> list[Image]:
        """All images, in their order."""
        return [part.image for message in self.messages for part in message.parts if part.image]

    def without_thinking(self) -> Conversation:
        """The same conversation as it goes without thinking in any turn."""
        return replace(self, messages=tuple(m.without_thinking() for m in self.messages))

    def all_trained(self) -> Conversation:
        """The same conversation without weights."""
        return replace(self, messages=tuple(replace(m, weight=1) for m in self.messages))

    def key(self) -> bytes:
        """Equal exactly for conversations with the same messages, word for word. Of ids of calls
        only the order counts: they are no words, and another export has others."""
        ids = [str(call.get("id")) for message in self.messages for call in message.tool_calls]
        said = [
            [
                message.role,
                message.text,
                [part.text for part in message.parts if part.kind == "thinking"],
                [_call_key(call["function"]) for call in message.tool_calls],
                ids.index(message.tool_call_id) if message.tool_call_id in ids else None,
                *[_image_key(part.image) for part in message.parts if part.image],
            ]
            for message in self.messages
        ]
        whole = said if self.plain is None else self.plain
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).digest()


def _call_key(function: dict[str, Any]) -> list[Any]:
    given = function.get("arguments")  # an object, or the same as text
    return [function["name"], json.loads(given or "{}") if isinstance(given, str) else given or {}]


def _image_key(image: Image) -> str:
    value = image.value if isinstance(image.value, bytes) else image.value.encode()
    return hashlib.sha256(value).hexdigest()


def parse_record(record: object) -> Conversation:
    """Check a parsed line and return its conversation.

    Raises:
        SampleFault: what is wrong first, and what to do.
    """
    if not isinstance(record, dict):
        raise SampleFault(
            f'{kind_of(record)} instead of an object; a line is {{"messages": [...]}}'
        )
    messages = record.get("messages")
    if "messages" not in record:
        keys = ", ".join(f"`{key}`" for key in list(record)[:6]) or "none"
        raise SampleFault(
            f"no `messages` (its keys: {keys}); convert it, or name its fields in data.fields"
        )
    if not isinstance(messages, list):
        raise SampleFault(f"`messages` is {kind_of(messages)}; it must be a list")
    if not messages:
        raise SampleFault("`messages` is empty; remove the line")
    if record.get("functions") is not None:
        raise SampleFault("`functions` is an older form that would be lost; use `tools`")
    conversation = Conversation(
        messages=tuple(_message(message, index) for index, message in enumerate(messages, 1)),
        tools=_tools(record.get("tools")),
        effort=_effort(record.get("reasoning_effort")),
    )
    _check_turns(conversation.messages)
    return conversation


def _effort(value: object) -> Effort | None:
    if value in (None, ""):  # tables of text write nothing so
        return None
    if value not in EFFORTS:
        raise SampleFault(
            f"`reasoning_effort` is {short(value)}; this model knows `none` and `high`"
        )
    return value


def _tools(value: object) -> tuple[dict[str, Any], ...]:
    if value is None:
        return ()
    if isinstance(value, str):  # tables hold them as text
        value = _parsed(value, "`tools`") if value.strip() else []
    if not isinstance(value, list):
        raise SampleFault(f"`tools` is {kind_of(value)}; it must be a list of tools")
    for tool in value:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict):
            raise SampleFault(
                'a tool without a function; write {"type": "function", "function": {...}}'
            )
    return tuple(value)


def _parsed(text: str, what: str) -> Any:
    try:
        return parse_json(text)
    except SampleFault as fault:
        raise SampleFault(f"{what}: {fault}") from fault


def _message(value: object, index: int) -> Message:
    where = f"message {index}"
    if not isinstance(value, dict):
        raise SampleFault(f"{where} is {kind_of(value)}; it must be an object with `role`")
    role = value.get("role")
    if role == "developer":  # OpenAI's newer name
        role = "system"
    if role not in ROLES:
        known = ", ".join(f"`{name}`" for name in ROLES)
        if "role" not in value:
            raise SampleFault(f"{where}: no `role`; use {known}")
        raise SampleFault(
            f"{where}: the role {short(role)} is unknown; use {known}, or name it in data.roles"
        )
    where = f"{where} ({role})"
    _refuse_changed_meaning(value, role, where)
    parts = _parts(value.get("content", _MISSING), role, where)
    if role == "assistant":
        parts = _with_thinking(parts, _reasoning(value, where), where)
    message = Message(
        role=role,
        parts=parts,
        tool_calls=_tool_calls(value.get("tool_calls"), role, where),
        tool_call_id=value.get("tool_call_id") if role == "tool" else None,
        name=value.get("name") if role == "tool" else None,
        weight=_weight(value, role, where),
    )
    if role == "tool" and not isinstance(message.tool_call_id, str):
        raise SampleFault(f"{where}: no `tool_call_id`; name the call that it answers")
    if role == "tool" and not isinstance(message.name, (str, type(None))):
        raise SampleFault(f"{where}: `name` is {kind_of(message.name)}; it must be text")
    if role == "assistant" and not (message.text.strip() or message.tool_calls):
        if not message.has_thinking:
            raise SampleFault(f"{where}: says nothing; give it content or remove it")
        if message.text:  # white space that would stand alone after the thinking
            raise SampleFault(f"{where}: only white space after the thinking; remove it")
    return message


def _refuse_changed_meaning(value: dict[str, Any], role: str, where: str) -> None:
    """Unknown keys are ignored, but not those that would make the message mean something else."""
    if role == "assistant":
        if value.get("prefix"):
            raise SampleFault(f"{where}: `prefix` is for unfinished turns; finish it, remove it")
        if value.get("function_call") is not None:
            raise SampleFault(f"{where}: `function_call` is an older form; use `tool_calls`")
        if value.get("audio") is not None:
            raise SampleFault(f"{where}: audio is not supported; give its text as content")


THINKING = ("thinking", "reasoning_content", "reasoning")
"""Keys of a message that hold its thinking."""
WEIGHTS = ("weight", "loss_weight", "train")
"""Keys of a message that say whether it is trained."""


def _weight(value: dict[str, Any], role: str, where: str) -> int:
    """Whether the message is trained, by the key that says so."""
    given = {key: value[key] for key in WEIGHTS if value.get(key) is not None}
    if not given:
        return 1
    for key, weight in given.items():
        if not isinstance(weight, (bool, int, float)) or weight not in (0, 1):
            raise SampleFault(
                f"{where}: `{key}` {short(weight)}; a message is trained (1) or is not (0)"
            )
    if len({int(weight) for weight in given.values()}) > 1:
        raise SampleFault(f"{where}: {' and '.join(f'`{k}`' for k in given)} differ; keep one")
    weight = int(next(iter(given.values())))
    if role == "assistant":
        return weight
    if weight:
        raise SampleFault(
            f"{where}: `{next(iter(given))}` says that it is trained, and only the assistant's "
            "messages are; remove the key"
        )
    return 1


_MISSING = object()


def _parts(content: object, role: str, where: str) -> tuple[Part, ...]:
    if isinstance(content, str):
        return (Part("text", content),) if content else ()
    if (content is None or content is _MISSING) and role == "assistant":
        return ()
    if not isinstance(content, list):
        what = "is missing" if content is _MISSING else f"is {kind_of(content)}"
        raise SampleFault(f"{where}: `content` {what}; it must be text or a list of parts")
    return tuple(_part(part, role, where) for part in content)


def _part(part: object, role: str, where: str) -> Part:
    if not isinstance(part, dict):
        raise SampleFault(f"{where}: a part is {kind_of(part)}; it must be an object with `type`")
    match part.get("type"):
        case "text":
            if not isinstance(part.get("text"), str):
                what = f"is {kind_of(part['text'])}" if "text" in part else "is missing"
                raise SampleFault(f"{where}: the `text` of a part {what}; it must be text")
            return Part("text", part["text"])
        case "thinking":
            if role != "assistant":
                raise SampleFault(f"{where}: holds thinking; only the assistant thinks: remove it")
            return _thinking_part(part, where)
        case "image" | "image_url":
            if role != "user":
                raise SampleFault(
                    f"{where}: holds an image; this model sees those of the user: move it there"
                )
            return Part("image", image=parse_image(part, where))
        case "input_audio" | "audio_url":
            raise SampleFault(f"{where}: audio is not supported; remove the sample")
        case other:
            raise SampleFault(
                f"{where}: the part type {short(other)} is unknown; use `text`, `thinking` or "
                "`image`"
            )


def parse_image(value: object, where: str) -> Image:
    """The source of an image: a path, a URL, base64, bytes, or an object that holds one of them.

    Raises:
        SampleFault: it has none, or several.
    """
    if isinstance(value, bytes) and value:
        return Image("bytes", value)
    if isinstance(value, str) and value.strip():
        if _is_data_uri(value):
            head, comma, data = value.partition(",")
            if not (comma and head.lower().endswith(";base64") and data):
                raise SampleFault(f"{where}: a data URI without `;base64,` and data; write it so")
            return Image("base64", unquote(data) if "%" in data else data)
        return Image("url" if "://" in value[:20] else "path", value)
    if isinstance(value, dict):
        names = ("image_url", "image", "bytes", "base64", "url", "path")
        given = [name for name in names if value.get(name) not in (None, "", b"", {})]
        if "bytes" in given:  # as tables of the hub have it, beside the name that it had
            given = ["bytes"]
        if len(given) == 1:
            inner = value[given[0]]
            if given[0] == "base64" and isinstance(inner, str) and not _is_data_uri(inner):
                return Image("base64", inner)
            if given[0] != "bytes" or isinstance(inner, bytes):
                return parse_image(inner, where)
    raise SampleFault(
        f"{where}: an image without one `path`, `url`, `base64` or `bytes`; give its source"
    )


def _is_data_uri(value: str) -> bool:
    return value[:5].lower() == "data:"


def _thinking_part(part: dict[str, Any], where: str) -> Part:
    thinking, closed = part.get("thinking"), part.get("closed")
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
        what = f"is {kind_of(thinking)}" if "thinking" in part else "is missing"
        raise SampleFault(f"{where}: `thinking` {what}; it must be text or a list of text parts")
    if not isinstance(closed, (bool, type(None))):
        raise SampleFault(f"{where}: `closed` is {kind_of(closed)}; it must be true or false")
    return Part("thinking", unwrap(thinking), closed is not False)


def _reasoning(value: dict[str, Any], where: str) -> Part | None:
    """The thinking beside a message's content; exports write null or "" for none."""
    given = {name: value[name] for name in THINKING if value.get(name) not in (None, "")}
    for name, thinking in given.items():
        if not isinstance(thinking, str):
            raise SampleFault(f"{where}: `{name}` is {kind_of(thinking)}; it must be text")
    if len(set(given.values())) > 1:
        raise SampleFault(f"{where}: {' and '.join(f'`{k}`' for k in given)} differ; keep one")
    return Part("thinking", unwrap(next(iter(given.values())))) if given else None


def _with_thinking(parts: tuple[Part, ...], own: Part | None, where: str) -> tuple[Part, ...]:
    """The parts of an assistant's message with the thinking that stands beside or in its text."""
    if any(part.kind == "thinking" for part in parts) or own is not None:
        # A text beside explicit thinking is only text, whatever it mentions.
        if any(part.kind == "text" and begins_with_tag(part.text) for part in parts) or (
            own is not None and any(part.kind == "thinking" for part in parts)
        ):
            raise SampleFault(f"{where}: thinking in `content` and beside it; keep one of them")
        return parts if own is None else (own, *parts)
    if len(parts) == 1 and parts[0].kind == "text":
        return tuple(Part(p.kind, p.text, p.closed) for p in split_tags(parts[0].text))
    return tuple(
        Part(p.kind, p.text, p.closed)
        for part in parts
        for p in (split_tags(part.text) if part.text else (part,))
    )


def _tool_calls(value: object, role: str, where: str) -> tuple[dict[str, Any], ...]:
    if value is None or value == []:
        return ()
    if role != "assistant":
        raise SampleFault(f"{where}: `tool_calls` belong to the assistant; remove them")
    if isinstance(value, str):  # tables hold them as text
        value = _parsed(value, f"{where}: `tool_calls`") if value.startswith("[") else value
    if not isinstance(value, list):
        raise SampleFault(f"{where}: `tool_calls` is {kind_of(value)}; it must be a list")
    for call in value:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise SampleFault(
                f"{where}: a tool call without a function's name; write "
                '{"id": ..., "function": {"name": ..., "arguments": ...}}'
            )
        arguments = function.get("arguments")
        if isinstance(arguments, str) and arguments:
            arguments = _parsed(arguments, f"{where}: arguments of {function['name']!a}")
        if not isinstance(arguments, dict) and arguments not in (None, ""):
            raise SampleFault(
                f"{where}: the arguments of {function['name']!a} are {kind_of(arguments)}; "
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
        for part in message.parts:
            if part.kind == "thinking" and written:
                raise SampleFault(
                    f"message {index} (assistant): thinking after other content of the same turn; "
                    "a turn thinks once, first: join its thinking"
                )
            written.append(part)
