"""What tests of `ms4 descale` look at when it ended with an error."""

from __future__ import annotations

import json
from pathlib import Path

from tests.kill_points import Result


def refused(result: Result, *words: str) -> bool:
    """Whether it ended with one message for the user, which says all of `words`."""
    assert result.code == 2, result.text
    assert result.text.startswith("ms4 descale: "), result.text
    assert "Traceback" not in result.text
    assert len(result.text) < 1500
    for word in words:
        assert word in result.text
    return True


def whole(base: Path) -> dict[Path, int]:
    """The pieces that a record speaks for, with their numbers in the file system."""
    records = {path.stem: json.loads(path.read_text()) for path in base.glob(".pieces/*.json")}
    found = {path: path.stat() for path in base.glob("*.safetensors") if path.name in records}
    assert {p.name: s.st_size for p, s in found.items()} == {
        name: record["entry"]["size"] for name, record in records.items()
    }
    return {path: status.st_ino for path, status in found.items()}


def left_clean(base: Path) -> bool:
    """Whether nothing vouches for a base that is not whole, and nothing is half-written."""
    assert not [path for path in base.rglob("*") if path.suffix == ".tmp"]
    named, index = list(base.glob("*.safetensors")), base / "model.safetensors.index.json"
    assert len(named) <= len(whole(base)) + 1  # a record follows each name
    if index.exists() or (base / "base.json").exists():
        files = json.loads(index.read_text())["weight_map"].values()
        assert set(files) == {path.name for path in whole(base)}
    return True
