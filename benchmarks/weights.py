"""Descaling and loading against the disk, the hash, torch, bitsandbytes and transformers.

    python benchmarks/weights.py [PART ...]    kernel, descale, memory, transformers, load; or all

It writes a synthetic checkpoint in the official layout into a temporary directory (TMPDIR says
where): 40 GB of room are needed. Figures that are compared come from runs in turn.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import synthetic
from common import peak_gib, record_part, spread

PAIRS = 5
LAYERS = 7
"""Of the checkpoint that is measured: 6.6 GB. The check of memory takes one of twice as many."""
SMALL_LAYERS = 2
"""Of the checkpoint that transformers gets, which holds all of it in memory: 2.0 GB."""
THREADS = 2
CHILD = "--child"
"""What tells a part in a process of its own from the names of parts."""
CLAIM = (
    "FP8 → bf16 with hashes and fsync at 0.85 or more of the lower of dd conv=fsync and the hashing"
    " rate, in 1 GiB of memory whatever the size; the kernels at least 5 times torch's product (2 "
    "Gelem/s on two threads) and 12 times bitsandbytes' quantize_4bit."
)


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def child(*arguments: str) -> dict[str, float]:
    """Run a part of this file in a process of its own; the figures that it prints last."""
    command = [sys.executable, __file__, CHILD, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}: failed\n{done.stdout}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def report(**figures: float) -> None:
    """What `child` reads: the figures, and this process's peak memory in GiB."""
    print(json.dumps({**figures, "peak_gib": peak_gib()}))


# What runs in a process of its own.


def child_descale(source: str, target: str, to: str) -> None:
    """Convert; the time without that of Python's imports."""
    import torch

    from ms4.weights import convert

    torch.set_num_threads(THREADS)
    before = peak_gib()
    seconds = timed(lambda: convert.descale_directory(Path(source), Path(target), to, "plain"))  # type: ignore[arg-type]
    report(seconds=seconds, imports_gib=before)


def child_transformers(source: str, target: str) -> None:
    """transformers' own way: load with dequantization, save. Its experts lack their scales."""
    import torch
    from transformers import Mistral3ForConditionalGeneration
    from transformers.utils.quantization_config import FineGrainedFP8Config

    def convert() -> None:
        model = Mistral3ForConditionalGeneration.from_pretrained(
            source,
            quantization_config=FineGrainedFP8Config(dequantize=True),
            dtype=torch.bfloat16,
        )
        model.save_pretrained(target)

    torch.set_num_threads(THREADS)
    seconds = timed(convert)
    report(seconds=seconds)


def child_load(base: str) -> None:
    """Load an NF4 base as training does."""
    import torch

    from ms4.model.build import load_model

    torch.set_num_threads(THREADS)
    before = peak_gib()
    cpu = torch.device("cpu")
    seconds = timed(lambda: load_model(Path(base), "nf4", cpu, torch.bfloat16))
    report(seconds=seconds, imports_gib=before)


# The parts.


