"""Stage descale: FP8 with scales → the base that is trained on, as a stream.

The source is read in stretches of a few megabytes, converted on all cores and written into pieces,
one a decoder layer; memory does not grow with the checkpoint. Each piece has a record beside it
(what it was made from, its SHA-256): a rerun keeps the pieces whose record holds, and the same
source gives the same bytes, whatever the number of threads and the number of kills.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ms4 import lock, spec
from ms4.config import RunConfig
from ms4.errors import Ms4Error
from ms4.manifest import (
    check_files,
    copy_file,
    file_entry,
    read_json,
    read_manifest,
    sha256_file,
    sha256_json,
    sync_directory,
    write_json,
    write_manifest,
)
from ms4.weights import configs, fp8, nf4
from ms4.weights.layouts import Segment, Source, native_names, native_scales
from ms4.weights.meter import Meter, say
from ms4.weights.shards import Bytes, Piece, Table, readable, sweep, table_bytes, writable
from ms4.weights.stream import STRETCH, Task, Work, check_room, drop_others, make
from ms4.weights.tables import Storage, piece_table, pieces

SOURCE = Path("weights/source.json")
BASE = Path("weights/base")
MANIFEST = Path("weights/base.json")
INDEX = "model.safetensors.index.json"
RECORDS = ".pieces"
OWN_MANIFEST = "base.json"
"""Where a base that is made outside a project has its manifest: in its own directory."""
BESIDE = ("tekken.json", "chat_template.jinja", "SYSTEM_PROMPT.txt", "generation_config.json")
"""Files that go with the weights, if the source has them."""


# How one parameter is converted, in tasks that any thread may take.


def _tasks(source: Source, tensor: spec.Tensor, piece: Piece, to: str) -> Iterator[Task]:
    segments = source.segments(tensor)
    if to == "nf4" and tensor.role == "experts":
        each = len(segments) // tensor.shape[0]
        for expert in range(tensor.shape[0]):
            own = segments[expert * each : (expert + 1) * each]
            yield partial(_to_nf4, source, tensor, piece, expert, own)
    elif to == "fp8" and tensor.dtype == "F8_E4M3":
        yield from _fp8_tasks(source, tensor, piece, segments)
    else:
        convert = _copy if tensor.dtype == "BF16" else _to_bf16
        for segment in segments:
            for start in range(0, segment.count, STRETCH):
                count = min(STRETCH, segment.count - start)
                yield partial(convert, source, tensor, piece, segment, start, count)


def _all_tasks(
    job: Job, tensors: Sequence[spec.Tensor], piece: Piece
) -> Iterator[tuple[Task, int]]:
    for tensor in tensors:
        tasks = list(_tasks(job.source, tensor, piece, job.to))
        for task in tasks:
            yield task, tensor.numel // len(tasks)


def _damaged(segment: Segment, what: str) -> Ms4Error:
    return Ms4Error(
        f"{segment.entry.path}: {segment.entry.name}: holds {what} that are not a number; the file "
        "is damaged at its origin. Fetch it again, or use another source."
    )


def _codes(source: Source, segment: Segment, start: int, count: int) -> Bytes:
    codes = source.read(segment, start, count)
    if fp8.has_nan(codes):
        raise _damaged(segment, "FP8 codes")
    return codes


def _copy(
    source: Source, tensor: spec.Tensor, piece: Piece, segment: Segment, start: int, count: int
) -> None:
    for at in range(start, start + count, fp8.CHUNK):
        some = min(fp8.CHUNK, start + count - at)
        values = source.read(segment, at, some).view(np.uint16)
        if (values & 0x7FFF).max() >= 0x7F80:  # without the sign: infinity, and NaN above it
            raise _damaged(segment, "BF16 values")
        piece.write(tensor.disk, 2 * (segment.at + at), values)


def _to_bf16(
    source: Source, tensor: spec.Tensor, piece: Piece, segment: Segment, start: int, count: int
) -> None:
    for at in range(start, start + count, fp8.CHUNK):
        some = min(fp8.CHUNK, start + count - at)
        codes = _codes(source, segment, at, some)
        made = np.empty(some, np.uint16)
        fp8.descale_codes(codes, segment.scale, made)
        piece.write(tensor.disk, 2 * (segment.at + at), made)


def _to_nf4(
    source: Source, tensor: spec.Tensor, piece: Piece, expert: int, segments: Sequence[Segment]
) -> None:
    """One projection of one expert, in one segment or, in the native layout, gate and up apart."""
    codes_name, absmax_name, scale_name, offset_name = (
        tensor.disk + suffix for suffix in nf4.SUFFIXES
    )
    magnitudes = []
    for segment in segments:
        table = nf4.pair_table(segment.scale)
        for at in range(0, segment.count, nf4.CHUNK):
            some = min(nf4.CHUNK, segment.count - at)
            made = np.empty(some // 2, np.uint8)
            codes = _codes(source, segment, at, some)
            largest = nf4.quantize_codes(codes, table, made)
            magnitudes.append(nf4.block_magnitudes(largest, segment.scale))
            piece.write(codes_name, (segment.at + at) // 2, made)
    absmax, scale, offset = nf4.pack_absmax(torch.cat(magnitudes))
    piece.write(absmax_name, expert * absmax.nbytes, absmax.numpy())
    piece.write(scale_name, expert * scale.nbytes, scale.numpy())
    piece.write(offset_name, expert * offset.nbytes, offset.numpy())


def fused_scales(tensor: spec.Tensor, segments: Sequence[Segment]) -> list[float]:
    """The scale of each matrix of the HF tensor: of gate and up of an expert the larger one."""
    matrices = tensor.shape[0] if tensor.role == "experts" else 1
    each = len(segments) // matrices
    scales = [segment.scale for segment in segments]
    return [max(scales[i * each : (i + 1) * each]) for i in range(matrices)]


def _fp8_tasks(
    source: Source, tensor: spec.Tensor, piece: Piece, segments: Sequence[Segment]
) -> Iterator[Task]:
    fused = fused_scales(tensor, segments)
    bits = torch.tensor(fused).bfloat16().view(torch.int16).numpy()
    yield partial(piece.write, tensor.scale, 0, bits)
    each = len(segments) // len(fused)
    for number, segment in enumerate(segments):
        for start in range(0, segment.count, STRETCH):
            count = min(STRETCH, segment.count - start)
            scale = fused[number // each]
            yield partial(_to_fp8, source, tensor, piece, segment, start, count, scale)


def _to_fp8(
    source: Source,
    tensor: spec.Tensor,
    piece: Piece,
    segment: Segment,
    start: int,
    count: int,
    scale: float,
) -> None:
    """Codes as they are, or, where gate and up share the larger of two scales, rounded again."""
    for at in range(start, start + count, fp8.CHUNK):
        some = min(fp8.CHUNK, start + count - at)
        codes = _codes(source, segment, at, some)
        if segment.scale != scale:
            codes = fp8.rescale(codes, segment.scale, scale)
        piece.write(tensor.disk, segment.at + at, codes)


# Pieces and their records.


@dataclass(frozen=True)
class Job:
    """A conversion: what, where to, and by which hash its pieces are known."""

    source: Source
    target: Path
    to: Storage
    threads: int
    made_from: str
    """Hash of the source's files and settings and of `to`: a piece that was made from something
    else is made anew."""

    @property
    def records(self) -> Path:
        """Directory of the pieces' records."""
        return self.target / RECORDS

    def table(self, name: str) -> Table:
        """The tensors of a piece."""
        return piece_table(self.source.dims, name, self.to)

    def record(self, name: str) -> dict[str, Any] | None:
        """A piece's record, if it holds for what is here: by time stamp, else by hash."""
        path, kept = self.target / name, self.records / f"{name}.json"
        if not (kept.exists() and path.is_file()):
            return None
        try:
            record = read_json(kept)
            entry, when = record["entry"], record["mtime_ns"]
            if record["made_from"] != self.made_from or path.stat().st_size != entry["size"]:
                return None
            if path.stat().st_mtime_ns != when and sha256_file(path) != entry["sha256"]:
                return None
        except (Ms4Error, OSError, KeyError, TypeError):
            return None
        return dict(record)

    def keep(self, piece: Piece, digest: str) -> None:
        """Write the record of a finished piece."""
        name = piece.path.name
        record = {
            "made_from": self.made_from,
            "entry": {"path": name, "size": piece.size, "sha256": digest},
            "tensors": sorted(self.table(name)),
            "mtime_ns": piece.path.stat().st_mtime_ns,
            "source_scales": self.source.all_scales(pieces(self.source.dims)[name]),
        }
        with writable(piece.path):
            write_json(self.records / f"{name}.json", record)


