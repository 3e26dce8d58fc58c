"""Shapes that data sets in use have: read for what they mean, and what is not read is told."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from ms4.config_data import DataSection, Format
from ms4.data.conversation import Conversation, Image, parse_record
from ms4.data.faults import SampleFault
from ms4.data.formats import Reading, detect, mapped_fields, to_conversation, unused_keys
from ms4.data.readers import parse_row, read_rows
from ms4.data.sources import Source

USER = {"role": "user", "content": "Two and two?"}
ANSWER = {"role": "assistant", "content": "Four."}
THINKS = parse_record({"messages": [USER, {**ANSWER, "reasoning_content": "2+2"}]})


def reading(record: Any, **data: Any) -> Reading:
    """How a file of this record is read."""
    section = DataSection.model_validate({"train": ["a"], **data})
    return Reading.of(detect([record], section), section)


def read(record: Any, **data: Any) -> Conversation:
    return to_conversation(record, reading(record, **data))


def turns(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": name, "value": value} for name, value in pairs]}


# Thinking beside a message's content.


@pytest.mark.parametrize("name", ["thinking", "reasoning_content", "reasoning"])
def test_a_message_may_have_its_thinking_beside_its_content(name: str) -> None:
    message = {**ANSWER, name: "2+2"}
    assert read({"messages": [{**USER, "thinking": None}, message]}) == THINKS
    turn = {"from": "gpt", "value": "Four.", name: "2+2"}
    assert read({"conversations": [*turns(("human", "Two and two?"))["conversations"], turn]}) == (
        THINKS
    )


def test_thinking_that_stands_twice_is_one_or_a_fault() -> None:
    twice = {**ANSWER, "thinking": "2+2", "reasoning": "2+2"}
    assert read({"messages": [USER, twice]}) == THINKS
    with pytest.raises(SampleFault, match="`thinking` and `reasoning` differ; keep one"):
        read({"messages": [USER, {**twice, "thinking": "3+1"}]})
    with pytest.raises(SampleFault, match="`thinking` is a boolean; it must be text"):
        read({"messages": [USER, {**ANSWER, "thinking": True}]})
    with pytest.raises(SampleFault, match="thinking in `content` and beside it; keep one"):
        read({"messages": [USER, {"role": "assistant", "content": "<think>a</think>b",
                                  "thinking": "a"}]})  # fmt: skip


# What is not read is told.


@pytest.mark.parametrize(
    ("record", "data", "unused"),
    [
        ({"messages": [USER, {**ANSWER, "masked": True, "refusal": None, "annotations": []}]},
         {}, {"messages.masked"}),
        ({"messages": [{**USER, "name": "Bob"}, ANSWER]}, {}, {"messages.name"}),
        ({"messages": [USER, {**ANSWER, "weight": 0, "thinking": "", "prefix": False}]}, {}, set()),
        ({"messages": [USER, {"role": "tool", "name": "f", "tool_call_id": "a", "content": ""}]},
         {}, set()),
        ({"messages": json.dumps([USER, {**ANSWER, "loss": 0}])}, {}, {"messages.loss"}),
        ({"conversations": [USER, {**ANSWER, "loss": 1}]}, {}, {"conversations.loss"}),
        ({"conversations": [{"from": "human", "value": "a", "loss": 1}, "b"]}, {},
         {"conversations.loss"}),
        ({"prompt": [{**USER, "loss": 1}], "completion": [{**ANSWER, "more": 1}]}, {},
         {"prompt.loss", "completion.more"}),
        ({"prompt": "[1]", "completion": "b"}, {}, set()),
        ({"a": {"turns": [{"who": "bot", "says": "b", "more": 1},
                          {"who": "api", "says": "c", "name": "f"}]}},
         {"fields": {"messages": "a.turns", "role": "who", "content": "says"},
          "roles": {"bot": "assistant", "api": "tool"}}, {"a.turns.more"}),
    ],
)  # fmt: skip
def test_keys_of_turns_that_nothing_is_made_of(
    record: dict[str, Any], data: dict[str, Any], unused: set[str]
) -> None:
    assert unused_keys(record, reading(record, **data)) == unused


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"query": "a", "response": "b"}, "keys: `query`, .*; convert it, or .*data.fields"),
        ({"messages": [{"role": "human", "content": "a"}]}, "role 'human' is .* in data.roles"),
    ],
)  # fmt: skip
def test_a_fault_names_the_setting_that_helps(record: Any, message: str) -> None:
    with pytest.raises(SampleFault, match=message):
        read(record)


# Tables of text.


def table(path: Path, header: list[str], *rows: list[str]) -> list[Any]:
    """The records of a CSV file of these rows."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return [parse_row(row) for row in read_rows(Source(str(path), str(path)))]


