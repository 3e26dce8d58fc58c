"""Paths as a person writes them."""

from __future__ import annotations

from pathlib import Path


def expand_home(text: str) -> Path:
    """A path; a leading `~/` is the home directory. `~name` stays: it may be a file's name."""
    return Path(text).expanduser() if text == "~" or text.startswith("~/") else Path(text)
