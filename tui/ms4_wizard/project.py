"""A project's directory: whether it is one, writing it, and reading its answers again.

`config/project.json` notes what wrote the project, where it runs, and what its files were: so what
was edited since is known, and is not lost.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from difflib import unified_diff
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

import ms4
from ms4 import config, yaml_text
from ms4.errors import Ms4Error
from ms4.manifest import read_json, write_json, write_text
from ms4.pipeline_files import PROJECT
from ms4_wizard.answers import Answers, Where
from ms4_wizard.emit import CONFIG, NO_REQUEUE, SLURM, relocate
from ms4_wizard.merge import merge

LINKS = {"local": "profiles/local", "slurm": "profiles/slurm"}
"""Links at a project's root: Snakemake looks there for a profile that is called so."""

Files = Mapping[str, str]
"""Path in the project → text."""


class EditedError(Ms4Error):
    """Files that were edited would be replaced."""


@dataclass(frozen=True)
class Note:
    """`config/project.json`."""

    ms4_version: str
    where: dict[str, Any]
    """The section `where` of the answers."""
    files: dict[str, str]
    """SHA-256 of each file as it was written."""
    pending: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file as it is being written: after a kill, they are known as ours, too."""
    answers: dict[str, Any] = field(default_factory=dict)
    """The configuration that was written: what was edited since can be told from it."""


@dataclass(frozen=True)
class Change:
    """What writing does to a file."""

    name: str
    what: Literal["written", "kept", "merged", "replaced"]
    """Written: ms4's own file; kept: edited, and ms4 has nothing new for it; merged: edited, and
    what is new goes in beside that; replaced: edited in the same lines."""
    before: str
    after: str

    def diff(self) -> str:
        """What changes, as a unified diff; empty if nothing does."""
        old, new = (text.splitlines(keepends=True) for text in (self.before, self.after))
        name = self.name if self.before else "/dev/null"
        return "".join(
            line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"
            for line in unified_diff(old, new, name, self.name)
        )

    def __str__(self) -> str:
        told = {
            "written": "written",
            "kept": "kept as you edited it",
            "merged": "merged, what you edited stays",
            "replaced": "replaced, and what you edited kept beside it as a .bak",
        }
        return f"{told[self.what]}: {self.name}"


def read_note(directory: Path) -> Note | None:
    """The project's note, or None if the directory is free for a new project.

    Raises:
        Ms4Error: the directory holds something else, or cannot be looked into.
    """
    try:
        if directory.is_symlink() and not directory.exists():
            raise Ms4Error(f"{directory}: is a link that leads nowhere. Name another directory.")
        # `new/..` is this directory, also before `new` exists.
        place = directory.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise _unusable(directory, error) from error
    try:
        if (place / PROJECT).is_file():
            return TypeAdapter(Note).validate_python(read_json(place / PROJECT))
        free = not any(place.iterdir()) if place.is_dir() else not place.exists()
    except (Ms4Error, ValidationError) as error:
        raise Ms4Error(
            f"{directory / PROJECT}: not the note that the wizard wrote. Restore it from your "
            "version control, or write the project to another directory."
        ) from error
    except (OSError, ValueError) as error:
        raise _unusable(directory, error) from error
    if not free:
        raise Ms4Error(
            f"{directory}: holds something that is not an ms4 project. "
            "Name a directory that does not exist yet, or is empty."
        )
    return None


def _unusable(directory: Path, error: Exception) -> Ms4Error:
    why = getattr(error, "strerror", None) or error
    return Ms4Error(
        f"{directory}: cannot be used ({why}). Mend that and run it again, or name another "
        "directory."
    )


def read_project(directory: Path) -> Answers:
    """The answers of the project in `directory`, their paths relative to the current directory.

    Raises:
        Ms4Error: it holds no project, or its configuration is wrong.
    """
    note = read_note(directory)
    if note is None:
        raise Ms4Error(f"{directory}: holds no ms4 project.")
    configuration = config.load(directory / CONFIG)
    where = {**note.where, **_edited_in_profile(directory / SLURM)}
    values = configuration.model_dump(mode="json") | {"where": where}
    answers = config.check(values, str(directory / PROJECT), model=Answers)
    return relocate(answers, directory, Path.cwd())


def _edited_in_profile(profile: Path) -> dict[str, str]:
    """Partition, account and requeueing as they stand in the Slurm profile: people enter them
    there."""
    try:
        settings = yaml.safe_load(profile.read_text(encoding="utf-8"))
        text = "\n".join(map(str, settings.get("default-resources") or ()))
        requeue = settings.get("slurm-requeue")
    except (OSError, ValueError, yaml.YAMLError, AttributeError, TypeError):
        return {}  # none are given, or Snakemake will say what is wrong with the file
    found = re.findall(r"^slurm_(partition|account)=([\"']?)([\w.+-]+)\2$", text, re.MULTILINE)
    told = {key: name for key, _, name in found}
    if requeue is True:
        told["requeue"] = "always"
    elif re.search(rf"^slurm_extra=([\"']?){NO_REQUEUE}\1$", text, re.MULTILINE):
        told["requeue"] = "never"
    return told


# Writing.


def write_project(
    directory: Path,
    files: Files,
    where: Where,
    *,
    configuration: config.RunConfig | None = None,
    base: Files | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> list[str]:
    """Write a project. A new one appears whole; an existing one is changed file by file.

    Args:
        directory: new, empty, or a project.
        files: as `emit.project_files` makes them.
        where: the section of the answers that the files do not hold.
        configuration: what the files say, for the note.
        base: the files as they were made of the answers in the note: what was edited since is
            merged with what is new.
        overwrite: replace what was edited; it stays beside the new file as `NAME.bak`.
        dry_run: only say what would be done.

    Returns:
        What was (or would be) done, a line a file; for a new project only if `dry_run`.

    Raises:
        EditedError: edits would be replaced, and `overwrite` does not say so.
        Ms4Error: the directory holds something else, or cannot be written.
    """
    note = read_note(directory)
    if note is None:
        if not dry_run:
            try:
                _write_new(directory.resolve(), files, where, configuration)
            except OSError as error:
                raise _unusable(directory, error) from error
            return []
        links = [f"{name} -> {target}" for name, target in LINKS.items()]
        return sorted([*files, *links, str(PROJECT)])
    found = preview(directory, files, base)
    directory = directory.resolve()
    replaced = [change.name for change in found if change.what == "replaced"]
    if replaced and not overwrite:
        raise EditedError(
            f"{directory}: these files were edited since the wizard wrote them, and would be "
            f"replaced: {', '.join(replaced)}. With --overwrite they are, and what you edited "
            "is kept beside them as NAME.bak."
        )
    try:
        if not dry_run:
            files = {**files, **_copies(directory, files)}
            write_json(directory / PROJECT, asdict(replace(note, pending=_hashes(files))))
            for change in found:
                _apply(directory, change)
            _finish(directory, files, where, configuration)
        return [str(change) for change in found]
    except OSError as error:
        raise _unusable(directory, error) from error


def preview(directory: Path, files: Files, base: Files | None = None) -> list[Change]:
    """What writing these files to a project would do; for a new one, each file is written.

    Raises:
        Ms4Error: the directory holds something else, or cannot be read.
    """
    note = read_note(directory)
    if note is None:
        return [Change(name, "written", "", text) for name, text in files.items()]
    place = directory.resolve()
    try:
        files = {**files, **_copies(place, files, make=False)}
        return list(changes(place, files, note, base))
    except OSError as error:
        raise _unusable(directory, error) from error


def changes(
    directory: Path, files: Files, note: Note, base: Files | None = None
) -> Iterator[Change]:
    """What writing does to each file that is not already as it should be."""
    for name, text in files.items():
        path = directory / name
        now = path.read_bytes() if path.is_file() else None
        if now == text.encode():
            continue
        before = "" if now is None else now.decode(errors="replace")
        ours = (note.files.get(name), note.pending.get(name))
        if now is None or hashlib.sha256(now).hexdigest() in ours:
            yield Change(name, "written", before, text)
        elif _says(path, text) if name == CONFIG else note.files.get(name) == _sha256(text):
            yield Change(name, "kept", before, before)
        elif (merged := _merged(name, now, text, note, base)) is not None:
            yield Change(name, "merged", before, merged)
        else:
            yield Change(name, "replaced", before, text)


def _merged(name: str, now: bytes, text: str, note: Note, base: Files | None) -> str | None:
    """An edited file with what is new in it; None if that is in the edited lines."""
    was = None if base is None else base.get(name)
    if was is None or _sha256(was) != note.files.get(name):
        return None  # what it was before it was edited is not known
    try:
        merged = merge(was, now.decode(), text)
        if merged is None or name != CONFIG:
            return merged
        # A value that was edited and that the answers do not have is no merge.
        return merged if _parsed(merged) == _parsed(text) else None
    except (UnicodeDecodeError, Ms4Error):
        return None


def _parsed(text: str) -> config.RunConfig:
    values, root = yaml_text.parse(text, CONFIG)
    return config.check(values, CONFIG, root)


def _says(path: Path, text: str) -> bool:
    """Whether a configuration that was edited says the same as `text`."""
    try:
        return config.load(path) == _parsed(text)
    except Ms4Error:
        return False


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _hashes(files: Files) -> dict[str, str]:
    return {name: _sha256(text) for name, text in files.items()}


def _apply(directory: Path, change: Change) -> None:
    path = directory / change.name
    if change.what == "kept":
        return
    if change.what == "replaced":
        backup = path.with_name(f"{path.name}.bak")
        number = 1
        while backup.exists():
            number += 1
            backup = path.with_name(f"{path.name}.bak{number}")
        shutil.copyfile(path, backup)
    write_text(path, change.after)


def _write_new(
    directory: Path, files: Files, where: Where, configuration: config.RunConfig | None
) -> None:
    """Write it aside and rename it: a reader sees all of it or nothing."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    there, moved = directory.is_dir(), []
    if there:
        # It may be a mount, the current directory, or lie in one that is not ours to write to: so
        # aside is inside. The note comes first: after a kill, writing again completes the project.
        temporary = directory / f".ms4-wizard.{os.getpid()}.tmp"
    else:
        temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        for name, text in files.items():
            write_text(temporary / name, text)
        _finish(temporary, {**files, **_copies(temporary, files)}, where, configuration)
        if not there:
            temporary.rename(directory)
            return
        for path in sorted(temporary.iterdir(), key=lambda path: path.name != PROJECT.parts[0]):
            moved.append(path.rename(directory / path.name))
    except OSError:
        # A part of a project would be taken for something else.
        for path in moved:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copies(directory: Path, files: Files, make: bool = True) -> dict[str, str]:
    """Make the links; where links cannot be made, the files that take their place."""
    copies = {}
    for name, target in LINKS.items():
        link = directory / name
        if link.is_file() and not link.is_symlink():
            raise Ms4Error(
                f"{link}: is a file, but a link to {target} belongs there (a version control "
                "without links leaves such files). Remove it and run it again."
            )
        if make and not link.is_symlink() and not link.exists():
            try:
                link.symlink_to(target)
            except OSError:
                link.mkdir()
        if link.is_dir() and not link.is_symlink():
            copies[f"{name}/config.yaml"] = files[f"{target}/config.yaml"]
    return copies


def _finish(
    directory: Path, files: Files, where: Where, configuration: config.RunConfig | None
) -> None:
    """Write the copies of a new project, and the note."""
    for name, text in files.items():
        if not (directory / name).exists():
            write_text(directory / name, text)
    answers = {} if configuration is None else configuration.model_dump(mode="json")
    note = Note(ms4.__version__, where.model_dump(mode="json"), _hashes(files), answers=answers)
    write_json(directory / PROJECT, asdict(note))
