"""Checkpoints: adapters, optimizer, random state and position; whole or not there.

A checkpoint is a directory `checkpoints/step-NNNNNN/`, filled under another name and renamed, so a
kill leaves either all of it or a leftover that the next run removes. Only safetensors and JSON.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ms4.errors import Ms4Error
from ms4.manifest import read_json, sha256_file, sync_directory, write_json
from ms4.train import optim

CHECKPOINTS = Path("checkpoints")
KEPT = 2
"""Checkpoints that are kept."""


@dataclass
class Progress:
    """Where the loop is. The schedule and the data position follow from `step`."""

    step: int = 0
    """Optimizer steps done."""
    trained_tokens: int = 0
    """Tokens that were targets of the loss so far."""
    seconds: float = 0.0
    """Time spent in steps, over all tries."""
    resumed: int = 0
    """How often the run was taken up again."""
    first_loss: float = 0.0
    """Loss of the first step, nats a token."""
    last_loss: float = 0.0
    """Loss of the latest step."""


def save(
    progress: Progress,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    run: str,
) -> None:
    """Write a checkpoint and remove all but the last two.

    Args:
        progress: where the loop is.
        parameters: what is trained, by name.
        optimizer: over exactly these parameters, in this order.
        run: hash of what the run depends on; a checkpoint of another run is not taken up.
    """
    name = f"step-{progress.step:06d}"
    temporary, final = CHECKPOINTS / f".{name}.tmp", CHECKPOINTS / name
    for leftover in CHECKPOINTS.glob(".step-*.tmp"):
        shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
    state: dict[str, torch.Tensor] = {"rng/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["rng/cuda"] = torch.cuda.get_rng_state()
    for name_, parameter in parameters.items():
        state[f"parameter/{name_}"] = parameter.detach()
        for key, value in optim.read_state(optimizer, parameter).items():
            state[f"optimizer/{key}/{name_}"] = value
    tensors = temporary / "state.safetensors"
    save_file({key: value.contiguous().cpu() for key, value in state.items()}, tensors)
    with tensors.open("rb") as file:
        os.fsync(file.fileno())
    write_json(
        temporary / "progress.json",
        {"run": run, "sha256": sha256_file(tensors), **vars(progress)},
    )
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    sync_directory(CHECKPOINTS)
    for old in sorted(CHECKPOINTS.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)


def _read(directory: Path, run: str) -> tuple[Progress, dict[str, torch.Tensor]] | None:
    """A checkpoint's content, or None if it is of another run or damaged."""
    tensors = directory / "state.safetensors"
    try:
        record: dict[str, Any] = read_json(directory / "progress.json")
        whole = record.pop("run") == run and record.pop("sha256") == sha256_file(tensors)
        return (Progress(**record), load_file(tensors)) if whole else None
    except (Ms4Error, OSError, SafetensorError, KeyError, TypeError) as error:
        print(f"{directory} is damaged and not used: {error}")
        return None


def restore(
    parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, run: str
) -> Progress:
    """Take up the newest whole checkpoint of this run, or start at step 0."""
    for directory in sorted(CHECKPOINTS.glob("step-*"), reverse=True):
        found = _read(directory, run)
        if found is None:
            continue
        progress, state = found
        moments: dict[str, dict[str, torch.Tensor]] = {}
        for key, value in state.items():
            if key.startswith("optimizer/"):
                _, kind, name = key.split("/", 2)
                moments.setdefault(name, {})[kind] = value
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state[f"parameter/{name}"])
                if name in moments:  # no step, no moments
                    optim.write_state(optimizer, parameter, moments[name])
        torch.set_rng_state(state["rng/cpu"])
        if "rng/cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["rng/cuda"])
        progress.resumed += 1
        return progress
    if CHECKPOINTS.exists():
        # What is left is of another configuration or damaged: nothing in it can be used again.
        shutil.rmtree(CHECKPOINTS)
    CHECKPOINTS.mkdir()
    return Progress()
