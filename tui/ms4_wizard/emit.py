"""The project that the wizard writes, and reading one again.

A project is the pipeline's own files, a configuration, and a note (`config/project.json`) of what
wrote it and what the files were. The same answers give the same bytes. A user's text goes through
the YAML writer and nowhere else.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

import ms4
from ms4 import config
from ms4.errors import Ms4Error
from ms4.manifest import read_json, sha256_file, write_text
from ms4.pipeline_files import PROJECT, pipeline_directory
from ms4_wizard.questions import Answers

CONFIG = "config/config.yaml"
LINKS = {"local": "profiles/local", "slurm": "profiles/slurm"}
"""Links at the project's root: Snakemake looks there for a profile that is called so."""
IGNORED = ("weights", "data", "checkpoints", "results", "locks", "logs", ".snakemake")
"""What a run leaves behind: not for version control."""

Files = Mapping[str, str]
"""Path in the project → text."""


def relocate(answers: Answers, start: Path, project: Path) -> Answers:
    """The answers with relative paths made relative to another directory; absolute ones stay.

    Args:
        answers: with paths relative to `start`.
        start: for a new project, the directory that the wizard was started in.
        project: the directory that the paths are to be relative to.
    """

    def moved(text: str) -> str:
        path = config.expand_home(text)
        return str(path) if path.is_absolute() else os.path.relpath(start / path, project)

    data = answers.data.model_copy(
        update={
            "train": tuple(moved(path) for path in answers.data.train),
            "test": {name: moved(path) for name, path in answers.data.test.items()},
        }
    )
    model = answers.model
    local = answers.resolve_source()
    if local is not None:
        source = moved(str(local))
        # With a leading dot it cannot be mistaken for a hub id.
        source = source if source.startswith((".", "/")) else f"./{source}"
        model = model.model_copy(update={"source": source})
    return answers.model_copy(update={"data": data, "model": model})


def missing_data(answers: Answers, base: Path) -> dict[str, str]:
    """The data files that are not there or cannot be read: field → what is wrong.

    Args:
        answers: with paths relative to `base`.
        base: a directory.
    """
    sets = [("data.train", path) for path in answers.data.train]
    sets += [(f"data.test.{name}", path) for name, path in answers.data.test.items()]
    faults: dict[str, str] = {}
    for field, name in sets:
        path = base / config.expand_home(name)
        if not path.is_file():
            faults[field] = f"no such file: {name}"
        elif not os.access(path, os.R_OK):
            faults[field] = f"cannot be read: {name}"
    return faults


def check_data(answers: Answers, base: Path) -> None:
    """Check that the data files are there.

    Raises:
        Ms4Error: names each that is missing or cannot be read.
    """
    faults = missing_data(answers, base)
    if faults:
        lines = [f"{field}: {message}" for field, message in faults.items()]
        raise Ms4Error("\n".join([*lines, f"Relative paths are relative to {base}."]))


def project_files(answers: Answers) -> dict[str, str]:
    """All files of the project of these answers, whose paths are relative to it."""
    pipeline = pipeline_directory()
    names = [Path("Snakefile"), *(f.relative_to(pipeline) for f in pipeline.glob("rules/*.smk"))]
    names += [f.relative_to(pipeline) for f in pipeline.glob("profiles/*/config.yaml")]
    files = {str(name): (pipeline / name).read_text(encoding="utf-8") for name in sorted(names)}
    files["profiles/slurm/config.yaml"] = _slurm_profile(
        files["profiles/slurm/config.yaml"], answers
    )
    files[CONFIG] = config.dump(answers.configuration())
    files["config/schema.json"] = config.json_schema()
    files["README.md"] = _readme(answers)
    files[".gitignore"] = "".join(f"/{name}/\n" for name in IGNORED)
    note = {
        "ms4_version": ms4.__version__,
        "where": answers.where.model_dump(mode="json"),
        "files": {name: _sha256(text) for name, text in files.items()},
    }
    files[str(PROJECT)] = json.dumps(note, indent=2) + "\n"
    return files


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _slurm_profile(text: str, answers: Answers) -> str:
    """The Slurm profile with the cluster's names, in the place of its commented examples."""
    where = answers.where
    names = {"slurm_account": where.account, "slurm_partition": where.partition}
    # Quoted: Snakemake evaluates these as Python, and a name like `input` means something there.
    defaults = [f"{key}='{name}'" for key, name in names.items() if name is not None]
    resources = [f"train:runtime={60 * where.hours}"] if where.hours is not None else []
    for key, entries in (("default-resources", defaults), ("set-resources", resources)):
        if not entries:
            continue
        lines = text.splitlines()
        first = lines.index(f"# {key}:")
        last = first + 1
        while last < len(lines) and lines[last].startswith("#   - "):
            last += 1
        lines[first:last] = [f"{key}:", *(f"  - {entry}" for entry in entries)]
        text = "\n".join(lines) + "\n"
    return text