def convert(job: Job, names: Sequence[str], meter: Meter) -> None:
    """Make those of the named pieces that are not here whole; their sources must be.

    Raises:
        Ms4Error: the source is damaged, or the disk is full; whole pieces are kept.
    """
    with writable(job.target):
        job.records.mkdir(parents=True, exist_ok=True)

    def works() -> Iterator[Work]:
        for name in names:
            tensors = pieces(job.source.dims)[name]
            if job.record(name) is not None:
                meter.add(sum(tensor.numel for tensor in tensors))
                continue
            with writable(job.target):
                (job.records / f"{name}.json").unlink(missing_ok=True)
            yield Work(job.target / name, job.table(name), partial(_all_tasks, job, tensors))

    make(works(), job.threads, job.keep, meter)


def total_elements(dims: spec.Dimensions) -> int:
    """What the progress of a whole conversion counts up to."""
    return sum(tensor.numel for tensor in spec.tensors(dims))


def unmade(job: Job) -> list[str]:
    """The pieces that are not here whole."""
    return [name for name in pieces(job.source.dims) if job.record(name) is None]


def disk_needed(job: Job) -> int:
    """Bytes that the pieces that are not here yet will take."""
    return sum(table_bytes(job.table(name)) for name in unmade(job))


def finish(
    job: Job, manifest: Path, softmax_scale: str, config_hash: str, inputs: Sequence[Path]
) -> dict[str, Any]:
    """Write index, settings, the files beside the weights, and the manifest, which vouches for all.

    Raises:
        Ms4Error: a piece is missing, or the source was written meanwhile.
    """
    job.source.check_unchanged()
    records = {name: job.record(name) for name in pieces(job.source.dims)}
    whole = {name: record for name, record in records.items() if record is not None}
    if missing := [name for name in records if name not in whole]:
        raise Ms4Error(f"{job.target}: {', '.join(missing)} changed meanwhile; run again.")
    entries = [record["entry"] for record in whole.values()]
    weight_map = {tensor: name for name, record in whole.items() for tensor in record["tensors"]}
    size = sum(entry["size"] for entry in entries)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    config = configs.base_config(job.source.config, job.source.dims, softmax_scale)
    with writable(job.target):
        write_json(job.target / INDEX, index)
        write_json(job.target / "config.json", config)
        for name in BESIDE:
            if (job.source.directory / name).is_file():
                copy_file(job.source.directory / name, job.target / name)
        beside = [INDEX, "config.json", *(n for n in BESIDE if (job.target / n).is_file())]
        entries += [file_entry(job.target / name, job.target) for name in beside]
        scales: dict[str, list[float]] = {}
        for record in whole.values():
            scales |= record["source_scales"]
        return write_manifest(
            manifest,
            "descale",
            config_hash=config_hash,
            inputs=inputs,
            files=entries,
            directory=job.target.as_posix(),
            experts=job.to,
            layout=job.source.layout,
            softmax_scale=softmax_scale,
            parameters=total_elements(job.source.dims),
            source_scales=dict(sorted(scales.items())),
        )


