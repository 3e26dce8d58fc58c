"""What mistral-common itself makes of a conversation in OpenAI's form, and conversations to try."""

from __future__ import annotations

import base64
import copy
import io
import json
import random
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from PIL import Image as Pillow

from ms4.config import Effort
from ms4.data.conversation import Conversation, Image, Message, Part

Record = dict[str, Any]

CONTROLS = ["[INST]", "[/INST]", "</s>", "<s>", "[THINK]", "[/THINK]", "[TOOL_CALLS]", "[ARGS]"]
CONTROLS += ["[SYSTEM_PROMPT]", "[/MODEL_SETTINGS]", "<pad>", "[TOOL_RESULTS]", "<SPECIAL_20>"]
CONTROLS += ["[IMG]", "[IMG_BREAK]", "[IMG_END]", "[AVAILABLE_TOOLS]", "<unk>", "[CALL_ID]"]


def png(width: int, height: int, seed: int = 0) -> bytes:
    """A PNG file of noise."""
    dice = np.random.default_rng(seed)
    file = io.BytesIO()
    Pillow.fromarray(dice.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


IMAGES = [
    png(*size, seed)
    for seed, size in enumerate([(1, 1), (28, 28), (29, 30), (57, 100), (1600, 40), (30, 1541)])
]


def reference(mistral: Any, record: Record, messages: list[Record], effort: Effort) -> list[int]:
    """Token ids straight from mistral-common."""
    request: Any = ChatCompletionRequest.from_openai(
        messages=copy.deepcopy(messages),
        tools=copy.deepcopy(record.get("tools")),
        reasoning_effort=effort,
    )
    tokens: list[int] = mistral.encode_chat_completion(request).tokens
    return tokens


def assistant_turns(messages: list[Record]) -> list[tuple[int, int]]:
    """First message and end of each run of assistant messages."""
    turns, start = [], None
    for index, message in enumerate([*messages, {"role": "end"}]):
        if message["role"] == "assistant":
            start = index if start is None else start
        elif start is not None:
            turns.append((start, index))
            start = None
    return turns


def spans_by_prefixes(mistral: Any, record: Record, effort: Effort) -> list[tuple[int, int]]:
    """Each assistant turn's tokens by encoding the conversation up to its start and to its end:
    slow, and right by construction."""
    messages = record["messages"]
    whole = reference(mistral, record, messages, effort)
    spans = []
    for start, end in assistant_turns(messages):
        before = reference(mistral, record, messages[:start], effort)
        after = reference(mistral, record, messages[:end], effort)
        assert whole[: len(before)] == before
        assert whole[: len(after)] == after
        spans.append((len(before), len(after)))
    return spans


def mask_of(length: int, spans: list[tuple[int, int]]) -> npt.NDArray[np.uint8]:
    """1 within the spans."""
    mask = np.zeros(length, dtype=np.uint8)
    for start, end in spans:
        mask[start:end] = 1
    return mask


def conversation_of(record: Record, weights: dict[int, int] | None = None) -> Conversation:
    """A record as the encoder gets it, without the checks of reading.

    Args:
        record: OpenAI messages; images are data URIs.
        weights: of messages, by their number, where they are not 1.
    """

    def part(value: Record) -> Part:
        if value["type"] == "text":
            return Part("text", value["text"])
        if value["type"] == "thinking":
            return Part("thinking", value["thinking"], value["closed"])
        raw = base64.b64decode(value["image_url"]["url"].partition(",")[2])
        return Part("image", image=Image("bytes", raw))

    messages = []
    for number, value in enumerate(record["messages"]):
        content = value.get("content") or []
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        messages.append(
            Message(
                role=value["role"],
                parts=tuple(map(part, content)),
                tool_calls=tuple(value.get("tool_calls") or ()),
                tool_call_id=value.get("tool_call_id"),
                weight=(weights or {}).get(number, 1),
            )
        )
    return Conversation(tuple(messages), tuple(record.get("tools") or ()))


def replaced(text: str) -> str:
    """A text as the tokenizer takes it: halves of surrogate pairs become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def written(messages: list[Record]) -> str:
    """What the assistant's messages of one turn are in text, by the rules of the format."""
    said, calls = "", ""
    thought = any(p["type"] == "thinking" for m in messages for p in m.get("content") or [])
    thinking = ""
    for message in messages:
        text = ""
        for part in message.get("content") or []:
            if part["type"] == "thinking":
                thinking += f"[THINK]{part['thinking']}{'[/THINK]' if part['closed'] else ''}"
            else:
                text += part["text"]
        said += "\n\n" + text if said and text else text
        for call in message.get("tool_calls") or []:
            arguments = call["function"]["arguments"]
            if isinstance(arguments, str):
                arguments = json.loads(arguments or "{}")
            shown = json.dumps(arguments or {}, ensure_ascii=False)
            calls += f"[TOOL_CALLS]{call['function']['name']}[ARGS]{shown}"
    return replaced(thinking + (said if thought else said.rstrip(" ")) + calls) + "</s>"


# Conversations of any shape that mistral-common accepts.

_plain = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_odd = st.sampled_from(
    [
        *CONTROLS,
        "👩‍👩‍👧‍👦🏳️‍🌈",
        "שלום עולם",
        "مرحبا بالعالم ‏ ‎",
        "\x00\x07\x1b[31m\x7f",
        "\r\n\r\n \t ",
        "   ",
        "\ud800",
        "\udc00x",
        "\ud83d\ude00",
        "\ufffd",
        "e\u0301\u0323",
        "1234567890" * 3,
        "汉字かな한글",
    ]
)
texts = _plain | st.lists(_plain | _odd, min_size=1, max_size=4).map("".join)


@st.composite
def long_texts(draw: st.DrawFn) -> str:
    """A very long turn."""
    piece = draw(texts.filter(bool))
    times = draw(st.integers(1, 3000))
    return "".join(
        random.Random(times).choice([piece, " and ", "\n", "the "]) for _ in range(times)
    )


_any_text = st.integers(0, 30).flatmap(lambda n: long_texts() if n == 30 else texts)
said = _any_text.filter(lambda text: bool(text.strip()))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)  # fmt: skip

