"""The machine's screen: what was found, and planning for another machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

from ms4.device import GPUS
from ms4_wizard import machine, targets
from ms4_wizard.draft import Draft
from ms4_wizard.machine import Known, Partition
from ms4_wizard.widgets.machine import Targets, facts
from tests.tui.conftest import MACHINE
from tests.tui.driving import VALUES, app_of, drive, go_to, screen_text

SIZES = ((80, 24), (140, 45))


async def choose(pilot: Pilot[Any], name: str) -> None:
    """Choose a target by keys."""
    listed = pilot.app.screen.query_one(Targets)
    listed.focus()
    await pilot.press("home")
    for _ in range(listed.option_count):
        option = listed.get_option_at_index(listed.highlighted or 0)
        if name in str(option.prompt):
            break
        await pilot.press("down")
    await pilot.press("enter")
    await pilot.pause()


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_it_shows_what_was_found(place: Path, size: tuple[int, int]) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "machine")
        seen = screen_text(pilot)
        for part in (
            "96 cores",
            "755 GiB, 701 free",
            "○ H100 SXM",
            "budget 79",
            "4,321 GiB",
            "token in HF_TOKEN",
            "h200 × 8",
        ):
            assert part in seen, f"{part!r} is not in sight:\n{seen}"

    drive(app_of(VALUES), how, size)


def test_a_gpu_by_its_name(place: Path) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "machine")
        draft: Draft = pilot.app.flow.draft  # type: ignore[attr-defined]
        await choose(pilot, "RTX 4090")
        assert (draft.get("run.device"), draft.get("run.memory_gib")) == ("cuda", 24.0)
        assert "● RTX 4090" in screen_text(pilot)
        assert "● cuda" in screen_text(pilot)
        assert "does not fit" in screen_text(pilot)
        await choose(pilot, "H200 SXM")
        assert draft.get("run.memory_gib") == 140.4
        assert "fits: " in screen_text(pilot)
        await choose(pilot, "this machine")
        assert (draft.get("run.device"), draft.get("run.memory_gib")) == ("auto", None)

    drive(app_of(VALUES), how, (140, 45))


def test_a_partition_of_the_cluster(place: Path) -> None:
    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "machine")
        draft: Draft = pilot.app.flow.draft  # type: ignore[attr-defined]
        await choose(pilot, "Slurm short")
        fields = ("run.device", "run.memory_gib", "where.run", "where.partition", "where.hours")
        assert [draft.get(field) for field in fields] == ["cuda", 45.0, "slurm", "short", 4]
        await choose(pilot, "Slurm gpu")
        assert draft.get("run.memory_gib") == 140.4
        assert draft.get("where.partition") == "gpu"
        assert draft.get("where.hours") is None, "the limit of the other partition stayed"

    drive(app_of(VALUES), how)


def test_what_is_not_known_yet_is_looked_for(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The screen is there at once, and the machine when its programs have answered."""
    monkeypatch.undo()
    monkeypatch.chdir(place)
    monkeypatch.setattr(Known, "machine", None)
    monkeypatch.setenv("PATH", "/nowhere")

    async def how(pilot: Pilot[list[str]]) -> None:
        await go_to(pilot, "machine")
        await pilot.app.workers.wait_for_complete()
        await pilot.pause()
        assert Known.machine is not None
        assert "nvidia-smi is not" in screen_text(pilot)
        assert "not installed here" in screen_text(pilot)
        assert "Slurm gpu" not in screen_text(pilot)

    drive(app_of(VALUES), how)


def test_facts_of_every_kind() -> None:
    gpus = (machine.FoundGpu("NVIDIA H200", 140.4), machine.FoundGpu("NVIDIA GB10", None))
    found = machine.Machine("cpu", 4, 8, 4, gpus=gpus, cuda="12.8")
    told = dict(facts(found))
    assert told["CUDA"] == "12.8"
    assert told["hub"] == "no token"
    assert told["Slurm"] == "not installed here"
    assert [words for name, words in facts(found) if name == "GPU"] == [
        *("NVIDIA H200, 140.4 GiB", "NVIDIA GB10")
    ]
    dead = machine.Machine("cpu", 4, 8, 4, slurm=machine.Slurm(fault="sinfo does not answer"))
    assert dict(facts(dead))["Slurm"] == "sinfo does not answer"
    lines = [words for name, words in facts(MACHINE) if name == "Slurm"]
    assert lines == [
        "gpu (default); h200 × 8; 4 nodes; 2-00:00:00 at most; only for physics",
        "short; l40s × 4; 2 nodes; 04:00:00 at most",
        "cpu; no GPUs; 40 nodes; no time limit",
    ]


@pytest.mark.parametrize(
    ("kind", "gib"),
    [
        ("h200 × 8", 140.4),
        ("nvidia_h100 × 1", 79.6),
        ("a100 × 4", 40.0),
        ("v100 × 4", None),
        ("nvidia_geforce_rtx_4090 × 2", 24.0),
        ("rtx_a6000 × 4", None),
    ],
)
def test_a_clusters_name_for_a_gpu(kind: str, gib: float | None) -> None:
    partition = Partition("gpu", True, True, 1, (kind,), 8, 64, None, None)
    found = targets.known_gpu(partition)
    assert (found.gib if found else None) == gib


def test_every_gpu_that_has_a_data_sheet_can_be_planned_for() -> None:
    names = [target.name for target in targets.targets(None)]
    assert names == ["this machine", *(gpu.name for gpu in GPUS)]
