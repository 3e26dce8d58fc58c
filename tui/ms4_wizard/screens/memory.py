"""Memory and experts: the three ways of holding the experts, each with what it takes."""

from __future__ import annotations

from ms4.device import GIB
from ms4_wizard import costs
from ms4_wizard.costs import Cost
from ms4_wizard.screens.step import StepScreen
from ms4_wizard.widgets.choices import Choices


class MemoryScreen(StepScreen):
    """Budget and expert quantization side by side with the plan."""

    def show_extra(self, found: Cost | str) -> None:
        """What each way of holding the experts takes with the other answers as they are."""
        answers = self.flow.answers()
        notes: dict[str, str] = {}
        if not isinstance(found, str) and not isinstance(answers, str):
            for name, other in costs.storages(answers, found).items():
                fits = {True: "fits", False: "does not fit", None: ""}[other.fits]
                notes[name] = f"{other.plan.peak / GIB:.1f} GiB in all  {fits}".rstrip()
        self.query_one("#answer-model-experts Choices", Choices).annotate(notes)
