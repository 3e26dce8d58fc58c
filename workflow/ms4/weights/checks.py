"""What can be wrong with a base and with its source, all of it together.

A fault is one line: file, tensor, what. Nothing here raises for what it is there to find.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ms4 import spec
from ms4.errors import Ms4Error
from ms4.weights import fp8
from ms4.weights.convert import INDEX
from ms4.weights.layouts import MOST_SCALE, Source, shard_names
from ms4.weights.meter import Meter
from ms4.weights.recompute import recompute
from ms4.weights.shards import Bytes, Entry, read_header, readable
from ms4.weights.tables import base_tensors, pieces

STRETCH = 1 << 24
"""Bytes that one task looks at, a part at a time."""
_BLOCK = 1 << 22
_NAMED = 5
"""Members of a tensor, or tensors of a file, that one fault names."""


def _listed(names: Sequence[object]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(str(name) for name in names[:_NAMED]) + more


# The base.


def tensor_faults(target: Path, dims: spec.Dimensions, to: str) -> tuple[int, list[str]]:
    """Compare the headers and the index of a base with the table of its storage `to`.

    Returns:
        The number of tensors that are there, and what is missing, left over, of another dtype or
        shape, there twice, or in another file than the index says.
    """
    faults: list[str] = []
    found: dict[str, Entry] = {}
    unread: set[str] = set()
    for path in sorted(target.glob("*.safetensors")):
        try:
            header = read_header(path)
        except Ms4Error as error:
            faults.append(str(error))
            unread.add(path.name)
            continue
        for name, entry in header.items():
            if name in found:
                faults.append(f"{path}: {name}: is in {found[name].path.name} too")
            found[name] = entry
    expected: set[str] = set()
    for file, tensors in pieces(dims).items():
        table = {
            name: kind for tensor in tensors for name, kind in base_tensors(tensor, to).items()
        }
        expected |= table.keys()
        for name, (dtype, shape) in table.items():
            if name not in found:
                if file not in unread:
                    faults.append(f"{target / file}: {name}: is missing")
            elif (found[name].dtype, found[name].shape) != (dtype, shape):
                faults.append(
                    f"{found[name].path}: {name}: is {found[name].dtype} "
                    f"{list(found[name].shape)} instead of {dtype} {list(shape)}"
                )
    faults += [
        f"{found[name].path}: {name}: is unexpected" for name in sorted(found.keys() - expected)
    ]
    return len(found), faults + _index_faults(target / INDEX, found, unread)


def _index_faults(index: Path, found: Mapping[str, Entry], unread: set[str]) -> list[str]:
    try:
        files = shard_names(index)
    except Ms4Error as error:
        return [str(error)]
    faults = [
        f"{index}: {name}: is in {entry.path.name} and not in {files.get(name, 'the index')}"
        for name, entry in sorted(found.items())
        if files.get(name) != entry.path.name
    ]
    return faults + [
        f"{index}: {name}: should be in {file}, and is in no file"
        for name, file in sorted(files.items())
        if name not in found and file not in unread
    ]


def settings_faults(config: Mapping[str, Any], dims: spec.Dimensions, scale: str) -> list[str]:
    """Whether a base's config.json is what a base made with the softmax scale `scale` has."""
    faults = []
    if config.get("quantization_config") is not None:
        faults.append("config.json: has a quantization_config, which is the source's")
    text = config["text_config"]
    wanted = dims.softmax_scales(text.get("rope_parameters") or {})[scale]
    found = text.get("softmax_scale")
    if not isinstance(found, float) or not math.isclose(found, wanted, rel_tol=1e-6):
        faults.append(
            f"config.json: text_config.softmax_scale is {found!r:.40}, and the manifest says "
            f"`{scale}`, which is {wanted:.6g}"
        )
    return faults


def file_faults(manifest: Mapping[str, Any], target: Path, threads: int) -> dict[str, str]:
    """Compare the base's files with its manifest, SHA-256 included: file → fault."""
    entries = manifest["files"]
    missing = {
        entry["path"]: f"{target / entry['path']}: is missing"
        for entry in entries
        if not (target / entry["path"]).is_file()
    }
    whole = [entry for entry in entries if entry["path"] not in missing]
    return missing | _content_faults(whole, target, threads, "hash the base")


def _content_faults(
    entries: Sequence[Mapping[str, Any]], directory: Path, threads: int, label: str
) -> dict[str, str]:
    """Compare files that are there with their entries in a manifest: file → fault."""
    faults: dict[str, str] = {}
    whole = []
    for entry in entries:
        path = directory / entry["path"]
        if path.stat().st_size == entry["size"]:
            whole.append(entry)
        else:
            size = path.stat().st_size
            faults[entry["path"]] = f"{path}: has {size} bytes instead of {entry['size']}"
    with (
        Meter(label, sum(entry["size"] for entry in whole)) as meter,
        ThreadPoolExecutor(threads) as pool,
    ):

        def digest(entry: Mapping[str, Any]) -> str:
            path, digest = directory / entry["path"], hashlib.sha256()
            with readable(path), path.open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
                    meter.add(len(block))
            return digest.hexdigest()

        for entry, found in zip(whole, pool.map(digest, whole), strict=True):
            if found != entry["sha256"]:
                path = directory / entry["path"]
                faults[entry["path"]] = f"{path}: its content differs from its SHA-256"
    return faults


