"""Formats: each way to write a conversation is told apart, and read right or refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ms4.config_data import DataSection, Format
from ms4.data.conversation import Conversation, Image, parse_record
from ms4.data.faults import SampleFault
from ms4.data.format_names import FORMATS
from ms4.data.formats import (
    Reading,
    detect,
    in_its_names,
    mapped_fields,
    to_conversation,
    unused_keys,
)
from tests.examples import examples

USER = {"role": "user", "content": "Two and two?"}
ANSWER = {"role": "assistant", "content": "Four."}
CALL = {"name": "weather", "arguments": {"city": "Ulm"}}
TOOL = {"name": "weather", "description": "Weather", "parameters": {"type": "object"}}


def section(**data: Any) -> DataSection:
    return DataSection.model_validate({"train": ["a"], **data})


def read(record: Any, **data: Any) -> Conversation:
    """The conversation of a record whose format is detected."""
    configured = section(**data)
    return to_conversation(record, Reading.of(detect([record], configured), configured))


def gives(record: Any, *messages: dict[str, Any], **data: Any) -> None:
    """Assert that a record is these messages."""
    assert read(record, **data) == parse_record({"messages": list(messages)})


def turns(*pairs: tuple[str, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": name, "value": value} for name, value in pairs]}


# Which format it is.

DETECTED: list[tuple[Any, Format]] = [
    ({"messages": [USER, ANSWER]}, "messages"),
    ({"conversations": [USER, ANSWER]}, "messages"),
    ({"conversation": [USER, ANSWER]}, "messages"),
    (turns(("human", "a"), ("gpt", "b")), "sharegpt"),
    ({"conversations": []}, "sharegpt"),
    ({"instruction": "a", "input": "", "output": "b"}, "alpaca"),
    ({"instruction": "a", "response": "b"}, "alpaca"),
    ({"prompt": "a", "completion": "b"}, "prompt_completion"),
    ({"prompt": "a", "response": "b"}, "prompt_completion"),
    ({"question": "a", "answer": "b"}, "question_answer"),
    ({"text": "a"}, "text"),
    ({"messages": [USER, ANSWER], "text": "rendered"}, "messages"),
    ({"something": "else"}, "messages"),
    ("no object", "messages"),
]


@pytest.mark.parametrize(("record", "format"), DETECTED)
def test_a_format_is_told_from_the_records(record: Any, format: Format) -> None:
    assert detect([record], section()) == format


def test_most_records_decide_and_a_declared_format_is_final() -> None:
    records = [{"prompt": "a", "completion": "b"}, {"text": "a"}, {"text": "b"}]
    assert detect(records, section()) == "text"
    assert detect(records, section(format="alpaca")) == "alpaca"
    assert detect([], section()) == "messages"


# What a record means.


def test_sharegpt() -> None:
    gives(
        {**turns(("system", "Be brief."), ("human", "Two and two?"), ("gpt", "Four."))},
        {"role": "system", "content": "Be brief."},
        USER,
        ANSWER,
    )
    gives(
        {**turns(("user", "Two and two?"), ("assistant", "Four.")), "system": "Be brief."},
        {"role": "system", "content": "Be brief."},
        USER,
        ANSWER,
    )
    gives({**turns(("human", "Two and two?"), ("gpt", "Four.")), "system": ""}, USER, ANSWER)
    gives({"conversations": json.dumps([{"from": "human", "value": "Two and two?"},
                                        {"from": "gpt", "value": "Four."}])}, USER, ANSWER,
          format="sharegpt")  # fmt: skip


def test_sharegpt_tools() -> None:
    record = turns(
        ("human", "Ulm?"),
        ("function_call", json.dumps(CALL)),
        ("observation", '{"t": 21}'),
        ("function_call", json.dumps([CALL, CALL])),
        ("observation", '["a", {"b": 1}]'),
        ("gpt", "21 degrees."),
    )
    record["tools"] = json.dumps([TOOL])
    conversation = read(record)
    assert conversation.tools == ({"type": "function", "function": TOOL},)
    roles = [message.role for message in conversation.messages]
    assert roles == ["user", "assistant", "tool", "assistant", "tool", "tool", "assistant"]
    calls = [call for message in conversation.messages for call in message.tool_calls]
    assert [call["function"] for call in calls] == [CALL] * 3
    ids = [call["id"] for call in calls]
    assert len(set(ids)) == 3
    assert all(len(name) == 9 and name.isalnum() for name in ids)
    assert [m.tool_call_id for m in conversation.messages if m.role == "tool"] == ids
    texts = [m.text for m in conversation.messages if m.role == "tool"]
    assert texts == ['{"t": 21}', "a", '{"b": 1}']


def test_alpaca() -> None:
    answer = {"role": "assistant", "content": "b"}
    gives(
        {"instruction": "a", "input": "", "output": "b"}, {"role": "user", "content": "a"}, answer
    )
    gives({"instruction": "a", "input": "x", "output": "b"},
          {"role": "user", "content": "a\nx"}, answer)  # fmt: skip
    gives(
        {
            "instruction": "a",
            "output": "b",
            "system": "s",
            "history": [["c", "d"], ["e", "f"]],
        },
        {"role": "system", "content": "s"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e"},
        {"role": "assistant", "content": "f"},
        {"role": "user", "content": "a"},
        answer,
    )
    gives({"instruction": "a", "response": "b", "history": "[]"}, {"role": "user", "content": "a"},
          answer)  # fmt: skip


def test_prompt_and_completion() -> None:
    gives({"prompt": "Two and two?", "completion": "Four."}, USER, ANSWER)
    gives({"prompt": [USER], "completion": [ANSWER]}, USER, ANSWER)
    gives(
        {"prompt": [USER, ANSWER, USER], "completion": "Four."},
        USER,
        {**ANSWER, "weight": 0},
        USER,
        ANSWER,
    )


def test_question_and_answer_with_thinking_and_effort() -> None:
    record = {"question": "Two and two?", "answer": "Four.", "thinking": "2+2", "id": 7}
    gives(record, USER, {**ANSWER, "reasoning_content": "2+2"})
    assert read({**record, "reasoning_effort": "high"}).effort == "high"
    assert unused_keys(record, Reading("question_answer", {}, {})) == {"id"}


@pytest.mark.parametrize(
    ("record", "unused"),
    [
        ({"prompt": "a", "completion": "b", "response": "c"}, {"response"}),
        ({"prompt": "a", "completion": None, "response": "c"}, set()),
        ({"instruction": "a", "output": "b", "response": "c"}, {"response"}),
        ({"question": "a", "answer": "b", "response": "c"}, {"response"}),
        ({"messages": [USER, ANSWER], "conversations": []}, {"conversations"}),
        ({**turns(("human", "a"), ("gpt", "b")), "conversation": [1]}, {"conversation"}),
        ({"text": "a", "tools": [TOOL]}, {"tools"}),
    ],
)
def test_of_keys_that_mean_the_same_one_is_read(record: dict[str, Any], unused: set[str]) -> None:
    reading = Reading.of(detect([record], section()), section())
    assert unused_keys(record, reading) == unused
    to_conversation(record, reading)


def test_a_mapped_column_stands_in_the_place_of_its_name() -> None:
    record = {"prompt": "a", "completion": "b", "gold": "c", "mode": "loud"}
    data = section(fields={"completion": "gold", "effort": "mode"})
    reading = Reading.of(detect([record], data), data)
    assert unused_keys(record, reading) == {"completion"}
    with pytest.raises(SampleFault) as caught:
        to_conversation(record, reading)
    assert in_its_names(str(caught.value), reading).startswith("`mode` is 'loud'; this model")


def test_plain_text() -> None:
    conversation = read({"text": "Once upon a time."})
    assert conversation == Conversation(messages=(), plain="Once upon a time.")
    assert conversation.key() != read({"text": "Once upon a time"}).key()


def test_tags_in_a_text_are_thinking() -> None:
    thought = {**ANSWER, "reasoning_content": "2+2"}
    for text in (
        "<think>2+2</think>Four.",
        "<think>\n2+2\n</think>\n\nFour.",
        " [THINK]2+2[/THINK] Four.",
    ):
        gives({"messages": [USER, {"role": "assistant", "content": text}]}, USER, thought)
        part = [{"type": "text", "text": text}]
        gives({"messages": [USER, {"role": "assistant", "content": part}]}, USER, thought)
        gives({"question": "Two and two?", "answer": text}, USER, thought)
        gives(turns(("human", "Two and two?"), ("gpt", text)), USER, thought)
    wrapped = {**ANSWER, "reasoning_content": "<think>2+2</think>"}
    gives({"messages": [USER, wrapped]}, USER, thought)


def test_a_mention_of_a_tag_is_text() -> None:
    mention = "Write `<think>` and `</think>` around it."
    conversation = read({"question": "How?", "answer": mention})
    assert conversation.messages[1].text == mention
    assert not conversation.has_thinking
    question = "<think>Why?</think>"
    assert read({"question": question, "answer": "So."}).messages[0].text == question


def test_weights_of_messages() -> None:
    for key, value in (("weight", 0), ("weight", 0.0), ("loss_weight", 0), ("train", False)):
        first = {**ANSWER, key: value}
        conversation = read({"messages": [USER, first, USER, {**ANSWER, key: not value}]})
        assert [m.weight for m in conversation.messages] == [1, 0, 1, 1]
        shared = turns(("human", "a"), ("gpt", "b"))
        shared["conversations"][1][key] = value
        assert read(shared).messages[1].weight == 0


# Images.


def images_of(record: Any) -> list[Image]:
    return read(record).images


def test_images_in_parts() -> None:
    def part(**fields: Any) -> list[Image]:
        text = {"type": "text", "text": "?"}
        return images_of({"messages": [{"role": "user", "content": [fields, text]}, ANSWER]})

    assert part(type="image", path="a.png") == [Image("path", "a.png")]
    assert part(type="image", image="a.png") == [Image("path", "a.png")]
    assert part(type="image", url="https://x/a.png") == [Image("url", "https://x/a.png")]
    assert part(type="image", base64="aGk=") == [Image("base64", "aGk=")]
    assert part(type="image", image={"bytes": b"hi", "path": "a"}) == [Image("bytes", b"hi")]
    assert part(type="image_url", image_url={"url": "data:image/png;base64,aGk="}) == [
        Image("base64", "aGk=")
    ]
    assert part(type="image_url", image_url="file:///a.png") == [Image("url", "file:///a.png")]


def test_images_beside_the_messages() -> None:
    shared = {**turns(("human", "See <image> and <image>?"), ("gpt", "Yes."))}
    conversation = read({**shared, "images": ["a.png", "b.png"]})
    kinds = [(part.kind, part.text) for part in conversation.messages[0].parts]
    assert kinds == [
        ("text", "See "),
        ("image", ""),
        ("text", " and "),
        ("image", ""),
        ("text", "?"),
    ]
    assert [image.value for image in conversation.images] == ["a.png", "b.png"]
    plain = read({"question": "What?", "answer": "A cat.", "images": ["a.png"]})
    assert [part.kind for part in plain.messages[0].parts] == ["image", "text"]
    placed = [{"type": "image"}, {"type": "text", "text": "?"}]
    record = {"messages": [{"role": "user", "content": placed}, ANSWER], "images": ["a.png"]}
    assert images_of(record) == [Image("path", "a.png")]


# Names that the data uses.


def test_mapped_messages() -> None:
    record = {
        "meta": {"mode": "high"},
        "dialog": [
            {"speaker": "client", "utterance": "Two and two?"},
            {"speaker": "bot", "utterance": "Four.", "cot": "2+2"},
        ],
    }
    data = section(
        fields={
            "messages": "dialog",
            "role": "speaker",
            "content": "utterance",
            "thinking": "cot",
            "effort": "meta.mode",
        },
        roles={"client": "user", "bot": "assistant"},
    )
    reading = Reading.of(detect([record], data), data)
    conversation = to_conversation(record, reading)
    assert conversation == parse_record(
        {
            "messages": [USER, {**ANSWER, "reasoning_content": "2+2"}],
            "reasoning_effort": "high",
        }
    )
    assert mapped_fields(record, reading) == set(data.fields)
    assert unused_keys(record, reading) == set()


def test_mapped_columns() -> None:
    record = {"task": "Two and two?", "solution": "Four.", "cot": "2+2", "mode": "high"}
    fields = {"prompt": "task", "completion": "solution", "thinking": "cot", "effort": "mode"}
    conversation = read(record, fields=fields)
    assert conversation.effort == "high"
    assert (
        conversation.messages
        == parse_record({"messages": [USER, {**ANSWER, "reasoning_content": "2+2"}]}).messages
    )
    assert read({"story": "x"}, fields={"text": "story"}).plain == "x"


def test_roles_of_sharegpt_by_other_names() -> None:
    record = turns(("Alice", "Two and two?"), ("Bob", "Four."))
    gives(record, USER, ANSWER, roles={"Alice": "user", "Bob": "assistant"})


# What is wrong.

FAULTS: list[tuple[Any, dict[str, Any], str]] = [
    ([], {"format": "alpaca"}, "a list instead of an object"),
    (turns(("human", "a"), ("cat", "b")), {}, "turn 2: `from` is 'cat'; use .* data.roles"),
    ({"conversations": [{"from": "human"}]}, {}, "turn 1: no `value`; add"),
    ({"conversations": ["a"]}, {}, "turn 1 is text; it must be an object of `from` and `value`"),
    ({"conversations": []}, {}, "`conversations` is empty; remove"),
    (
        {"conversations": 3},
        {"format": "sharegpt"},
        "`conversations` is a number; it must be a list",
    ),
    ({"text": "x"}, {"format": "sharegpt"}, r"`conversations` is missing; .* keys: `text`\)"),
    ({"conversations": "[{"}, {"format": "sharegpt"}, "`conversations`: not valid JSON"),
    (
        {**turns(("system", "a"), ("human", "b"), ("gpt", "c")), "system": "d"},
        {},
        "a `system` beside a first turn of the system; keep one",
    ),
    (
        turns(("human", "a"), ("function_call", "{}"), ("gpt", "b")),
        {},
        "turn 2: a function_call is",
    ),
    (turns(("human", "a"), ("function_call", "{"), ("gpt", "b")), {}, "function_call`: not valid"),
    (turns(("human", "a"), ("function_call", "f"), ("gpt", "b")), {}, "turn 2: a function_call is"),
    (
        turns(("human", "a"), ("observation", "x"), ("gpt", "b")),
        {},
        "turn 2: an observation without",
    ),
    (
        turns(("human", "a"), ("gpt", "b"), ("human", "c")),
        {},
        "ends with a turn of the role `user`",
    ),
    (turns(("human", "a"), ("gpt", None)), {}, "says nothing"),
    ({"instruction": "a", "output": ""}, {}, "`output` is empty, so nothing to learn; fill it"),
    ({"instruction": "", "output": "b"}, {}, "`instruction` is empty; fill it"),
    ({"instruction": 3, "output": "b"}, {}, "`instruction` is a number; it must be text"),
    ({"instruction": "a", "input": [], "output": "b"}, {}, "`input` is a list; it must be text"),
    (
        {"instruction": "a", "output": "b", "history": [["c"]]},
        {},
        "`history` is not a list of pairs",
    ),
    ({"instruction": "a", "output": "b", "history": 1}, {}, "`history` is not a list of pairs"),
    (
        {"prompt": "a"},
        {"format": "prompt_completion"},
        r"`completion` is missing; .*\(the record's keys",
    ),
    ({"prompt": [USER], "completion": 3}, {}, "`prompt` is a list and `completion` is a num"),
    ({"prompt": [USER], "completion": []}, {}, "no assistant turn"),
    ({"question": "a", "answer": None}, {}, "`answer` is null; it must be text"),
    (
        {"question": "a", "answer": "b", "thinking": "c", "reasoning": "d"},
        {},
        "`thinking` and `reasoning` beside each other; keep one",
    ),
    (
        {"question": "a", "answer": "b", "reasoning_effort": "low"},
        {},
        "`reasoning_effort` is 'low'",
    ),
    ({"question": "a", "answer": "b", "system": 3}, {}, "`system` is a number"),
    ({"text": 3}, {}, "`text` is a number; it must be text"),
    ({"text": " \n"}, {}, "`text` is empty; remove"),
    ({"question": "a", "answer": "b"}, {"format": "text"}, "`text` is missing; it must be text"),
    ({"messages": "[{"}, {}, "`messages`: not valid JSON"),
    ({"messages": "hi"}, {}, "`messages` is text; it must be a list"),
    (
        {"question": "<image>?", "answer": "b", "images": ["a", "b"]},
        {},
        "2 images, of which the messages place 1 .*; place all",
    ),
    ({"question": "<image><image>", "answer": "b", "images": ["a"]}, {}, "more places for images"),
    ({"question": "a", "answer": "b", "images": [3]}, {}, "an image without one `path`"),
    (
        {"question": "a", "answer": "b<think>c</think>d"},
        {},
        "thinking after other content of the same turn; a turn thinks once",
    ),
    (
        {"messages": [USER, {**ANSWER, "content": "<think>a</think>b", "reasoning": "a"}]},
        {},
        "thinking in `content` and beside it; keep one",
    ),
]


@pytest.mark.parametrize(("record", "data", "message"), FAULTS)
def test_a_fault_says_what_is_wrong_and_what_to_do(
    record: Any, data: dict[str, Any], message: str
) -> None:
    with pytest.raises(SampleFault, match=message) as caught:
        read(record, **data)
    assert ";" in str(caught.value)


def test_a_record_of_another_format_than_its_file_is_called_so() -> None:
    reading = Reading.of("messages", DataSection(train=["a"]))
    with pytest.raises(SampleFault, match=r"no `messages` .* written as Alpaca: give each"):
        to_conversation({"instruction": "a", "output": "b"}, reading)
    for broken in ({"messages": 3}, {"other": 3}):
        with pytest.raises(SampleFault) as caught:
            to_conversation(broken, reading)
        assert "is written as" not in str(caught.value)


KEYS = ["messages", "conversations", "role", "content", "from", "value", "type", "text", "image"]
KEYS += ["prompt", "completion", "question", "answer", "instruction", "input", "output", "history"]
KEYS += [
    "system",
    "tools",
    "images",
    "thinking",
    "reasoning_effort",
    "weight",
    "tool_calls",
    "path",
]

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.binary(max_size=3)
    | st.text(max_size=5)
    | st.sampled_from(["user", "human", "gpt", "assistant", "image", "<image>", "<think>", "[{"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5)
    ),
    max_leaves=15,
)


@settings(deadline=None, max_examples=examples(400))
@given(
    st.dictionaries(st.sampled_from(KEYS), values, max_size=5) | values,
    st.sampled_from(["auto", *FORMATS]),
    st.dictionaries(
        st.sampled_from(["messages", "role", "content", "prompt", "thinking", "images"]),
        st.sampled_from([*KEYS, "a.b", "text.role"]),
        max_size=2,
    ),
)
def test_whatever_stands_there_nothing_but_a_fault_is_raised(
    record: Any, format: str, fields: dict[str, str]
) -> None:
    try:
        conversation = read(record, format=format, fields=fields)
    except SampleFault:
        return
    assert conversation.plain is not None or conversation.messages[-1].role == "assistant"
    conversation.key()
