"""A project whose weights are fetched, and what `preprocess` leaves in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ms4 import config, manifest
from ms4.data.packed import PackedData, load_packed

Record = dict[str, Any]


def fetch(directory: Path, **changes: Any) -> None:
    """Leave what fetching does: the weights' tokenizer file lies in `directory`."""
    content = {
        "directory": str(directory),
        "origin": "local",
        "files": [manifest.file_entry(directory / "tekken.json", directory)],
        **changes,
    }
    manifest.write_manifest(Path("weights/source.json"), "fetch", config_hash="", **content)


def sample(question: str, answer: str, thinking: str | None = None, **fields: Any) -> Record:
    said = {"role": "assistant", "content": answer, "reasoning": thinking}
    return {"messages": [{"role": "user", "content": question}, said], **fields}


def write(path: str, *records: Any) -> str:
    """Write JSONL; a text stands as it is."""
    Path(path).write_text(
        "".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records)
    )
    return path


def configure(threads: int | None = None, **data: Any) -> config.RunConfig:
    values = {"data": {"train": ["train.jsonl"], **data}, "run": {"threads": threads}}
    return config.RunConfig.model_validate(values)


def result() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path("results/data.json").read_text())
    return content


def packed() -> PackedData:
    return load_packed(Path("data/packed/train.safetensors"))


def documents() -> list[list[int]]:
    data = packed()
    return [data.document(number)[0].tolist() for number in range(data.documents)]
