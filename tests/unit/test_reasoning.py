"""Thinking that is not in order: every case under every policy, and what is noted of it."""

from __future__ import annotations

from typing import Any

import pytest

from ms4.config_data import DataSection
from ms4.data.conversation import Conversation, parse_record
from ms4.data.faults import SampleDropped, SampleFault
from ms4.data.reasoning import Settled, check_order, settle

USER = {"role": "user", "content": "Two and two?"}
ANSWER = {"role": "assistant", "content": "Four."}
THINKS = {**ANSWER, "reasoning": "2+2"}


def says(*parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(parts), **fields}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def thinks(value: str, closed: bool = True) -> dict[str, Any]:
    return {"type": "thinking", "thinking": value, "closed": closed}


def record(*turns: dict[str, Any], **fields: Any) -> dict[str, Any]:
    messages = [message for turn in turns for message in (USER, turn)]
    return {"messages": messages, **fields}


def settled(value: dict[str, Any], **data: Any) -> Settled:
    return settle(parse_record(value), DataSection.model_validate({"train": ["a"], **data}))


CALL = [{"id": "c1", "function": {"name": "f", "arguments": {}}}]

# Case, record, settings, what a fault says, and what `fix` makes of it: a record with its effort,
# or None where it cannot help.
CASES: list[tuple[str, dict[str, Any], dict[str, Any], str, tuple[Any, str] | None]] = [
    (
        "under_none",
        record(THINKS),
        {"reasoning": "none"},
        "holds thinking, but data.reasoning is `none`, so it is of effort `none`; use `per_sample`",
        (record(ANSWER), "none"),
    ),
    (
        "under_none",
        record(THINKS, reasoning_effort="none"),
        {},
        "holds thinking, but it is of effort `none`; correct its `reasoning_effort`, or remove",
        (record(ANSWER, reasoning_effort="none"), "none"),
    ),
    (
        "missing",
        record(ANSWER),
        {"reasoning": "high"},
        "the last turn does not think, but data.reasoning is `high`, so it is of effort `high`",
        (record(ANSWER), "none"),
    ),
    (
        "missing",
        record(THINKS, ANSWER),
        {},
        "the last turn does not think, but earlier ones do, so it is of effort `high`; remove",
        (record(ANSWER, ANSWER), "none"),
    ),
    (
        "empty",
        record(says(thinks(" \n"), text("Four."))),
        {},
        r"message 2 \(assistant\): the thinking is empty; fill it or remove the part",
        (record(ANSWER), "none"),
    ),
    (
        "empty",
        record({"role": "assistant", "content": "<think>\n\n</think>\n\nFour."}),
        {},
        "the thinking is empty; fill it",
        (record(ANSWER), "none"),
    ),
    ("empty", record(says(thinks(""))), {}, "the thinking is empty; fill it", None),
    (
        "unclosed",
        record(says(thinks("2+2", closed=False), text("Four."))),
        {},
        "content after thinking that is not closed; remove `closed`",
        (record(THINKS), "high"),
    ),
    (
        "unclosed",
        record(says(thinks("2+2", closed=False), tool_calls=CALL)),
        {},
        "content after thinking that is not closed; remove `closed`",
        (record(says(thinks("2+2"), tool_calls=CALL)), "high"),
    ),
    (
        "unclosed",
        record(says(thinks("2+2", closed=False))),
        {},
        "thinking without an end, so without an answer; end it and add one",
        None,
    ),
    (
        "unclosed",
        record({"role": "assistant", "content": "<think>2+2 Four."}),
        {},
        "thinking without an end, so without an answer; end it and add one",
        None,
    ),
    (
        "unclosed",
        record({"role": "assistant", "content": "2+2\n</think>\n\nFour."}),
        {},
        r"message 2 \(assistant\): an end of thinking without a beginning; put one first",
        (record(THINKS), "high"),
    ),
    (
        "unclosed",
        record({"role": "assistant", "content": "</think>Four."}),
        {},
        "an end of thinking without a beginning; put one first",
        (record(ANSWER), "none"),
    ),
    (
        "unclosed",
        record({"role": "assistant", "content": "a</think>b</think>c"}),
        {},
        "an end of thinking without a beginning; put one first",
        None,
    ),
    (
        "unclosed",
        record({"role": "assistant", "content": "<think><think>2+2</think>Four."}),
        {},
        "a beginning of thinking inside the thinking; remove it",
        (record(THINKS), "high"),
    ),
    (
        "no_answer",
        record({"role": "assistant", "content": "", "reasoning": "2+2"}),
        {},
        r"message 2 \(assistant\): a turn of nothing but thinking has no answer; add one",
        None,
    ),
    (
        "no_answer",
        record({"role": "assistant", "content": "", "reasoning": "2+2</think>Four."}),
        {},
        "an end of thinking inside the thinking; put the answer behind it into the text",
        (record(THINKS), "high"),
    ),
    (
        "no_answer",
        record({"role": "assistant", "content": "Four.", "reasoning": "2+2</think>Five."}),
        {},
        "an end of thinking inside the thinking; put the answer behind it into the text",
        None,
    ),
]
IDS = [f"{case}-{number}" for number, (case, *_) in enumerate(CASES)]


