"""Whether a sample's thinking is in order, and what becomes of it if not.

Each case has a policy (`data.thinking`): `error` and `drop` refuse the sample, `warn` takes it as
it is, `fix` mends it, or refuses it where nothing can be made of it. Nothing happens in silence:
what was taken or mended is noted with the sample, what was refused has its reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ms4.config_data import DataSection, Effort, ThinkingCase
from ms4.data import think_tags
from ms4.data.conversation import Conversation, Message, Part
from ms4.data.faults import SampleDropped, SampleFault

TEMPLATE = "template text"
"""The note of a plain text that holds a chat template's marks: a conversation written out."""
_TEMPLATE_MARKS = (
    "[INST]", "<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|user|>",
    "### Instruction:",
)  # fmt: skip
OTHER_TAGS = "other_tags text"
"""The note of a sample whose answers hold tags that mean thinking elsewhere."""


@dataclass(frozen=True)
class Settled:
    """A sample as it is trained."""

    conversation: Conversation
    effort: Effort
    notes: tuple[str, ...] = ()
    """What was let pass or mended: `missing fix`, `empty warn`."""


class _Policies:
    """What becomes of each case, and what has happened to one sample."""

    def __init__(self, data: DataSection) -> None:
        self._data = data
        self.notes: list[str] = []

    def fixes(self, case: ThinkingCase, text: str) -> bool:
        """Note the case; whether it is to be mended.

        Raises:
            SampleFault, SampleDropped: the sample is refused.
        """
        policy = self._data.thinking.get(case, "error")
        if policy == "error":
            raise SampleFault(f"{text}, or set data.thinking.{case}")
        if policy == "drop":
            raise SampleDropped(f"data.thinking.{case} is `drop`: {text}")
        self.notes.append(f"{case} {policy}")
        return policy == "fix"

    def cannot_fix(self, case: ThinkingCase, text: str) -> SampleDropped:
        """What to raise where nothing can be mended."""
        return SampleDropped(f"data.thinking.{case} is `fix`, which cannot help: {text}")


def settle(conversation: Conversation, data: DataSection) -> Settled:
    """Bring a sample's thinking in order and decide its effort.

    Raises:
        SampleFault: its thinking is not in order, and the policy is `error`.
        SampleDropped: the policy is to leave it out.
    """
    if conversation.plain is not None:
        written_out = any(mark in conversation.plain for mark in _TEMPLATE_MARKS)
        return Settled(conversation, "none", (TEMPLATE,) if written_out else ())
    policies = _Policies(data)
    if conversation.has_thinking or _has_lone_end(conversation):
        conversation = _in_order(conversation, policies)
        if data.earlier_thinking == "drop":
            conversation = without_earlier_thinking(conversation)
    effort, conversation = _effort(conversation, data, policies)
    if any(
        part.kind == "text" and think_tags.has_other_tag(part.text)
        for message in conversation.messages
        if message.role == "assistant"
        for part in message.parts
    ):
        policies.notes.append(OTHER_TAGS)
    return Settled(conversation, effort, tuple(policies.notes))


def without_earlier_thinking(conversation: Conversation) -> Conversation:
    """The conversation without the thinking of turns before the last."""
    last_user = max(i for i, m in enumerate(conversation.messages) if m.role != "assistant")
    messages = tuple(
        message if index > last_user else message.without_thinking()
        for index, message in enumerate(conversation.messages)
    )
    return replace(conversation, messages=messages)


def check_order(conversation: Conversation) -> None:
    """Check a held-out sample, for which there are no policies.

    Raises:
        SampleFault: thinking is empty, not closed, or without an answer.
    """
    _in_order(conversation, _Policies(DataSection(train=("-",))))


def _has_lone_end(conversation: Conversation) -> bool:
    return any(
        think_tags.split_at_end(part.text) is not None
        for message in conversation.messages
        if message.role == "assistant"
        for part in message.parts
        if part.kind == "text"
    )


def _in_order(conversation: Conversation, policies: _Policies) -> Conversation:
    messages: list[Message] = []
    for first, turn in _runs(conversation.messages):
        where = f"message {first + 1} (assistant)"
        messages += _turn(turn, where, policies) if turn[0].role == "assistant" else turn
    return replace(conversation, messages=tuple(messages))


def _runs(messages: tuple[Message, ...]) -> Iterator[tuple[int, list[Message]]]:
    """Turns of the assistant, and all other messages alone, with the first one's index."""
    first = 0
    while first < len(messages):
        end = first + 1
        while (
            messages[first].role == "assistant"
            and end < len(messages)
            and messages[end].role == "assistant"
        ):
            end += 1
        yield first, list(messages[first:end])
        first = end


