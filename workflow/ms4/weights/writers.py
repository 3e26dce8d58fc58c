"""From a base back to the checkpoints that others read: HF layout in BF16 or FP8, native layout.

Each is written as a stream, in shards as the publisher splits them; index and settings come last,
so that what a kill leaves is no checkpoint. A target is locked as `descale` locks its own. What is
not exact is said on standard error and returned.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ms4 import lock, spec
from ms4.errors import Ms4Error
from ms4.manifest import copy_file, file_entry, read_json, write_json
from ms4.weights import configs, fp8
from ms4.weights.base import Base
from ms4.weights.convert import BESIDE
from ms4.weights.layouts import (
    INDEX,
    SETTINGS,
    Layout,
    Source,
    native_names,
    native_scales,
    part_shape,
    rope_order,
)
from ms4.weights.meter import Meter, say
from ms4.weights.requantize import Requantizer, bf16_bits
from ms4.weights.shards import ITEM_BYTES, Piece, sweep, table_bytes, writable
from ms4.weights.stream import STRETCH, Task, Work, check_room, make

NATIVE_LIMIT = 20_000_000_000
"""Bytes of tensor data in one native shard, at most: seven shards, as published."""
_STEM: Mapping[Layout, str] = {"hf": "model", "native": "consolidated"}

Read = Callable[[int, int], npt.NDArray[Any]]
"""Gives `count` elements from element `start` on."""
Fill = Callable[[Piece], Iterator[tuple[Task, int]]]
"""The tasks that write one tensor into its file, with the elements of each."""
Columns = dict[str, tuple[tuple[str, tuple[int, ...]], Fill]]
"""Name → ((dtype, shape), what writes it)."""


@dataclass(frozen=True)
class Written:
    """A checkpoint that was written."""

    files: list[dict[str, Any]]
    """Path, size and SHA-256 of each, as manifests have them."""
    notes: list[str]
    """What about it is not exact; empty if all is."""


def write_bf16(base: Base, target: Path, limit: int = spec.SHARD_LIMIT) -> Written:
    """Write the HF layout in BF16, which transformers loads as it is.

    As exact as the base: out of fp8 every weight is its code × its scale; out of nf4 the experts
    are what is left of them in 4 bits, which is said.

    Args:
        base: of any storage.
        target: a new or empty directory.
        limit: bytes of tensor data in one shard, at most.

    Raises:
        Ms4Error: the target is not empty, another process writes to it, or the disk is full.
    """
    columns: Columns = {
        tensor.disk: (("BF16", tensor.shape), _bf16_of(base, tensor)) for tensor in base.tensors
    }
    return _write(base.directory, target, "hf", columns, base.config, limit, base.losses)


def write_fp8(
    base: Base, target: Path, source: Source | None = None, limit: int = spec.SHARD_LIMIT
) -> Written:
    """Write the HF layout in FP8, with the scales of weights and activations, as it is published.

    From an fp8 base: its codes. From a bf16 base: a matrix goes back to the codes under the scale
    that the source had, and an untouched one to exactly the source's; one that outgrew its scale
    gets a new one, 1/448 of its largest magnitude, and a note. With `source` the codes of untouched
    matrices are copied from there and not computed.

    Args:
        base: in bf16 or fp8.
        target: a new or empty directory.
        source: the FP8 checkpoint that the base was made from, in either layout; an fp8 base needs
            none.
        limit: bytes of tensor data in one shard, at most.

    Raises:
        Ms4Error: the base is in nf4, the source is another model's, scales are missing, the target
            is not empty, another process writes to it, or the disk is full.
    """
    if base.to == "nf4":
        raise Ms4Error(
            f"{base.directory}: its experts are in nf4, and FP8 made of 4 bits would only look "
            "like the original. Convert the source to bf16 or fp8 and write that."
        )
    coded = Requantizer(base, source)
    columns: Columns = {}
    for tensor in base.tensors:
        if tensor.dtype == "BF16":
            columns[tensor.disk] = (("BF16", tensor.shape), _bf16_of(base, tensor))
            continue
        (scale, shape), (activation, other) = tensor.scales().items()
        columns |= {
            tensor.disk: (("F8_E4M3", tensor.shape), partial(coded.tasks, tensor)),
            scale: (("BF16", shape), _numbers(scale, partial(coded.weight_scales, tensor))),
            activation: (
                ("BF16", other),
                _numbers(activation, partial(coded.activation_scales, tensor)),
            ),
        }
    config = {**base.config, "quantization_config": configs.fp8_quantization()}

    def notes() -> list[str]:
        return base.losses() + coded.notes()

    return _write(base.directory, target, "hf", columns, config, limit, notes, source)


def write_native(origin: Base | Source, target: Path, limit: int = NATIVE_LIMIT) -> Written:
    """Write Mistral's native layout, which vLLM serves: in FP8 with its scales from an FP8 source
    or an fp8 base, else in BF16.

    Args:
        origin: a base of any storage, or an FP8 checkpoint in either layout. Out of the HF layout
            gate and up of an expert get the scale that they share there.
        target: a new or empty directory.
        limit: bytes of tensor data in one shard, at most.

    Raises:
        Ms4Error: files of the source are missing, scales are missing, the target is not empty,
            another process writes to it, or the disk is full.
    """
    tensors = spec.tensors(origin.dims)
    coded = isinstance(origin, Source) or origin.to == "fp8"
    if isinstance(origin, Source):
        origin.check_here()
    columns: Columns = {}
    for tensor in tensors:
        read = _reader_of(origin, tensor)
        if tensor.transform == "rope_rows":
            fill = partial(_native_rows, tensor, rope_order(origin.dims), read)
            columns[tensor.native] = (("BF16", tensor.shape), fill)
            continue
        dtype = tensor.dtype if coded else "BF16"
        shape = part_shape(tensor)
        for number, name in enumerate(native_names(tensor)):
            part = partial(_shifted, read, number * math.prod(shape))
            columns[name] = ((dtype, shape), _stretches(name, dtype, math.prod(shape), part))
        if coded and tensor.dtype == "F8_E4M3":
            columns |= _native_scales(origin, tensor)
    if isinstance(origin, Source) and origin.layout == "native":
        params = read_json(origin.directory / SETTINGS["native"])
    else:
        params = configs.to_params(origin.config, fp8=coded)
    notes = partial(_native_notes, origin)
    source = origin if isinstance(origin, Source) else None
    return _write(origin.directory, target, "native", columns, params, limit, notes, source)


def _native_notes(origin: Base | Source) -> list[str]:
    if isinstance(origin, Source):
        return []
    notes = origin.losses()
    scale = origin.manifest.get("softmax_scale")
    if scale != "plain":
        notes.append(
            f"{origin.directory} has the softmax scale {scale}, and params.json no setting for it: "
            "what reads the native layout takes 1/sqrt(head)."
        )
    return notes


# What one tensor is filled with.


def _copy(piece: Piece, name: str, item: int, read: Read, start: int, count: int) -> None:
    for at in range(start, start + count, fp8.CHUNK):
        piece.write(name, item * at, read(at, min(fp8.CHUNK, start + count - at)))


def _stretches(name: str, dtype: str, count: int, read: Read) -> Fill:
    def fill(piece: Piece) -> Iterator[tuple[Task, int]]:
        for start in range(0, count, STRETCH):
            some = min(STRETCH, count - start)
            yield partial(_copy, piece, name, ITEM_BYTES[dtype], read, start, some), some

    return fill


def _bf16_of(base: Base, tensor: spec.Tensor) -> Fill:
    return _stretches(tensor.disk, "BF16", tensor.numel, partial(base.read_bf16, tensor))


def _numbers(name: str, values: Callable[[], Sequence[float]]) -> Fill:
    def fill(piece: Piece) -> Iterator[tuple[Task, int]]:
        yield lambda: piece.write(name, 0, bf16_bits(values())), 0

    return fill


def _shifted(read: Read, first: int, start: int, count: int) -> npt.NDArray[Any]:
    return read(first + start, count)


def _reader_of(origin: Base | Source, tensor: spec.Tensor) -> Read:
    """Reads a parameter in the order of its HF tensor, in FP8 where the origin has it so."""
    if isinstance(origin, Source):
        return partial(origin.read_across, origin.segments(tensor))
    if origin.to == "fp8" and tensor.dtype == "F8_E4M3":
        return partial(origin.read, tensor.disk)
    return partial(origin.read_bf16, tensor)


def _native_rows(
    tensor: spec.Tensor, order: npt.NDArray[np.intp], read: Read, piece: Piece
) -> Iterator[tuple[Task, int]]:
    """The vision tower's q or k, a few megabytes, its rows back in interleaved pairs."""

    def write() -> None:
        rows = read(0, tensor.numel).view(np.uint16).reshape(tensor.shape)
        made = np.empty_like(rows)
        made[order] = rows
        piece.write(tensor.native, 0, made)

    yield write, tensor.numel


