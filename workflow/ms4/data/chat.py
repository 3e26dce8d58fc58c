"""Conversation → token ids and the mask of trained tokens, with mistral-common.

mistral-common is the truth about the chat format. What it encodes is (turns in their order)

    <s> [SYSTEM_PROMPT]…[/SYSTEM_PROMPT]
    [AVAILABLE_TOOLS]…[/AVAILABLE_TOOLS][MODEL_SETTINGS]…[/MODEL_SETTINGS][INST]…[/INST]
    [THINK]…[/THINK]text[TOOL_CALLS]name[ARGS]…</s> [TOOL_RESULTS]…[/TOOL_RESULTS] …

Text never becomes a control id. So whatever stands outside a pair of brackets, <s> aside, is
the assistant's, and one cumulative sum over the ids finds all of its turns.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from ms4.config import Effort
from ms4.data.conversation import Conversation
from ms4.data.faults import SampleFault
from ms4.errors import Ms4Error

_BRACKETS = (
    ("[INST]", "[/INST]"),
    ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    ("[MODEL_SETTINGS]", "[/MODEL_SETTINGS]"),
    ("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
)
"""What encloses everything that the assistant does not write."""


@dataclass(frozen=True)
class Encoded:
    """A conversation in tokens."""

    tokens: npt.NDArray[np.int32]
    trained: npt.NDArray[np.uint8]
    """1 on each token that the assistant writes: thinking, tool calls and </s> included."""

    @property
    def last_turn(self) -> int:
        """Where the assistant's last turn begins."""
        return int(np.flatnonzero(self.trained == 0)[-1]) + 1

    @property
    def prompt(self) -> npt.NDArray[np.int32]:
        """The tokens before the assistant's last turn."""
        return self.tokens[: self.last_turn]


class Chat:
    """The model's tokenizer and chat format."""

    def __init__(self, path: Path) -> None:
        """Load a `tekken.json`.

        Raises:
            Ms4Error: it is not a tokenizer of this model's version.
        """
        try:
            self._mistral = MistralTokenizer.from_file(path, mode=ValidationMode.agnostic)
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            raise Ms4Error(
                f"{path}: cannot be loaded as a tokenizer ({_one_line(error)}); fetch it again."
            ) from error
        except MistralCommonException as error:
            raise Ms4Error(
                f"{path}: not a tokenizer file ({_one_line(error)}); "
                "the file of Mistral Small 4 is called tekken.json."
            ) from error
        tokenizer = self._mistral.instruct_tokenizer.tokenizer
        builder = getattr(tokenizer, "model_settings_builder", None)
        if not isinstance(tokenizer, Tekkenizer) or getattr(builder, "reasoning_effort", 0) is None:
            builder = None
        if builder is None:
            raise Ms4Error(
                f"{path}: a tokenizer of version {tokenizer.version.value} without reasoning "
                "efforts; take the tekken.json of Mistral Small 4."
            )
        self._tokenizer = tokenizer
        special = self._tokenizer.get_special_token
        self.bos, self.eos, self.pad = special("<s>"), special("</s>"), special("<pad>")
        self.think, self.end_think = special("[THINK]"), special("[/THINK]")
        self._tool_ids = {special("[TOOL_CALLS]"), special("[ARGS]")}
        self._first_text_id = self._tokenizer.num_special_tokens
        # Step of the bracket depth at each special id; the last entry stands for all text.
        self._step = np.zeros(self._first_text_id + 1, dtype=np.int8)
        for opening, closing in _BRACKETS:
            self._step[special(opening)] = 1
            self._step[special(closing)] = -1

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self._tokenizer.n_words

    def encode(self, conversation: Conversation, effort: Effort) -> Encoded:
        """Token ids of the whole conversation, and which of them are trained.

        Raises:
            SampleFault: mistral-common refuses the conversation.
        """
        tokens = self._encode(conversation, effort)
        step = self._step[np.minimum(tokens, self._first_text_id)]
        outside = np.cumsum(step, dtype=np.int32) == 0
        trained = outside & (step == 0)
        trained[0] = False  # <s>
        return Encoded(tokens, trained.astype(np.uint8))

    def encode_prompt(self, conversation: Conversation, effort: Effort) -> list[int]:
        """Token ids up to where the model begins to write the last assistant turn.

        Raises:
            SampleFault: mistral-common refuses the conversation.
        """
        prompt: list[int] = self.encode(conversation, effort).prompt.tolist()
        return prompt

    def _encode(self, conversation: Conversation, effort: Effort) -> npt.NDArray[np.int32]:
        try:
            request: ChatCompletionRequest = ChatCompletionRequest.from_openai(  # type: ignore[type-arg]
                messages=[message.to_openai() for message in conversation.messages],
                # A round trip through JSON is the fastest deep copy of what came from JSON.
                tools=json.loads(json.dumps(conversation.tools)) or None,
                reasoning_effort=effort,
            )
            tokens = self._mistral.encode_chat_completion(request).tokens
        except (MistralCommonException, ValueError, AssertionError, RecursionError) as error:
            raise SampleFault(
                f"refused by mistral-common: {_one_line(error)}; correct the messages"
            ) from error
        return np.array(tokens, dtype=np.int32)

    def decode(self, tokens: npt.NDArray[np.int32] | list[int]) -> str:
        """Text of token ids; control ids by their names."""
        return self._tokenizer.decode([int(token) for token in tokens], SpecialTokenPolicy.KEEP)

    def decode_answer(self, tokens: list[int], effort: Effort) -> tuple[str | None, str, bool]:
        """Take apart what the model wrote as its turn.

        Args:
            tokens: the generated ids; what follows the first </s> is ignored.
            effort: the reasoning effort that was asked for.

        Returns:
            thinking: the text between [THINK] and [/THINK] (or the end); None without [THINK].
            answer: the rest without white space around it; tool calls stand in it as
                `[TOOL_CALLS]name[ARGS]{...}`, other control ids are left out.
            well_formed: whether the turn ends with </s>, says something, and has thinking
                exactly once and first under `high`, none under `none`.
        """
        ended = self.eos in tokens
        body = tokens[: tokens.index(self.eos)] if ended else tokens
        before, thought, after = body, None, list[int]()
        if self.think in body:
            start = body.index(self.think)
            end = body.index(self.end_think, start) if self.end_think in body[start:] else len(body)
            before, thought, after = body[:start], body[start + 1 : end], body[end + 1 :]
        written = before + after
        answer = self.decode(
            [t for t in written if t >= self._first_text_id or t in self._tool_ids]
        ).strip()
        # A second [THINK] or [/THINK] is one of the control ids that have no business here.
        only_known = all(t >= self._first_text_id or t in self._tool_ids for t in written)
        if effort == "high":
            right_thinking = (
                thought is not None
                and not before
                and all(t >= self._first_text_id for t in thought)
            )
        else:
            right_thinking = thought is None
        thinking = None
        if thought is not None:
            thinking = self.decode([t for t in thought if t >= self._first_text_id])
        return thinking, answer, bool(ended and only_known and right_thinking and answer)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
