"""The public data sets as they are read: ids and masks against mistral-common's own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from ms4.config import EFFORTS, DataSection
from ms4.data.chat import Chat
from ms4.data.conversation import Conversation
from ms4.data.formats import Reading, detect, to_conversation
from tests.chat_reference import Record, mask_of, reference, spans_by_prefixes, written

FILES = {
    "gsm8k/train.jsonl": ("question_answer", 3000),
    "gsm8k/test.jsonl": ("question_answer", 300),
    "llamafactory/alpaca_en_demo.json": ("alpaca", 300),
    "llamafactory/glaive_toolcall_en_demo.json": ("sharegpt", 100),
}


@pytest.fixture(scope="module")
def root() -> Path:
    directory = os.environ.get("MS4_TEST_DATA")
    if directory is None:
        pytest.skip("MS4_TEST_DATA does not name the public data sets")
    return Path(directory)


@pytest.fixture(scope="module")
def tekken(whole_tekken: Path) -> Path:
    return whole_tekken


def records(path: Path) -> list[Record]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        found: list[Record] = json.loads(text)
        return found
    return [json.loads(line) for line in text.splitlines()]


def by_hand(record: Record, format: str) -> Iterator[Record]:
    """The messages of a record, from its own form: another reading than the one that is tested."""

    def message(role: str, text: str) -> Record:
        return {"role": role, "content": [{"type": "text", "text": text}]}

    if format == "question_answer":
        yield message("user", record["question"])
        yield message("assistant", record["answer"])
        return
    if format == "alpaca":
        more = record["input"]
        yield message("user", record["instruction"] + ("\n" + more if more else ""))
        yield message("assistant", record["output"])
        return
    calls = 0
    for turn in record["conversations"]:
        if turn["from"] == "function_call":
            calls += 1
            function = json.loads(turn["value"])
            call = {"id": f"c{calls}", "type": "function", "function": function}
            yield {"role": "assistant", "content": [], "tool_calls": [call]}
        elif turn["from"] == "observation":
            yield {**message("tool", turn["value"]), "tool_call_id": f"c{calls}"}
        else:
            yield message({"human": "user", "gpt": "assistant"}[turn["from"]], turn["value"])


def check(chat: Chat, mistral: Any, conversation: Conversation, record: Record) -> None:
    for effort in EFFORTS:
        whole = reference(mistral, record, record["messages"], effort)
        spans = spans_by_prefixes(mistral, record, effort)
        encoded = chat.encode(conversation, effort)
        assert encoded.tokens.tolist() == whole
        assert encoded.trained.tolist() == mask_of(len(whole), spans).tolist()
        turns = conversation.assistant_turns
        assert len(turns) == len(spans)
    trained = [chat.decode(encoded.tokens[start:end]) for start, end in spans]
    own = [message for message in record["messages"] if message["role"] == "assistant"]
    assert trained == [written([message]) for message in own]


def run(name: str, root: Path, tekken: Path, step: int) -> None:
    format, count = FILES[name]
    chat = Chat(tekken)
    mistral: Any = MistralTokenizer.from_file(tekken, mode=ValidationMode.agnostic)
    found = records(root / name)
    assert len(found) == count
    data = DataSection(train=(name,))
    assert detect(found[:100], data) == format
    reading = Reading.of(detect(found[:100], data), data)
    checked = 0
    for raw in found[::step]:
        conversation = to_conversation(raw, reading)
        messages = list(by_hand(raw, format))
        tools = json.loads(raw.get("tools") or "[]") if format == "sharegpt" else []
        record = {
            "messages": messages,
            "tools": [{"type": "function", "function": tool} for tool in tools],
        }
        check(chat, mistral, conversation, record)
        checked += 1
    assert checked == len(range(0, count, step))


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_tenth_of_the_public_data(name: str, root: Path, tekken: Path) -> None:
    run(name, root, tekken, 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_all_of_the_public_data(name: str, root: Path, tekken: Path) -> None:
    run(name, root, tekken, 1)
