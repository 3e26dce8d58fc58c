"""Adapters: what each kind adds, in parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from textual.widget import Widget
from textual.widgets import Static

from ms4 import memory
from ms4.config import PRESETS
from ms4_wizard.costs import Cost
from ms4_wizard.explain import count
from ms4_wizard.screens.step import StepScreen
from ms4_wizard.widgets.choices import Choices


class AdaptersScreen(StepScreen):
    """Targets and ranks, with the parameters that they come to."""

    def compose_extra(self) -> Iterable[Widget]:
        """The sum."""
        yield Static("", id="parameters", markup=False)

    def show_extra(self, found: Cost | str) -> None:
        """Count what is chosen, and what each kind would add."""
        notes: dict[str, str] = {}
        told = ""
        if not isinstance(found, str):
            adapters: Any = found.config.adapters
            # The rank that routed experts would get, also before they are chosen.
            typed = self.flow.draft.get("adapters.expert_rank")
            waiting = int(typed) if str(typed).isdigit() else adapters.rank
            for preset in PRESETS:
                chosen = preset in adapters.presets
                rank = adapters.rank_of(preset) if chosen or preset != "experts" else waiting
                number = memory.adapter_parameters(found.dims, preset, rank)
                notes[preset] = f"{count(number)} parameters"
            trained = memory.trained_parameters(found.config, found.dims)
            whole = sum(memory.parameters(found.dims).values())
            told = f"Trained: {count(trained)} parameters, {100 * trained / whole:.2g} % of all."
        self.query_one("#answer-adapters-targets Choices", Choices).annotate(notes)
        self.query_one("#parameters", Static).update(told)
