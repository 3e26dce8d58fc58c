"""The data, looked at beside the screens: in a process of its own, by the code of `ms4 data`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from textual import events
from textual.pilot import Pilot
from textual.widgets import TextArea

from ms4.data import preview, sources
from ms4_wizard import costs
from ms4_wizard.answers import Answers
from ms4_wizard.app import WizardApp
from ms4_wizard.draft import Draft
from ms4_wizard.flow import Flow
from ms4_wizard.looking import Looker
from ms4_wizard.screens.samples import SamplesScreen, coloured
from tests.chat_reference import png
from tests.tui.driving import VALUES, answer, drive, go_to, screen_text, until

pytestmark = pytest.mark.slow


def record(question: str, reply: str, thinking: str | None = None) -> str:
    parts: Any = reply
    if thinking is not None:
        parts = [{"type": "thinking", "thinking": thinking}, {"type": "text", "text": reply}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": parts}]
    return json.dumps({"messages": messages}) + "\n"


def app_with_looker(values: dict[str, Any]) -> WizardApp:
    return WizardApp(Flow(Draft(values), Path("project"), looker=Looker()))


def settled(app: Any, state: str = "done") -> bool:
    look = app.flow.looker.look
    return look is not None and look.state == state


def test_data_is_looked_at_beside_the_screen(place: Path) -> None:
    lines = [record(f"q {n}", f"a {n}", "hm" if n % 2 else None) for n in range(20)]
    (place / "train.jsonl").write_text("".join(lines) + "broken\n")

    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "data")
        await until(pilot, lambda: settled(pilot.app))
        await until(pilot, lambda: "1 record lost" in screen_text(pilot))
        text = screen_text(pilot)
        assert "OpenAI messages, 21 records" in text
        assert "effort none: 10 (50%)" in text
        assert "train.jsonl:21: not valid JSON" in text
        # The same as the command says.
        flow = pilot.app.flow  # type: ignore[attr-defined]
        config = preview.read_settings(["train.jsonl"], None, [], None)
        chat = preview.tokenizer(None, config)
        wanted = preview.survey(config, chat, sources.expand(config.data.train), lambda _: None)
        found = flow.looker.look.found
        assert found["tokens"] == wanted.tally.tokens
        assert found["trained_tokens"] == wanted.tally.trained_tokens
        assert found["fault_count"] == len(wanted.faults) == 1
        assert flow.data.samples == 20
        # Samples, with what is trained and what is a control token.
        await pilot.press("ctrl+e")
        await until(pilot, lambda: isinstance(pilot.app.screen, SamplesScreen))
        first = str(pilot.app.screen.query_one("#sample").render())
        assert first.endswith("[INST]q 0[/INST]a 0</s>")
        await pilot.press("right")
        await until(pilot, lambda: "[THINK]hm[/THINK]a 1" in screen_text(pilot))
        shown = coloured(flow.looker.look.samples[1])
        spans = [(shown.plain[s.start : s.end], str(s.style)) for s in shown.spans]
        assert any("a 1" in text and "underline" in style for text, style in spans)
        assert any("[INST]" in text and "reverse" in style for text, style in spans)
        assert not any("q 1" in text and "underline" in style for text, style in spans)

    drive(app_with_looker({**VALUES}), how)


def test_effort_changes_what_the_data_is(place: Path) -> None:
    (place / "train.jsonl").write_text(record("a", "b") + record("c", "d", "thinking"))

    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "reasoning")
        await until(pilot, lambda: "effort high: 1 (50%)" in screen_text(pilot))
        await pilot.press("down", "enter")
        await until(pilot, lambda: "1 refused" in screen_text(pilot))

    drive(app_with_looker(VALUES), how)


def test_a_big_file_can_be_cancelled_and_keys_are_answered_meanwhile(place: Path) -> None:
    line = record("question " * 50, "answer " * 50).encode()
    with (place / "train.jsonl").open("wb") as file:
        for _ in range(200):
            file.write(line * 1000)

    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "data")
        await until(pilot, lambda: pilot.app.flow.looker.look is not None)  # type: ignore[attr-defined]
        await until(pilot, lambda: "Ctrl+X cancels" in screen_text(pilot))
        text = answer(pilot, "data.train").query_one(TextArea)
        process = pilot.app.flow.looker._process  # type: ignore[attr-defined]
        await until(pilot, lambda: pilot.app.flow.looker._process is not None)  # type: ignore[attr-defined]
        process = pilot.app.flow.looker._process  # type: ignore[attr-defined]
        await pilot.press("end", "x", "backspace")
        assert text.text == "train.jsonl"
        assert settled(pilot.app, "reading"), "all the while"
        await pilot.press("ctrl+x")
        await until(pilot, lambda: "Cancelled" in screen_text(pilot))
        await until(pilot, lambda: process.returncode is not None)

    drive(app_with_looker(VALUES), how)


def test_leaving_ends_the_look(place: Path) -> None:
    line = record("question " * 50, "answer " * 50).encode()
    (place / "train.jsonl").write_bytes(line * 100_000)
    numbers: list[int] = []

    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "data")
        await until(pilot, lambda: pilot.app.flow.looker._process is not None)  # type: ignore[attr-defined]
        numbers.append(pilot.app.flow.looker._process.pid)  # type: ignore[attr-defined]

    drive(app_with_looker(VALUES), how)
    end = time.monotonic() + 60
    while psutil.pid_exists(numbers[0]) and psutil.Process(numbers[0]).status() != "zombie":
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("key", ["escape", "enter"])
def test_picker(place: Path, key: str) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "data")
        await pilot.press("ctrl+o")
        await until(pilot, lambda: pilot.app.screen.query("#found"))
        await pilot.press(*"sets", "enter")
        await until(pilot, lambda: "sets/test.jsonl" in screen_text(pilot))
        await pilot.press("down", key)
        await until(pilot, lambda: not pilot.app.screen.query("#found"))
        wanted = ["train.jsonl", "sets/test.jsonl"] if key == "enter" else ["train.jsonl"]
        assert pilot.app.flow.draft.get("data.train") == wanted  # type: ignore[attr-defined]

    drive(app_with_looker(VALUES), how)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": {"train": ["nowhere.jsonl"]}}, "no such file"),
        ({"data": {"train": []}}, "data.train"),
    ],
)
def test_the_child_says_what_is_wrong(place: Path, values: dict[str, Any], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ms4_wizard.analyse"],
        input=json.dumps(values),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
        timeout=120,
    )
    last = json.loads(done.stdout.splitlines()[-1])
    assert message in json.dumps(last)
    assert done.stderr == ""


@pytest.mark.parametrize("key", ["data", "reasoning"])
def test_a_key_makes_one_plan(place: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """Also when the data is known: what is shown of it needs no plan of its own."""
    (place / "train.jsonl").write_text(record("q", "a") * 3)
    plans: list[object] = []
    whole = costs.cost

    def counted(answers: Answers) -> costs.Cost:
        plans.append(answers)
        return whole(answers)

    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "data")
        await until(pilot, lambda: settled(pilot.app))
        await go_to(pilot, key)
        await until(pilot, lambda: settled(pilot.app))
        await pilot.pause()
        monkeypatch.setattr(costs, "cost", counted)
        field = {"data": "data.train", "reasoning": "data.reasoning"}[key]
        control = answer(pilot, field).control
        control.focus()
        await until(pilot, lambda: control.has_focus)
        await pilot.press(*{"data": ["x"], "reasoning": ["down", "enter"]}[key])
        await pilot.pause()
        assert len(plans) == 1

    drive(app_with_looker(VALUES), how)


def test_data_that_is_not_there_is_told_beside_the_question(place: Path) -> None:
    """And what was known of other data goes, its steps too."""
    (place / "train.jsonl").write_text(record("q", "a"))

    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "data")
        await until(pilot, lambda: settled(pilot.app))
        flow = pilot.app.flow  # type: ignore[attr-defined]
        assert flow.data is not None
        answer(pilot, "data.train").query_one(TextArea).text = "tra"
        await until(pilot, lambda: settled(pilot.app, "failed"))
        await until(pilot, lambda: "no such file: tra" in screen_text(pilot))
        assert flow.data is None
        # A path that is begun goes on in the picker, and does not stay beside it.
        await pilot.press("ctrl+o")
        await until(pilot, lambda: pilot.app.screen.query("#found"))
        await pilot.press("tab", "enter")
        await until(pilot, lambda: flow.draft.get("data.train") == ["train.jsonl"])
        # A whole one stays.
        await pilot.press("ctrl+o")
        await until(pilot, lambda: pilot.app.screen.query("#found"))
        await pilot.press(*"train", "tab", "enter")
        await until(pilot, lambda: flow.draft.get("data.train") == ["train.jsonl"] * 2)

    drive(app_with_looker(VALUES), how)


@pytest.mark.parametrize(
    ("step", "field", "old"), [("data", "data.train", "b.jsonl"), ("adapters", "adapters.rank", "")]
)
def test_what_is_typed_meanwhile_stays(place: Path, step: str, field: str, old: str) -> None:
    """A control is ahead of the draft by the keys whose messages are on their way."""
    app = app_with_looker(VALUES)

    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, step)
        control: Any = answer(pilot, field).control
        screen: Any = pilot.app.screen
        for number in range(3):
            if isinstance(control, TextArea):
                control.text = f"{number}{old}"
                control.move_cursor((0, 1))
                control.insert("a")
                control.action_delete_left()
                control.insert("x")
            else:
                control.value = f"{number + 7}"
            wanted = control.text if isinstance(control, TextArea) else control.value
            screen.answers_changed()  # by a look at the data that ended, say
            assert wanted == (control.text if isinstance(control, TextArea) else control.value)
            await pilot.pause()
            assert app.flow.draft.text(answer(pilot, field).question) == wanted
        # What is changed elsewhere is shown, and typing goes on behind it.
        app.flow.draft.set(field, ["new"] if isinstance(control, TextArea) else 6)
        screen.answers_changed()
        control.focus()
        await pilot.press("1")
        await pilot.pause()
        assert app.flow.draft.get(field) in (["new1"], 61, "61")

    drive(app, how)


@pytest.mark.parametrize(("step", "field"), [("data", "data.train"), ("adapters", "adapters.rank")])
def test_keys_edit_in_their_order(place: Path, step: str, field: str) -> None:
    """However fast they come: all stand in the queue before the first is taken."""
    app = app_with_looker(VALUES)

    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, step)
        control: Any = answer(pilot, field).control
        control.focus()
        await pilot.pause()
        await pilot.press("end")
        for key in [*["backspace"] * 20, *"12", "left", "3", "backspace", "delete", *"4"]:
            pilot.app.post_message(events.Key(key, key if len(key) == 1 else None))
        await pilot.pause()
        await until(pilot, lambda: app.flow.draft.text(answer(pilot, field).question) == "14")

    drive(app, how)


def test_why_the_data_is_not_looked_at(place: Path) -> None:
    flow = Flow(Draft({"data": {"train": []}}), place)
    assert flow.unread().startswith("Name the data")
    flow.draft.set("data.train", ["x.jsonl"])
    flow.draft.set("adapters.rank", "many")
    assert flow.unread().endswith("Rank: write a whole number")


def test_faults_below_the_edge_are_reached_by_keys(place: Path) -> None:
    faulty = '{"messages": [{"role": "user", "content": "q"}]}\n'
    (place / "train.jsonl").write_text(record("q", "a") + faulty * 9)

    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "data")
        await until(pilot, lambda: settled(pilot.app))
        await until(pilot, lambda: "train.jsonl:2" in screen_text(pilot))
        assert "`ms4 data FILE`" not in screen_text(pilot)
        for _ in range(3):
            await pilot.press("pagedown")
        await until(pilot, lambda: "`ms4 data FILE` lists all" in screen_text(pilot))
        for _ in range(3):
            await pilot.press("pageup")
        await until(pilot, lambda: "OpenAI messages, 10 records" in screen_text(pilot))

    drive(app_with_looker(VALUES), how)


def test_the_tiny_model_reads_with_its_own_tokenizer(place: Path) -> None:
    """Else the length that is computed would be too short, and the run would stop."""
    (place / "train.jsonl").write_text(
        record("What is it?", "A longer answer of some words. " * 20)
    )
    config = preview.read_settings(["train.jsonl"], None, ["model.source=tiny"], None)
    chat = preview.tokenizer(None, config)
    wanted = preview.survey(config, chat, sources.expand(config.data.train), lambda _: None)

    async def how(pilot: Pilot[list[str]]) -> None:
        flow = pilot.app.flow  # type: ignore[attr-defined]
        await go_to(pilot, "data")
        await until(pilot, lambda: settled(pilot.app))
        assert flow.data.tokens < wanted.tally.tokens
        await go_to(pilot, "method")
        flow.draft.set("model.source", "tiny")
        await go_to(pilot, "training")
        await until(pilot, lambda: flow.data.tokens == wanted.tally.tokens)
        await until(pilot, lambda: flow.draft.get("data.sequence_length") >= flow.data.longest)

    drive(app_with_looker({"data": {"train": ["train.jsonl"]}}), how)


def test_what_becomes_of_faults_is_asked(place: Path) -> None:
    (place / "train.jsonl").write_text(record("q", "a") + "broken\n")

    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "data")
        await until(pilot, lambda: "1 fault, 1 record lost if they" in screen_text(pilot))
        await pilot.press("tab", "down", "enter")
        flow = pilot.app.flow  # type: ignore[attr-defined]
        await until(pilot, lambda: flow.draft.get("data.faulty") == "drop")
        await until(pilot, lambda: "1 fault, 1 record lost:" in screen_text(pilot))

    drive(app_with_looker(VALUES), how)


def test_images_are_told_before_the_run_stops_at_them(place: Path) -> None:
    """They are counted whatever is answered, since the data come first."""
    (place / "a.png").write_bytes(png(40, 30))
    parts = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What?"}]
    said = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A square."}]
    (place / "train.jsonl").write_text(3 * (json.dumps({"messages": said}) + "\n"))

    async def how(pilot: Pilot[list[str]]) -> None:
        flow = pilot.app.flow  # type: ignore[attr-defined]
        await go_to(pilot, "data")
        await until(pilot, lambda: settled(pilot.app))
        await until(pilot, lambda: "3 images: answer" in screen_text(pilot))
        assert "no faults" in screen_text(pilot)
        assert "3 images, at which the run would stop" in flow.refused_images(flow.answers())
        for field, value in (("data.modality", "text_vision"), ("data.faulty", "drop")):
            flow.draft.set(field, value)
            assert flow.refused_images(flow.answers()) == ""
            flow.draft.set(field, {"data.modality": "text"}.get(field, value))

    drive(app_with_looker(VALUES), how)