def _turn(turn: list[Message], where: str, policies: _Policies) -> list[Message]:
    turn = _lone_end(turn, where, policies)
    thinking = next((p for message in turn for p in message.parts if p.kind == "thinking"), None)
    if thinking is None:
        return turn
    # Where there is thinking, it is the turn's first part: `parse_record` sees to that.
    if not thinking.text.strip():
        text = f"{where}: the thinking is empty; fill it or remove the part"
        if not policies.fixes("empty", text):
            return turn
        turn[0] = turn[0].without_thinking()
        if not _answers(turn):
            raise policies.cannot_fix("empty", f"{where}: says nothing beside empty thinking")
        return turn
    inside = think_tags.split_at_end(thinking.text)
    if inside is not None:
        return _answer_inside(turn, inside, where, policies)
    if think_tags.has_opening(thinking.text):
        text = f"{where}: a beginning of thinking inside the thinking; remove it"
        if policies.fixes("unclosed", text):
            thinking = replace(thinking, text=think_tags.without_openings(thinking.text))
            turn[0] = _rethought(turn[0], thinking)
    if not _answers(turn):
        if not thinking.closed:
            text = f"{where}: thinking without an end, so without an answer; end it and add one"
            if policies.fixes("unclosed", text):
                raise policies.cannot_fix("unclosed", text)
            return turn
        text = f"{where}: a turn of nothing but thinking has no answer; add one"
        if policies.fixes("no_answer", text):
            raise policies.cannot_fix("no_answer", text)
        return turn
    if not thinking.closed:
        text = f"{where}: content after thinking that is not closed; remove `closed`"
        if policies.fixes("unclosed", text):
            turn[0] = _rethought(turn[0], replace(thinking, closed=True))
    return turn


def _answers(turn: list[Message]) -> bool:
    return any(message.text.strip() or message.tool_calls for message in turn)


def _rethought(message: Message, thinking: Part) -> Message:
    rest = tuple(part for part in message.parts if part.kind != "thinking")
    return replace(message, parts=(thinking, *rest) if thinking.text else rest)


def _lone_end(turn: list[Message], where: str, policies: _Policies) -> list[Message]:
    """An end of thinking in a text, without a beginning: servers put the beginning into the
    prompt, and records of what they answered lack it."""
    if any(part.kind == "thinking" for message in turn for part in message.parts):
        return turn
    for number, message in enumerate(turn):
        for at, part in enumerate(message.parts):
            found = think_tags.split_at_end(part.text) if part.kind == "text" else None
            if found is None:
                continue
            text = f"{where}: an end of thinking without a beginning; put one first"
            if not policies.fixes("unclosed", text):
                return turn
            thinking, answer = found
            if number or at or think_tags.split_at_end(answer) is not None:
                raise policies.cannot_fix("unclosed", f"{text} (it stands behind other content)")
            parts = [Part("thinking", thinking)] if thinking else []
            parts += [Part("text", answer)] if answer else []
            turn[0] = replace(message, parts=(*parts, *message.parts[1:]))
            if not (turn[0].parts or message.tool_calls):
                raise policies.cannot_fix("unclosed", text)
            return turn
    return turn


def _answer_inside(
    turn: list[Message], inside: tuple[str, str], where: str, policies: _Policies
) -> list[Message]:
    text = (
        f"{where}: an end of thinking inside the thinking; put the answer behind it into the text"
    )
    if not policies.fixes("no_answer", text):
        return turn
    thinking, answer = inside
    if any(m.text.strip() for m in turn) or think_tags.split_at_end(answer) or not answer.strip():
        raise policies.cannot_fix("no_answer", text)
    rest = [Part("thinking", think_tags.without_openings(thinking))] if thinking else []
    turn[0] = replace(turn[0], parts=(*rest, Part("text", answer)))
    return turn


def _effort(
    conversation: Conversation, data: DataSection, policies: _Policies
) -> tuple[Effort, Conversation]:
    effort: Effort
    if data.reasoning == "per_sample":
        derived: Effort = "high" if conversation.has_thinking else "none"
        effort = conversation.effort or derived
        why, way_out = "it is", "correct its `reasoning_effort`,"
        if conversation.effort is None:
            why, way_out = "earlier ones do, so it is", "remove their thinking,"
    else:
        effort = "none" if data.reasoning == "none" else "high"
        why, way_out = f"data.reasoning is `{data.reasoning}`, so it is", "use `per_sample`,"
    if effort == "none" and conversation.has_thinking:
        text = f"holds thinking, but {why} of effort `none`; {way_out} or remove the thinking"
        if policies.fixes("under_none", text):
            conversation = conversation.without_thinking()
            _check_says_something(conversation, policies, "under_none")
    if effort == "high" and not conversation.ends_with_thinking:
        text = (
            f"the last turn does not think, but {why} of effort `high`; {way_out} or add thinking "
            "to that turn"
        )
        if policies.fixes("missing", text):
            conversation = conversation.without_thinking()
            _check_says_something(conversation, policies, "missing")
            effort = "none"
    return effort, conversation


def _check_says_something(
    conversation: Conversation, policies: _Policies, case: ThinkingCase
) -> None:
    for message in conversation.messages:
        if message.role == "assistant" and not (message.text.strip() or message.tool_calls):
            raise policies.cannot_fix(case, "a turn says nothing beside its thinking")
