"""Stage fetch: the source's files, whole and hashed, from a hub, a directory or made on the spot.

A hub's files lie in `weights/source/`, with a record of what was checked beside them; a local
directory is read in place; the tiny model is built into `weights/tiny/`. No torch here, except
where the tiny model is built.
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import is_offline_mode

import ms4
from ms4 import manifest
from ms4.config import RunConfig
from ms4.errors import Ms4Error
from ms4.weights.download import Hashes, RemoteFile, Repository, Snapshot, disk
from ms4.weights.meter import Meter, gigabytes, say

MANIFEST = Path("weights/source.json")
SOURCE = Path("weights/source")
TINY = Path("weights/tiny")
RECORD = SOURCE / ".fetched.json"
TINY_RECORD = TINY / ".made.json"

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
REQUIRED = (CONFIG, "tekken.json", INDEX)
OPTIONAL = (
    "params.json",
    "chat_template.jinja",
    "SYSTEM_PROMPT.txt",
    "LICENSE",
    "generation_config.json",
)

_BLOCK = 1 << 22
_SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")


def run_stage(config: RunConfig) -> None:
    """Bring the source's files in and write `weights/source.json`.

    Raises:
        Ms4Error: the source is missing, not this model, not reachable, or damaged.
    """
    local = config.resolve_source()
    if config.model.source == "tiny":
        content = _make_tiny(config)
    elif local is not None:
        content = _read_in_place(local, config.model.revision)
    else:
        content = _fetch(config.model.source, config.model.revision)
    with disk(MANIFEST):
        manifest.write_manifest(MANIFEST, "fetch", config_hash=config.part_hash("fetch"), **content)


# What a source must hold.


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Ms4Error(f"{path}: cannot be read ({error.strerror}) (model.source).") from error
    except (ValueError, RecursionError) as error:
        raise Ms4Error(f"{path}: is not valid JSON; the model.source is damaged.") from error
    if not isinstance(value, dict):
        raise Ms4Error(f"{path}: does not hold a JSON object; the model.source is damaged.")
    return value


def check_model(path: Path) -> None:
    """Check that the `config.json` at `path` is that of a Mistral Small 4.

    Raises:
        Ms4Error: it is of another model, or no configuration.
    """
    values = _read_object(path)
    text = values.get("text_config")
    outer, inner = (
        values.get("model_type"),
        text.get("model_type") if isinstance(text, dict) else None,
    )
    if (outer, inner) != ("mistral3", "mistral4"):
        raise Ms4Error(
            f"{path}: model.source is a model of type {outer!r} with text_config of type {inner!r};"
            " only Mistral Small 4 (mistral3 with mistral4) is supported."
        )


def shard_names(path: Path) -> list[str]:
    """The shards that the index at `path` names, sorted.

    Raises:
        Ms4Error: it is no index, or names something else than safetensors files beside it.
    """
    weight_map = _read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise Ms4Error(f"{path}: has no weight_map; it is not the index of a checkpoint.")
    names = set(map(str, weight_map.values()))
    # A name is opened, and written when it comes from a hub: it must not lead out of the directory,
    # and no format but safetensors is read, as others can run code.
    if bad := sorted(name for name in names if not _SHARD.fullmatch(name)):
        listing = ", ".join(repr(name[:80]) for name in bad[:5])
        raise Ms4Error(
            f"{path}: names {listing} as a shard; only plain file names that end in .safetensors "
            "are accepted. Use another model.source."
        )
    return sorted(names)


def _missing(where: str, names: Sequence[str]) -> Ms4Error:
    return Ms4Error(
        f"model.source: {where} lacks {', '.join(names)}. It must hold the HF layout: "
        f"{', '.join(REQUIRED)} and the shards that the index names."
    )


def _entries(directory: Path, where: str) -> list[dict[str, Any]]:
    """Check the layout of `directory` and hash its files; `where` names it in errors."""
    present = {path.name for path in directory.iterdir() if path.is_file()}
    if CONFIG in present:
        check_model(directory / CONFIG)
    shards = shard_names(directory / INDEX) if INDEX in present else []
    if missing := [name for name in (*REQUIRED, *shards) if name not in present]:
        raise _missing(where, missing)
    names = sorted({*REQUIRED, *shards, *present.intersection(OPTIONAL)})
    sizes = {name: (directory / name).stat().st_size for name in names}
    with Meter("hashing", sum(sizes.values())) as meter:
        return [
            {"path": name, "size": sizes[name], "sha256": _hash(directory / name, meter).sha256()}
            for name in names
        ]


def _hash(path: Path, meter: Meter, *, git: bool = False) -> Hashes:
    with disk(path), path.open("rb") as file:
        hashes = Hashes(path.stat().st_size, git=git)
        while block := file.read(_BLOCK):
            hashes.update(block)
            meter.add(len(block))
    return hashes


# A local directory.


def _read_in_place(source: Path, revision: str | None) -> dict[str, Any]:
    if revision is not None:
        raise Ms4Error("model.revision: a local directory has none; remove it.")
    if not source.is_dir():
        fault = "is not a directory" if source.exists() else "no such directory"
        raise Ms4Error(
            f"model.source: {source}: {fault}. Give the directory that holds {CONFIG}, or a hub id "
            "(owner/name)."
        )
    directory = source.resolve()
    with disk(directory):
        files = _entries(directory, str(source))
    return {"files": files, "directory": str(directory), "origin": "local"}


# The tiny model.


def _make_tiny(config: RunConfig) -> dict[str, Any]:
    wanted = {"config_hash": config.part_hash("fetch"), "ms4_version": ms4.__version__}
    if not _tiny_is_whole(wanted):
        with disk(TINY):
            MANIFEST.unlink(missing_ok=True)
            if TINY.exists():
                shutil.rmtree(TINY)
            TINY.mkdir(parents=True)
        _build_tiny(config)
        record = {"stage": "fetch", **wanted, "files": _entries(TINY, str(TINY))}
        with disk(TINY_RECORD):
            manifest.write_json(TINY_RECORD, record)
    files = manifest.read_json(TINY_RECORD)["files"]
    return {"files": files, "directory": TINY.as_posix(), "origin": "tiny"}


def _tiny_is_whole(wanted: dict[str, str]) -> bool:
    if not TINY_RECORD.exists():
        return False
    record = manifest.read_manifest(TINY_RECORD, "fetch")
    if any(record.get(key) != value for key, value in wanted.items()):
        return False
    try:
        manifest.check_files(record, TINY, hashes=True)
    except Ms4Error as error:
        say(f"{error}\nThe tiny model is made anew.")
        return False
    return True


def _build_tiny(config: RunConfig) -> None:
    try:
        # By name, and only here: building needs torch, and nothing else in this module does.
        tiny = importlib.import_module("ms4.tiny")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "ms4":
            raise
        raise Ms4Error(
            f"model.source: making the tiny model needs {error.name}, which is not installed: "
            "pip install 'ms4[train]'"
        ) from error
    tiny.build(TINY, config.seed, config.run.threads)


# A repository on a hub.


@dataclass
class _Checked:
    """A file in `weights/source/` whose content was compared with the hub's hash."""

    size: int
    digest: str
    sha256: str
    mtime_ns: int


