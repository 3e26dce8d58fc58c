"""How a person wants the screens: kept from one time to the next."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from ms4_wizard.drafts import state_directory

THEMES = ("textual-dark", "textual-light")


class Preferences:
    """The file `wizard.json` in the state directory."""

    def __init__(self, place: Path | None = None) -> None:
        self._path = (place or state_directory()) / "wizard.json"

    def theme(self) -> str:
        """The theme that was chosen last; dark if none was, or it cannot be read."""
        try:
            wanted = json.loads(self._path.read_text(encoding="utf-8"))["theme"]
        except (OSError, ValueError, KeyError, TypeError):
            return THEMES[0]
        return wanted if wanted in THEMES else THEMES[0]

    def save(self, theme: str) -> None:
        """Keep a theme; where that cannot be, go on without."""
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps({"theme": theme}) + "\n", encoding="utf-8")
