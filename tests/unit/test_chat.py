"""Token ids and masks: what mistral-common encodes, each assistant turn found, nothing else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from ms4.config import EFFORTS, Effort
from ms4.data.chat import Chat
from ms4.data.conversation import parse_record
from ms4.data.faults import SampleFault
from tests.chat_reference import (
    CONTROLS,
    Record,
    assistant_turns,
    mask_of,
    reference,
    spans_by_prefixes,
)
from tests.examples import examples

TAGS = ["[THINK]", "[/THINK]"]
"""In an assistant's text these are read as thinking, not as text."""


@pytest.fixture(scope="module", params=["whole_tekken", "small_tekken"], ids=["131072", "4096"])
def tekken(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture(scope="module")
def serving(tekken: Path) -> MistralTokenizer:  # type: ignore[type-arg]
    """Refuses what ends in a turn of the assistant: prompts must pass it."""
    return MistralTokenizer.from_file(tekken, mode=ValidationMode.test)


def check(chat: Chat, mistral: Any, serving: Any, record: Record, effort: Effort) -> None:
    """Tokens, mask and prompt of a record are what mistral-common makes of it."""
    conversation = parse_record(record)
    before = copy.deepcopy(conversation)
    encoded = chat.encode(conversation, effort)
    assert conversation == before
    assert encoded.tokens.dtype == np.int32
    assert encoded.trained.dtype == np.uint8
    assert encoded.tokens.tolist() == reference(mistral, record, record["messages"], effort)
    spans = spans_by_prefixes(mistral, record, effort)
    expected = mask_of(len(encoded.tokens), spans)
    assert encoded.trained.tolist() == expected.tolist()
    last, _ = assistant_turns(record["messages"])[-1]
    prompt = reference(serving, record, record["messages"][:last], effort)
    assert encoded.prompt.tolist() == prompt
    starts = np.diff(encoded.trained.astype(np.int8), prepend=0) == 1
    assert starts.sum() == len(assistant_turns(record["messages"]))


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Wetter in Zürich?",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def asks(*ids: str) -> list[Record]:
    return [
        {
            "id": i,
            "type": "function",
            "function": {"name": "weather", "arguments": '{"city":"Ulm"}'},
        }
        for i in ids
    ]


def answers(*ids: str) -> list[Record]:
    return [{"role": "tool", "tool_call_id": i, "content": f'{{"{i}": 21.5}}'} for i in ids]


def system(text: str) -> Record:
    return {"role": "system", "content": text}


def user(text: str) -> Record:
    return {"role": "user", "content": text}


def says(text: str, thinking: str | None = None, **fields: Any) -> Record:
    if thinking is None:
        return {"role": "assistant", "content": text, **fields}
    return {"role": "assistant", "content": text, "reasoning_content": thinking, **fields}


RECORDS: dict[str, Record] = {
    "one turn": {"messages": [user("Two and two?"), says("Four.")]},
    "trailing spaces": {"messages": [user(" a  "), says("b   ")]},
    "empty user": {"messages": [user(""), says("Hello!")]},
    "thinking": {"messages": [user("Two and two?"), says("4", "2 + 2 = 4")]},
    "thinking only": {
        "messages": [user("x"), {"role": "assistant", "content": None, "reasoning": "hm"}]
    },
    "thinking cut off": {
        "messages": [
            user("x"),
            {
                "role": "assistant",
                "content": [{"type": "thinking", "thinking": "hm", "closed": False}],
            },
        ]
    },
    "thinking in an earlier turn": {
        "messages": [user("a"), says("b", "c"), user("d"), says("e"), user("f"), says("g", "h")]
    },
    "system first": {"messages": [system("Be brief."), user("a"), says("b")]},
    "systems in the middle": {
        "messages": [
            system("One."),
            system("Two."),
            user("a"),
            says("b"),
            user("c"),
            system("Three."),
            says("d"),
        ]
    },
    "users in a row": {
        "messages": [user("a"), user("b"), says("c"), user("d"), user(""), says("e")]
    },
    "assistants in a row": {
        "messages": [user("a"), says("b", "t"), says("c"), user("d"), says("e"), says("f")]
    },
    "tool call last": {
        "messages": [user("a"), says("Let me see.", tool_calls=asks("c1"))],
        "tools": [WEATHER],
    },
    "tools": {
        "messages": [
            system("Use tools."),
            user("Ulm?"),
            says("", "I must look.", tool_calls=asks("c1")),
            *answers("c1"),
            says("21.5 degrees.", "Good."),
            user("And now?"),
            {"role": "assistant", "content": None, "tool_calls": asks("c2", "c3")},
            *answers("c3", "c2"),
            says("Still 21.5."),
        ],
        "tools": [WEATHER],
    },
    "user after a tool": {
        "messages": [
            user("a"),
            {"role": "assistant", "tool_calls": asks("c1")},
            *answers("c1"),
            user("b"),
            says("c"),
        ]
    },
}


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("name", RECORDS)
def test_tokens_mask_and_prompt(
    name: str, effort: Effort, chat: Chat, mistral: Any, serving: Any
) -> None:
    check(chat, mistral, serving, RECORDS[name], effort)


def test_what_is_trained_reads_as_the_assistant_wrote_it(chat: Chat) -> None:
    encoded = chat.encode(parse_record(RECORDS["tools"]), "high")
    edges = np.flatnonzero(np.diff(encoded.trained, prepend=0, append=0))
    turns = [
        chat.decode(encoded.tokens[start:end])
        for start, end in zip(edges[::2], edges[1::2], strict=True)
    ]
    call = '[TOOL_CALLS]weather[ARGS]{"city": "Ulm"}'
    assert turns == [
        f"[THINK]I must look.[/THINK]{call}</s>",
        "[THINK]Good.[/THINK]21.5 degrees.</s>",
        f"{call}{call}</s>",
        "Still 21.5.</s>",
    ]
    prompt = chat.decode(encoded.tokens[: edges[0]])
    assert prompt.startswith("<s>[SYSTEM_PROMPT]Use tools.[/SYSTEM_PROMPT][AVAILABLE_TOOLS][{")
    assert prompt.endswith(
        "}][/AVAILABLE_TOOLS]"
        '[MODEL_SETTINGS]{"reasoning_effort": "high"}[/MODEL_SETTINGS][INST]Ulm?[/INST]'
    )


# Random conversations.

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
texts = words | st.lists(words | st.sampled_from(CONTROLS), min_size=1, max_size=3).map("".join)
untagged = texts.filter(lambda text: not any(tag in text for tag in TAGS))
said = untagged.filter(lambda text: bool(text.strip()))


@st.composite
def records(draw: st.DrawFn) -> Record:
    """A conversation of any shape that mistral-common accepts."""
    messages: list[Record] = [system(draw(texts)) for _ in range(draw(st.integers(0, 2)))]
    calls = iter(range(100))
    for _ in range(draw(st.integers(1, 3))):
        for _ in range(draw(st.integers(1, 2))):
            messages.append(user(draw(texts)))
        if draw(st.booleans()):
            messages.append(system(draw(texts)))
        for _ in range(draw(st.integers(0, 2))):
            ids = [f"call{next(calls)}" for _ in range(draw(st.integers(1, 2)))]
            thought = draw(st.none() | said)
            messages.append(says(draw(untagged), thought))
            messages[-1]["tool_calls"] = asks(*ids)
            messages.extend(answers(*draw(st.permutations(ids))))
        messages.append(says(draw(said), draw(st.none() | said)))
        messages.extend(says(draw(said)) for _ in range(draw(st.integers(0, 1))))
    tools = draw(st.sampled_from([{}, {"tools": [WEATHER]}]))
    return {"messages": messages, **tools}


def test_random_conversations(chat: Chat, mistral: Any, serving: Any) -> None:
    @settings(deadline=None, max_examples=examples(120))
    @given(records(), st.sampled_from(EFFORTS))
    def run(record: Record, effort: Effort) -> None:
        try:
            parse_record(record)
        except SampleFault as fault:
            # White space beside thinking is all that the strategy may draw wrong.
            assume("only white space" not in str(fault))
            raise
        check(chat, mistral, serving, record, effort)

    run()


def test_names_of_control_tokens_stay_text(chat: Chat) -> None:
    """Whoever writes `[INST]` or `</s>` in a text opens no turn and ends none."""

    def record(text: str) -> Record:
        own = "plain" if any(tag in text for tag in TAGS) else text
        return {
            "messages": [
                system(text),
                user(text),
                says(own, own, tool_calls=asks("c1")),
                {"role": "tool", "tool_call_id": "c1", "content": text},
                says(own),
            ],
            "tools": [{"function": {"name": "f", "description": text, "parameters": {}}}],
        }

    def controls(text: str) -> list[int]:
        tokens = chat.encode(parse_record(record(text)), "high").tokens
        return [token for token in tokens.tolist() if token < 1000]

    plain = controls("plain")
    for name in [*CONTROLS, "".join(CONTROLS)]:
        assert controls(name) == plain
        tokens = chat.encode(parse_record(record(name)), "high").tokens
        own = not any(tag in name for tag in TAGS)
        assert chat.decode(tokens).count(name) >= (7 if own else 4)


# What mistral-common refuses.

REFUSED: list[tuple[Record, str]] = [
    (
        {"messages": [user("a"), says("b"), system("c"), user("d"), says("e")]},
        "Unexpected role 'system' after role 'assistant'",
    ),
    (
        {
            "messages": [
                user("a"),
                {"role": "assistant", "tool_calls": asks("c1")},
                user("b"),
                says("c"),
            ]
        },
        "Not the same number of function calls and responses",
    ),
    (
        {
            "messages": [
                user("a"),
                {"role": "assistant", "tool_calls": asks("c1")},
                *answers("c2"),
                says("c"),
            ]
        },
        "Unexpected tool call id c2",
    ),
    (
        {
            "messages": [
                user("a"),
                {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
            ]
        },
        "validation error for ToolCall",
    ),
    (
        {
            "messages": [
                user("a"),
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "c", "function": {"name": "a b", "arguments": {}}}],
                },
            ]
        },
        "Function name was a b",
    ),
    (
        {
            "messages": [user("a"), says("b")],
            "tools": [{"function": {"name": "f", "parameters": {"type": "no such type"}}}],
        },
        "Invalid tool schema",
    ),
    ({"messages": [user(" " * 1_000_000), says("b")]}, "Regex error while tokenizing"),
]