@dataclass
class _Record:
    """What is known of `weights/source/`, kept beside the files; written after each of them."""

    repository: str = ""
    asked: str | None = None
    """`model.revision` when the files were fetched."""
    commit: str = ""
    complete: bool = False
    """All files of the commit that are needed were here and checked."""
    files: dict[str, _Checked] = field(default_factory=dict)

    @classmethod
    def read(cls) -> _Record:
        """The record, or an empty one if there is none or it is of another form."""
        if not RECORD.exists():
            return cls()
        try:
            record = cls(**manifest.read_json(RECORD))
            record.files = {name: _Checked(**checked) for name, checked in record.files.items()}  # type: ignore[arg-type]
        except (TypeError, AttributeError):
            return cls()
        return record

    def write(self) -> None:
        """Write the record."""
        with disk(RECORD):
            manifest.write_json(RECORD, asdict(self))

    def vouch(self, file: RemoteFile, sha256: str) -> None:
        """Note that the content of `file` was checked just now."""
        mtime_ns = (SOURCE / file.name).stat().st_mtime_ns
        self.files[file.name] = _Checked(file.size, file.digest, sha256, mtime_ns)
        self.write()

    def is_whole(self, file: RemoteFile) -> bool:
        """Whether the file here has the hub's content: by time stamp if checked before, or hash."""
        path = SOURCE / file.name
        if not path.is_file() or path.stat().st_size != file.size:
            return False
        known = self.files.get(file.name)
        if (
            known is not None
            and known.digest == file.digest
            and known.mtime_ns == path.stat().st_mtime_ns
        ):
            return True
        with Meter(f"checking {file.name}", file.size) as meter:
            hashes = _hash(path, meter, git=len(file.digest) == 40)
        if hashes.digest() != file.digest:
            return False
        self.vouch(file, hashes.sha256())
        return True

    def remote_files(self) -> list[RemoteFile]:
        """The recorded files as the hub had described them."""
        return [RemoteFile(name, known.size, known.digest) for name, known in self.files.items()]

    def content(self) -> dict[str, Any]:
        """What the manifest says of a source from a hub."""
        files = [
            {"path": name, "size": known.size, "sha256": known.sha256}
            for name, known in sorted(self.files.items())
        ]
        return {
            "files": files,
            "directory": SOURCE.as_posix(),
            "origin": "hub",
            "repository": self.repository,
            "revision": self.commit,
        }


