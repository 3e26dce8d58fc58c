"""The demo: the built-in tiny model learns a small task, on any machine, in some minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ms4.errors import Ms4Error

PROJECT = Path("ms4-demo")
DATA = Path("ms4-demo-data")


def answers(data: Path = DATA) -> dict[str, Any]:
    """The demo's answers, as `examples/answers.yaml` has them."""
    return {
        "model": {"source": "tiny", "experts": "nf4"},
        "data": {
            "train": [str(data / "train.jsonl")],
            "test": {name: str(data / f"{name}.jsonl") for name in ("seal", "chat", "copy")},
            "reasoning": "per_sample",
            "sequence_length": 256,
        },
        "adapters": {"targets": ["attention", "shared", "experts"], "rank": 16, "alpha": 32},
        "train": {
            "epochs": 4,
            "micro_batch": 4,
            "accumulation": 1,
            "learning_rate": 0.002,
            "checkpointing": "auto",
        },
        "evaluate": {
            "max_samples": 100,
            "max_new_tokens": 64,
            "batch": 100,
            "min_exact_match": {"seal": 0.6, "chat": 0.9, "copy": 0.9},
        },
        "run": {"device": "cpu", "threads": 2},
        "where": {"run": "local"},
    }


def write_data(directory: Path = DATA) -> None:
    """Write the demo's data, unless it is there.

    Raises:
        Ms4Error: it cannot be written.
    """
    from ms4 import tiny_text

    if (directory / "train.jsonl").is_file():
        return
    try:
        tiny_text.write_examples(directory)
    except OSError as error:
        raise Ms4Error(f"{directory}: cannot be written ({error.strerror}).") from error
