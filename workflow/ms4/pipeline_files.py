"""Where the pipeline's own files are: Snakefile, rules, profiles.

A wheel carries them inside the package, as `ms4/_pipeline`; in an editable install they stay
where they are in the checkout, two levels above the package.
"""

from __future__ import annotations

from pathlib import Path

from ms4.errors import Ms4Error

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