@pytest.mark.parametrize(("case", "value", "data", "message", "fixed"), CASES, ids=IDS)
def test_every_case_under_every_policy(
    case: str, value: dict[str, Any], data: dict[str, Any], message: str, fixed: Any
) -> None:
    with pytest.raises(SampleFault, match=message):
        settled(value, **data)
    with pytest.raises(SampleFault, match=message):
        settled(value, **data, thinking={case: "error"})
    with pytest.raises(SampleDropped, match=f"data.thinking.{case} is `drop`: .*{message}"):
        settled(value, **data, thinking={case: "drop"})
    # Taken as it is, it may be out of order in another way: that is another policy's.
    others = dict.fromkeys(["under_none", "missing", "empty", "unclosed", "no_answer"], "warn")
    warned = settled(value, **data, thinking=others)
    assert warned.conversation == parse_record(value)
    assert f"{case} warn" in warned.notes
    if fixed is None:
        with pytest.raises(
            SampleDropped, match=f"data.thinking.{case} is `fix`, which cannot help"
        ):
            settled(value, **data, thinking={case: "fix"})
        return
    expected, effort = fixed
    mended = settled(value, **data, thinking={case: "fix"})
    assert (mended.conversation, mended.effort) == (parse_record(expected), effort)
    assert mended.notes == (f"{case} fix",)


def test_what_is_in_order_is_left_alone() -> None:
    for value, effort in (
        (record(ANSWER), "none"),
        (record(THINKS), "high"),
        (record(THINKS, THINKS), "high"),
        (record(ANSWER, THINKS), "high"),
        (record(ANSWER, reasoning_effort="none"), "none"),
        (record(says(thinks("a"), tool_calls=CALL)), "high"),
    ):
        assert settled(value) == Settled(parse_record(value), effort)  # type: ignore[arg-type]
    assert settled(record(ANSWER), reasoning="none").effort == "none"
    assert settled(record(THINKS), reasoning="high").effort == "high"
    plain = Conversation(messages=(), plain="<think>")
    assert settle(plain, DataSection(train=("a",), reasoning="high")) == Settled(plain, "none")


def test_thinking_in_earlier_turns() -> None:
    value = record(THINKS, THINKS)
    assert settled(value, earlier_thinking="keep").conversation == parse_record(value)
    # It is masked when it is encoded.
    assert settled(value, earlier_thinking="mask").conversation == parse_record(value)
    dropped = settled(value, earlier_thinking="drop")
    assert dropped == Settled(parse_record(record(ANSWER, THINKS)), "high")
    only_earlier = settled(record(THINKS, ANSWER), earlier_thinking="drop")
    assert only_earlier == Settled(parse_record(record(ANSWER, ANSWER)), "none")


def test_several_messages_of_one_turn() -> None:
    parts = {"messages": [USER, says(thinks("2+2", closed=False)), ANSWER]}
    with pytest.raises(SampleFault, match="content after thinking that is not closed"):
        settled(parts)
    mended = settled(parts, thinking={"unclosed": "fix"}).conversation
    assert mended == parse_record({"messages": [USER, says(thinks("2+2")), ANSWER]})


def test_a_turn_that_says_nothing_without_its_thinking() -> None:
    earlier = record({"role": "assistant", "content": None, "reasoning": "hm"}, ANSWER)
    policies = {"no_answer": "warn", "missing": "fix"}
    with pytest.raises(
        SampleDropped, match=r"missing is `fix`, .*: a turn says nothing beside its"
    ):
        settled(earlier, thinking=policies)
    policies = {"no_answer": "warn", "under_none": "fix"}
    with pytest.raises(SampleDropped, match=r"under_none is `fix`, .* says nothing beside"):
        settled(earlier, reasoning="none", thinking=policies)


def test_held_out_samples_have_no_policies() -> None:
    for value, message in (
        (record(says(thinks(""), text("a"))), "the thinking is empty"),
        (record(says(thinks("a", closed=False), text("b"))), "not closed"),
        (record(says(thinks("a"))), "nothing but thinking has no answer"),
    ):
        with pytest.raises(SampleFault, match=message):
            check_order(parse_record(value))
    check_order(parse_record(record(THINKS, ANSWER)))
