"""The benchmark of a GPU, tried with a tiny model on the CPU: each of its lines but CUDA's own."""

import json
import sys

import bitsandbytes.functional as bnb
import pytest
import torch

from tests.commands import CHECKOUT, run

COMMAND = (sys.executable, CHECKOUT / "benchmarks/gpu.py", "--size", "tiny", "--device", "cpu")


@pytest.fixture
def gpu(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(CHECKOUT / "benchmarks")
    import gpu

    return gpu


@pytest.mark.soak
def test_calls_go_on_until_all_is_measured(tmp_path):
    record = tmp_path / "record.json"
    first = run(*COMMAND, "--record", record, "--minutes", "0", cwd=tmp_path)
    assert first.returncode == 0, first.stdout
    assert "are missing: the same command goes on" in first.stdout
    assert len(json.loads(record.read_text())["cases"]) == 1

    second = run(*COMMAND, "--record", record, "--minutes", "30", cwd=tmp_path)
    assert "Nothing is missing." in second.stdout, second.stdout
    assert "times as fast as the plain stack" in second.stdout
    found = json.loads(record.read_text())
    rows = {json.dumps(row["case"]): row for row in found["cases"]}
    assert len(rows) == len(found["cases"]) == 29
    assert {row["session"] for row in rows.values()} == {0, 1}
    assert {row["outcome"] for row in rows.values()} == {"measured"}
    for row in rows.values():
        ours, experts = row["case"]["stack"] == "ours", row["case"]["adapters"] == "all"
        assert row["peak_gib"] > 0
        assert row["tokens_per_s"] > 0
        assert ("planned_gib" in row) == ours
        # PEFT's adapter of gate and up does nothing over parametrized experts: two a layer.
        dead = "0" if ours or not experts else "8"
        assert row["adapter_tensors_without_gradient"] == f"{dead} of {80 if experts else 64}"
    losses = [row["losses"][0] for row in rows.values() if row["case"]["length"] == 64]
    assert max(losses) - min(losses) < 0.02  # the same weights, the same tokens

    third = run(*COMMAND, "--record", record, cwd=tmp_path)
    assert "Nothing is missing." in third.stdout
    assert json.loads(record.read_text()) == found


@pytest.mark.slow
def test_what_does_not_fit_is_told_and_survived(gpu, monkeypatch, tmp_path, capsys):
    """A plan above the device's memory, memory that runs out, and a kernel that is not there."""
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
    faults = iter([full, RuntimeError("x")])

    def build(case, setting):
        raise next(faults, ValueError("no more"))

    monkeypatch.setattr(gpu, "build", build)
    record = tmp_path / "record.json"
    given = ["--size", "tiny", "--device", "cpu", "--record", str(record)]
    assert gpu.main([*given, "--minutes", "30", "--memory", "0.51"]) == 1
    rows = json.loads(record.read_text())["cases"]
    skipped = [row for row in rows if row["outcome"] == "skipped"]
    assert skipped
    assert all(row["planned_gib"] > 0.51 for row in skipped)
    assert "GiB, the device has 0.5" in skipped[0]["why"]
    others = [row for row in rows if row["outcome"] != "skipped"]
    assert others[0]["outcome"] == "out of memory"
    assert others[0]["why"] == "CUDA out of memory. Tried to allocate 2 GiB"
    assert (others[1]["outcome"], others[1]["why"]) == ("failed", "RuntimeError: x")
    told = capsys.readouterr().out
    assert "failed: ValueError: no more" in told
    assert "the same command tries them again" in told


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(gpu, capsys):
    assert gpu.main([]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().out


def test_the_two_stacks_compute_the_same(gpu):
    import stacks

    dims, cpu = gpu.SIZES["tiny"].dims, torch.device("cpu")
    state = stacks.random_weights(dims, cpu, torch.float32, "fp8")
    tokens = torch.arange(1000, 1040)[None]
    models = (
        stacks.packed_model(state, dims, cpu, torch.float32, "fp8"),
        stacks.plain_model(state, dims, cpu, torch.float32),
    )
    with torch.no_grad():
        ours, plain = (model(input_ids=tokens).logits for model in models)
    assert (ours - plain).norm() / plain.norm() < 1e-5


def test_halves_are_the_whole(gpu):
    """gate_up_proj of the published model is dequantized in two calls."""
    import stacks

    weight = torch.randn(4, 128, 64)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    wanted = bnb.dequantize_4bit(packed, state)
    assert torch.equal(stacks.HalvesOf4Bit(state)(packed), wanted)