_tools = st.fixed_dictionaries(
    {"name": st.sampled_from(["weather", "a-b_C9"])},
    optional={
        "description": texts,
        "strict": st.booleans(),
        "parameters": st.just({})
        | texts.map(lambda text: {"type": "object", "properties": {text: {"description": text}}}),
    },
).map(lambda function: {"type": "function", "function": function})


def image_part(raw: bytes) -> Record:
    """An image as a data URI."""
    url = "data:image/png;base64," + base64.b64encode(raw).decode()
    return {"type": "image_url", "image_url": {"url": url}}


@st.composite
def _contents(draw: st.DrawFn, images: bool) -> list[Record]:
    """Parts of a user's message or a tool's result."""
    parts = []
    for _ in range(draw(st.integers(0, 3))):
        if images and draw(st.integers(0, 3)) == 0:
            parts.append(image_part(draw(st.sampled_from(IMAGES))))
        else:
            parts.append({"type": "text", "text": draw(_any_text)})
    return parts


@st.composite
def _turns(draw: st.DrawFn, call_ids: list[str]) -> list[Record]:
    """One turn of the assistant, in one message or several; with calls, if there are ids."""
    messages: list[Record] = []
    for _ in range(draw(st.integers(1, 2)) if not call_ids else 1):
        parts = [{"type": "text", "text": draw(_any_text)} for _ in range(draw(st.integers(0, 2)))]
        if not call_ids:
            parts.append({"type": "text", "text": draw(said)})
        messages.append({"role": "assistant", "content": parts})
    if draw(st.booleans()):
        thinking = draw(said)
        messages[0]["content"].insert(
            0, {"type": "thinking", "thinking": thinking, "closed": draw(st.integers(0, 3)) > 0}
        )
    if call_ids:
        messages[-1]["tool_calls"] = [
            {
                "id": id_,
                "type": "function",
                "function": {"name": draw(st.sampled_from(["weather", "a-b_C9"])), "arguments": a},
            }
            for id_ in call_ids
            for a in [
                draw(
                    st.just("")
                    | st.dictionaries(texts, values, max_size=3)
                    | st.dictionaries(texts, values, max_size=3).map(json.dumps)
                )
            ]
        ]
    return messages


@st.composite
def records(draw: st.DrawFn, images: bool = True) -> Record:
    """A conversation in OpenAI's form, every content a list of parts."""
    messages: list[Record] = [
        {"role": "system", "content": [{"type": "text", "text": draw(texts)}]}
        for _ in range(draw(st.integers(0, 2)))
    ]
    calls = iter(range(100))
    for _ in range(draw(st.integers(1, 4))):
        for _ in range(draw(st.integers(1, 2))):
            messages.append({"role": "user", "content": draw(_contents(images))})
        if draw(st.integers(0, 4)) == 0:
            messages.append({"role": "system", "content": [{"type": "text", "text": draw(texts)}]})
        for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
            ids = [f"call{next(calls)}" for _ in range(draw(st.integers(1, 2)))]
            messages += draw(_turns(ids))
            for id_ in draw(st.permutations(ids)):
                content = draw(_contents(images))
                messages.append({"role": "tool", "tool_call_id": id_, "content": content})
        messages += draw(_turns([]))
    record: Record = {"messages": messages}
    if draw(st.booleans()):
        record["tools"] = draw(st.lists(_tools, min_size=1, max_size=2))
    return record
