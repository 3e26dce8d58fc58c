"""Stage fetch: the source's files, whole and hashed, from a hub, a directory or made on the spot.

In a project, a hub's files lie in `weights/source/`, with a record of what was checked beside them;
a local directory is read in place; the tiny model is built into `weights/tiny/`. `fetch_directory`
does the same anywhere else. No torch here, except where something is built or converted.
"""

from __future__ import annotations

import importlib
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ms4
from ms4 import lock, manifest
from ms4.config import RunConfig, local_directory
from ms4.errors import Ms4Error
from ms4.weights import sources
from ms4.weights.layouts import Layout, find_layout
from ms4.weights.meter import say
from ms4.weights.shards import writable
from ms4.weights.sources import NO_ENDPOINT, Place, Target, Words
from ms4.weights.tables import Storage

MANIFEST = Path("weights/source.json")
BASE, BASE_MANIFEST = Path("weights/base"), Path("weights/base.json")
TINY = Path("weights/tiny")
TINY_RECORD = TINY / ".made.json"
OWN_MANIFEST = "source.json"
"""The manifest of a source that is fetched outside a project, in its own directory."""


def run_stage(config: RunConfig) -> None:
    """Bring the source's files in and write `weights/source.json`.

    Raises:
        Ms4Error: the source is missing, not this model, not reachable, or damaged.
    """
    model, words = config.model, Words()
    local = config.resolve_source()
    if model.source == "tiny":
        content = _make_tiny(config)
    elif local is not None:
        if model.free_source:
            raise Ms4Error(
                f"model.free_source: {local} is your own directory, and nothing in it is removed; "
                "set it to false."
            )
        content = _read_in_place(local, model.revision, model.layout, words)
    else:
        place = Place(Path("weights/source"), MANIFEST, words, ours=True)
        free, threads = model.free_source, config.run.threads
        target = Target(BASE, BASE_MANIFEST, model.experts, free, free, threads)
        with ExitStack() as stack:
            if free:
                stack.enter_context(lock.hold("descale"))  # its files are written here
            content = _fetch(model.source, model.revision, model.layout, place, target)
        content["directory"] = place.directory.as_posix()
    with writable(MANIFEST):
        manifest.write_manifest(MANIFEST, "fetch", config_hash=config.part_hash("fetch"), **content)


def fetch_directory(
    source: str,
    directory: Path,
    *,
    revision: str | None,
    layout: Layout,
    convert: Storage | None,
    free: bool,
) -> None:
    """`ms4 fetch REPO_OR_PATH DIR`: a source outside a project, and perhaps the base made of it.

    Args:
        source: hub id or local directory. Of the latter nothing is copied: its files are hashed
            where they are, and converted from there.
        directory: where the files go, with a manifest `source.json`; a base goes to a directory in
            it that is called `bf16`, `nf4` or `fp8`.
        revision: commit, tag or branch on the hub.
        layout: which files; of a local directory, which if it holds both.
        convert: how the base stores FP8 tensors; None: no base.
        free: remove shards that are converted and verified.

    Raises:
        Ms4Error: the source is missing, not this model, not reachable or damaged, or another
            process is at work in the directory.
    """
    words = Words("REPO_OR_PATH", "--revision", "--free-source")
    local = local_directory(source)
    if local is not None and (convert is None or free):
        raise Ms4Error(
            f"{local} is your own directory, and nothing in it is removed: leave out --free-source."
            if free
            else f"{local} is here already, there is nothing to fetch. `ms4 descale {local} TARGET "
            "--to bf16|nf4|fp8` converts it; to have a copy, copy it."
        )
    own = directory / OWN_MANIFEST
    place = Place(directory, own, words, ours=False)
    target = None
    if convert is not None:
        base = directory / convert
        target = Target(base, base / "base.json", convert, True, free, None)
    with ExitStack() as stack:
        with writable(directory):
            directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock.hold("fetch", directory / lock.LOCKS))
            if target is not None:
                target.directory.mkdir(exist_ok=True)
                stack.enter_context(lock.hold("descale", target.directory / lock.LOCKS))
        if local is not None:
            content = _read_in_place(local, revision, layout, words)
        else:
            content = _fetch(source, revision, layout, place, target)
            content["directory"] = "."
        hashed = manifest.sha256_json([source, revision, layout, convert, free])
        with writable(own):
            made = manifest.write_manifest(own, "fetch", config_hash=hashed, **content)
        if target is not None:
            where = directory if local is None else Path(content["directory"])
            importlib.import_module("ms4.weights.arrival").finish(where, made, target)


# A repository on a hub.


def _fetch(
    source: str, revision: str | None, layout: Layout, place: Place, target: Target | None
) -> dict[str, Any]:
    # huggingface_hub reads its variables when it is imported; of an address that it cannot read it
    # prints parts, a password perhaps.
    try:
        _ = urlsplit(os.environ.get("HF_ENDPOINT", "")).port
    except ValueError as error:
        raise Ms4Error(NO_ENDPOINT) from error
    try:
        from ms4.weights import pull
    except ValueError as error:
        raise Ms4Error(
            f"a variable that huggingface_hub reads has a value that it cannot use ({error}); "
            "HF_HUB_DOWNLOAD_TIMEOUT and HF_HUB_ETAG_TIMEOUT are whole seconds."
        ) from error
    return pull.fetch(pull.Wanted(source, revision, layout), place, target)


# A local directory.


def _read_in_place(
    source: Path, revision: str | None, layout: Layout, words: Words
) -> dict[str, Any]:
    if revision is not None:
        raise Ms4Error(f"{words.revision}: a local directory has none; remove it.")
    if not source.is_dir():
        fault = "is not a directory" if source.exists() else "no such directory"
        raise Ms4Error(
            f"{words.source}: {source}: {fault}. Give the directory that holds the weights, or a "
            "hub id (owner/name)."
        )
    directory = source.resolve()
    found = find_layout(directory, layout)
    files = sources.entries(directory, found, str(source), words)
    return {"files": files, "directory": str(directory), "origin": "local", "layout": found}


# The tiny model.


def _make_tiny(config: RunConfig) -> dict[str, Any]:
    wanted = {"config_hash": config.part_hash("fetch"), "ms4_version": ms4.__version__}
    if not _tiny_is_whole(wanted):
        with writable(TINY):
            MANIFEST.unlink(missing_ok=True)
            if TINY.exists():
                shutil.rmtree(TINY)
            TINY.mkdir(parents=True)
        _build_tiny(config)
        files = sources.entries(TINY, "hf", str(TINY), Words())
        with writable(TINY_RECORD):
            manifest.write_json(TINY_RECORD, {"stage": "fetch", **wanted, "files": files})
    files = manifest.read_json(TINY_RECORD)["files"]
    return {"files": files, "directory": TINY.as_posix(), "origin": "tiny", "layout": "hf"}


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
