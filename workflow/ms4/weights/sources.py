"""What a source must hold: the files of its layout, checked and hashed; and where it lies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from ms4.errors import Ms4Error
from ms4.weights.layouts import INDEX, SETTINGS, Layout, read_settings, shard_names
from ms4.weights.meter import Meter
from ms4.weights.shards import readable
from ms4.weights.tables import Storage

NEEDED: Mapping[Layout, tuple[str, ...]] = {
    layout: (SETTINGS[layout], "tekken.json", INDEX[layout]) for layout in INDEX
}
"""Files that every source has, beside the shards that its index names."""
_BESIDE = ("chat_template.jinja", "SYSTEM_PROMPT.txt", "LICENSE", "generation_config.json")
OPTIONAL: Mapping[Layout, tuple[str, ...]] = {"hf": ("params.json", *_BESIDE), "native": _BESIDE}
"""Files that are taken along where they exist."""
NO_ENDPOINT = "HF_ENDPOINT: is not the address of a hub; it begins with https:// and holds a host"
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Words:
    """What errors call that which a person gave."""

    source: str = "model.source"
    revision: str = "model.revision"
    free: str = "model.free_source: true"


@dataclass(frozen=True)
class Place:
    """Where a source goes."""

    directory: Path
    manifest: Path
    words: Words
    ours: bool
    """Nobody else puts files there: what is not the source's may be replaced."""


@dataclass(frozen=True)
class Target:
    """The base that a source is converted to."""

    directory: Path
    manifest: Path
    to: Storage
    at_once: bool
    """Pieces are made as soon as their shards have come; else the room for them is kept free."""
    free: bool
    """Shards are removed when all that is made of them is made and verified."""
    threads: int | None
    """That convert; None: all cores."""


def missing(where: str, names: Sequence[str], layout: Layout, words: Words) -> Ms4Error:
    """The error for a source that lacks files; `where` says which source it is."""
    return Ms4Error(
        f"{words.source}: {where} lacks {', '.join(names)}. In the {layout} layout it must hold "
        f"{', '.join(NEEDED[layout])} and the shards that the index names."
    )


def shards_of(directory: Path, layout: Layout) -> list[str]:
    """The shards that the index in `directory` names, in their order.

    Raises:
        Ms4Error: it is no index, or names something else than safetensors files beside it.
    """
    return sorted(set(shard_names(directory / INDEX[layout]).values()))


def blocks(path: Path, meter: Meter) -> Iterator[bytes]:
    """The content of a file, counted by the meter.

    Raises:
        Ms4Error: it cannot be read.
    """
    with readable(path), path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block
            meter.add(len(block))


def entries(directory: Path, layout: Layout, where: str, words: Words) -> list[dict[str, Any]]:
    """Check that `directory` holds a source and hash its files, for a manifest.

    Args:
        directory: that is looked at.
        layout: in which.
        where: what errors call it.
        words: what errors call that which it was named in.

    Raises:
        Ms4Error: files are missing, or are not of this model.
    """
    with readable(directory):
        present = {path.name for path in directory.iterdir() if path.is_file()}
    if SETTINGS[layout] in present:
        read_settings(directory, layout)
    shards = shards_of(directory, layout) if INDEX[layout] in present else []
    if absent := [name for name in (*NEEDED[layout], *shards) if name not in present]:
        raise missing(where, absent, layout, words)
    names = sorted({*NEEDED[layout], *shards, *present.intersection(OPTIONAL[layout])})
    sizes = {name: (directory / name).stat().st_size for name in names}
    found = []
    with Meter("hashing", sum(sizes.values())) as meter:
        for name in names:
            digest = sha256()
            for block in blocks(directory / name, meter):
                digest.update(block)
            found.append({"path": name, "size": sizes[name], "sha256": digest.hexdigest()})
    return found