@pytest.mark.parametrize(("record", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_refusals_of_mistral_common_are_faults(record: Record, message: str, chat: Chat) -> None:
    with pytest.raises(SampleFault, match=f"refused by mistral-common: .*{message}") as caught:
        chat.encode(parse_record(record), "none")
    assert str(caught.value).endswith("; correct the messages")
    assert len(str(caught.value)) < 260


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "properties", "required", "items", "enum", "$ref", "name"]),
            inner | st.sampled_from(["object", "string"]),
            max_size=4,
        )
    ),
    max_leaves=8,
)


def test_odd_tools_are_faults_or_encoded(chat: Chat) -> None:
    fields = dict.fromkeys(("name", "description", "parameters", "strict"), json_values)

    @settings(deadline=None, max_examples=examples(150))
    @given(
        st.fixed_dictionaries({}, optional={**fields, "name": st.just("f") | json_values}),
        st.fixed_dictionaries(
            {"name": st.sampled_from(["f", "g h"]), "arguments": json_values},
            optional={"extra": json_values},
        ),
        st.dictionaries(st.sampled_from(["id", "type", "name", "tool_call_id"]), json_values),
    )
    def run(tool: Record, function: Record, odd: Record) -> None:
        call = {"id": "c1", **odd, "function": function}
        result = {"role": "tool", "tool_call_id": "c1", "content": "x", **odd}
        record = {
            "messages": [user("a"), {"role": "assistant", "tool_calls": [call]}, result, says("b")],
            "tools": [{"type": "function", **odd, "function": tool}],
        }
        try:
            encoded = chat.encode(parse_record(record), "none")
        except SampleFault:
            return
        assert encoded.trained.any()

    run()


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("name", RECORDS)
def test_what_is_trained_is_well_formed(name: str, effort: Effort, chat: Chat) -> None:
    conversation = parse_record(RECORDS[name])
    if effort == "none":
        conversation = conversation.without_thinking()
    last = conversation.assistant_turns[-1]
    spoken = any(message.text.strip() or message.tool_calls for message in last)
    if not spoken or (effort == "high") != conversation.ends_with_thinking:
        return
    encoded = chat.encode(conversation, effort)
    turn = encoded.tokens[encoded.last_turn :].tolist()
    thinking, answer, well_formed = chat.decode_answer(turn, effort)
    assert well_formed
    assert answer.startswith("\n\n".join(message.text for message in last).strip())
    assert (thinking is not None) == (effort == "high")
