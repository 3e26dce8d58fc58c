"""The predictions of docs/performance.md are those of the plan."""

from __future__ import annotations

import re

import pytest

from ms4 import config, memory, spec, throughput
from ms4.device import GPUS
from tests.commands import CHECKOUT

PAGE = (CHECKOUT / "docs/performance.md").read_text(encoding="utf-8")
Values = dict[str, dict[str, object]]
LENGTHS = (2048, 8192, 16384)
LEAN: Values = {
    "adapters": {"targets": ["all"], "dtype": "bf16"},
    "train": {"optimizer": "adamw_8bit"},
}


def run_of(length: int, policy: str, values: Values) -> config.RunConfig:
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
    (gpu,) = (gpu for gpu in GPUS if gpu.name.startswith("H200"))
    for policy, cells in rows:
        for length, cell in zip(LENGTHS, cells.split(" | "), strict=True):
            if cell == "does not fit":
                assert not throughput.fits(gpu, planned(length, policy, {}).peak)
                continue
            found = throughput.estimate(run_of(length, policy, {}), spec.Dimensions(), gpu)
            assert float(cell.replace(",", "")) == pytest.approx(found.tokens_per_s, abs=6)
