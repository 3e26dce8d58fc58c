"""Samples of the data as the model sees them: control tokens by name, what is trained marked."""

from __future__ import annotations

from typing import Any, ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Footer, Static

from ms4.errors import printable

TRAINED = "bold green underline"
SPECIAL = "reverse"
TRAINED_SPECIAL = "bold green reverse"


def coloured(sample: dict[str, Any]) -> Text:
    """A sample's text; what is trained is underlined too, for those who see no colours."""
    text = Text()
    for words, trained, special in sample["pieces"]:
        style = TRAINED_SPECIAL if trained and special else TRAINED if trained else ""
        text.append(printable(words.replace("\t", "    ")), style or (SPECIAL if special else ""))
    if sample["cut"]:
        text.append(" … (the rest is not shown)", "dim")
    return text


class SamplesScreen(ModalScreen[None]):
    """One sample at a time."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("right,n", "next(1)", "Next sample", key_display="→"),
        Binding("left,p", "next(-1)", "Previous", key_display="←"),
        Binding("escape,enter,ctrl+e", "close", "Close", key_display="esc"),
    ]

    def __init__(self, samples: list[dict[str, Any]]) -> None:
        """
        Args:
            samples: as `analyse` tells them; the list may grow meanwhile.
        """
        super().__init__()
        self._samples = samples
        self._number = 0

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="page"):
            yield Static("", id="head", markup=False)
            yield Static("", id="sample", markup=False)
            legend = Text.assemble(
                ("trained", TRAINED), "  ", ("control token", SPECIAL), "  not trained"
            )
            yield Static(legend, id="legend")
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """Arrow keys scroll at once."""
        self.query_one("#page").focus()
        self.action_next(0)

    def action_next(self, step: int) -> None:
        """Another sample."""
        self._number = (self._number + step) % len(self._samples)
        sample = self._samples[self._number]
        self.query_one("#head", Static).update(
            f"{printable(sample['place'])}: effort {sample['effort']}, "
            f"{sample['tokens']:,} tokens, {sample['trained']:,} trained"
        )
        self.query_one("#sample", Static).update(coloured(sample))
        page = self.query_one("#page", VerticalScroll)
        page.border_title = f"Sample {self._number + 1} of {len(self._samples)}"
        page.scroll_home(animate=False)

    def action_close(self) -> None:
        """Back to the question."""
        self.dismiss()
