"""A path that is typed, with completion."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.suggester import Suggester
from textual.widgets import Input

from ms4_wizard.paths import candidates, complete


class _Paths(Suggester):
    """Shows the first path that what is typed can go on as."""

    def __init__(self) -> None:
        super().__init__(use_cache=False, case_sensitive=True)

    async def get_suggestion(self, value: str) -> str | None:
        """The suggestion behind the cursor, if there is one."""
        found = candidates(value, Path.cwd()) if value else []
        return found[0] if found and found[0] != value else None


class PathInput(Input):
    """Tab completes as far as all candidates agree; where there is nothing to add, it goes on."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("tab", "complete", "Complete", show=False),
    ]

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id, suggester=_Paths(), select_on_focus=False, compact=True)

    def action_complete(self) -> None:
        """Complete, or go to the next control."""
        longer = complete(self.value, Path.cwd()) if self.value else self.value
        if longer != self.value:
            self.value = longer
            self.cursor_position = len(longer)
        else:
            self.screen.focus_next()
