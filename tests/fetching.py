"""Small checkpoints, and `ms4 fetch` as a process in a project of its own: for tests of fetch."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ms4 import config, manifest
from ms4.weights import configs
from ms4.weights.download import RemoteFile
from tests.hub import Hub
from tests.small_source import DIMS

REPOSITORY = "someone/small-four"
BIG = "model-00002-of-00002.safetensors"
SHARDS = ["model-00001-of-00002.safetensors", BIG]
NEEDED = sorted(
    [
        "config.json",
        "tekken.json",
        "model.safetensors.index.json",
        "params.json",
        "LICENSE",
        *SHARDS,
    ]
)
HIDDEN = ("HF_", "HUGGING", "ALL_PROXY", "HTTP", "http", "all_proxy")
"""Beginnings of the variables that say where a hub is and how it is reached."""
CREDENTIAL = "hf_TheTokenThatNobodyMaySee"
WRONG = "hf_wrong"


def make_checkpoint(directory: Path, seed: int = 0) -> Path:
    """A small checkpoint in the HF layout, with files that must not be fetched beside it."""
    directory.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    weight_map = {}
    for shard, rows in zip(SHARDS, (8, 1500), strict=True):
        tensors = {f"{shard[:11]}.weight": generator.random((rows, 64), dtype=np.float32)}
        save_file(tensors, directory / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
    (directory / "config.json").write_text(json.dumps(configs.hf_config(DIMS)))
    write_index(directory, weight_map)
    (directory / "tekken.json").write_text(json.dumps({"vocab": list(range(30_000))}))
    (directory / "params.json").write_text("{}")
    (directory / "LICENSE").write_text("Apache-2.0\n")
    (directory / "README.md").write_text("not needed\n")
    (directory / "consolidated-00001-of-00001.safetensors").write_bytes(b"native layout")
    return directory


def write_index(directory: Path, weight_map: Any) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def make_config(source: str, revision: str | None = None, **model: Any) -> config.RunConfig:
    model |= {"source": source, "revision": revision}
    return config.check({"model": model, "data": {"train": ["train.jsonl"]}}, "test")


@dataclass
class Result:
    code: int
    text: str


def environment(home: Path, endpoint: str) -> dict[str, str]:
    """The variables of a process that fetches from a hub of the tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(HIDDEN)}
    return kept | {
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        # The library asks the hub for something unrelated otherwise.
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


class Project:
    """A project's directory, and `ms4 fetch` in it as a process."""

    def __init__(self, directory: Path, endpoint: str) -> None:
        self.directory = directory
        self.source = directory / "weights/source"
        self.environment = environment(directory / "home", endpoint)
        directory.mkdir()
        self.configure(REPOSITORY)

    def configure(self, source: str, revision: str | None = None, **model: Any) -> None:
        text = config.dump(make_config(source, revision, **model))
        (self.directory / "config.yaml").write_text(text)

    def start(self, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "ms4", "fetch", "--config", "config.yaml"],
            cwd=self.directory,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def fetch(self, **environment: str) -> Result:
        return finish(self.start(**environment))

    def manifest(self) -> dict[str, Any]:
        return manifest.read_manifest(self.directory / "weights/source.json", "fetch")

    def partials(self, name: str = "*") -> list[Path]:
        return list(self.source.glob(f"{name}.*.part"))

    def holds(self, checkpoint: Path) -> bool:
        """Whether the fetched files are those of `checkpoint`, and the manifest says so."""
        entries = self.manifest()["files"]
        manifest.check_files(self.manifest(), self.source, hashes=True)
        return [entry["path"] for entry in entries] == NEEDED and all(
            (self.source / name).read_bytes() == (checkpoint / name).read_bytes() for name in NEEDED
        )


def finish(process: subprocess.Popen[str]) -> Result:
    text, _ = process.communicate(timeout=120)
    return Result(process.returncode, text)


def refused(result: Result, *words: str) -> bool:
    """Whether the command said all of `words` in a message for the user, and ended so."""
    assert result.code == 2, result.text
    assert "Traceback" not in result.text
    for word in words:
        assert word in result.text
    return True


def resolved(server: Hub) -> list[str]:
    """Names of the files that were asked for."""
    return [r.path.rsplit("/", 1)[1] for r in server.requests if "/resolve/" in r.path]


def leave_partial(project: Project, checkpoint: Path, size: int) -> Path:
    """Leave the big shard's first `size` bytes as a fetch that was killed leaves them."""
    content = (checkpoint / BIG).read_bytes()
    remote = RemoteFile(BIG, len(content), hashlib.sha256(content).hexdigest())
    part = remote.partial(project.source)
    part.parent.mkdir(parents=True)
    part.write_bytes(content[:size])
    return part
