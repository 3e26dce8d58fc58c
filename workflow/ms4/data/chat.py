"""Conversation → token ids and the mask of trained tokens, with mistral-common.

mistral-common is the truth about the chat format. What it encodes is (turns in their order)

    <s> [SYSTEM_PROMPT]…[/SYSTEM_PROMPT]
    [AVAILABLE_TOOLS]…[/AVAILABLE_TOOLS][MODEL_SETTINGS]…[/MODEL_SETTINGS][INST]…[/INST]
    [THINK]…[/THINK]text[TOOL_CALLS]name[ARGS]…</s> [TOOL_RESULTS]…[/TOOL_RESULTS] …

Text never becomes a control id. So whatever stands outside a pair of brackets, <s> aside, is
the assistant's, and one cumulative sum over the ids finds all of its turns (`masking`). Most
conversations are encoded from their pieces (`segments`), which gives the same ids sooner.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken
from mistral_common.exceptions import MistralCommonException
from mistral_common.protocol.instruct.chunk import ImageChunk, ImageURLChunk
from mistral_common.protocol.instruct.normalize import get_normalizer
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode, get_validator
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from mistral_common.tokens.tokenizers.image import ImageEncoder, ImageEncoding
from mistral_common.tokens.tokenizers.instruct import InstructTokenizerV15
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer, load_image_encoder
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from ms4.config import Effort
from ms4.data.conversation import Conversation, Message
from ms4.data.faults import SampleFault
from ms4.data.images import MAX_SIZE, EncodedImage, Grid, encoded_image
from ms4.data.masking import Masking, Masks
from ms4.data.normalized import changes
from ms4.data.segments import Segments
from ms4.errors import Ms4Error

__all__ = ["Chat", "Encoded", "Masking"]

_CONTROLS = (
    "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
    "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[MODEL_SETTINGS]", "[/MODEL_SETTINGS]",
    "[TOOL_CALLS]", "[ARGS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[THINK]", "[/THINK]",
    "[IMG]", "[IMG_BREAK]", "[IMG_END]",
)  # fmt: skip


@dataclass(frozen=True)
class Encoded:
    """A conversation in tokens."""

    tokens: npt.NDArray[np.int32]
    trained: npt.NDArray[np.uint8]
    """1 on each token that is a target of the loss."""
    turn_ends: npt.NDArray[np.int64]
    """The position after each assistant turn's </s>: where the conversation may be cut."""
    images: tuple[EncodedImage, ...] = ()
    """In the order of their tokens."""
    changed: Counter[str] = field(default_factory=Counter)
    """What mistral-common's rules changed, as `normalized.changes` counts it."""

    @property
    def last_turn(self) -> int:
        """Where the assistant's last turn begins; of a conversation whose last turn is trained."""
        return int(np.flatnonzero(self.trained == 0)[-1]) + 1

    @property
    def prompt(self) -> npt.NDArray[np.int32]:
        """The tokens before the assistant's last turn."""
        return self.tokens[: self.last_turn]


class _GridEncoder(ImageEncoder):
    """Writes an image's tokens by its grid alone; the pixels are prepared elsewhere."""

    grids: Sequence[Grid] = ()
    used: list[int]

    def __call__(self, content: ImageChunk | ImageURLChunk) -> ImageEncoding:
        """The tokens of the image whose number stands as the chunk's URL."""
        if not isinstance(content, ImageURLChunk):
            raise TypeError("images are handed over by their numbers")
        number = int(content.get_url())
        columns, rows = self.grids[number]
        tokens = ([self.special_ids.img] * columns + [self.special_ids.img_break]) * rows
        tokens[-1] = self.special_ids.img_end
        self.used.append(number)
        return ImageEncoding(tokens=tokens, image=np.empty(0, dtype=np.float32))


