"""Files that survive a kill: atomic writes, hashes, stage manifests.

A stage declares one small JSON manifest as its output. The manifest vouches for
the payload: path, size and SHA-256 of each file, and the hashes of what the stage
read. It holds no time and no host name, so that the same work gives the same bytes
and a rerun that changes nothing reruns nothing downstream.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import ms4
from ms4.errors import Ms4Error

WEIGHTS = ("fetch", "descale", "verify")
"""Stages that make weights."""
_BLOCK = 1 << 22


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a JSON value, independent of key order and white space."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    # A name of a file need not be UTF-8: Python keeps its odd bytes as surrogates.
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def sync_directory(directory: Path) -> None:
    """Make a rename in `directory` survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def commit_file(temporary: Path, path: Path) -> None:
    """Sync `temporary` and rename it to `path`: a reader sees all of it or none."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def copy_file(source: Path, path: Path) -> None:
    """Copy a file atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        shutil.copyfile(source, temporary)
        commit_file(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, making its directory if need be. Bytes of a file's name that
    are not UTF-8 become escapes, which JSON reads as the same name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        commit_file(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically: two spaces of indent, keys in their given order."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        Ms4Error: it cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Ms4Error(f"{path}: cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise Ms4Error(f"{path}: not valid JSON ({error}). Remove it and run again.") from error


def file_entry(path: Path, base: Path, sha256: str | None = None) -> dict[str, Any]:
    """The manifest's entry of one payload file: path relative to `base`, size in bytes, SHA-256
    (the file is read for it unless it is given)."""
    return {
        "path": path.relative_to(base).as_posix(),
        "size": path.stat().st_size,
        "sha256": sha256 or sha256_file(path),
    }


def write_manifest(
    path: Path,
    stage: str,
    *,
    config_hash: str,
    inputs: Iterable[Path] = (),
    files: Iterable[Mapping[str, Any]] = (),
    **content: Any,
) -> dict[str, Any]:
    """Write a stage's manifest and return it.

    Args:
        path: the declared output, for instance `weights/base.json`.
        stage: the stage's name.
        config_hash: hash of the stage's part of the configuration.
        inputs: manifests and data files that the stage read; their hashes are recorded.
        files: entries made by `file_entry`.
        content: what else the stage has to say; JSON values.
    """
    manifest = {
        "stage": stage,
        "ms4_version": ms4.__version__,
        "config_hash": config_hash,
        "inputs": {item.as_posix(): sha256_file(item) for item in inputs},
        "files": list(files),
        **content,
    }
    write_json(path, manifest)
    return manifest


def read_manifest(path: Path, stage: str) -> dict[str, Any]:
    """Read the manifest of the stage before.

    Raises:
        Ms4Error: it is missing, unreadable or of another stage.
    """
    if not path.exists():
        raise Ms4Error(f"{path} is missing: run `ms4 {stage}` (or `snakemake`) first.")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("stage") != stage:
        raise Ms4Error(f"{path}: not a manifest of the stage {stage}. Remove it and run again.")
    return manifest


Stage = TypeVar("Stage", bound=str)


class Configuration(Protocol):
    """What a configuration is to a manifest."""

    def part_hash(self, stage: Any) -> str:
        """Hash of what a stage depends on."""


def read_inputs(inputs: Mapping[Stage, Path], config: Configuration) -> dict[Stage, dict[str, Any]]:
    """The manifests of the stages before, by stage.

    Those of weights name what they were made of themselves; what else was made under another
    configuration is no input of this run.

    Raises:
        Ms4Error: one is missing, unreadable, of another stage or of another configuration.
    """
    found = {stage: read_manifest(path, stage) for stage, path in inputs.items()}
    for stage, manifest in found.items():
        if stage in WEIGHTS or manifest["config_hash"] == config.part_hash(stage):
            continue
        raise Ms4Error(
            f"{inputs[stage]}: made before the configuration was changed: run `snakemake`, which "
            f"reruns what has to be, or `ms4 {stage}`."
        )
    return found


def check_files(manifest: Mapping[str, Any], base: Path, *, hashes: bool = False) -> None:
    """Check that the payload is what the manifest vouches for.

    Args:
        manifest: as read by `read_manifest`.
        base: the directory that the entries' paths are relative to.
        hashes: compare SHA-256 too; otherwise only existence and size (fast).

    Raises:
        Ms4Error: a file is missing or differs; names each of them.
    """
    faults = []
    for entry in manifest["files"]:
        path = base / entry["path"]
        if not path.is_file():
            faults.append(f"{path}: missing")
        elif path.stat().st_size != entry["size"]:
            faults.append(f"{path}: {path.stat().st_size} bytes instead of {entry['size']}")
        elif hashes and sha256_file(path) != entry["sha256"]:
            faults.append(f"{path}: content differs from its SHA-256")
    if faults:
        listing = "\n  ".join(faults)
        raise Ms4Error(
            f"files of the stage {manifest['stage']} are not as its manifest says:\n  {listing}\n"
            f"Remove the manifest of that stage and run again; whole pieces are kept."
        )
