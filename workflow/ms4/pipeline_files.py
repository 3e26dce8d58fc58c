"""The pipeline's own files: where they are installed, and which ms4 wrote those of a project.

A wheel carries Snakefile, rules and profiles inside the package, as `ms4/_pipeline`; in an
editable install they stay where they are in the checkout, two levels above the package.
"""

from __future__ import annotations

from pathlib import Path

import ms4
from ms4.errors import Ms4Error
from ms4.manifest import read_json

NAMES = ("Snakefile", "rules", "profiles")
"""What a project needs beside its configuration."""


def pipeline_directory() -> Path:
    """The directory that holds `NAMES`.

    Raises:
        Ms4Error: the installation lacks them.
    """
    package = Path(__file__).resolve().parent
    candidates = (package / "_pipeline", package.parents[1])
    for directory in candidates:
        if all((directory / name).exists() for name in NAMES):
            return directory
    raise Ms4Error(
        f"the pipeline's files ({', '.join(NAMES)}) are neither in {candidates[0]} nor in "
        f"{candidates[1]}: this installation of ms4 is broken; install it again."
    )


PROJECT = Path("config/project.json")
"""What the wizard notes of a project: the version that wrote it, where it runs, its files."""


def check_writer(root: Path) -> None:
    """Check that the project's rules were written by this series (major.minor) of ms4.

    A checkout's root was written by no wizard: it has no note, and its rules are of its version.

    Raises:
        Ms4Error: another series wrote them, or the note cannot be read.
    """
    note = root / PROJECT
    if not note.exists():
        return
    try:
        content = read_json(note)
    except Ms4Error:
        content = None
    version = content.get("ms4_version") if isinstance(content, dict) else None
    if not isinstance(version, str):
        raise Ms4Error(
            f"{note}: not the note that the wizard wrote: it names no `ms4_version`. Restore it "
            "from your version control."
        )
    if version.split(".")[:2] != ms4.__version__.split(".")[:2]:
        raise Ms4Error(
            f"{note}: ms4 {version} wrote this project's rules, but ms4 {ms4.__version__} is "
            f"installed, and they may not fit. Either install that version "
            f"(pip install ms4=={version}), or write the rules anew, with the same answers: "
            "ms4-wizard ."
        )
