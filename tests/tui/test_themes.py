"""Both themes can be read."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import get_args

import pytest
from textual.color import Color
from textual.filter import ANSIToTruecolor
from textual.pilot import Pilot
from textual.widgets import Static

from ms4_wizard.preferences import Preferences
from ms4_wizard.steps import STEPS
from ms4_wizard.themes import LIGHT
from ms4_wizard.watch.app import WatchApp
from ms4_wizard.watch.stages import Stage, State
from ms4_wizard.widgets.stages import line
from tests.tui.driving import VALUES, app_of, drive, go_to, screen_text, until

pytestmark = pytest.mark.slow

LEAST_CONTRAST = 4.5
"""Of text and what is behind it, as WCAG 2.1 (1.4.3) asks."""


def luminance(colour: Color) -> float:
    """Relative luminance (WCAG 2.1)."""
    parts = [part / 255 for part in (colour.r, colour.g, colour.b)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: Color, other: Color) -> float:
    """Their ratio (WCAG 2.1)."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def drawn_contrast(pilot: Pilot[list[str]], text: str) -> float:
    """Of the first segment that has a text, when all filters of the app were applied."""
    app = pilot.app
    for strip in app.screen._compositor.render_strips():
        if text not in strip.text:
            continue
        for part in strip.apply_filter(ANSIToTruecolor(app.ansi_theme), Color(0, 0, 0)):
            if text in part.text and part.style is not None:
                assert not part.style.dim, "a terminal decides how weak that is"
                assert part.style.color is not None
                assert part.style.bgcolor is not None
                return contrast(
                    Color.from_rich_color(part.style.color),
                    Color.from_rich_color(part.style.bgcolor),
                )
    raise AssertionError(f"{text!r} is not there: {screen_text(pilot)}")


@pytest.mark.parametrize("theme", ["textual-dark", "textual-light"])
def test_texts_stand_out(place: Path, theme: str) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        pilot.app.theme = theme
        await go_to(pilot, "adapters")
        await pilot.press("tab", "ctrl+u", *"many")
        await pilot.pause()
        for part in ("Title .what", "Title .how-far", ".ask", ".fault"):
            widget = pilot.app.screen.query(part).last(Static)
            _, _, behind, colour = widget.colors
            ratio = contrast(behind, behind + colour)
            assert ratio >= LEAST_CONTRAST, f"{part}: {ratio:.1f}"
        # The sentence in the plan's place, and the headings of the review, as they are drawn.
        assert drawn_contrast(pilot, "No plan yet.") >= LEAST_CONTRAST
        await pilot.press("ctrl+u", *"16")
        pilot.app.go(len(STEPS))  # type: ignore[attr-defined]
        await until(pilot, lambda: "Reasoning mode" in screen_text(pilot))
        assert drawn_contrast(pilot, "Reasoning mode") >= LEAST_CONTRAST

    drive(app_of(VALUES), how)


def test_named_colours_stand_out_on_every_ground() -> None:
    """Amber, green and red of sentences: on the grounds that the light theme has."""
    from textual.theme import BUILTIN_THEMES

    colours = BUILTIN_THEMES["textual-light"].to_color_system().generate()
    for ground in ("background", "surface", "panel"):
        for number in range(1, 7):  # red, green, yellow, blue, magenta, cyan
            ink = Color(*LIGHT.ansi_colors[number])
            ratio = contrast(ink, Color.parse(colours[ground]))
            assert ratio >= LEAST_CONTRAST, f"{number} on {ground}: {ratio:.1f}"


def test_both_programs_draw_with_them(place: Path) -> None:
    for app in (app_of(VALUES), WatchApp(place, "local")):
        app.theme = "textual-light"
        assert app.ansi_theme is LIGHT


def test_the_run_screen_looks_as_it_was_chosen(place: Path) -> None:
    kept = Preferences(place / "state")
    kept.save("textual-light")

    async def run() -> None:
        app = WatchApp(place, "local", preferences=kept)
        async with app.run_test() as pilot:
            await pilot.pause()
            assert not app.current_theme.dark
            await pilot.press("ctrl+t")
            assert app.current_theme.dark

    asyncio.run(run())
    assert kept.theme() == "textual-dark"


@pytest.mark.parametrize("theme", ["textual-dark", "textual-light"])
def test_the_run_screen_can_be_read(place: Path, theme: str) -> None:
    async def run() -> None:
        app = WatchApp(place, "local")
        async with app.run_test() as pilot:
            app.theme = theme
            await until(pilot, lambda: "waiting" in screen_text(pilot))
            for part in ("#what", "#says"):
                _, _, behind, colour = app.screen.query_one(part).colors
                assert contrast(behind, behind + colour) >= LEAST_CONTRAST

    asyncio.run(run())


def test_a_stage_has_the_colour_of_its_state_in_its_mark_alone() -> None:
    for state in get_args(State):
        text = line(Stage("train", state), 30)
        marks = {
            str(span.style) for span in text.spans if "train" in text.plain[span.start : span.end]
        }
        assert marks <= {"", "bold", "dim"}, state
