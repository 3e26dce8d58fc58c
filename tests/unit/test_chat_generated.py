"""Generated conversations: ids, masks, images and counted changes against mistral-common's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ms4.config import EFFORTS, Effort
from ms4.data.chat import Chat, Masking
from ms4.data.conversation import parse_record
from ms4.data.faults import SampleFault
from ms4.data.render import stretches
from tests.chat_reference import (
    Record,
    assistant_turns,
    conversation_of,
    mask_of,
    png,
    records,
    reference,
    replaced,
    spans_by_prefixes,
    written,
)
from tests.examples import examples


@pytest.fixture(scope="module")
def tekken(whole_tekken: Path) -> Path:
    return whole_tekken


def check(chat: Chat, mistral: Any, record: Record, effort: Effort) -> None:
    """Everything that is promised of an encoded conversation."""
    messages = record["messages"]
    conversation = conversation_of(record)
    whole = reference(mistral, record, messages, effort)
    spans = spans_by_prefixes(mistral, record, effort)
    encoded = chat.encode(conversation, effort)
    assert encoded.tokens.tolist() == whole
    assert chat.encode_slowly(conversation, effort).tolist() == whole
    assert encoded.trained.tolist() == mask_of(len(whole), spans).tolist()
    assert encoded.turn_ends.tolist() == [end for _, end in spans]

    # What is trained reads as the assistant wrote it, as far as mistral-common lets it.
    turns = [messages[start:end] for start, end in assistant_turns(messages)]
    for (start, end), turn in zip(spans, turns, strict=True):
        assert chat.decode(encoded.tokens[start:end]) == written(turn)

    # No text becomes a control id: each stands as often as the shape of the conversation says.
    roles = [message["role"] for message in messages]
    special = encoded.tokens[encoded.tokens < 1000]
    assert (special == chat.eos).sum() == len(turns)
    assert (special == chat.bos).sum() == 1
    users = sum(
        role == "user" and (not n or roles[n - 1] != "user") for n, role in enumerate(roles)
    )
    assert (special == 3).sum() == (special == 4).sum() == users
    assert (special == 7).sum() == (special == 8).sum() == roles.count("tool")
    assert (special == 17).sum() == (special == 18).sum() == roles.count("system")
    thinking = [
        part for message in messages for part in message["content"] if part["type"] == "thinking"
    ]
    assert (special == chat.think).sum() == len(thinking)
    assert (special == chat.end_think).sum() == sum(part["closed"] for part in thinking)

    check_images(encoded, messages)
    check_changes(chat, encoded, record, turns)


def check_images(encoded: Any, messages: list[Record]) -> None:
    """The images are in the order of their tokens."""
    shown = sum(part["type"] == "image_url" for m in messages for part in m["content"])
    assert len(encoded.images) == shown
    written = [token for token in encoded.tokens.tolist() if token in (10, 12, 13)]
    for image in encoded.images:
        columns, rows = image.grid
        tokens, written = written[: image.tokens], written[image.tokens :]
        assert tokens == [*(([10] * columns + [12]) * rows)[:-1], 13]
    assert not written


def check_changes(chat: Chat, encoded: Any, record: Record, turns: list[list[Record]]) -> None:
    """The counts of what was changed, recounted from the result."""
    stripped = 0
    for turn in turns:
        parts = [part for message in turn for part in message["content"]]
        texts = [part["text"] for part in parts if part["type"] == "text" and part["text"]]
        thought = any(part["type"] == "thinking" for part in parts)
        stripped += bool(texts) and texts[-1].endswith(" ") and not thought
    assert encoded.changed["trailing_spaces"] == stripped
    halves = chat.decode(encoded.tokens).count("\ufffd") - str(
        chat.decode(chat.encode(conversation_of(without_surrogates(record)), "none").tokens)
    ).count("\ufffd")
    assert encoded.changed["surrogates"] >= halves
    assert (encoded.changed["surrogates"] > 0) == (halves > 0)


def without_surrogates(value: Any) -> Any:
    """The same with X for every half of a surrogate pair."""
    if isinstance(value, str):
        return "".join(
            new if new != "\ufffd" or old == "\ufffd" else "X"
            for old, new in zip(*[iter_pairs(value), replaced(value)], strict=True)
        )
    if isinstance(value, list):
        return [without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {without_surrogates(k): without_surrogates(v) for k, v in value.items()}
    return value


def iter_pairs(text: str) -> list[str]:
    """Characters, two halves that belong together as one."""
    pairs: list[str] = []
    for character in text:
        if (
            pairs
            and len(pairs[-1]) == 1
            and "\ud800" <= pairs[-1] <= "\udbff"
            and "\udc00" <= character <= "\udfff"
        ):
            pairs[-1] += character
        else:
            pairs.append(character)
    return pairs


def run(chat: Chat, mistral: Any, count: int) -> None:
    @settings(
        deadline=None,
        max_examples=count,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(records(), st.sampled_from(EFFORTS))
    def each(record: Record, effort: Effort) -> None:
        check(chat, mistral, record, effort)

    each()


def test_a_sample_of_generated_conversations(chat: Chat, mistral: Any) -> None:
    run(chat, mistral, examples(40))


@pytest.mark.soak
def test_five_thousand_generated_conversations(chat: Chat, mistral: Any) -> None:
    run(chat, mistral, 5000)


# Masks, by another way: each turn cut into its tokens.


def expected_mask(
    chat: Chat,
    tokens: list[int],
    spans: list[tuple[int, int]],
    masking: Masking,
    weights: list[int],
) -> list[int]:
    """The mask by walking over the tokens."""
    mask = [0] * len(tokens)
    for number, (start, end) in enumerate(spans):
        last = number == len(spans) - 1
        if weights[number] == 0 or (masking.turns == "last" and not last):
            continue
        thinks, calls = False, False
        for at in range(start, end - 1):
            thinks = thinks or tokens[at] == chat.think
            calls = calls or tokens[at] == 9
            hidden = (thinks and not (masking.thinking and (last or masking.earlier_thinking))) or (
                calls and not masking.tool_calls
            )
            mask[at] = int(not hidden)
            if tokens[at] == chat.end_think:
                thinks = False
        mask[end - 1] = int(any(mask[start : end - 1]))
    return mask


maskings = st.builds(
    Masking,
    turns=st.sampled_from(["all", "last"]),
    thinking=st.booleans(),
    tool_calls=st.booleans(),
    earlier_thinking=st.booleans(),
)


def test_masks_of_every_kind(chat: Chat, mistral: Any) -> None:
    seen = set()

    @settings(
        deadline=None,
        max_examples=examples(60),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(records(images=False), maskings, st.data())
    def each(record: Record, masking: Masking, data: st.DataObject) -> None:
        turns = assistant_turns(record["messages"])
        weights = [data.draw(st.sampled_from([1, 1, 0])) for _ in turns]
        by_message = {
            number: weight
            for (start, end), weight in zip(turns, weights, strict=True)
            for number in range(start, end)
        }
        conversation = conversation_of(record, by_message)
        spans = spans_by_prefixes(mistral, record, "high")
        tokens = chat.encode_slowly(conversation, "high").tolist()
        expected = expected_mask(chat, tokens, spans, masking, weights)
        encoded = chat.encode(conversation, "high", masking)
        assert encoded.tokens.tolist() == tokens
        assert encoded.trained.tolist() == expected
        # Never outside the assistant's turns.
        outside = mask_of(len(tokens), spans) == 0
        assert not encoded.trained[outside].any()
        seen.add(any(expected))

    each()
    assert seen == {True, False} or examples(60) < 60, "a few examples can all be of one kind"


CALL = {"id": "a", "function": {"name": "f", "arguments": {}}}
THREE_TURNS = [
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": "b", "reasoning": "a"},
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": "d", "reasoning": "c", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "a", "content": "t"},
    {"role": "assistant", "content": "f", "reasoning": "e"},
]


@pytest.mark.parametrize(
    ("masking", "trained"),
    [
        (Masking(), ["[THINK]a[/THINK]b</s>", "[THINK]c[/THINK]d[TOOL_CALLS]f[ARGS]{}</s>",
                     "[THINK]e[/THINK]f</s>"]),
        (Masking(turns="last"), ["[THINK]e[/THINK]f</s>"]),
        (Masking(thinking=False), ["b</s>", "d[TOOL_CALLS]f[ARGS]{}</s>", "f</s>"]),
        (Masking(tool_calls=False), ["[THINK]a[/THINK]b</s>", "[THINK]c[/THINK]d", "</s>",
                                     "[THINK]e[/THINK]f</s>"]),
        (Masking(earlier_thinking=False), ["b</s>", "d[TOOL_CALLS]f[ARGS]{}</s>",
                                           "[THINK]e[/THINK]f</s>"]),
        (Masking(turns="last", thinking=False), ["f</s>"]),
    ],
)  # fmt: skip
def test_what_each_masking_trains(masking: Masking, trained: list[str], chat: Chat) -> None:
    encoded = chat.encode(parse_record({"messages": THREE_TURNS}), "high", masking)
    assert [text for text, is_trained in stretches(chat, encoded) if is_trained] == trained


def test_what_is_put_in_another_order_is_counted(chat: Chat) -> None:
    calls = [{"id": name, "function": {"name": "f", "arguments": {}}} for name in "ab"]
    results = [{"role": "tool", "tool_call_id": name, "content": name} for name in "ab"]
    image = {"type": "image", "image": png(28, 28)}

    def changed(*results: Record, parts: list[Record]) -> dict[str, int]:
        conversation = parse_record({"messages": [
            {"role": "user", "content": parts}, {"role": "assistant", "tool_calls": calls},
            *results, {"role": "assistant", "content": "c"},
        ]})  # fmt: skip
        return dict(chat.encode(conversation, "none").changed)

    text = {"type": "text", "text": "What?"}
    assert changed(*results, parts=[image, text]) == {}
    assert changed(*results, parts=[text, image, text]) == {}
    assert changed(*results, parts=[text, image]) == {"image_first": 1}
    assert changed(*reversed(results), parts=[text]) == {"results_reordered": 1}


def test_weights_that_differ_within_a_turn_are_a_fault(chat: Chat) -> None:
    def text(role: str, words: str) -> Record:
        return {"role": role, "content": [{"type": "text", "text": words}]}

    record = {"messages": [text("user", "a"), text("assistant", "b"), text("assistant", "c")]}
    with pytest.raises(SampleFault, match="one turn with one end, but their weights differ"):
        chat.encode(conversation_of(record, {1: 0}), "none")
    both = chat.encode(conversation_of(record), "none")
    assert both.trained.sum() == len(both.tokens) - both.last_turn


def test_plain_text_is_trained_whole(chat: Chat) -> None:
    from ms4.data.conversation import Conversation

    text = "Once [INST]upon</s> a time \ud800 "
    encoded = chat.encode(Conversation((), plain=text), "none")
    assert encoded.trained.tolist() == [0] + [1] * (len(encoded.tokens) - 1)
    assert chat.decode(encoded.tokens) == f"<s>{replaced(text)}</s>"
    assert (encoded.tokens < 1000).sum() == 2
    assert encoded.turn_ends.tolist() == [len(encoded.tokens)]
    assert encoded.changed == {"surrogates": 1}
    with pytest.raises(SampleFault, match=r"refused by the tokenizer: .*; shorten the text"):
        chat.encode(Conversation((), plain=" " * 1_000_000), "none")


def test_long_runs_go_the_way_that_ends_in_an_error(chat: Chat, mistral: Any) -> None:
    """The fast way's engine dies of what it cannot match; no text that it gets is that long."""
    for piece in (" ", "\n", "a", "A", "9", "é", "汉", "\u0301", "-", "\t \r\n"):
        for length in (49_999, 50_001):
            text = (piece * length)[:length]
            record = {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": text}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
                ]
            }
            tokens = chat.encode(conversation_of(record), "none").tokens
            assert tokens.tolist() == reference(mistral, record, record["messages"], "none")
