"""What a person should know of data that was read, in lines for a terminal."""

from __future__ import annotations

from ms4.data.normalized import WORDS
from ms4.data.reasoning import OTHER_TAGS, TEMPLATE
from ms4.data.render import count
from ms4.data.tally import Tally


def statements(tally: Tally, length: int) -> list[str]:
    """What is not as a person may expect, a line each."""
    lines = []
    if tally.too_long:
        lines.append(f"dropped: {too_long(tally, length)}")
    if tally.truncated:
        lines.append(f"truncated after a turn: {count(tally.truncated, 'sample')}")
    unlike = {kind for kind in tally.by_kind if ", " in kind or kind == "plain text"}
    lines += [
        f"{kind}: {count(tally.by_kind[kind]['samples'], 'sample')}, "
        f"{tally.by_kind[kind]['tokens'] / tally.tokens:.1%} of the tokens"
        for kind in sorted(unlike)
    ]
    for note, number in sorted(tally.notes.items()):
        case, policy = note.split()
        if note == OTHER_TAGS:
            lines.append(
                f"thinking by other tags ({count(number, 'sample')}): only `<think>` and `[THINK]` "
                "mean thinking; the likes of `<thinking>` are trained as text"
            )
            continue
        if note == TEMPLATE:
            lines.append(
                f"plain text with the marks of a chat template ({count(number, 'sample')}): all of "
                "it is trained, and the marks as text; give the messages instead"
            )
            continue
        did = "taken as they are" if policy == "warn" else "mended"
        lines.append(f"thinking, data.thinking.{case}: {count(number, 'case')} {did}")
    lines += [
        f"changed by mistral-common's rules: {WORDS[name]} ({count(number, 'time')})"
        for name, number in sorted(tally.changed.items())
    ]
    return lines


def image_tokens(tally: Tally) -> str:
    """How many tokens the images take, and what their cap saves."""
    text = f"{count(tally.images, 'image')}, {count(tally.image_tokens, 'token')} in all"
    if tally.image_tokens_uncapped > tally.image_tokens:
        text += f" ({tally.image_tokens_uncapped:,} if data.images.max_size did not cap them)"
    return text


def too_long(tally: Tally, length: int) -> str:
    """How many samples are too long, and the longest of them."""
    are = "is" if tally.too_long == 1 else "are"
    return (
        f"{count(tally.too_long, 'sample')} {are} longer than data.sequence_length {length:,}; "
        f"the longest, {tally.longest_place}, has {tally.longest_tokens:,} tokens"
    )
