"""Samples as the model sees them: control tokens by name, images by their number of tokens, what is
trained marked."""

from __future__ import annotations

import numpy as np

from ms4.data.chat import Chat, Encoded
from ms4.data.faults import count as count
from ms4.errors import printable

EXAMPLE_CHARACTERS = 600
_STRETCH_CHARACTERS = 160


def stretches(chat: Chat, encoded: Encoded) -> list[tuple[str, bool]]:
    """The text of each run of tokens that are all trained, or all not, and which it is."""
    changes = np.flatnonzero(np.diff(encoded.trained)) + 1
    return [
        (chat.decode_shown(tokens), bool(trained[0]))
        for tokens, trained in zip(
            np.split(encoded.tokens, changes), np.split(encoded.trained, changes), strict=True
        )
    ]


def pieces(chat: Chat, encoded: Encoded) -> list[tuple[str, bool, bool]]:
    """The text of each run of tokens that are alike in whether they are trained and whether they
    are control tokens, and those two."""
    control = encoded.tokens < chat.first_text_id
    changes = np.flatnonzero(np.diff(2 * encoded.trained.astype(np.int8) + control)) + 1
    return [
        (chat.decode_shown(tokens), bool(trained[0]), bool(special[0]))
        for tokens, trained, special in zip(
            np.split(encoded.tokens, changes),
            np.split(encoded.trained, changes),
            np.split(control, changes),
            strict=True,
        )
    ]


def render_example(chat: Chat, encoded: Encoded) -> str:
    """A sample as the model sees it, control tokens by name, what is trained between ⟦ and ⟧."""
    parts = []
    for text, trained in stretches(chat, encoded):
        if len(text) > _STRETCH_CHARACTERS:
            half = _STRETCH_CHARACTERS // 2
            text = f"{text[:half]} … {text[-half:]}"
        parts.append(f"⟦{text}⟧" if trained else text)
    example = "".join(parts)
    if len(example) > EXAMPLE_CHARACTERS:
        example = example[:EXAMPLE_CHARACTERS] + " …"
    return example


def render_whole(chat: Chat, encoded: Encoded, colour: bool) -> str:
    """All of a sample; what is trained is green and bold, or else between ⟦ and ⟧. Control
    characters of the texts become escapes."""
    opening, closing = ("\x1b[1;32m", "\x1b[0m") if colour else ("⟦", "⟧")
    return "".join(
        f"{opening}{printable(text)}{closing}" if trained else printable(text)
        for text, trained in stretches(chat, encoded)
    )
