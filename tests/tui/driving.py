"""Driving the screens by keys, and looking at what they show."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from textual.pilot import Pilot

from ms4_wizard.app import WizardApp
from ms4_wizard.draft import Draft
from ms4_wizard.drafts import Store
from ms4_wizard.flow import Flow
from ms4_wizard.screens.review import ReviewScreen
from ms4_wizard.screens.step import StepScreen
from ms4_wizard.widgets.answer import Answer
from ms4_wizard.widgets.plan import PlanPanel

# A machine of a known size: the plan on the screens depends on it.
VALUES: dict[str, Any] = {
    "data": {"train": ["train.jsonl"], "test": {"held": "sets/test.jsonl"}},
    "run": {"device": "cuda", "memory_gib": 79},
}

Drive = Callable[[Pilot[list[str]]], Awaitable[None]]


def app_of(
    values: dict[str, Any],
    directory: str = "project",
    opened: bool = False,
    state: Path | None = None,
    **more: Any,
) -> WizardApp:
    store = None if state is None else Store(Path(directory), state)
    return WizardApp(Flow(Draft(values), Path(directory), opened=opened, store=store), **more)


def drive(app: WizardApp, how: Drive, size: tuple[int, int] = (80, 24)) -> list[str] | None:
    """Run the app and drive it; what it returns."""

    async def run() -> list[str] | None:
        async with app.run_test(size=size) as pilot:
            await app.workers.wait_for_complete()  # it looks at the machine
            await pilot.pause()
            await how(pilot)
        return app.return_value

    return asyncio.run(run())


async def go_to(pilot: Pilot[Any], key: str) -> None:
    """Press Next until a step is there."""
    while not (isinstance(pilot.app.screen, StepScreen) and pilot.app.screen.step.key == key):
        before = pilot.app.screen
        await pilot.press("ctrl+n")
        await pilot.pause()
        assert pilot.app.screen is not before, f"Next did not go on: {screen_text(pilot)}"


async def review(pilot: Pilot[Any]) -> ReviewScreen:
    """Press Next until the review is there."""
    await go_to(pilot, "evaluation")
    await pilot.press("ctrl+n")
    await pilot.pause()
    screen = pilot.app.screen
    assert isinstance(screen, ReviewScreen), f"Next did not go on: {shown(pilot)}"
    return screen


async def until(pilot: Pilot[Any], condition: Callable[[], object]) -> None:
    """Let the app work until a condition holds."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "the screen does not come to rest"
        await pilot.pause()


def answer(pilot: Pilot[Any], field: str) -> Answer:
    return pilot.app.screen.query_one(f"#answer-{field.replace('.', '-')}", Answer)


def shown(pilot: Pilot[Any]) -> str:
    """The faults that the screen shows."""
    faults = [w for w in pilot.app.screen.query(".fault") if w.display]
    return "\n".join(str(fault.render()) for fault in faults)


def screen_text(pilot: Pilot[Any]) -> str:
    """What is on the screen, line by line."""
    strips = pilot.app.screen._compositor.render_strips()
    return "\n".join(strip.text.rstrip() for strip in strips)


def plan(pilot: Pilot[Any]) -> str:
    """The panel's text, as it is drawn."""
    panel = pilot.app.screen.query_one(PlanPanel)
    return "\n".join(strip.text for strip in panel.render_lines(panel.size.region))


def peak(pilot: Pilot[Any]) -> float:
    found = re.search(r"at its fullest, GiB +([\d.]+)", plan(pilot))
    assert found is not None, plan(pilot)
    return float(found[1])
