"""What the answers cost: the picture, the change that makes it fit, the speed, computed numbers."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from textual.pilot import Pilot
from textual.widgets import Input

from ms4 import plan as planner
from ms4 import throughput
from ms4.device import GIB, GPUS
from ms4_wizard import costs, suggest
from ms4_wizard.answers import Answers
from ms4_wizard.screens.help import HelpScreen
from ms4_wizard.speed import Size, duration, gpu_of, speed
from ms4_wizard.widgets.plan import OTHER, OVER, bar, parts, scale_line
from tests.tui.driving import VALUES, answer, app_of, drive, go_to, peak, plan, screen_text, until

COMPONENTS = st.dictionaries(st.text(min_size=1, max_size=5), st.integers(0, 10**12), min_size=1)


def answers_of(**sections: Any) -> Answers:
    return Answers.model_validate({"data": {"train": ["-"]}, **sections})


# The bar.


@given(COMPONENTS, st.integers(2, 20))
def test_parts_are_all_of_it(components: dict[str, int], rows: int) -> None:
    shown = parts(components, rows)
    assert sum(part.amount for part in shown) == sum(components.values())
    assert len(shown) <= rows
    named = [part.name for part in shown if part.look is not OTHER]
    assert named == [name for name in components if name in named], "in their order"
    left = [amount for name, amount in components.items() if name not in named]
    smallest = min((components[name] for name in named), default=0)
    assert all(amount <= smallest for amount in left)


@given(COMPONENTS, st.none() | st.integers(1, 10**13), st.integers(8, 120))
def test_bar_is_as_wide_as_its_room(
    components: dict[str, int], budget: int | None, width: int
) -> None:
    shown = parts(components, 6)
    needed = sum(components.values())
    line = bar(shown, budget, width)
    assert len(line.plain) == width
    over = line.plain.count(OVER[0])
    assert (over > 0) == (budget is not None and needed > budget)
    if budget is not None and needed > budget:
        assert any(str(span.style) == OVER[1] for span in line.spans), "red where it does not fit"
        assert abs(over - width * (needed - budget) / needed) <= 1.5
    if budget is not None and 0 < needed <= budget:
        drawn = width - line.plain.count("·")
        assert abs(drawn - width * needed / budget) <= 1
    assert len(scale_line(needed, budget, width).plain) <= max(width, 24) + width


def test_neighbours_in_the_bar_differ_without_colours() -> None:
    shown = parts({str(n): 10 for n in range(12)}, 20)
    assert all(a.look[0] != b.look[0] for a, b in pairwise(shown))


# On the screens.


def test_the_plan_follows_each_key(place: Path) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "training")
        before = peak(pilot)
        assert "fits: " in plan(pilot)
        await pilot.press("end", "0")  # 20480 tokens
        await until(pilot, lambda: peak(pilot) != before)
        await pilot.press("0")
        await until(pilot, lambda: "does not fit" in plan(pilot))
        assert "╳" in plan(pilot)
        await pilot.press("x")
        await until(pilot, lambda: "No plan yet. Sequence length:" in plan(pilot))
        await pilot.press("backspace", "backspace", "backspace")
        await until(pilot, lambda: peak(pilot) == before)

    drive(app_of(VALUES), how)


@pytest.mark.slow
def test_the_cheapest_change_is_a_key(place: Path) -> None:
    values = {**VALUES, "run": {"device": "cuda", "memory_gib": 64}}
    values["adapters"] = {"targets": ["attention", "shared"], "rank": 256}

    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "adapters")
        await until(pilot, lambda: "Ctrl+F" in plan(pilot))
        answers = Answers.model_validate(pilot.app.flow.draft.values)  # type: ignore[attr-defined]
        found = costs.cost(answers)
        wanted = costs.remedy(answers, found)
        assert wanted is not None
        assert "make it fit" in screen_text(pilot).lower()
        await pilot.press("ctrl+f")
        await until(pilot, lambda: "does not fit" not in plan(pilot))
        for field, value in wanted.values.items():
            assert pilot.app.flow.draft.get(field) == value  # type: ignore[attr-defined]
        # The same figure before and after, also where `auto` takes some of the room that there is
        # then for a faster checkpointing.
        assert peak(pilot) == pytest.approx(wanted.peak / GIB, abs=0.01)
        assert peak(pilot) <= 64

    drive(app_of(values), how)


@pytest.mark.slow
def test_nothing_makes_it_fit(place: Path) -> None:
    values = {**VALUES, "run": {"device": "cuda", "memory_gib": 20}}

    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "memory")
        await until(pilot, lambda: "No change of the answers" in plan(pilot))
        await pilot.press("ctrl+f")
        assert "does not fit" in plan(pilot)

    drive(app_of(values), how)


@pytest.mark.slow
def test_each_storage_of_the_experts_has_its_plan(place: Path) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "memory")
        text = screen_text(pilot)
        answers = Answers.model_validate(VALUES)
        for name, found in costs.storages(answers, costs.cost(answers)).items():
            assert f"{name}  {found.plan.peak / GIB:.1f} GiB in all" in text
        assert text.count("does not fit") == 2

    drive(app_of(VALUES), how)


@pytest.mark.slow
def test_parameters_of_adapters_are_counted(place: Path) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "adapters")
        text = screen_text(pilot)
        assert "attention  33.7 M parameters" in text
        assert "experts  2.11 B parameters" in text, "also before it is chosen"
        await pilot.press("down", "down", "enter", "tab", "tab")
        expert_rank = answer(pilot, "adapters.expert_rank")
        assert expert_rank.display
        await pilot.press(*"8")
        await until(pilot, lambda: "experts  528 M parameters" in screen_text(pilot))

    drive(app_of(VALUES), how)


# Computed numbers.


@pytest.mark.slow
def test_numbers_are_computed_until_somebody_gives_them(place: Path) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        flow = pilot.app.flow  # type: ignore[attr-defined]
        flow.data = Size(samples=600, tokens=60_000, longest=300)
        await go_to(pilot, "training")
        get = flow.draft.get
        assert (get("data.sequence_length"), get("train.epochs")) == (512, 3.0)
        assert "computed" in screen_text(pilot)
        # Twice the length: half as many sequences a step, as nobody gave their number.
        before = get("train.micro_batch") * get("train.accumulation")
        await pilot.press("ctrl+u", *"1024")
        await pilot.pause()
        assert get("train.micro_batch") * get("train.accumulation") == max(1, before // 2)
        assert "↺ 512" in screen_text(pilot)
        await pilot.press("f1")
        await until(pilot, lambda: isinstance(pilot.app.screen, HelpScreen))
        assert "The longest sample has 300 tokens" in screen_text(pilot)
        await pilot.press("escape", "ctrl+r")
        await until(pilot, lambda: get("data.sequence_length") == 512)
        line = answer(pilot, "data.sequence_length").query_one(Input)
        await until(pilot, lambda: line.value == "512")
        # Also in the place of what is no number; what was typed is not called computed.
        await pilot.press(*"abc")
        await until(pilot, lambda: "write a whole number" in screen_text(pilot))
        note = answer(pilot, "data.sequence_length").query_one(".note")
        assert str(note.render()) == ""
        await pilot.press("ctrl+r")
        await until(pilot, lambda: get("data.sequence_length") == 512)
        # What was given stays, whatever else changes.
        line = answer(pilot, "train.accumulation").query_one(Input)
        line.focus()
        await pilot.press("ctrl+u", *"5", "shift+tab", "shift+tab", "ctrl+u", *"2048")
        await pilot.pause()
        assert get("train.accumulation") == "5"

    drive(app_of(VALUES), how)


@given(
    st.builds(
        Size,
        samples=st.integers(1, 10**6),
        tokens=st.integers(1, 10**9),
        longest=st.integers(1, 10**6),
    ),
    st.sampled_from((256, 2048, 8192)),
    st.sampled_from((20, 64, 79, 140)),
)
def test_suggestions_are_good_answers(data: Size, length: int, budget: int) -> None:
    base = answers_of(data={"train": ["-"], "sequence_length": length}, run={"device": "cuda"})
    found = costs.standing(
        base.model_copy(update={"run": base.run.model_copy(update={"memory_gib": budget})})
    )
    got = suggest.suggestions(base, data, found)
    values: dict[str, Any] = {"data": {"train": ["-"]}, "train": {}}
    for field, suggestion in got.items():
        section, name = field.split(".")
        values[section][name] = suggestion.value
        assert suggestion.reason.endswith(".")
    answers = Answers.model_validate(values)
    batch = answers.train.micro_batch * answers.train.accumulation
    assert batch * length <= max(suggest.STEP_TOKENS, length)
    assert answers.data.sequence_length >= min(data.longest, suggest.LONGEST)
    steps = planner.total_steps(answers.configuration(), data.bins(length))
    assert steps >= min(suggest.FEWEST_STEPS, data.bins(length))


# Speed.


def test_speed_is_the_planners_estimate() -> None:
    answers = answers_of(run={"device": "cuda", "memory_gib": 79}, train={"steps": 100})
    found = costs.standing(answers)
    got = speed(answers, found, None)
    gpu = gpu_of(found)
    assert gpu is not None
    assert gpu.gib >= 79
    wanted = throughput.estimate(found.config, found.dims, gpu)
    assert (got.kind, got.source) == ("estimate", gpu.name)
    assert got.tokens_per_s == pytest.approx(wanted.tokens_per_s)
    assert got.hours == pytest.approx(wanted.hours(100 * 8 * 2048))
    assert got.kwh == pytest.approx(wanted.kwh(100 * 8 * 2048))
    assert (got.steps, got.steps_kind) == (100, "given")


def test_gpu_is_found_by_its_name() -> None:
    answers = answers_of(run={"device": "cuda", "memory_gib": 79})
    found = costs.standing(answers)
    for name, wanted in (("NVIDIA H100 80GB HBM3", "H100 SXM"), ("a GPU", "A100 SXM 80 GB")):
        named = costs.Cost(
            found.plan,
            "cuda",
            f"{name} (nvidia-smi lists it)",
            found.budget,
            found.config,
            found.dims,
        )
        gpu = gpu_of(named)
        assert gpu is not None
        assert gpu.name == wanted
    unknown = costs.Cost(found.plan, "cuda", "a GPU", None, found.config, found.dims)
    assert gpu_of(unknown) is None
    assert speed(answers, unknown, None).tokens_per_s is None
    assert gpu_of(costs.Cost(found.plan, "cpu", "CPU", 1, found.config, found.dims)) is None
    assert GPUS, "the table is not empty"


def test_what_training_measured_takes_the_estimates_place(tmp_path: Path) -> None:
    answers = answers_of(run={"device": "cuda", "memory_gib": 79}, train={"steps": 10})
    found = costs.standing(answers)
    (tmp_path / "results").mkdir()
    planned = {"config_hash": answers.configuration().part_hash("plan")}
    (tmp_path / "results/plan.json").write_text(json.dumps(planned))
    lines = [json.dumps({"step": n, "tokens_per_s": 100.0 + n}) for n in range(3)]
    metrics = tmp_path / "results/metrics.jsonl"
    metrics.write_text("\n".join(lines) + '\n{"step": 3, "tok')  # one is being written
    got = speed(answers, found, None, tmp_path)
    assert (got.kind, got.tokens_per_s) == ("measured", 101.0)
    assert got.hours == pytest.approx(10 * 8 * 2048 / 101 / 3600)
    # Of other settings it says nothing.
    other = answers_of(run={"device": "cuda", "memory_gib": 79}, adapters={"rank": 8})
    assert speed(other, costs.standing(other), None, tmp_path).kind == "estimate"
    metrics.write_text("[1]\nnull\n")
    assert speed(answers, found, None, tmp_path).kind == "estimate"
    metrics.unlink()
    assert speed(answers, found, None, tmp_path).kind == "estimate"
    (tmp_path / "results/plan.json").write_text("[")
    assert speed(answers, found, None, tmp_path).kind == "estimate"


@pytest.mark.parametrize(
    ("hours", "text"),
    [(0.001, "< 1 min"), (0.5, "30 min"), (3.26, "3.3 h"), (240, "10 days")],
)
def test_durations(hours: float, text: str) -> None:
    assert duration(hours) == text