def _readme(answers: Answers) -> str:
    """The project's README: its commands, and what was chosen (no free text: that is in YAML)."""
    profile = answers.where.run
    adapters, train = answers.adapters, answers.train
    length = (
        f"{train.steps} steps"
        if train.steps is not None
        else f"{train.epochs:g} pass(es) over the data"
    )
    rows = {
        "method": f"{answers.method}, experts in {answers.model.experts}",
        "adapters": f"{', '.join(adapters.targets)}; rank {adapters.rank}, "
        f"alpha {adapters.alpha:g}",
        "reasoning": answers.data.reasoning,
        "sequence length": f"{answers.data.sequence_length} tokens",
        "training": f"{length}, {train.micro_batch} × {train.accumulation} sequences a step, "
        f"learning rate {train.learning_rate:g}",
        "held-out sets": ", ".join(answers.data.test) or "none",
    }
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    start = {
        "local": "All stages run on this machine.",
        "slurm": "Each stage is a Slurm job. Start it on a login node, in tmux or screen; "
        "the cluster's names are in `profiles/slurm/config.yaml`.",
    }[profile]
    return f"""# A fine-tuning of Mistral Small 4

Written by `ms4-wizard`, ms4 {ms4.__version__}. All of it may be edited and committed.

```sh
snakemake --profile {profile} -n    # what would run
snakemake --profile {profile}       # from the weights to the report
ms4 summary                    # untuned against tuned, and where the report is
```

{start} Whatever breaks, the same command goes on from where it was. If Snakemake itself was \
killed: `ms4 resume . --profile {profile}`.

## What was chosen

| | |
|---|---|
{table}
Every setting, with its meaning, is in `config/config.yaml`. Change it there, or answer the \
questions again with `ms4-wizard .`; only the stages that depend on a change run again.

## What appears here

| | |
|---|---|
| `weights/` | the weights as fetched, and the base that is trained on |
| `data/packed/` | the data as tokens |
| `checkpoints/` | the training's state, for going on after a kill |
| `results/adapter/` | the adapter, which loads with PEFT |
| `results/report/report.html` | curves, tables and a record of everything that went in |
| `logs/` | what each stage printed |
"""


# Writing and reading.


@dataclass(frozen=True)
class Note:
    """What `config/project.json` says, beside the version."""

    where: dict[str, Any]
    """The section `where` of the answers."""
    files: dict[str, str]
    """SHA-256 of each file as it was written."""


def _note(directory: Path) -> Note | None:
    """The project's note, or None if the directory is free for a new project.

    Raises:
        Ms4Error: the directory holds something else.
    """
    if (directory / PROJECT).is_file():
        content = read_json(directory / PROJECT)
        try:
            return TypeAdapter(Note).validate_python(
                {"where": content.get("where"), "files": content.get("files")}
            )
        except (AttributeError, ValidationError) as error:
            raise Ms4Error(
                f"{directory / PROJECT}: not the note that the wizard wrote. Restore it from "
                "your version control, or write the project to another directory."
            ) from error
    if directory.is_dir() and not any(directory.iterdir()):
        return None
    if directory.exists() or directory.is_symlink():
        raise Ms4Error(
            f"{directory}: holds something that is not an ms4 project. "
            "Name a directory that does not exist yet, or is empty."
        )
    return None


def is_project(directory: Path) -> bool:
    """Whether the directory holds a project; False if it is free for one.

    Raises:
        Ms4Error: it holds something else.
    """
    return _note(directory) is not None