def _native_scales(origin: Base | Source, tensor: spec.Tensor) -> Columns:
    weights, activations = origin.source_scales(tensor)
    if isinstance(origin, Base):
        # Its codes may have been brought to the scale that gate and up share.
        each = len(weights) // len(origin.scales(tensor))
        weights = [scale for scale in origin.scales(tensor) for _ in range(each)]
    columns: Columns = {}
    for name, weight, activation in zip(native_names(tensor), weights, activations, strict=True):
        for scale, value in zip(native_scales(name), (weight, activation), strict=True):
            columns[scale] = (("BF16", ()), _numbers(scale, partial(list, [value])))
    return columns


# The files.


def _write(
    origin: Path,
    target: Path,
    layout: Layout,
    columns: Columns,
    settings: Mapping[str, Any],
    limit: int,
    notes: Callable[[], list[str]],
    source: Source | None = None,
) -> Written:
    """Make the shards, and then, if `source` is what it was, the files that make a checkpoint of
    them."""
    table = {name: columns[name][0] for name in sorted(columns, key=spec.natural)}
    shards = spec.plan_shards(table, limit)
    files = {
        f"{_STEM[layout]}-{number:05d}-of-{len(shards):05d}.safetensors": names
        for number, names in enumerate(shards, start=1)
    }
    planned = [*files, *BESIDE, INDEX[layout], lock.LOCKS.name]
    with ExitStack() as stack:
        _check_empty(target, planned)  # before a lock is left in somebody's directory
        with writable(target):
            target.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock.hold("descale", target / lock.LOCKS))
        _check_empty(target, planned)
        sweep(target)
        needed = sum(table_bytes({name: table[name] for name in names}) for names in shards)
        check_room(target, needed, "the checkpoint")
        entries: list[dict[str, Any]] = []

        def fill(names: list[str], piece: Piece) -> Iterator[tuple[Task, int]]:
            for name in names:
                yield from columns[name][1](piece)

        def works() -> Iterator[Work]:
            for file, names in files.items():
                part = {name: table[name] for name in names}
                yield Work(target / file, part, partial(fill, names))

        def finished(piece: Piece, digest: str) -> None:
            entries.append({"path": piece.path.name, "size": piece.size, "sha256": digest})

        total = sum(math.prod(shape) for _, shape in table.values())
        with Meter("write", total) as meter:
            make(works(), torch.get_num_threads(), finished, meter)
        if source is not None:
            source.check_unchanged()
        weight_map = {name: file for file, names in files.items() for name in names}
        size = sum(ITEM_BYTES[dtype] * math.prod(shape) for dtype, shape in table.values())
        beside = [name for name in BESIDE if (origin / name).is_file()]
        with writable(target):
            for name in beside:
                copy_file(origin / name, target / name)
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            write_json(target / INDEX[layout], index)
            write_json(target / SETTINGS[layout], settings)
            last = [*beside, INDEX[layout], SETTINGS[layout]]
            entries += [file_entry(target / name, target) for name in last]
        made = Written(entries, notes())
        for note in made.notes:
            say(note)
        return made


def _check_empty(target: Path, planned: Sequence[str]) -> None:
    """Whether the target is new or empty, but for what a writer that was killed left there.

    Raises:
        Ms4Error: it holds something else.
    """
    with writable(target):
        found = sorted(path.name for path in target.iterdir()) if target.exists() else []
    temporary = re.compile(r"\..*\.tmp")
    if other := [n for n in found if n not in planned and not temporary.fullmatch(n)]:
        raise Ms4Error(
            f"{target}: is not empty (it holds {', '.join(other[:3])}); give a new or an empty "
            "directory."
        )
