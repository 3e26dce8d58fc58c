"""Held-out by content, and near-duplicates: what MinHash finds against counting every shingle."""

from __future__ import annotations

import hashlib
import random
import re

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ms4.data.conversation import Conversation, Message, Part
from ms4.data.split import BANDS, NearDuplicates, held_out, signature, text_of
from tests.examples import examples

WORDS = [f"word{n}" for n in range(400)]


def key(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def test_the_share_is_held_out_and_stays_so() -> None:
    keys = [key(number) for number in range(20_000)]
    at_ten = {k for k in keys if held_out(k, 0.1)}
    assert abs(len(at_ten) / len(keys) - 0.1) < 0.01
    assert at_ten < {k for k in keys if held_out(k, 0.2)}
    assert not any(held_out(k, 0.0) for k in keys)
    assert all(held_out(k, 1.0) for k in keys)
    assert held_out(b"\xff" * 32, 1.0)
    # Which ones they are may never change: another split would leak between runs.
    assert [n for n in range(60) if held_out(key(n), 0.1)] == [9, 39, 49, 51, 55]


def test_signatures_never_change() -> None:
    digest = hashlib.sha256(signature("The quick brown fox jumps over it").tobytes()).hexdigest()
    assert digest[:16] == GOLDEN


GOLDEN = "76a81a0b7f1bb243"


def shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    size = min(5, max(len(words), 1))
    return {tuple(words[at : at + size]) for at in range(max(len(words) - size + 1, 1))}


@settings(deadline=None, max_examples=examples(200))
@given(st.randoms(use_true_random=False), st.integers(0, 300), st.integers(0, 60))
def test_the_estimate_is_near_the_true_similarity(
    dice: random.Random, length: int, edits: int
) -> None:
    first = dice.choices(WORDS, k=length)
    second = list(first)
    for _ in range(edits):
        place = dice.randint(0, len(second))
        second[place : place + dice.randint(0, 1)] = dice.choices(WORDS, k=dice.randint(0, 2))
    a, b = " ".join(first), ", ".join(second).upper()
    true = len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))
    estimate = float((signature(a) == signature(b)).mean())
    assert abs(estimate - true) < 0.25  # five standard deviations and more
    if true == 1:
        assert estimate == 1


def test_near_duplicates_are_found_and_others_are_not() -> None:
    dice = random.Random(0)
    texts = [" ".join(dice.choices(WORDS, k=dice.randint(30, 300))) for _ in range(300)]
    index = NearDuplicates()
    for number, text in enumerate(texts):
        index.add(f"set:{number}", signature(text))
    for number, text in enumerate(texts):
        words = text.split()
        words[dice.randrange(len(words))] = "another"
        found = index.find(signature(" ".join(words)))
        true = len(shingles(text) & shingles(" ".join(words))) / len(
            shingles(text) | shingles(" ".join(words))
        )
        if true > 0.93:
            assert found is not None
            assert found[0] == f"set:{number}"
        assert index.find(signature(" ".join(dice.choices(WORDS, k=100)))) is None
        exact = index.find(signature(text.upper() + "!"))
        assert exact == (f"set:{number}", 1.0)
    assert BANDS == 32


def test_long_texts_and_texts_of_nothing() -> None:
    long = " ".join(random.Random(1).choices(WORDS, k=5000))
    assert (signature(long) == signature(long + " end")).mean() > 0.95
    assert (signature("") == signature(" !? ")).all()
    assert (signature("yes") != signature("no")).any()
    assert signature("a \ud800 b").dtype == np.uint32
    assert NearDuplicates().find(signature("x")) is None


def test_what_counts_of_a_conversation() -> None:
    conversation = Conversation(
        (
            Message("system", (Part("text", "be brief"),)),
            Message("user", (Part("text", "a"), Part("image"))),
            Message("assistant", (Part("thinking", "t"), Part("text", "b"))),
            Message("tool", (Part("text", "r"),), tool_call_id="c"),
        )
    )
    assert text_of(conversation) == "a\nt\nb"
    assert text_of(Conversation((), plain="p")) == "p"