SHAREGPT = turns(("human", "Two and two?"), ("gpt", "Four."))["conversations"]


@pytest.mark.parametrize(
    ("name", "messages", "format"),
    [
        ("messages", [USER, ANSWER], "messages"),
        ("conversations", [USER, ANSWER], "messages"),
        ("conversation", [USER, ANSWER], "messages"),
        ("conversations", SHAREGPT, "sharegpt"),
        ("conversation", SHAREGPT, "sharegpt"),
    ],
)
def test_turns_as_text(name: str, messages: list[Any], format: Format, tmp_path: Path) -> None:
    (record,) = table(tmp_path / "a.csv", [name], [json.dumps(messages)])
    assert reading(record).format == format
    assert read(record) == parse_record({"messages": [USER, ANSWER]})


def test_turns_as_broken_text() -> None:
    with pytest.raises(SampleFault, match="`conversations`: not valid JSON"):
        read({"conversations": '[{"from": "human"'})


def test_turns_as_text_by_other_names(tmp_path: Path) -> None:
    said = [{"who": "user", "says": "Two and two?"}, {"who": "assistant", "says": "Four."}]
    (record,) = table(tmp_path / "a.csv", ["messages"], [json.dumps(said)])
    fields = {"role": "who", "content": "says"}
    assert read(record, fields=fields) == parse_record({"messages": [USER, ANSWER]})
    assert mapped_fields(record, reading(record, fields=fields)) == fields.keys()
    inside = {"a": {"turns": said}}
    fields["messages"] = "a.turns"
    assert read(inside, fields=fields) == parse_record({"messages": [USER, ANSWER]})
    assert mapped_fields(inside, reading(inside, fields=fields)) == fields.keys()


def test_an_empty_cell_is_no_effort(tmp_path: Path) -> None:
    header = ["question", "answer", "thinking", "reasoning_effort"]
    rows = ["Two and two?", "Four.", "2+2", "high"], ["Two and two?", "Four.", "", ""]
    high, none = table(tmp_path / "a.csv", header, *rows)
    assert (read(high).effort, read(none).effort) == ("high", None)


# Calls in a row, and an image alone.


def test_calls_of_sharegpt_in_a_row_are_one_turns() -> None:
    def call(name: str) -> str:
        return json.dumps({"name": name, "arguments": {}})

    record = turns(
        ("human", "Two and two?"), ("function_call", call("f")), ("function_call", call("g")),
        ("function_call", call("h")), ("observation", "1"), ("observation", "2"),
        ("observation", "3"), ("function_call", call("f")), ("observation", "4"), ("gpt", "Four."),
    )  # fmt: skip
    messages = read(record).messages
    roles = ["user", "assistant", "tool", "tool", "tool", "assistant", "tool", "assistant"]
    assert [message.role for message in messages] == roles
    names = {c["id"]: c["function"]["name"] for m in messages for c in m.tool_calls}
    answers = [(names[m.tool_call_id or ""], m.text) for m in messages if m.role == "tool"]
    assert answers == [("f", "1"), ("g", "2"), ("h", "3"), ("f", "4")]


def test_one_image_beside_the_turns() -> None:
    record = {**turns(("human", "<image>\nWhat?"), ("gpt", "A cat.")), "image": "cat.png"}
    assert read(record).images == [Image("path", "cat.png")]
    assert unused_keys(record, reading(record)) == set()
    assert read({**record, "images": []}) == read(record)
    with pytest.raises(SampleFault, match="`images` and `image` beside each other; keep one"):
        read({**record, "images": ["dog.png"]})


# A system's prompt beside the messages.


def test_a_system_beside_messages_is_their_first() -> None:
    record = {"messages": [USER, ANSWER], "system": "Be brief."}
    first = {"role": "system", "content": "Be brief."}
    assert read(record) == parse_record({"messages": [first, USER, ANSWER]})
    assert unused_keys(record, reading(record)) == set()
    assert read({**record, "system": None}) == read({**record, "system": ""})
    with pytest.raises(SampleFault, match="a `system` beside a first turn of the system; keep one"):
        read({**record, "messages": [first, USER, ANSWER]})
    with pytest.raises(SampleFault, match="no assistant turn"):
        read({"messages": [], "system": "Be brief."})
