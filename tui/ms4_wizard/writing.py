"""From answers to a project on the disk, and what that would change there."""

from __future__ import annotations

import shlex
from pathlib import Path

from ms4 import config
from ms4.errors import Ms4Error
from ms4.lock import live_owners
from ms4_wizard import costs, emit, project
from ms4_wizard.answers import Answers
from ms4_wizard.project import Change, Files


def files_of(answers: Answers, directory: Path) -> Files:
    """The files of the project of the answers, whose paths are relative to the current directory.

    Raises:
        Ms4Error: the model is not to be found.
    """
    found = costs.standing(answers)
    return emit.project_files(emit.relocate(answers, Path.cwd(), directory), found)


def _base(directory: Path) -> Files | None:
    """The files of the answers that the project's note has; None if there is no such note."""
    note = project.read_note(directory)
    if note is None or not note.answers:
        return None
    try:
        answers = config.check({**note.answers, "where": note.where}, str(directory), None, Answers)
        found = costs.standing(emit.relocate(answers, directory, Path.cwd()))
        return emit.project_files(answers, found)
    except Ms4Error:
        return None


def preview(answers: Answers, directory: Path) -> list[Change]:
    """What writing the project would do to each file that it changes.

    Raises:
        Ms4Error: the directory holds something else.
    """
    return project.preview(directory, files_of(answers, directory), _base(directory))


def check(answers: Answers, directory: Path) -> None:
    """Whether the project can be written.

    Raises:
        Ms4Error: it cannot fit, data are missing, or the directory holds something else.
    """
    project.read_note(directory)  # before anything else: whether it can be written there
    emit.check_data(answers, Path.cwd())
    refused = costs.refusal(answers, costs.cost(answers))
    if refused is not None:
        raise refused


def quoted(directory: Path) -> str:
    """A directory for a shell's command line; it cannot be taken for an option."""
    return shlex.quote(str(directory) if directory.is_absolute() else f"./{directory}")


def next_commands(answers: Answers, directory: Path) -> list[str]:
    """What a person types then."""
    return [f"cd {quoted(directory)}", f"snakemake --profile {answers.where.run}"]


def write_from_answers(
    answers: Answers, directory: Path, *, dry_run: bool = False, overwrite: bool = False
) -> list[str]:
    """Write the project of the answers (or say what would be written); returns what to print.

    Raises:
        Ms4Error: it cannot fit, data are missing, the directory holds something else, or a stage
            is at work in it and would find other answers.
    """
    check(answers, directory)
    # What changes nothing is no harm: `make demo` writes its project again after any kill.
    owners = [] if dry_run else live_owners(directory)
    if owners and preview(answers, directory):
        raise Ms4Error(
            f"{directory}: {owners[0]} is at work there, under the answers as they were. Wait for "
            f"it, or stop it (`ms4-wizard watch {quoted(directory)}`), and write then."
        )
    moved = emit.relocate(answers, Path.cwd(), directory)
    told = project.write_project(
        directory,
        emit.project_files(moved, costs.standing(answers)),
        answers.where,
        configuration=moved.configuration(),
        base=_base(directory),
        overwrite=overwrite,
        dry_run=dry_run,
    )
    if dry_run:
        return [f"This would be done in {directory}:", *(f"  {line}" for line in told)]
    return [
        *told,
        f"The project is in {directory}. Next:",
        *(f"  {line}" for line in next_commands(answers, directory)),
    ]
