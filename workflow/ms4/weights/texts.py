"""What the loss of a base is taken of: ordinary English, or what the tiny model was taught.

The paragraphs in `ordinary.txt` were written for this.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import numpy.typing as npt
from mistral_common.tokens.tokenizers.tekken import Tekkenizer

from ms4 import tiny_text
from ms4.data.chat import Chat
from ms4.data.conversation import parse_record
from ms4.errors import Ms4Error

CONVERSATIONS = 60
"""Of the tiny model's text: about as many tokens that count as ordinary text has."""


@dataclass(frozen=True)
class Text:
    """Documents in tokens, one after the other. T tokens in all."""

    name: str
    """What it is, for a person."""
    tokens: npt.NDArray[np.int64]
    """Ids [T]."""
    documents: npt.NDArray[np.int64]
    """Number of the document of each token [T], ascending."""
    counted: npt.NDArray[np.bool_]
    """Whether the loss of predicting a token counts [T]; not that of a document's first one."""

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """Place of each token in its document [T]."""
        starts = np.searchsorted(self.documents, self.documents)
        return np.arange(len(self.tokens)) - starts


def _text(name: str, documents: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Text:
    """From pairs of tokens and whether they count."""
    numbers = [np.full(len(tokens), n) for n, (tokens, _) in enumerate(documents)]
    counted = [np.asarray(counts, dtype=bool) for _, counts in documents]
    for counts in counted:
        counts[0] = False
    return Text(
        name,
        np.concatenate([np.asarray(tokens, np.int64) for tokens, _ in documents]),
        np.concatenate(numbers),
        np.concatenate(counted),
    )


def ordinary(tekken: Path) -> Text:
    """A few paragraphs of English prose, as one document with <s> before it.

    Raises:
        Ms4Error: `tekken` is no tokenizer of this model.
    """
    Chat(tekken)  # the checks that a tokenizer of this model passes
    prose = resources.files("ms4.weights").joinpath("ordinary.txt").read_text(encoding="utf-8")
    tokens = Tekkenizer.from_file(tekken).encode(prose.strip(), bos=True, eos=False)
    return _text("English prose", [(tokens, [1] * len(tokens))])


def taught(tekken: Path) -> Text:
    """Conversations of the kind that the tiny model is taught, of which the answers count.

    Raises:
        Ms4Error: `tekken` is no tokenizer of this model.
    """
    chat = Chat(tekken)
    dice = random.Random("verify")  # noqa: S311 - not a secret
    documents = []
    for _ in range(CONVERSATIONS):
        record = tiny_text.base_record(dice)
        encoded = chat.encode(parse_record(record), record["reasoning_effort"])
        documents.append((encoded.tokens.tolist(), encoded.trained.tolist()))
    return _text("the tiny model's own text", documents)


def choose(directory: Path, vocabulary: int, *, tiny: bool) -> Text | None:
    """The text for a base, by the tokenizer beside it; None without one.

    Raises:
        Ms4Error: the tokenizer is not one, or not of a model with `vocabulary` tokens.
    """
    tekken = directory / "tekken.json"
    if not tekken.is_file():
        return None
    text = taught(tekken) if tiny else ordinary(tekken)
    if text.tokens.max() >= vocabulary:
        raise Ms4Error(
            f"{tekken}: has the token {text.tokens.max()}, and the model's vocabulary ends at "
            f"{vocabulary - 1}; put the tokenizer of this model there."
        )
    return text