def begin(source: Source, target: Path, to: Storage, threads: int, identity: Any) -> Job:
    """Take up a conversion where it was left; what a kill left half-written is removed.

    Args:
        source: whose settings are here; its weights may still be on their way.
        target: directory of the base.
        to: how FP8 tensors are stored in it.
        threads: that convert.
        identity: of the source's weights: a JSON value that changes when they do.

    Raises:
        Ms4Error: the model cannot be stored so, or the target cannot be written.
    """
    if to == "nf4":
        _check_blocks(source.dims)
    job = Job(source, target, to, threads, sha256_json([identity, source.config, to]))
    with writable(target):
        target.mkdir(parents=True, exist_ok=True)
    sweep(target)
    sweep(job.records)
    return job


def retract(manifest: Path, target: Path) -> None:
    """Until all is whole, nothing vouches for a base: pieces of two sources may stand side by side.

    Raises:
        Ms4Error: they cannot be removed.
    """
    with writable(manifest):
        for path in (manifest, target / INDEX):
            path.unlink(missing_ok=True)
            sync_directory(path.parent)


def weights_of(manifest: Mapping[str, Any]) -> list[list[Any]]:
    """Name, size and hash of each shard of a source, by its manifest; those that were freed too."""
    files = [*manifest["files"], *manifest.get("freed", [])]
    entries = sorted([entry["path"], entry["size"], entry["sha256"]] for entry in files)
    return [entry for entry in entries if entry[0].endswith(".safetensors")]


