"""The fast way to a conversation's token ids: piece by piece, straight from the vocabulary.

mistral-common builds requests, validates, normalizes and decodes again, which takes several times
as long as the encoding itself. Here the same rules of its v15 format are applied to a checked
conversation. What is not plain (an odd tool call, an order of roles that it refuses) is left to
mistral-common, so that refusals and their words are its own. Tests hold the two together.

Ids are collected as ranks of the vocabulary, control ids as negative ones; one addition at the end
turns both into ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache

import tiktoken

from ms4.config import Effort
from ms4.data.conversation import Conversation, Message
from ms4.data.faults import SampleFault

Grid = tuple[int, int]
"""Columns and rows of an image's tokens."""
Ids = list[int]

_FOLLOWS = {
    "system": {"user", "assistant", "system"},
    "user": {"assistant", "system", "user"},
    "assistant": {"assistant", "user", "tool"},
    "tool": {"assistant", "tool", "user"},
}
"""Which roles may follow a role."""
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_LONGEST = 50_000
"""Characters of a text that are encoded here. Of several hundred thousand blanks the vocabulary's
engine panics; mistral-common's way to it ends in an error instead."""


class _NotPlainError(Exception):
    """Left to mistral-common."""


class Segments:
    """Encodes conversations from pieces."""

    def __init__(
        self,
        encoding: tiktoken.Encoding,
        special: dict[str, int],
        specials: int,
        head: Callable[[str, Effort], Ids],
    ) -> None:
        """Prepare the pieces.

        Args:
            encoding: the vocabulary's engine.
            special: ids of the control tokens by name.
            specials: number of control ids; the text of rank r has id specials + r.
            head: ids of tools (as JSON) and effort as they stand before the first [INST].
        """
        self._encoding = encoding
        self._special = {name: id_ - specials for name, id_ in special.items()}
        self._head = lru_cache(maxsize=64)(
            lambda tools, effort: [id_ - specials for id_ in head(tools, effort)]
        )
        # The same few system prompts stand in thousands of conversations.
        self._system = lru_cache(maxsize=64)(self._text)

    def encode(
        self, conversation: Conversation, effort: Effort, grids: Sequence[Grid]
    ) -> tuple[Ids, list[int]] | None:
        """Ids less the number of control ids, or None: mistral-common has to look at it.

        Args:
            conversation: checked, with messages.
            effort: the reasoning effort.
            grids: the tokens of each image, in the order of the conversation.

        Returns:
            The ids, and the numbers of the images in the order of their tokens.
        """
        messages = conversation.messages
        try:
            self._check(messages)
            writer = _Writer(self, messages, grids)
            return writer.write(conversation, effort), writer.used
        except (_NotPlainError, SampleFault):  # the second: it refuses the tools
            return None

    def _text(self, text: str) -> Ids:
        if len(text) > _LONGEST:
            raise _NotPlainError
        ids: Ids = self._encoding.encode_ordinary(text)
        return ids

    def _check(self, messages: Sequence[Message]) -> None:
        """Order of roles, and tool results by their ids; as mistral-common's validators."""
        asked: set[str] = set()
        answered: set[str] = set()
        before = None
        for message in messages:
            role = message.role
            if before is not None and role not in _FOLLOWS[before]:
                raise _NotPlainError
            before = role
            if role == "tool":
                id_ = message.tool_call_id
                if id_ not in asked or id_ in answered:
                    raise _NotPlainError
                if message.name is not None and not _NAME.fullmatch(message.name):
                    raise _NotPlainError
                answered.add(id_)
            elif role == "assistant":
                if len(asked) != len(answered):
                    raise _NotPlainError
                if message.tool_calls or asked:
                    asked, answered = {_call_id(call) for call in message.tool_calls}, set()
                    if len(asked) != len(message.tool_calls):
                        raise _NotPlainError


def _call_id(call: dict[str, object]) -> str:
    id_ = call.get("id")
    if not isinstance(id_, str) or not id_ or id_ == "null":
        raise _NotPlainError
    if not call.keys() <= {"id", "type", "function"} or call.get("type", "function") != "function":
        raise _NotPlainError
    return id_


