"""Shards converted as soon as they have arrived and, where that is asked for, freed.

Pieces are made while other shards are still on their way. A shard is freed only when every piece
that is made of it is whole and has been compared with it (`recompute`). The record then says so:
a rerun fetches it again only if one of those pieces is lost.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ms4.errors import Ms4Error
from ms4.manifest import sha256_json
from ms4.weights import convert
from ms4.weights.download import RemoteFile
from ms4.weights.layouts import Source
from ms4.weights.meter import Display, Meter, gigabytes, say
from ms4.weights.pull import Downloads, Errand, Need, check_room, on_disk
from ms4.weights.recompute import recompute
from ms4.weights.schedule import Schedule
from ms4.weights.sources import Target
from ms4.weights.tables import piece_bytes, pieces

VERIFIERS = 8
"""Threads that compare, at most: each takes some 60 MB."""


def fetch_and_convert(errand: Errand, shards: Sequence[RemoteFile], target: Target) -> None:
    """Bring in the shards and make the pieces of the base; its manifest is left to `convert.run`.

    Args:
        errand: whose other files are here.
        shards: all of the source.
        target: the base, and whether shards are freed.

    Raises:
        Ms4Error: it does not fit, the hub fails, or a shard is damaged or not of this model.
    """
    if unhashed := [file.name for file in shards if len(file.digest) != 64]:
        raise Ms4Error(
            f"{errand.place.words.source}: the hub has no SHA-256 of {', '.join(unhashed)}, by "
            "which pieces are known. Fetch first, and convert then."
        )
    record = errand.record
    # What stands here with another content, or was left by a kill when it was being freed, must be
    # gone before its header is read.
    freed = [file for file in shards if target.free and record.is_freed(file)]
    errand.drop([file for file in shards if file in freed or not record.is_whole(file)])
    threads = target.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    with Source(errand.place.directory, record.state.layout) as source:
        identity = sorted([file.name, file.size, file.digest] for file in shards)
        job = convert.begin(source, target.directory, target.to, threads, identity)
        _Arrival(errand, shards, target, job).run()


def finish(directory: Path, source_manifest: Mapping[str, Any], target: Target) -> None:
    """Make what is not made yet of a base outside a project, and its manifest.

    Args:
        directory: of the source.
        source_manifest: that vouches for it.
        target: the base.

    Raises:
        Ms4Error: the source is damaged or not this model, or the disk is full.
    """
    with Source(directory, source_manifest["layout"]) as source:
        convert.run(
            source,
            target.directory,
            target.to,
            softmax_scale="plain",
            threads=target.threads or torch.get_num_threads(),
            identity=convert.weights_of(source_manifest),
            manifest=target.manifest,
            config_hash=sha256_json([target.to, "plain"]),
        )


class _Arrival:
    """One conversion that goes along with a fetch."""

    def __init__(
        self, errand: Errand, shards: Sequence[RemoteFile], target: Target, job: convert.Job
    ) -> None:
        self._errand, self._record, self._target, self._job = errand, errand.record, target, job
        self._files = {file.name: file for file in shards}
        directory = errand.place.directory
        self._needs = {
            name: job.source.needs(tensors) for name, tensors in pieces(job.source.dims).items()
        }
        made = {name: job.record(name) is not None for name in self._needs}
        todo = [name for name in self._needs if not (made[name] and self._is_done(name))]
        needed = {shard for name in todo for shard in self._needs[name]}
        wanted = [
            file
            for file in shards
            if not target.free
            or file.name in needed
            or (directory / file.name).exists()
            or not self._record.is_known(file)
        ]
        self._arrived = {file.name for file in wanted if (directory / file.name).exists()}
        self._absent = [file for file in wanted if file.name not in self._arrived]
        sizes, old = piece_bytes(job.source.dims, target.to), _sizes(job, todo)
        self.schedule = Schedule(
            shards={file.name: file.size for file in wanted},
            here={
                file.name: file.size if file.name in self._arrived else errand.come(file)
                for file in wanted
            },
            pieces={name: 0 if made[name] else sizes[name] for name in todo},
            replaced={name: 0 if made[name] else old[name] for name in todo},
            needs={name: self._needs[name] for name in todo},
            free=target.free,
        )
        self._todo, self._done = todo, set[str]()

    def run(self) -> None:
        """Do it."""
        self._say_what_is_lost()
        self._errand.clear(self._absent)
        self._check_room()
        if any(self.schedule.pieces.values()):
            convert.retract(self._target.manifest, self._target.directory)
        if self._absent:
            self._errand.announce(self._absent)
        tensors = pieces(self._job.source.dims)
        elements = sum(tensor.numel for name in self._todo for tensor in tensors[name])
        with (
            Display() as display,
            Downloads(self._errand, self._errand.meter(self._absent, display)) as downloads,
        ):
            self._loop(downloads, Meter("converted", elements, 0, display))

    def _loop(self, downloads: Downloads, meter: Meter) -> None:
        pending, most, free = list(self._absent), self.schedule.peak(), self._target.free
        while True:
            self._free()
            ready = self.schedule.ready(self._arrived, self._done)
            while pending and not downloads.failed:
                begun = downloads.under_way | {pending[0].name}
                idle = not (ready or downloads.under_way)
                foreseen = self.schedule.peak(self._arrived, begun, self._done) if free else 0
                if foreseen > most and not idle:
                    break
                downloads.start(pending.pop(0))
            if ready:
                self._make(ready, meter)
            elif downloads.under_way:
                downloads.wait()
            else:
                break
            downloads.look()
            self._arrived |= downloads.come
        # What had come is converted before the failure of the rest is reported.
        downloads.check()

    def _make(self, names: Sequence[str], meter: Meter) -> None:
        self._job.source.refresh()
        convert.convert(self._job, names, meter)
        if self._target.free:
            for name in names:
                self._verify(name)
        self._done |= set(names)

    def _verify(self, name: str) -> None:
        """Compare a piece with the source: every tensor, of experts a few."""
        job = self._job
        tensors = pieces(job.source.dims)[name]
        with ThreadPoolExecutor(min(job.threads, VERIFIERS)) as pool:
            errors = pool.map(lambda t: recompute(job.source, job.target, t, job.to), tensors)
            # Rounded: the sum's order, and with it the last digits, may depend on the machine.
            found = {t.disk: float(f"{e:.6g}") for t, e in zip(tensors, errors, strict=True)}
        self._record.verify(self._key(name), self._digest(name), found)

    def _free(self) -> None:
        if not self._target.free:
            return
        directory = self._errand.place.directory
        for shard in sorted(self.schedule.unneeded(self._done) & self._arrived):
            if (directory / shard).exists():
                made = [self._key(name) for name, needed in self._needs.items() if shard in needed]
                self._job.source.forget(shard)
                self._record.free(shard, made)
                say(f"{shard}: freed, what was made of it is verified")

    def _is_done(self, name: str) -> bool:
        verified = self._record.is_verified(self._key(name), self._digest(name))
        return verified or not self._target.free

    def _key(self, name: str) -> str:
        """A piece's name in the record: its path as seen from there."""
        return os.path.relpath(self._job.target / name, self._record.directory)

    def _digest(self, name: str) -> str:
        record = self._job.record(name)
        if record is None:
            raise Ms4Error(f"{self._job.target / name}: changed meanwhile; run again.")
        return str(record["entry"]["sha256"])

    def _say_what_is_lost(self) -> None:
        again = [file.name for file in self._absent if self._record.is_freed(file)]
        lost = [name for name in self._todo if self._needs[name] & set(again)]
        if lost:
            say(f"{self._job.target}: {', '.join(lost)} must be made, of shards that were freed")

    def _check_room(self) -> None:
        """Say what the disk must hold, and whether it can."""
        schedule, errand, target = self.schedule, self._errand, self._target
        rest, base = errand.need(self._absent), sum(schedule.pieces.values())
        grown = Need(target.directory, base, f"the base ({target.to})")
        if not target.free:
            least = gigabytes(replace(schedule, free=True).peak())
            advice = f", or take less at a time: with {errand.place.words.free} {least} will do"
            check_room([rest, grown], advice)
            return
        if on_disk(target.directory) == on_disk(rest.path):
            what = (
                f"{rest.what} ({gigabytes(rest.size)}) and making the base in {target.to} "
                f"({gigabytes(base)}), each shard freed when it may be,"
            )
            needs = [Need(rest.path, schedule.peak(), what)]
        else:
            nothing = dict.fromkeys(schedule.pieces, 0)
            shards = replace(schedule, pieces=nothing, replaced=nothing).peak()
            needs = [replace(rest, size=shards), grown]
        if self._todo:
            self._foretell()
        check_room(needs)

    def _foretell(self) -> None:
        held = sum(self.schedule.here.values())
        held += sum(_sizes(self._job, self._needs).values())
        ends = sum(piece_bytes(self._job.source.dims, self._target.to).values())
        say(
            f"shards are freed as they are converted: at most "
            f"{gigabytes(held + self.schedule.peak())} of shards and base on the disk at a time, "
            f"{gigabytes(ends)} in the end"
        )
        say(f"that forecloses: {_foreclosed(self._target.to, self._job.source.layout)}")


def _sizes(job: convert.Job, names: Sequence[str] | dict[str, set[str]]) -> dict[str, int]:
    """Bytes of the files that are where these pieces go."""
    paths = {name: job.target / name for name in names}
    return {name: path.stat().st_size if path.is_file() else 0 for name, path in paths.items()}


def _foreclosed(to: str, layout: str) -> str:
    """What cannot be made any more without the source."""
    if to == "nf4":
        return "exports in FP8, and an exact BF16 copy; the base has 4 bits of each expert weight"
    if to == "bf16":
        return (
            "the FP8 export with the source's very codes; one that is rounded from BF16 under the "
            "kept scales stays possible"
        )
    if layout == "native":
        return (
            "the native codes of experts whose gate and up have different scales: both are rounded "
            "to the larger one"
        )
    return "nothing; the base holds the source's very codes and scales"
