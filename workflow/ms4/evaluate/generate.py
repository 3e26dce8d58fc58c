"""Greedy answers and losses of a model on held-out samples.

Shape letters: B samples, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ms4.data.image_store import ImageStore
from ms4.data.packed import TestSample
from ms4.model.vision import image_outputs
from ms4.train.batches import PAD, collate, load_images, loss_sum

EOS = 2


@torch.no_grad()
def mean_loss(
    model: Any, samples: Sequence[TestSample], store: ImageStore | None, batch: int, chunk: int
) -> tuple[float | None, int]:
    """Mean cross-entropy (nats a token) over the samples' assistant tokens, and their number.

    Samples without a reference in their effort are left out; None if that leaves nothing.
    """
    whole = [s for s in samples if s.tokens is not None and s.trained is not None]
    total, trained = 0.0, 0
    for start in range(0, len(whole), batch):
        taken = whole[start : start + batch]
        group = collate(
            [[(np.asarray(s.tokens, np.int32), np.asarray(s.trained, np.uint8))] for s in taken]
        )
        images, shown = _images(taken, store)
        group = replace(group, images=images, shown=shown)
        total += loss_sum(model, group.to(model.device), chunk).item()
        trained += group.trained
    return (total / trained if trained else None), trained


def _images(
    samples: Sequence[TestSample], store: ImageStore | None
) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
    uses = [number for sample in samples for number in sample.images]
    return ((), ()) if store is None else load_images(store, uses)


@torch.no_grad()
def answer(
    model: Any, samples: Sequence[TestSample], store: ImageStore | None, max_new_tokens: int
) -> list[list[int]]:
    """The model's greedy continuation of each prompt, up to and with </s>, without the prompt."""
    prompts = [sample.prompt for sample in samples]
    images, shown = _images(samples, store)
    T = max(len(prompt) for prompt in prompts)
    tokens_BT = torch.full((len(prompts), T), PAD, dtype=torch.long)
    seen_BT = torch.zeros((len(prompts), T), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, T - len(prompt) :] = torch.tensor(prompt)
        seen_BT[row, T - len(prompt) :] = 1
    generated = model.generate(
        input_ids=tokens_BT.to(model.device),
        attention_mask=seen_BT.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=EOS,
        pad_token_id=PAD,
        **image_outputs(model.model, [image.to(model.device) for image in images], shown),
    )
    answers = []
    for row in generated[:, T:].tolist():
        end = row.index(EOS) + 1 if EOS in row else len(row)
        answers.append(row[:end])
    return answers