def differing(source: Source, target: Path, piece: str, to: str) -> str:
    """Which tensors of a damaged piece differ from source × scale, as the end of a fault."""
    names = []
    for tensor in pieces(source.dims).get(piece, []):
        if not source.is_here([tensor]):
            return ""
        try:
            recompute(source, target, tensor, to, every_expert=True)
        except Ms4Error:
            names.append(tensor.disk)
    if not names:
        return "; no tensor differs by more than rounding"
    return f"; {len(names)} of its tensors differ from source × scale: {_listed(names)}"


# The source.


def source_file_faults(
    record: Mapping[str, Any], directory: Path, mend: str, threads: int
) -> tuple[int, list[str]]:
    """Compare the source's files that are here with the hashes that were recorded when they came.

    Args:
        record: the manifest of the stage fetch.
        directory: of the source. What was freed, or is on another disk, is nothing to compare.
        mend: what to do about a file that is not what it was, as the end of a fault.
        threads: that hash, one file each.

    Returns:
        How many files were compared, and the faults.
    """
    here = [entry for entry in record["files"] if (directory / entry["path"]).is_file()]
    faults = _content_faults(here, directory, threads, "hash the source")
    return len(here), [
        f"{fault}, which `ms4 fetch` recorded: it changed or was damaged since. {mend}"
        for fault in faults.values()
    ]


def _is_weight_scale(name: str) -> bool:
    return name.endswith(("_scale_inv", ".qscale_weight"))


def _is_activation_scale(name: str) -> bool:
    return name.endswith(("activation_scale", ".qscale_act"))


def _is_scale(name: str) -> bool:
    return _is_weight_scale(name) or _is_activation_scale(name)


def source_faults(source: Source, threads: int) -> tuple[list[str], list[str]]:
    """Scan all files of the source that are here.

    Returns:
        Codes and values that are not a number, and scales that cannot be one's; and, apart, scales
        of activations that are zero or negative, which no weight depends on.
    """
    scales = [entry for entry in source.entries.values() if _is_scale(entry.name)]
    data = [entry for entry in source.entries.values() if not _is_scale(entry.name)]
    tasks = [(entry, at) for entry in data for at in range(0, entry.size, STRETCH)]
    counts: dict[str, int] = {}
    with (
        Meter("scan the source", sum(entry.size for entry in data)) as meter,
        ThreadPoolExecutor(threads) as pool,
    ):

        def scan(task: tuple[Entry, int]) -> int:
            entry, start = task
            count, end = 0, min(start + STRETCH, entry.size)
            for at in range(start, end, fp8.CHUNK):
                part = source.reader.read(entry, at, min(fp8.CHUNK, end - at))
                count += _not_numbers(part, entry.dtype)
            meter.add(end - start)
            return count

        for (entry, _), count in zip(tasks, pool.map(scan, tasks), strict=True):
            counts[entry.name] = counts.get(entry.name, 0) + count
    faults = [
        f"{entry.path}: {entry.name}: {counts[entry.name]} of its "
        f"{'FP8 codes' if entry.dtype == 'F8_E4M3' else 'BF16 values'} are not a number"
        for entry in data
        if counts.get(entry.name)
    ]
    notes = []
    for entry in scales:
        values = np.array(source.numbers(entry.name))
        positive = values > 0
        if _is_weight_scale(entry.name):
            faults += _scale_faults(entry, values, ~(positive & (values <= MOST_SCALE)))
        else:
            finite = np.isfinite(values)
            faults += _scale_faults(entry, values, ~finite)
            notes += _scale_faults(entry, values, finite & ~positive)
    return faults, notes


def _not_numbers(data: Bytes, dtype: str) -> int:
    """How many of these codes or BF16 values are NaN or, of BF16, infinite."""
    if dtype == "F8_E4M3":
        return int(((data & 127) == 127).sum()) if fp8.has_nan(data) else 0
    magnitudes = data.view(np.uint16) & 0x7FFF
    return int((magnitudes >= 0x7F80).sum())


def _scale_faults(
    entry: Entry, values: npt.NDArray[np.float64], wrong: npt.NDArray[np.bool_]
) -> list[str]:
    if not wrong.any():
        return []
    if len(values) == 1:
        return [f"{entry.path}: {entry.name}: the scale is {values[0]}"]
    numbers = np.flatnonzero(wrong)
    shown = _listed([f"{values[n]} (number {n})" for n in numbers])
    return [f"{entry.path}: {entry.name}: {len(numbers)} of {len(values)} scales are {shown}"]


def kept_scale_faults(
    source: Source, kept: Mapping[str, Sequence[float]], manifest: Path
) -> list[str]:
    """Compare the scales that a base's manifest keeps with those of the source that are here."""
    differ = [
        name
        for name in source.entries
        if _is_scale(name) and kept.get(name) != source.numbers(name)
    ]
    if not differ:
        return []
    return [
        f"{manifest}: {len(differ)} of the scales that it keeps are not the source's: "
        f"{_listed(differ)}"
    ]