class Chat:
    """The model's tokenizer and chat format."""

    def __init__(self, path: Path, max_image: int = MAX_SIZE) -> None:
        """Load a `tekken.json`.

        Args:
            path: the file.
            max_image: longest side, in pixels, that an image is scaled down to.

        Raises:
            Ms4Error: it is not a tokenizer of this model's version.
        """
        self._max_image = max_image
        try:
            mistral = MistralTokenizer.from_file(path, mode=ValidationMode.agnostic)
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            raise Ms4Error(
                f"{path}: cannot be loaded as a tokenizer ({_one_line(error)}); fetch it again."
            ) from error
        except MistralCommonException as error:
            raise Ms4Error(
                f"{path}: not a tokenizer file ({_one_line(error)}); "
                "the file of Mistral Small 4 is called tekken.json."
            ) from error
        tokenizer = mistral.instruct_tokenizer.tokenizer
        builder = getattr(tokenizer, "model_settings_builder", None)
        if not isinstance(tokenizer, Tekkenizer) or not getattr(builder, "reasoning_effort", None):
            raise Ms4Error(
                f"{path}: a tokenizer of version {tokenizer.version.value} without reasoning "
                "efforts; take the tekken.json of Mistral Small 4."
            )
        self._tokenizer = tokenizer
        special = {name: tokenizer.get_special_token(name) for name in _CONTROLS}
        self.bos, self.eos, self.pad = special["<s>"], special["</s>"], special["<pad>"]
        self.think, self.end_think = special["[THINK]"], special["[/THINK]"]
        self._tool_ids = {special["[TOOL_CALLS]"], special["[ARGS]"]}
        self._inst = special["[INST]"]
        self._image, self._end_image = special["[IMG]"], special["[IMG_END]"]
        self._in_image = {self._image, special["[IMG_BREAK]"]}
        self._first_text_id = tokenizer.num_special_tokens
        self._masks = Masks(special, self._first_text_id)
        self._grid_encoder: _GridEncoder | None = None
        if tokenizer.image is not None:
            ids = load_image_encoder(tokenizer.image, tokenizer).special_ids
            self._grid_encoder = _GridEncoder(tokenizer.image, ids)
        self._mistral: MistralTokenizer[Any, Any, Any, Any, Any] = MistralTokenizer(
            InstructTokenizerV15(tokenizer, image_encoder=self._grid_encoder),
            get_validator(tokenizer.version, mode=ValidationMode.agnostic),
            get_normalizer(tokenizer.version, builder),
        )
        # Not part of mistral-common's interface: without it all goes the slow way.
        engine = getattr(tokenizer, "_model", None)
        self._segments = (
            Segments(engine, special, self._first_text_id, self._head)
            if isinstance(engine, tiktoken.Encoding)
            else None
        )

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self._tokenizer.n_words

    def encode(
        self, conversation: Conversation, effort: Effort, masking: Masking | None = None
    ) -> Encoded:
        """Token ids of the whole conversation, and which of them are trained: none, maybe.

        Args:
            conversation: its images resolved to their bytes (`images.resolve`).
            effort: the reasoning effort; plain text has none.
            masking: what of the assistant's turns is trained; None: everything.

        Raises:
            SampleFault: mistral-common refuses the conversation.
        """
        if conversation.plain is not None:
            return self._encode_plain(conversation.plain)
        images = self._images(conversation)
        tokens, order = self._encode(conversation, effort, [image.grid for image in images])
        weights = _turn_weights(conversation)
        trained, turn_ends = self._masks.find(tokens, masking or Masking(), weights)
        return Encoded(
            tokens,
            trained,
            turn_ends,
            tuple(images[number] for number in order),
            changes(conversation),
        )

    def encode_slowly(self, conversation: Conversation, effort: Effort) -> npt.NDArray[np.int32]:
        """Token ids by mistral-common's own code alone: what the fast way is tested against.

        Raises:
            SampleFault: mistral-common refuses the conversation.
        """
        grids = [image.grid for image in self._images(conversation)]
        return self._encode_slowly(conversation, effort, grids)[0]

    def _encode_plain(self, text: str) -> Encoded:
        """Text for continued pre-training: <s>, the text, </s>; all but <s> is trained."""
        try:
            ids = self._tokenizer.encode(text, bos=True, eos=True)
        except ValueError as error:
            raise SampleFault(
                f"refused by the tokenizer: {_one_line(error)}; shorten the text"
            ) from error
        tokens = np.array(ids, dtype=np.int32)
        trained = np.ones(len(tokens), dtype=np.uint8)
        trained[0] = 0
        ends = np.array([len(tokens)], dtype=np.int64)
        return Encoded(tokens, trained, ends, (), changes(Conversation((), plain=text)))

    def _images(self, conversation: Conversation) -> list[EncodedImage]:
        parts = [
            part
            for message in conversation.messages
            for part in message.parts
            if part.kind == "image"
        ]
        if parts and self._grid_encoder is None:
            raise SampleFault("holds images, which this tokenizer does not know; remove them")
        images = []
        for part in parts:
            if part.image is None or not isinstance(part.image.value, bytes):
                raise TypeError("images must be resolved before they are encoded")
            images.append(encoded_image(part.image.value, self._max_image))
        return images

    def _encode(
        self, conversation: Conversation, effort: Effort, grids: list[Grid]
    ) -> tuple[npt.NDArray[np.int32], list[int]]:
        """The ids, and the numbers of the images in the order of their tokens."""
        if self._segments is not None:
            found = self._segments.encode(conversation, effort, grids)
            if found is not None:
                tokens = np.array(found[0], dtype=np.int32)
                tokens += self._first_text_id
                return tokens, found[1]
        return self._encode_slowly(conversation, effort, grids)

    def _encode_slowly(
        self, conversation: Conversation, effort: Effort, grids: list[Grid]
    ) -> tuple[npt.NDArray[np.int32], list[int]]:
        used: list[int] = []
        if self._grid_encoder is not None:
            self._grid_encoder.grids, self._grid_encoder.used = grids, used
        messages = _openai_messages(conversation.messages)
        # A round trip through JSON is the fastest deep copy of what came from JSON.
        tools = json.loads(json.dumps(conversation.tools))
        return np.array(self._ask(messages, tools, effort), dtype=np.int32), used

    def _head(self, tools: str, effort: Effort) -> list[int]:
        """What stands before the first [INST]: tools (as JSON) and settings, as mistral-common
        writes them."""
        messages: list[dict[str, Any]] = [{"role": "user", "content": ""}]
        tokens = self._ask(messages, json.loads(tools) if tools else [], effort)
        return tokens[1 : tokens.index(self._inst)]

    def _ask(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]], effort: Effort
    ) -> list[int]:
        """mistral-common's own ids; it may change what it is given.

        Raises:
            SampleFault: it refuses.
        """
        try:
            request: ChatCompletionRequest = ChatCompletionRequest.from_openai(  # type: ignore[type-arg]
                messages=messages, tools=tools or None, reasoning_effort=effort
            )
            tokens: list[int] = self._mistral.encode_chat_completion(request).tokens
        except (MistralCommonException, ValueError, AssertionError, RecursionError) as error:
            raise SampleFault(
                f"refused by mistral-common: {_one_line(error)}; correct the messages"
            ) from error
        return tokens

    @property
    def first_text_id(self) -> int:
        """Ids below are control tokens."""
        return self._first_text_id

    def decode(self, tokens: npt.NDArray[np.int32] | list[int]) -> str:
        """Text of token ids; control ids by their names."""
        return self._tokenizer.decode([int(token) for token in tokens], SpecialTokenPolicy.KEEP)

    def decode_shown(self, tokens: npt.NDArray[np.int32]) -> str:
        """Text of token ids as `decode` gives it, but for images: each by the number of its tokens,
        `[IMG × 345]`."""
        shown = []
        ids = iter(tokens.tolist())
        text: list[int] = []
        for token in ids:
            if token not in self._in_image:
                text.append(token)
                continue
            count = 2  # this one and the end
            while next(ids, self._end_image) != self._end_image:
                count += 1
            shown += [self.decode(text), f"[IMG × {count:,}]"]
            text = []
        return "".join([*shown, self.decode(text)])

    def decode_question(self, tokens: list[int]) -> str:
        """Text of a prompt; each image is one [IMG]."""
        short = [token for token in tokens if token not in self._in_image]
        return self.decode([self._image if t == self._end_image else t for t in short])

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


def _openai_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """In OpenAI's form, each image's number in the place of its URL."""
    made, number = [], 0
    for message in messages:
        fields = message.to_openai()
        for index, part in enumerate(message.parts):
            if part.kind == "image":
                fields["content"][index] = {"type": "image_url", "image_url": {"url": str(number)}}
                number += 1
        made.append(fields)
    return made


def _turn_weights(conversation: Conversation) -> list[int] | None:
    """The weight of each turn of the assistant; None if all are 1.

    Raises:
        SampleFault: messages of one turn have different weights.
    """
    messages = conversation.messages
    if all(message.weight == 1 for message in messages if message.role == "assistant"):
        return None
    weights = []
    for role, turn in groupby(messages, key=lambda message: message.role):
        if role == "assistant":
            found = {message.weight for message in turn}
            if len(found) > 1:
                raise SampleFault(
                    "assistant messages in a row are one turn with one end, but their weights "
                    "differ; give them one weight, or join them"
                )
            weights.append(found.pop())
    return weights


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