def _fetch(repository: str, revision: str | None) -> dict[str, Any]:
    record = _Record.read()
    # A commit never changes, so one that is here whole needs no network at all. A branch does,
    # and what it stood for at the last fetch is the best that can be had offline.
    current = record.commit == revision or (is_offline_mode() and record.asked == revision)
    if (
        record.complete
        and record.repository == repository
        and current
        and all(record.is_whole(file) for file in record.remote_files())
    ):
        say(f"{SOURCE}: whole, nothing to fetch ({repository} at {record.commit[:12]})")
        return record.content()
    if is_offline_mode():
        raise Ms4Error(
            f"model.source: HF_HUB_OFFLINE is set and {SOURCE} does not hold all of {repository} at"
            f" {revision or 'its main branch'}. Unset it, or give a local directory."
        )
    hub = Repository(repository)
    snapshot = hub.snapshot(revision)
    with disk(SOURCE):
        SOURCE.mkdir(parents=True, exist_ok=True)
    if (record.repository, record.commit) != (repository, snapshot.commit):
        record.complete = False
    record.repository, record.asked, record.commit = repository, revision, snapshot.commit
    names = _names(hub, snapshot, record)
    _sweep(snapshot, names, record)
    _bring(hub, snapshot, names, record)
    record.files = {name: record.files[name] for name in names}
    record.complete = True
    record.write()
    size = sum(known.size for known in record.files.values())
    say(f"{SOURCE}: {len(names)} files, {gigabytes(size)}, whole ({repository})")
    return record.content()


def _names(hub: Repository, snapshot: Snapshot, record: _Record) -> list[str]:
    """The files of the snapshot that are needed; fetches the two that tell."""
    _bring(hub, snapshot, [name for name in (CONFIG, INDEX) if name in snapshot.files], record)
    if CONFIG in snapshot.files:
        check_model(SOURCE / CONFIG)
    shards = shard_names(SOURCE / INDEX) if INDEX in snapshot.files else []
    if missing := [name for name in (*REQUIRED, *shards) if name not in snapshot.files]:
        raise _missing(f"{hub.name} at {snapshot.commit[:12]}", missing)
    # The shards last: whatever else is wrong shows before the long part.
    return [*REQUIRED, *(name for name in OPTIONAL if name in snapshot.files), *shards]


def _bring(hub: Repository, snapshot: Snapshot, names: Sequence[str], record: _Record) -> None:
    """Fetch those of the files that are not here whole."""
    files = [snapshot.file(name) for name in names]
    absent = [file for file in files if not record.is_whole(file)]
    if not absent:
        return
    # The old manifest vouches for content that is about to be replaced.
    MANIFEST.unlink(missing_ok=True)
    record.complete = False
    _drop(file.name for file in absent)
    partials = {file.partial(SOURCE) for file in absent}
    done = sum(path.stat().st_size for path in partials if path.exists())
    total = sum(file.size for file in absent)
    free = shutil.disk_usage(SOURCE).free
    if total - done > free:
        raise Ms4Error(
            f"{SOURCE}: fetching the rest of {hub.name} (model.source) takes "
            f"{gigabytes(total - done)} and the disk has {gigabytes(free)} free. Free some, or "
            "move the project to a larger disk; what was fetched is kept."
        )
    say(f"fetching {len(absent)} files, {gigabytes(total - done)}, of {hub.name} from {hub.host}")
    with Meter("fetched", total, done) as meter:
        for file in absent:
            record.vouch(file, hub.fetch(file, snapshot.commit, SOURCE, meter))


def _sweep(snapshot: Snapshot, names: Sequence[str], record: _Record) -> None:
    """Remove what is left of other commits: whole files and partial ones that nothing needs."""
    stale = [name for name in record.files if name not in names]
    if stale:
        MANIFEST.unlink(missing_ok=True)
    wanted = {snapshot.file(name).partial(SOURCE).name for name in names}
    _drop([*stale, *(part.name for part in SOURCE.glob("*.part") if part.name not in wanted)])


def _drop(names: Iterable[str]) -> None:
    for name in names:
        with disk(SOURCE / name):
            (SOURCE / name).unlink(missing_ok=True)