def kernel() -> dict[str, Any]:
    """The kernels in memory, each beside what it replaces, in turn."""
    import bitsandbytes.functional as bnb
    import torch

    from ms4.weights import fp8, nf4

    torch.set_num_threads(THREADS)
    codes = synthetic.normal_codes(np.random.default_rng(0))[: 4096 * 4096]
    scale, count = float(torch.tensor(2e-4).bfloat16()), len(codes)
    weights, table = np.empty(count, np.uint16), nf4.pair_table(scale)
    packed = np.empty(count // 2, np.uint8)
    stored = torch.from_numpy(codes).view(fp8.FP8)
    exact = fp8.descale(stored, torch.tensor(scale).bfloat16())
    made = torch.empty_like(exact)
    pool = ThreadPoolExecutor(THREADS)

    def bf16_table() -> None:
        def part(at: int) -> None:
            fp8.descale_codes(codes[at : at + fp8.CHUNK], scale, weights[at : at + fp8.CHUNK])

        list(pool.map(part, range(0, count, fp8.CHUNK)))

    def nf4_table() -> None:
        def part(at: int) -> None:
            end = at + nf4.CHUNK
            nf4.quantize_codes(codes[at:end], table, packed[at // 2 : end // 2])

        list(pool.map(part, range(0, count, nf4.CHUNK)))

    ways: dict[str, Callable[[], object]] = {
        "bf16_table": bf16_table,
        "bf16_torch": lambda: torch.mul(stored.to(torch.bfloat16), scale, out=made),
        "nf4_table": nf4_table,
        "nf4_bitsandbytes": lambda: bnb.quantize_4bit(exact, blocksize=64, quant_type="nf4"),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(PAIRS + 1):
        for name, call in ways.items():
            rate = count / timed(call) / 1e9
            if number:  # the first fills caches and tables
                rates[name].append(rate)
    found: dict[str, Any] = {
        f"{name}_gelem_per_s": spread(values) for name, values in rates.items()
    }
    for ours, theirs in (("bf16_table", "bf16_torch"), ("nf4_table", "nf4_bitsandbytes")):
        pairs = zip(rates[ours], rates[theirs], strict=True)
        found[f"{ours}_over_{theirs}"] = spread([a / b for a, b in pairs], 1)
    return found


def _hash_rate() -> float:
    """GB/s of SHA-256 on one thread."""
    import hashlib

    block = bytes(1 << 28)
    return len(block) / timed(lambda: hashlib.sha256(block)) / 1e9


def _dd(path: Path, size: int) -> float:
    """Seconds in which dd writes and syncs so many bytes."""
    count = -(-size // (1 << 22))
    command = ["dd", "if=/dev/zero", f"of={path}", "bs=4M", f"count={count}", "conv=fsync"]
    seconds = timed(lambda: subprocess.run(command, check=True, capture_output=True))
    path.unlink()
    return seconds * size / (count << 22)


def descale(place: Path) -> dict[str, Any]:
    """FP8 → bf16 end to end, in turn with dd of as many bytes."""
    source, target = _checkpoint(place, LAYERS), place / "target"
    ours, disk, shares, peaks, hashing = [], [], [], [], []
    for _ in range(PAIRS):
        spent = child("descale", str(source), str(target), "bf16")
        size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
        shutil.rmtree(target)
        hashing.append(_hash_rate())
        ours.append(size / spent["seconds"] / 1e9)
        disk.append(size / _dd(place / "dd", size) / 1e9)
        shares.append(ours[-1] / min(disk[-1], hashing[-1]))
        peaks.append(spent["peak_gib"])
    return {
        "output_gb": round(size / 1e9, 2),
        "gb_per_s": spread(ours),
        "dd_gb_per_s": spread(disk),
        "sha256_gb_per_s": spread(hashing),
        "share_of_the_lower": spread(shares),
        "peak_gib": max(peaks),
    }


def memory(place: Path) -> dict[str, Any]:
    """Peak memory as the checkpoint grows twofold, for each storage."""
    found: dict[str, Any] = {}
    for to in ("bf16", "nf4", "fp8"):
        peaks = []
        for layers in (LAYERS // 2, LAYERS):
            target = place / "target"
            spent = child("descale", str(_checkpoint(place, layers)), str(target), to)
            shutil.rmtree(target)
            peaks.append(spent["peak_gib"])
        found[to] = {"peak_gib": peaks, "of_it_imports_gib": spent["imports_gib"]}
    return found


def transformers(place: Path) -> dict[str, Any]:
    """The route of transformers and ours on the same checkpoint, in turn."""
    source = _checkpoint(place, SMALL_LAYERS)
    rows: dict[str, list[dict[str, float]]] = {"ms4": [], "transformers": []}
    for _ in range(3):
        for name, arguments in (
            ("ms4", ["descale", str(source), str(place / "target"), "bf16"]),
            ("transformers", ["transformers", str(source), str(place / "target")]),
        ):
            rows[name].append(child(*arguments))
            shutil.rmtree(place / "target")
    found: dict[str, Any] = {
        name: {
            "seconds": spread([run["seconds"] for run in runs], 1),
            "peak_gib": max(run["peak_gib"] for run in runs),
        }
        for name, runs in rows.items()
    }
    pairs = zip(rows["transformers"], rows["ms4"], strict=True)
    found["times_faster"] = spread([a["seconds"] / b["seconds"] for a, b in pairs], 1)
    found["note"] = "transformers' result has the experts' raw codes, without their scales"
    return found


def _forget(directory: Path) -> None:
    """Drop a directory's files from the page cache."""
    for path in directory.glob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def _read(directory: Path) -> None:
    buffer = bytearray(1 << 22)
    for path in directory.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def load(place: Path) -> dict[str, Any]:
    """Loading the NF4 base against reading its bytes, from the disk and from the page cache."""
    base = place / "base"
    child("descale", str(_checkpoint(place, LAYERS)), str(base), "nf4")
    size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
    found: dict[str, Any] = {"base_gb": round(size / 1e9, 2)}
    for state in ("cold", "warm"):
        ours, reads, peaks = [], [], []
        for _ in range(PAIRS):
            if state == "cold":
                _forget(base)
            spent = child("load", str(base))
            ours.append(spent["seconds"])
            peaks.append(spent["peak_gib"] - spent["imports_gib"])
            if state == "cold":
                _forget(base)
            reads.append(timed(lambda: _read(base)))
        found[state] = {
            "load_seconds": spread(ours),
            "read_seconds": spread(reads),
            "load_over_read": spread([a / b for a, b in zip(ours, reads, strict=True)], 2),
            "memory_over_base": round(max(peaks) * 2**30 / size, 3),
        }
    shutil.rmtree(base)
    return found


def _checkpoint(place: Path, layers: int) -> Path:
    directory = place / f"source-{layers}"
    if not directory.exists():
        synthetic.write_checkpoint(directory, synthetic.dimensions(layers))
    return directory


def main(parts: list[str]) -> None:
    """Measure the named parts, or all, each recorded with its own date."""
    places: dict[str, Callable[[Path], dict[str, Any]]] = {
        "kernel": lambda _: kernel(),
        "descale": descale,
        "memory": memory,
        "transformers": transformers,
        "load": load,
    }
    if unknown := [part for part in parts if part not in places]:
        sys.exit(f"{', '.join(unknown)}: no part of this benchmark; it has {', '.join(places)}.")
    with tempfile.TemporaryDirectory() as directory:
        for part in parts or places:
            record_part("weights", CLAIM, part, places[part](Path(directory)))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--child", "descale", source, target, to]:
            child_descale(source, target, to)
        case ["--child", "transformers", source, target]:
            child_transformers(source, target)
        case ["--child", "load", base]:
            child_load(base)
        case named:
            main(named)
