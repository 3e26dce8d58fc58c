"""The command `ms4-wizard watch`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ms4.errors import Ms4Error, printable
from ms4_wizard import project
from ms4_wizard.watch import control


def build_parser() -> argparse.ArgumentParser:
    """The command line after `ms4-wizard watch`."""
    parser = argparse.ArgumentParser(
        prog="ms4-wizard watch",
        description="Show how a project's run goes: stages, the log of the current one, loss, "
        "memory, expert load. Starts it, stops it cleanly, takes it up again. It only reads files: "
        "leaving it stops nothing. (A directory that is called watch opens as ./watch.)",
    )
    parser.add_argument(
        "directory", type=Path, nargs="?", default=Path(), metavar="DIR", help="of the project"
    )
    parser.add_argument("--run", action="store_true", help="start it at once, if it does not run")
    parser.add_argument(
        "--profile", help="Snakemake profile to start it with (default: as the project was written)"
    )
    return parser


def profile_of(root: Path) -> str:
    """The Snakemake profile that a project was written for; `local` if nothing says."""
    try:
        note = project.read_note(root)
    except Ms4Error:
        note = None  # a checkout's root, say, which no wizard wrote
    profile = note.where.get("run") if note is not None else None
    return profile if profile in ("local", "slurm") else "local"


def main(words: Sequence[str]) -> int:
    """Run it; returns the exit code: 0, or 2 for something that the user can mend."""
    arguments = build_parser().parse_args(words)
    root: Path = arguments.directory
    try:
        control.check_project(root)
        if not all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout)):
            raise Ms4Error(
                "there is no terminal to show it on. `snakemake --profile local` in the project "
                "runs it without one."
            )
        from ms4_wizard.preferences import Preferences
        from ms4_wizard.watch.app import WatchApp

        profile = arguments.profile or profile_of(root)
        told = WatchApp(root, profile, arguments.run, preferences=Preferences()).run()
        print(printable("\n".join(told or ())))
    except Ms4Error as error:
        print(printable(f"ms4-wizard watch: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ms4-wizard watch: interrupted; what runs goes on.", file=sys.stderr)
        return 130
    return 0