def run(
    source: Source,
    target: Path,
    to: Storage,
    *,
    softmax_scale: str,
    threads: int,
    identity: Any,
    manifest: Path,
    config_hash: str,
    inputs: Sequence[Path] = (),
) -> dict[str, Any]:
    """Convert a whole checkpoint; returns the manifest.

    Args:
        source: where all files are that pieces still have to be made of.
        target, to, threads, identity: as of `begin`.
        softmax_scale: the configuration's name for it.
        manifest: where the manifest goes.
        config_hash: of the stage's part of the configuration.
        inputs: manifests that the stage read.

    Raises:
        Ms4Error: the source is damaged or not this model, or the disk is full.
    """
    job = begin(source, target, to, threads, identity)
    _check_sources(job)
    with writable(target):
        check_room(target, disk_needed(job), "the base")
    retract(manifest, target)
    names = list(pieces(source.dims))
    drop_others(target, job.records, names)
    with Meter("descale", total_elements(source.dims)) as meter:
        convert(job, names, meter)
    made = finish(job, manifest, softmax_scale, config_hash, inputs)
    if to == "fp8" and source.layout == "native" and (lossy := _rounded_again(job, made)):
        say(
            f"{lossy} expert matrices share a scale with their gate or up matrix in the HF layout "
            "and were rounded to FP8 again: that is lossy. bf16 and nf4 are made without."
        )
    size = sum(entry["size"] for entry in made["files"])
    print(f"base: {len(names)} pieces, {size / 1e9:.2f} GB, experts in {to}")
    return made


def _check_blocks(dims: spec.Dimensions) -> None:
    for tensor in spec.tensors(dims):
        # Gate and up are apart in one layout, and no block may hold some of both.
        if tensor.role == "experts" and dims.expert_width * dims.hidden % nf4.BLOCK:
            raise Ms4Error(
                f"{tensor.disk}: an expert's {dims.expert_width} × {dims.hidden} weights are no "
                f"whole blocks of {nf4.BLOCK}, which nf4 takes; use bf16 or fp8."
            )


def _check_sources(job: Job) -> None:
    """Whether the shards of all pieces that are to be made are here: they may have been freed."""
    for name in unmade(job):
        tensors = pieces(job.source.dims)[name]
        if not job.source.is_here(tensors):
            shards = ", ".join(sorted(job.source.needs(tensors)))
            raise Ms4Error(
                f"{job.target / name}: is not whole, and of {shards} in {job.source.directory}, "
                f"which it is made of, not all is here. Remove {SOURCE} and run again: what was "
                "freed is fetched again."
            )


def _rounded_again(job: Job, made: Mapping[str, Any]) -> int:
    """Gate and up matrices of a native source whose scales differ."""
    scales, count = made["source_scales"], 0
    for tensor in spec.tensors(job.source.dims):
        if tensor.transform == "stack_gate_up":
            names = [native_scales(name)[0] for name in native_names(tensor)]
            pairs = zip(names[::2], names[1::2], strict=True)
            count += sum(scales[gate] != scales[up] for gate, up in pairs)
    return count


def run_stage(config: RunConfig) -> None:
    """Make `weights/base/` and `weights/base.json`."""
    manifest = read_manifest(SOURCE, "fetch")
    directory = Path(manifest["directory"])
    check_files(manifest, directory)
    threads = config.run.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    with Source(directory, manifest.get("layout")) as source:
        run(
            source,
            BASE,
            config.model.experts,
            softmax_scale=config.model.softmax_scale,
            threads=threads,
            identity=weights_of(manifest),
            manifest=MANIFEST,
            config_hash=config.part_hash("descale"),
            inputs=[SOURCE],
        )


def descale_directory(directory: Path, target: Path, to: Storage, softmax_scale: str) -> None:
    """`ms4 descale SOURCE TARGET`: a base outside a project, its manifest in its own directory.

    Raises:
        Ms4Error: the source is damaged or not this model, or another process writes the target.
    """
    with readable(directory):
        opened = Source(directory)
    with opened as source:
        used = sorted(set(source.files.values()))
        source.check_here()
        with writable(target):
            _check_target(target, directory)
        # Whole files are hashed when they are fetched; here size and time stamp have to do.
        stats = {name: (directory / name).stat() for name in used}
        identity = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()]
        with ExitStack() as stack:
            with writable(target):
                target.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock.hold("descale", target / lock.LOCKS))
            run(
                source,
                target,
                to,
                softmax_scale=softmax_scale,
                threads=torch.get_num_threads(),
                identity=identity,
                manifest=target / OWN_MANIFEST,
                config_hash=sha256_json([to, softmax_scale]),
            )


def _check_target(target: Path, source: Path) -> None:
    inside = target.resolve().is_relative_to(source.resolve())
    ours = (target / RECORDS).exists() or (target / OWN_MANIFEST).exists()
    # What stands there may be somebody's model, whose index and settings would be written over.
    foreign = not ours and (any(target.glob("*.safetensors")) or (target / "config.json").exists())
    if inside or foreign:
        fault = "is the source, or inside it" if inside else "holds a model that is no base of ours"
        raise Ms4Error(f"{target}: {fault}; give another directory.")