def read_project(directory: Path) -> Answers:
    """The answers of the project in `directory`, their paths relative to the current directory.

    Raises:
        Ms4Error: it holds no project, or its configuration is wrong.
    """
    note = _note(directory)
    if note is None:
        raise Ms4Error(f"{directory}: holds no ms4 project.")
    configuration = config.load(directory / CONFIG)
    values = configuration.model_dump(mode="json") | {"where": note.where}
    answers = config.check(values, str(directory / PROJECT), model=Answers)
    return relocate(answers, directory.absolute(), Path.cwd())


def edited_files(directory: Path, files: Files) -> list[str]:
    """The files that were edited since they were written, and would be written otherwise now.

    A file that was edited, but for which ms4 has nothing new, is not among them: it is kept."""
    note = _note(directory)
    if note is None:
        return []
    edited = []
    for name, text in files.items():
        path = directory / name
        if name == str(PROJECT) or not path.is_file():
            continue
        now, new = sha256_file(path), _sha256(text)
        if now not in (new, note.files.get(name)) and note.files.get(name) != new:
            edited.append(name)
    return edited


def has_edits(answers: Answers, directory: Path) -> bool:
    """Whether writing these answers would replace files that were edited."""
    if not (directory / PROJECT).is_file():
        return False
    relocated = relocate(answers, Path.cwd(), directory.absolute())
    return bool(edited_files(directory, project_files(relocated)))


def write_project(directory: Path, files: Files, overwrite: bool = False) -> list[str]:
    """Write a project, all of it or none.

    In an existing project a file that was edited is kept where ms4 has nothing new to say.

    Args:
        directory: new, empty, or a project.
        files: as `project_files` makes them.
        overwrite: replace what was edited; the edited file stays beside it as `NAME.bak`.

    Returns:
        What was written, replaced or kept, a line each, if the project existed.

    Raises:
        Ms4Error: the directory holds something else, or edits would be lost.
    """
    note = _note(directory)
    try:
        if note is None:
            _write_new(directory, files)
            return []
        edited = edited_files(directory, files)
        if edited and not overwrite:
            raise Ms4Error(
                f"{directory}: these files were edited since the wizard wrote them, and would be "
                f"replaced: {', '.join(edited)}. With --overwrite they are, and what you edited "
                "is kept beside them as NAME.bak."
            )
        return _update(directory, files, note)
    except OSError as error:
        raise Ms4Error(
            f"{directory}: cannot be written ({error.strerror or error}). Mend that and run it "
            "again, or name another directory."
        ) from error


def _write_new(directory: Path, files: Files) -> None:
    """Write it beside its place and rename it: a reader sees all of it or nothing."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Resolved: `.` has no name of its own, and a link is not to be replaced by what it leads to.
    place = directory.resolve()
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        for name, text in files.items():
            write_text(temporary / name, text)
        make_links(temporary)
        if place == Path.cwd():
            # The current directory cannot be renamed over; the note comes last.
            for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config"):
                path.rename(place / path.name)
            temporary.rmdir()
        else:
            temporary.rename(place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_links(directory: Path) -> None:
    """Make the links of `LINKS`; directories with the same content where links cannot be made."""
    for name, target in LINKS.items():
        link = directory / name
        if link.exists():
            continue
        try:
            link.symlink_to(target)
        except OSError:
            shutil.copytree(directory / target, link)


def _update(directory: Path, files: Files, note: Note) -> list[str]:
    told = []
    for name, text in files.items():
        path = directory / name
        new = _sha256(text)
        now = sha256_file(path) if path.is_file() else None
        if now == new or name == str(PROJECT):
            continue
        if now is not None and now != note.files.get(name):
            if note.files.get(name) == new:
                told.append(f"kept as you edited it: {name}")
                continue
            write_text(path.with_name(f"{path.name}.bak"), path.read_text(encoding="utf-8"))
            told.append(f"replaced; what you edited is {name}.bak: {name}")
        else:
            told.append(f"written: {name}")
        write_text(path, text)
    make_links(directory)
    for name, target in LINKS.items():
        # Where links cannot be made, the copies follow what they are copies of.
        copy, original = directory / name / "config.yaml", directory / target / "config.yaml"
        if not (directory / name).is_symlink() and copy.read_bytes() != original.read_bytes():
            write_text(copy, original.read_text(encoding="utf-8"))
    write_text(directory / PROJECT, files[str(PROJECT)])
    return told
