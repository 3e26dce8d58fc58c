"""A tokenizer file like the model's, made offline from what mistral-common ships.

The model's own `tekken.json` comes with its weights. The installed mistral-common carries
the same vocabulary and pattern in an older file without special tokens; with the model's
special tokens, version and settings put in, it encodes text and conversations as the
model's file does. Tests and the tiny model use it: real vocabulary, no network.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from ms4 import manifest
from ms4.errors import Ms4Error

SPECIAL_TOKENS = 1000
"""Ids below this are special; the token with rank r of the vocabulary has id 1000 + r."""

MIN_VOCABULARY = SPECIAL_TOKENS + 256
"""The 256 single bytes come first in the vocabulary: with them any text can be encoded."""

_SOURCE = "tekken_240911.json"

_NAMES = {
    0: "<unk>",
    1: "<s>",
    2: "</s>",
    3: "[INST]",
    4: "[/INST]",
    5: "[AVAILABLE_TOOLS]",
    6: "[/AVAILABLE_TOOLS]",
    7: "[TOOL_RESULTS]",
    8: "[/TOOL_RESULTS]",
    9: "[TOOL_CALLS]",
    10: "[IMG]",
    11: "<pad>",
    12: "[IMG_BREAK]",
    13: "[IMG_END]",
    14: "[PREFIX]",
    15: "[MIDDLE]",
    16: "[SUFFIX]",
    17: "[SYSTEM_PROMPT]",
    18: "[/SYSTEM_PROMPT]",
    19: "[TOOL_CONTENT]",
    32: "[ARGS]",
    33: "[CALL_ID]",
    34: "[THINK]",
    35: "[/THINK]",
    36: "[MODEL_SETTINGS]",
    37: "[/MODEL_SETTINGS]",
}


def write_tekken(path: Path, vocabulary: int = 131072) -> None:
    """Write a v15 tokenizer file; the same arguments give the same bytes.

    Args:
        path: where to; mistral-common wants a name like `tekken.json`. Its directory is made.
        vocabulary: number of ids, the 1000 special ones included.

    Raises:
        Ms4Error: `vocabulary` is too small to encode any text, or larger than the source's.
    """
    text = resources.files("mistral_common").joinpath("data", _SOURCE).read_text(encoding="utf-8")
    source: dict[str, Any] = json.loads(text)
    largest = SPECIAL_TOKENS + len(source["vocab"])
    if not MIN_VOCABULARY <= vocabulary <= largest:
        raise Ms4Error(
            f"{path}: a vocabulary of {vocabulary} tokens cannot be made; "
            f"choose {MIN_VOCABULARY} to {largest}."
        )
    ranks = vocabulary - SPECIAL_TOKENS
    tekken = {
        "config": {
            "pattern": source["config"]["pattern"],
            "num_vocab_tokens": ranks,
            "default_vocab_size": vocabulary,
            "default_num_special_tokens": SPECIAL_TOKENS,
            "version": "v15",
        },
        "vocab": source["vocab"][:ranks],
        "special_tokens": [
            {"rank": rank, "token_str": _NAMES.get(rank, f"<SPECIAL_{rank}>"), "is_control": True}
            for rank in range(SPECIAL_TOKENS)
        ],
        "image": {"image_patch_size": 14, "max_image_size": 1540, "spatial_merge_size": 2},
        "model_settings_builder": {
            "reasoning_effort": {
                "type": "enum",
                "values": ["none", "high"],
                "accepts_none": True,
                "default": "none",
            }
        },
    }
    manifest.write_text(path, json.dumps(tekken, separators=(",", ":")) + "\n")
