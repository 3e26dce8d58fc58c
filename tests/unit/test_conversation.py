"""Records and files: every fault is found, placed and explained; every spelling is understood."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms4.data.conversation import (
    Conversation,
    Message,
    Part,
    parse_json,
    parse_record,
)
from ms4.data.faults import LISTED, Faults, SampleFault
from ms4.data.readers import parse_row, read_rows
from ms4.data.sources import Source
from ms4.errors import Ms4Error
from tests.examples import examples

USER = {"role": "user", "content": "Two and two?"}
ANSWER = {"role": "assistant", "content": "Four."}


def assistant(**fields: Any) -> dict[str, Any]:
    return {"messages": [USER, {"role": "assistant", **fields}]}


def user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}, ANSWER]}


def call(function: Any) -> dict[str, Any]:
    return assistant(tool_calls=[{"id": "c1", "function": function}])


def thinking(value: Any, **fields: Any) -> dict[str, Any]:
    part = {"type": "thinking", "thinking": value, **fields}
    return assistant(content=[part, {"type": "text", "text": "Four."}])


# What is wrong with a record.

FAULTS: list[tuple[Any, str]] = [
    (["messages"], "a list instead of an object"),
    (None, "null instead of an object"),
    (3, "a number instead of an object"),
    ({"conversations": [], "id": 1}, r"no `messages` \(its keys: `conversations`, `id`\); convert"),
    ({}, r"no `messages` \(its keys: none\)"),
    ({"messages": "hi"}, "`messages` is text; it must be a list"),
    ({"messages": []}, "`messages` is empty"),
    ({"messages": [USER, ANSWER], "functions": []}, "`functions` is an older form"),
    ({"messages": [USER, ANSWER], "reasoning_effort": "low"}, "`reasoning_effort` is 'low'; this"),
    ({"messages": [USER, ANSWER], "reasoning_effort": []}, r"`reasoning_effort` is \[\]"),
    ({"messages": [USER, ANSWER], "tools": {}}, "`tools` is an object; it must be a list"),
    ({"messages": [USER, ANSWER], "tools": [{"name": "f"}]}, "a tool without a function"),
    ({"messages": [USER, ANSWER], "tools": ["f"]}, "a tool without a function"),
    ({"messages": ["hi"]}, "message 1 is text; it must be an object"),
    ({"messages": [USER, {"role": "gpt", "content": "x"}]}, "message 2: the role 'gpt' is unknown"),
    ({"messages": [{"content": "x"}]}, "message 1: no `role`; use `system`"),
    (
        {"messages": [{"role": "user"}]},
        r"message 1 \(user\): `content` is missing; it must",
    ),
    (user(None), r"message 1 \(user\): `content` is null; it must be text or a list"),
    (user({"text": "x"}), "`content` is an object; it must be text or a list"),
    (user(True), "`content` is a boolean; it must be text or a list"),
    (user(["x"]), "a part is text; it must be an object"),
    (user([{"type": "text"}]), "the `text` of a part is missing; it must be text"),
    (user([{"type": "video", "video": "x"}]), "the part type 'video' is unknown"),
    (user([{"text": "x"}]), "the part type None is unknown"),
    (user([{"type": "input_audio", "input_audio": "x"}]), "audio is not supported"),
    (user([{"type": "thinking", "thinking": "x"}]), "only the assistant thinks"),
    (assistant(content=""), r"message 2 \(assistant\): says nothing"),
    (assistant(content=None), "says nothing"),
    (assistant(), "says nothing"),
    (assistant(content=" \n"), "says nothing"),
    (assistant(content=[{"type": "text", "text": ""}]), "says nothing"),
    (assistant(content=" ", reasoning="hm"), "only white space after the thinking"),
    (assistant(content="x", weight=0.5), r"`weight` 0.5; a message is trained \(1\) or is not"),
    (assistant(content="x", loss_weight="1"), "`loss_weight` '1'; a message is trained"),
    (assistant(content="x", train=2), "`train` 2; a message is trained"),
    (assistant(content="x", train=True, weight=0), "`weight` and `train` differ; keep one"),
    (
        {"messages": [{**USER, "train": True}, ANSWER]},
        "`train` says that it is trained, and only the assistant's messages are",
    ),
    (user([{"type": "image"}]), "an image without one `path`, `url`, `base64` or `bytes`"),
    (user([{"type": "image", "image": "a", "path": "b"}]), "an image without one `path`"),
    (user([{"type": "image", "bytes": "a"}]), "an image without one `path`"),
    (user([{"type": "image_url", "image_url": {"url": ""}}]), "an image without one `path`"),
    (user([{"type": "image", "image": "data:image/png,x"}]), "a data URI without `;base64,`"),
    (
        assistant(content=[{"type": "image", "path": "x"}]),
        "holds an image; this model sees those of the user",
    ),
    (assistant(content="x", prefix=True), "`prefix` is for unfinished turns"),
    (assistant(content="x", function_call={"name": "f"}), "`function_call` is an older form"),
    (assistant(content="x", audio={"id": 1}), "audio is not supported; give its text"),
    (assistant(content="x", reasoning=["a"]), "`reasoning` is a list; it must be text"),
    (
        assistant(content="x", reasoning="a", reasoning_content="b"),
        "`reasoning_content` and `reasoning` differ",
    ),
    (
        assistant(content=[{"type": "thinking", "thinking": "a"}], reasoning="b"),
        "thinking in `content` and beside it; keep one",
    ),
    (thinking(None), "`thinking` is null; it must be text or a list"),
    (thinking([{"type": "image", "text": "x"}]), "a piece of `thinking` is not text"),
    (thinking(["x"]), "a piece of `thinking` is not text"),
    (thinking("x", closed="no"), "`closed` is text; it must be true or false"),
    (
        assistant(content=[{"type": "text", "text": "a"}, {"type": "thinking", "thinking": "b"}]),
        "thinking after other content of the same turn",
    ),
    (
        {"messages": [USER, ANSWER, {"role": "assistant", "content": "b", "reasoning": "c"}]},
        r"message 3 \(assistant\): thinking after other content of the same turn",
    ),
    (assistant(tool_calls="f"), "`tool_calls` is text; it must be a list"),
    (assistant(tool_calls=["f"]), "a tool call without a function's name"),
    (call({"arguments": "{}"}), "a tool call without a function's name"),
    (call({"name": "f", "arguments": "{'a': 1}"}), "arguments of 'f': not valid JSON"),
    (call({"name": "f", "arguments": '{"a": 1, "a": 2}'}), "arguments of 'f': the key 'a' stands"),
    (call({"name": "f", "arguments": "[1]"}), "the arguments of 'f' are a list"),
    (call({"name": "f", "arguments": 1}), "the arguments of 'f' are a number"),
    (
        {"messages": [{**USER, "tool_calls": [{"id": "c"}]}, ANSWER]},
        "`tool_calls` belong to the assistant",
    ),
    ({"messages": [USER, {"role": "tool", "content": "x"}, ANSWER]}, "no `tool_call_id`"),
    ({"messages": [USER]}, "no assistant turn, so nothing to learn"),
    ({"messages": [ANSWER, USER, ANSWER]}, "begins with a turn of the role `assistant`; put a"),
    (
        {"messages": [{"role": "system", "content": "Be brief."}, ANSWER]},
        "begins with a turn of the role `assistant`",
    ),
    (
        {"messages": [{"role": "tool", "tool_call_id": "c", "content": "x"}, USER, ANSWER]},
        "begins with a turn of the role `tool`",
    ),
    ({"messages": [USER, ANSWER, USER]}, "ends with a turn of the role `user`; cut it off"),
]


@pytest.mark.parametrize(("record", "message"), FAULTS)
def test_a_bad_record_says_what_is_wrong(record: Any, message: str) -> None:
    with pytest.raises(SampleFault, match=message) as caught:
        parse_record(record)
    assert ";" in str(caught.value), "says what to do"


JSON_FAULTS = [
    ('{"messages": [}', r"not valid JSON: .* \(column 15\)"),
    ("{'messages': []}", r"not valid JSON: .* \(column 2\)"),
    ('{"messages": [{}\n', r"not valid JSON: .* \(column 17\)"),
    ('{"a": NaN}', "NaN is not valid JSON"),
    ('{"a": [-Infinity]}', "-Infinity is not valid JSON"),
    ('{"a": 1e999}', "the number 1e999 is too large"),
    ('{"a": ' + "9" * 5000 + "}", "not readable as JSON"),
    ('{"a": {"b": 1, "c": 2, "b": 3}}', "the key 'b' stands twice in one object"),
    ('{"a": "\\ud83d"}', "half of a surrogate pair"),
    ('{"\\udc00": 1}', "half of a surrogate pair"),
    ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
]


@pytest.mark.parametrize(("text", "message"), JSON_FAULTS, ids=range(len(JSON_FAULTS)))
def test_json_that_would_be_silently_changed_is_refused(text: str, message: str) -> None:
    with pytest.raises(SampleFault, match=message):
        parse_json(text)


def test_halves_of_surrogate_pairs_become_what_mistral_common_makes_of_them() -> None:
    changed: Counter[str] = Counter()
    text = r'{"a\udc00": ["\ud83dx\ud83d\ude00", "\ufffd", 1, null], "\u00e9": "\udc00\ud800"}'
    assert parse_json(text, changed) == {
        "a\ufffd": ["\ufffdx😀", "\ufffd", 1, None],
        "é": "\ufffd" * 2,
    }
    assert changed == {"surrogates": 4}
    with pytest.raises(SampleFault, match="stands twice"):
        parse_json(r'{"\udc00": 1, "\ud800": 2}', changed)


def test_a_whole_surrogate_pair_is_a_character() -> None:
    assert parse_json('"\\ud83d\\ude00 \\u00e9"') == "😀 é"


KEYS = ["messages", "role", "content", "type", "text", "thinking", "closed", "reasoning"]
KEYS += ["tools", "tool_calls", "tool_call_id", "function", "name", "arguments", "id"]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(KEYS),
            inner | st.sampled_from(["user", "assistant", "system", "tool", "text", "thinking"]),
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=examples(300))
@given(
    st.fixed_dictionaries(
        {"messages": st.lists(json_values, max_size=3)}, optional={"tools": json_values}
    )
    | json_values
)
def test_whatever_stands_there_nothing_but_a_fault_is_raised(record: Any) -> None:
    try:
        conversation = parse_record(record)
    except SampleFault:
        return
    assert conversation.messages[-1].role == "assistant"


# What a record means.


def test_all_ways_to_write_thinking_are_one() -> None:
    text = {"type": "text", "text": "Four."}
    records = [
        assistant(content="Four.", reasoning="2+2"),
        assistant(content="Four.", reasoning_content="2+2"),
        assistant(content="Four.", reasoning_content="2+2", reasoning="2+2"),
        assistant(content=[text], reasoning="2+2"),
        thinking("2+2"),
        thinking("2+2", closed=True),
        thinking([{"type": "text", "text": "2"}, {"type": "text", "text": "+2"}]),
    ]
    parsed = [parse_record(record) for record in records]
    assert all(conversation == parsed[0] for conversation in parsed)
    assert parsed[0].messages[1].parts == (Part("thinking", "2+2"), Part("text", "Four."))
    assert parsed[0].ends_with_thinking


@pytest.mark.parametrize("nothing", [None, ""])
def test_an_empty_reasoning_field_is_no_thinking(nothing: str | None) -> None:
    assert not parse_record(assistant(content="Four.", reasoning_content=nothing)).has_thinking


def test_unknown_keys_are_ignored() -> None:
    plain = parse_record({"messages": [USER, ANSWER]})
    noisy = parse_record(
        {
            "id": 7,
            "meta": {},
            "messages": [
                {**USER, "name": "Ann", "id": 1},
                {**ANSWER, "weight": 1, "prefix": False, "function_call": None, "refusal": None},
            ],
        }
    )
    assert noisy == plain


def test_tools_effort_and_calls_are_kept() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    calls = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]
    conversation = parse_record(
        {
            "reasoning_effort": "none",
            "tools": [tool],
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": calls},
                {"role": "tool", "tool_call_id": "c1", "name": "f", "content": "4"},
                ANSWER,
            ],
        }
    )
    assert conversation.effort == "none"
    assert conversation.tools == (tool,)
    assert conversation.messages[1] == Message("assistant", (), tuple(calls))
    assert conversation.messages[2] == Message("tool", (Part("text", "4"),), (), "c1", "f")
    assert [len(turn) for turn in conversation.assistant_turns] == [1, 1]


def test_what_mistral_common_gets_is_a_copy() -> None:
    calls = [{"id": "c1", "function": {"name": "f", "arguments": {"a": [1]}}}]
    conversation = parse_record(assistant(tool_calls=calls))
    copied = conversation.messages[1].to_openai()
    copied["tool_calls"][0]["function"]["arguments"]["a"].append(2)
    copied["content"].append("x")
    assert conversation.messages[1].to_openai()["tool_calls"] == calls
    assert calls[0]["function"]["arguments"] == {"a": [1]}  # type: ignore[index]


def test_without_thinking_leaves_it_out_of_every_turn() -> None:
    turns = [USER, {**ANSWER, "reasoning": "a"}, USER, {**ANSWER, "reasoning": "b"}]
    conversation = parse_record({"messages": turns})
    assert conversation.without_thinking() == parse_record({"messages": [USER, ANSWER] * 2})
    assert not conversation.without_thinking().has_thinking


def test_thinking_of_an_earlier_turn_is_not_the_last_ones() -> None:
    conversation = parse_record({"messages": [USER, {**ANSWER, "reasoning": "a"}, USER, ANSWER]})
    assert conversation.has_thinking
    assert not conversation.ends_with_thinking


def test_the_key_tells_messages_apart_and_nothing_else() -> None:
    key = parse_record({"messages": [USER, ANSWER]}).key()
    parts = [{"type": "text", "text": "Two and"}, {"type": "text", "text": " two?"}]
    same = {"messages": [{"role": "user", "content": parts}, ANSWER], "reasoning_effort": "none"}
    assert parse_record(same).key() == key
    for other in (
        {"messages": [USER, {**ANSWER, "content": "Four"}]},
        {"messages": [USER, {**ANSWER, "reasoning": "2+2"}]},
        {"messages": [{"role": "system", "content": "x"}, USER, ANSWER]},
        {"messages": [USER, ANSWER, USER, ANSWER]},
    ):
        assert parse_record(other).key() != key


def test_calls_images_and_plain_texts_have_keys_of_their_own() -> None:
    def calls(*ids: str, city: str = "Ulm", text: bool = False) -> dict[str, Any]:
        arguments: Any = {"city": city}
        function = {"name": "weather", "arguments": json.dumps(arguments) if text else arguments}
        called = [{"id": id_, "function": function} for id_ in ids]
        results = [{"role": "tool", "tool_call_id": id_, "content": id_[-1]} for id_ in ids]
        return {"messages": [USER, {**ANSWER, "tool_calls": called}, *results, ANSWER]}

    def shows(image: str) -> dict[str, Any]:
        part = {"type": "image", "image": image}
        return {"messages": [{**USER, "content": [part]}, ANSWER]}

    records = [calls("a", "b"), calls("a", "b", city="Bonn"), shows("a.png"), shows("b.png")]
    keys = {parse_record(record).key() for record in records}
    keys |= {Conversation((), plain=text).key() for text in ("a", "b")}
    assert len(keys) == 6
    # Ids are no words: another export has others, and arguments as text.
    assert parse_record(calls("xa", "xb", text=True)).key() in keys
    crossed = calls("a", "b")
    crossed["messages"][2]["tool_call_id"], crossed["messages"][3]["tool_call_id"] = "b", "a"
    assert parse_record(crossed).key() not in keys


# Files.


def read(path: Path) -> tuple[list[tuple[int | None, Conversation]], str]:
    """The good lines of a file, and the message about the others."""
    faults, rows = Faults(), []
    for row in read_rows(Source(str(path), str(path))):
        try:
            rows.append((row.line, parse_record(parse_row(row))))
        except SampleFault as fault:
            faults.add(str(path), row.line, str(fault))
    try:
        faults.raise_any(path.with_name("faults.txt"))
    except Ms4Error as error:
        return rows, str(error).replace(str(path), "FILE")
    return rows, ""


def line(text: str = "Four.") -> str:
    return json.dumps({"messages": [USER, {"role": "assistant", "content": text}]})


def test_good_lines_of_all_kinds(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    long = line("x" * 2_000_000)
    separators = json.dumps(
        {"messages": [USER, {"role": "assistant", "content": "a\u2028b\x85c"}]}, ensure_ascii=False
    )
    text = "\ufeff" + line() + "\r\n\n  \n" + separators + "\n" + long
    path.write_bytes(text.encode())
    rows, message = read(path)
    assert message == ""
    assert [number for number, _ in rows] == [1, 4, 5]
    assert rows[1][1].messages[1].text == "a\u2028b\x85c"
    assert len(rows[2][1].messages[1].text) == 2_000_000


def test_faults_name_file_and_line_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{line()}\n{{\n\n{line()}\n[]\n{{}}\n{line()}\n")
    rows, message = read(path)
    assert [number for number, _ in rows] == [1, 4, 7]
    assert message.splitlines()[0] == "the data has 3 faults:"
    assert message.splitlines()[1].startswith("  FILE:2: not valid JSON: Expecting")
    assert message.splitlines()[2].startswith("  FILE:5: a list instead of an object; a line is")
    assert message.splitlines()[3].startswith("  FILE:6: no `messages`")


def test_the_first_faults_are_listed_and_all_are_written(tmp_path: Path) -> None:
    path, written = tmp_path / "a.jsonl", tmp_path / "faults.txt"
    path.write_text("{}\n" * (LISTED + 5))
    _, message = read(path)
    assert message.splitlines()[0] == f"the data has {LISTED + 5} faults:"
    assert message.count("FILE:") == LISTED
    assert message.splitlines()[-1] == f"  and 5 more (all in {written})"
    assert len(written.read_text().splitlines()) == LISTED + 5
    path.write_text(line())
    assert read(path)[1] == ""
    assert not written.exists(), "what was mended is not left lying about"


def test_faults_come_in_the_order_of_the_files(tmp_path: Path) -> None:
    faults = Faults(["b", "a"])
    faults.add("a", 1, "x; y")
    faults.add("b", 10, "x; y")
    faults.add("b", 9, "x; y")
    with pytest.raises(Ms4Error, match="3 faults:\n  b:9: x; y\n  b:10: x; y\n  a:1: x; y\n  sum"):
        faults.raise_any(tmp_path / "faults.txt", "sum")


def test_a_missing_file(tmp_path: Path) -> None:
    assert "FILE: no such file; correct its name" in read(tmp_path / "a.jsonl")[1]


def test_a_directory(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.mkdir()
    assert "FILE: a directory; name the files in it, by a pattern perhaps" in read(path)[1]


def test_an_unreadable_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.symlink_to(path)
    assert "FILE: cannot be read (Too many levels of symbolic links)" in read(path)[1]


@pytest.mark.parametrize("content", ["", "\n \n\r\n", "\ufeff"])
def test_a_file_without_samples(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content, newline="")
    assert "FILE: holds no samples; leave it out" in read(path)[1]


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    latin = json.dumps({"messages": [USER, ANSWER], "id": "é"}, ensure_ascii=False)
    path.write_bytes(b"\n".join([line().encode(), *[latin.encode("latin-1")] * 3]))
    rows, message = read(path)
    assert len(rows) == 1
    assert message.splitlines() == [
        "the data has 3 faults:",
        *[f"  FILE:{n}: not UTF-8; convert the file with `iconv`" for n in (2, 3, 4)],
    ]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_list_is_its_elements(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"messages": [USER, ANSWER]}] * 3, indent=indent))
    rows, message = read(path)
    assert message == ""
    lines = [row for row, _ in rows]
    assert lines == ([1, 1, 1] if indent is None else [2, 14, 26])


def test_bytes_are_reported_as_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{line()}\n\n{{}}\n" * 500)
    seen: list[int] = []
    list(read_rows(Source(str(path), str(path)), seen.append))
    assert sum(seen) == path.stat().st_size
    assert len(seen) > 5
