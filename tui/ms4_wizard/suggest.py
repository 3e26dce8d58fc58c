"""What the numbers of the training would be, by the data and the plan, and why."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from ms4 import fitting
from ms4_wizard.answers import Answers
from ms4_wizard.costs import Cost
from ms4_wizard.speed import Size

STEP_TOKENS = 16_384
"""Tokens of a step that adapters learn well from: 8 sequences of 2048."""
FEWEST_STEPS = 50
"""Steps that a run has at least, by smaller steps where there is little data."""
LONGEST = 32_768
"""Tokens of a sequence beyond which a person decides."""
LEARNING_RATE = 1e-4
"""Of adapters, FP32 held, of the 119 B model."""
TINY_LEARNING_RATE = 2e-3
"""Of the tiny model, measured with the demo."""


_BEST: dict[Hashable, int] = {}
"""Searches that were made: one takes some 15 ms, too long for a key stroke that changes nothing."""


@dataclass(frozen=True)
class Suggestion:
    """A value for a field."""

    value: Any
    reason: str


def suggestions(answers: Answers, data: Size | None, found: Cost | None) -> dict[str, Suggestion]:
    """A value for each of the training's questions, by its field.

    Args:
        answers: the answers so far; what they say of the sequence length and the epochs decides the
            size of a step.
        data: how much data there is, if it was looked at.
        found: the plan, if there is one.
    """
    length = answers.data.sequence_length
    batch, why = _batch(answers, data, length)
    micro = _micro_batch(found, batch)
    return {
        "data.sequence_length": _length(data),
        "train.micro_batch": Suggestion(
            micro,
            "The fastest by estimate of what the memory has room for."
            if micro > 1
            else "The least memory; packed sequences are full of tokens anyway.",
        ),
        "train.accumulation": Suggestion(
            batch // micro,
            f"{why} In micro-batches of {micro}, that is {batch // micro} a step.",
        ),
        "train.learning_rate": _learning_rate(answers),
        "train.epochs": _epochs(data),
        "train.checkpointing": Suggestion(
            "auto",
            "The fastest that the plan has room for"
            + (f": now {found.config.train.checkpointing}." if found is not None else "."),
        ),
    }


def _length(data: Size | None) -> Suggestion:
    if data is None:
        return Suggestion(2048, "The data was not looked at; 2048 suits most chats.")
    length = 1 << max(8, math.ceil(math.log2(max(data.longest, 1))))
    if length > LONGEST:
        return Suggestion(
            LONGEST,
            f"The longest sample has {data.longest:,} tokens; longer ones than {LONGEST:,} would "
            "be dropped or cut (data.too_long), or take more memory here.",
        )
    return Suggestion(
        length, f"The longest sample has {data.longest:,} tokens; a power of two holds it."
    )


def _batch(answers: Answers, data: Size | None, length: int) -> tuple[int, str]:
    """Sequences of a step, a power of two, and why."""
    batch = min(64, max(1, STEP_TOKENS // length))
    why = f"About {STEP_TOKENS:,} tokens a step: {batch} sequences of {length:,}."
    if data is not None:
        passes = data.bins(length) * answers.train.epochs
        most = max(1, int(passes // FEWEST_STEPS))
        if most < batch:
            batch = most
            why = f"Little data: smaller steps, so that there are {FEWEST_STEPS} of them."
    return 1 << int(math.log2(batch)), why


def _micro_batch(found: Cost | None, batch: int) -> int:
    if found is None or found.budget is None or found.kind == "cpu":
        return 1
    train, data = found.config.train, found.config.data
    key = (
        *(batch, found.budget, found.dims, found.kind, found.config.model.experts),
        *(found.config.adapters.model_dump_json(), data.sequence_length),
        *(train.optimizer, train.loss_chunk, train.offload_activations),
    )
    if key not in _BEST:
        tried = fitting.changed(found.config, "train", micro_batch=1, accumulation=batch)
        best = fitting.best(tried, found.dims, found.kind, found.budget)
        if len(_BEST) > 1000:
            _BEST.clear()
        _BEST[key] = 1 if best is None else best.config.train.micro_batch
    return _BEST[key]


def _learning_rate(answers: Answers) -> Suggestion:
    if answers.model.source == "tiny":
        return Suggestion(TINY_LEARNING_RATE, "High, because the model is tiny.")
    return Suggestion(LEARNING_RATE, "Usual for adapters, some ten times that of full fine-tuning.")


def _epochs(data: Size | None) -> Suggestion:
    if data is None:
        return Suggestion(1.0, "The data was not looked at; one pass never repeats it.")
    epochs = 3.0 if data.samples < 1_000 else 2.0 if data.samples < 10_000 else 1.0
    few = {3.0: "few: three passes", 2.0: "some: two passes", 1.0: "many: one pass"}[epochs]
    return Suggestion(epochs, f"{data.samples:,} samples are {few}.")