class _Writer:
    """One conversation on its way to ids."""

    def __init__(
        self, segments: Segments, messages: Sequence[Message], grids: Sequence[Grid]
    ) -> None:
        self._segments, self._messages, self._grids = segments, messages, grids
        self.used: list[int] = []
        # Numbers of each message's first image: tool results may change their order.
        self._first_image: list[int] = []
        count = 0
        for message in messages:
            self._first_image.append(count)
            if len(message.parts) > 1 or (message.parts and message.parts[0].kind == "image"):
                count += sum(part.kind == "image" for part in message.parts)

    def write(self, conversation: Conversation, effort: Effort) -> Ids:
        special = self._segments._special
        out = [special["<s>"]]
        messages, first_user = self._messages, True
        at, calls = 0, list[str]()
        while at < len(messages):
            role, end = messages[at].role, at + 1
            while end < len(messages) and messages[end].role == role:
                end += 1
            if role == "system":
                for number in range(at, end):
                    out.append(special["[SYSTEM_PROMPT]"])
                    for piece in self._pieces(number, number + 1):
                        if not isinstance(piece, str):
                            raise _NotPlainError
                        out += self._segments._system(piece)
                    out.append(special["[/SYSTEM_PROMPT]"])
            elif role == "user":
                if first_user:
                    tools = json.dumps(conversation.tools) if conversation.tools else ""
                    out += self._segments._head(tools, effort)
                    first_user = False
                out.append(special["[INST]"])
                pieces = self._pieces(at, end)
                if len(pieces) == 2 and isinstance(pieces[0], str) and isinstance(pieces[1], int):
                    pieces.reverse()  # one text and then one image: the image goes first
                self._write_pieces(out, pieces)
                out.append(special["[/INST]"])
            elif role == "assistant":
                self._write_turn(out, at, end)
                calls += [str(call["id"]) for m in messages[at:end] for call in m.tool_calls]
            else:
                order = {id_: number for number, id_ in enumerate(calls)}
                results = sorted(range(at, end), key=lambda n: order[str(messages[n].tool_call_id)])
                for number in results:
                    out.append(special["[TOOL_RESULTS]"])
                    self._write_pieces(out, self._pieces(number, number + 1))
                    out.append(special["[/TOOL_RESULTS]"])
                calls = []
            at = end
        return out

    def _pieces(self, start: int, end: int) -> list[str | int]:
        """Messages start … end - 1 as texts and numbers of images.

        Texts of one message are joined as they are, those of different messages by a blank line,
        and an image ends a text.
        """
        messages = self._messages
        if end - start == 1:
            parts = messages[start].parts
            if not parts:
                return []
            if len(parts) == 1 and parts[0].kind == "text":
                return [parts[0].text]
        pieces: list[str | int] = []
        joined = ""
        for number in range(start, end):
            separate = bool(joined)
            image = self._first_image[number]
            for part in messages[number].parts:
                if part.kind == "text":
                    if part.text:
                        joined += "\n\n" + part.text if separate else part.text
                        separate = False
                elif part.kind == "image":
                    if joined:
                        pieces.append(joined)
                        joined, separate = "", False
                    pieces.append(image)
                    image += 1
                else:
                    raise _NotPlainError
        if joined:
            pieces.append(joined)
        return pieces

    def _write_pieces(self, out: Ids, pieces: list[str | int]) -> None:
        special = self._segments._special
        for piece in pieces:
            if isinstance(piece, str):
                out += self._segments._text(piece)
                continue
            columns, rows = self._grids[piece]
            row = [special["[IMG]"]] * columns
            for _ in range(rows):
                out += row
                out.append(special["[IMG_BREAK]"])
            out[-1] = special["[IMG_END]"]
            self.used.append(piece)

    def _write_turn(self, out: Ids, start: int, end: int) -> None:
        """The assistant's messages start … end - 1: thinking, text, tool calls, </s>."""
        special, text = self._segments._special, self._segments._text
        joined, thought, said = "", False, False
        for message in self._messages[start:end]:
            separate = bool(joined)
            for part in message.parts:
                if part.kind == "thinking":
                    if joined:
                        out += text(joined)
                        joined, separate = "", False
                    out.append(special["[THINK]"])
                    out += text(part.text)
                    if part.closed:
                        out.append(special["[/THINK]"])
                    thought = said = True
                elif part.kind == "text":
                    if part.text:
                        joined += "\n\n" + part.text if separate else part.text
                        separate = False
                        said = True
                else:
                    raise _NotPlainError
        # Beside thinking, blanks at the end stay; mistral-common strips those of text alone.
        out += text(joined if thought else joined.rstrip(" "))
        for message in self._messages[start:end]:
            for call in message.tool_calls:
                said = True
                out.append(special["[TOOL_CALLS]"])
                name, arguments = _function(call["function"])
                out += text(name)
                out.append(special["[ARGS]"])
                out += text(arguments)
        if not said:
            raise _NotPlainError
        out.append(special["</s>"])


def _function(function: object) -> tuple[str, str]:
    """Name and arguments of a call, these as JSON in the one form that is encoded."""
    if not isinstance(function, dict) or not function.keys() <= {"name", "arguments"}:
        raise _NotPlainError
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _NotPlainError
    if not isinstance(arguments, dict | str | None):
        raise _NotPlainError
    try:
        if isinstance(arguments, str) and arguments:
            arguments = json.loads(arguments)
        return name, json.dumps(arguments or {}, ensure_ascii=False)
    except (ValueError, RecursionError):
        raise _NotPlainError from None
