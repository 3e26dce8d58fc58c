"""Estimates of time; and the predictions of docs/performance.md are those of plan and estimate."""

from __future__ import annotations

import re

import pytest

from ms4 import config, memory, spec, throughput
from ms4.device import GPUS
from tests.commands import CHECKOUT

PAGE = (CHECKOUT / "docs/performance.md").read_text(encoding="utf-8")
Values = dict[str, dict[str, object]]
(H200,) = (gpu for gpu in GPUS if gpu.name.startswith("H200"))
LENGTHS = (2048, 8192, 16384)
LEAN: Values = {
    "adapters": {"targets": ["all"], "dtype": "bf16"},
    "train": {"optimizer": "adamw_8bit"},
}


def run_of(length: int, policy: str, values: Values | None = None) -> config.RunConfig:
    values = values or {}
    train = {"accumulation": 1, "checkpointing": policy, **values.get("train", {})}
    return config.check(
        {
            "data": {"train": ["train.jsonl"], "sequence_length": length},
            "adapters": {"targets": ["attention", "shared"], **values.get("adapters", {})},
            "train": train,
        },
        "test",
    )


def planned(length: int, policy: str, values: Values) -> memory.Plan:
    return memory.plan(run_of(length, policy, values), spec.Dimensions(), "cuda")


def test_peaks_by_adapters_and_length() -> None:
    table = re.findall(r"^\|[^|]*\| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \| not yet", PAGE, re.M)
    cases = [(length, values) for values in (Values(), LEAN) for length in LENGTHS]
    assert len(table) == len(cases)
    for (length, peak, tensors), (wanted, values) in zip(table, cases, strict=True):
        found = planned(wanted, "full", values)
        assert int(length.replace(",", "")) == wanted
        assert float(peak) == pytest.approx(found.peak / 2**30, abs=0.051)
        assert float(tensors) == pytest.approx(found.tensors / 2**30, abs=0.051)


@pytest.mark.parametrize("policy", ["selective", "none"])
def test_peaks_by_policy(policy: str) -> None:
    found = re.search(rf"`{policy}` (\d+\.\d), (\d+\.\d) and (\d+\.\d)", PAGE)
    assert found is not None
    for length, peak in zip(LENGTHS, found.groups(), strict=True):
        assert float(peak) == pytest.approx(planned(length, policy, {}).peak / 2**30, abs=0.051)


def test_speeds() -> None:
    rows = re.findall(r"^\| predicted tokens/s, checkpointing `(\w+)` \| (.*) \|$", PAGE, re.M)
    assert [policy for policy, _ in rows] == ["full", "none"]
    for policy, cells in rows:
        for length, cell in zip(LENGTHS, cells.split(" | "), strict=True):
            if cell == "does not fit":
                assert not throughput.fits(H200, planned(length, policy, {}).peak)
                continue
            found = throughput.estimate(run_of(length, policy, {}), spec.Dimensions(), H200)
            assert float(cell.replace(",", "")) == pytest.approx(found.tokens_per_s, abs=6)


@pytest.mark.parametrize(("length", "reference"), [(2048, 4200), (8192, 7800), (16384, 8800)])
def test_speed_on_an_h200(length: int, reference: int) -> None:
    """Within a quarter of what was computed elsewhere for full checkpointing."""
    run = run_of(length, "full")
    found = throughput.estimate(run, spec.Dimensions(), H200)
    assert found.tokens_per_s == pytest.approx(reference, rel=0.25)
    assert found.hours(3_600_000) * found.tokens_per_s == pytest.approx(1000)
    assert found.kwh(1000) == pytest.approx(found.hours(1000) * 0.7)


def test_recomputing_takes_longer() -> None:
    speeds = [
        throughput.estimate(run_of(2048, policy), spec.Dimensions(), H200).tokens_per_s
        for policy in ("full", "selective", "none")
    ]
    assert sorted(set(speeds)) == speeds


def test_selective_checkpointing_spares_what_it_keeps() -> None:
    """39.6 of the 53 M multiplications of a layer's dense products for each token, by hand."""
    full, selective = (
        throughput.work(run_of(2048, policy), spec.Dimensions()) for policy in ("full", "selective")
    )
    kept = 4096 * (1024 + 320 + 2 * 2048 + 128 + 4096)
    assert full.dense_flops - selective.dense_flops == 2 * 2048 * 36 * kept
    assert full.attention_flops / selective.attention_flops == pytest.approx(4.5 / 3.5)
    assert full.expert_flops == selective.expert_flops
