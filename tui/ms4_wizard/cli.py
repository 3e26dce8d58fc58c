"""The command `ms4-wizard`: screens on a terminal, or the same from a file of answers."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ms4
from ms4 import completion
from ms4.errors import Ms4Error, printable, to_a_reader

# The first frame comes before the configuration and the planner: each function imports its own.
if TYPE_CHECKING:
    from ms4_wizard.answers import Answers
    from ms4_wizard.costs import Cost
    from ms4_wizard.drafts import Store
    from ms4_wizard.flow import Flow
    from ms4_wizard.project import Change

DEFAULT_DIRECTORY = Path("ms4-project")
EXIT_CODES = """\
exit codes:
  0    done
  1    the screens were left without writing a project (or a bug: with a traceback)
  2    something to mend: the command line, the answers, the data, the directory, or a run that
       does not fit; nothing was written
  130  interrupted
  141  who read the output left before its end
"""


def _directory(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("is empty (an unset variable?)")
    return Path(text)


def _watch_parser() -> argparse.ArgumentParser:
    from ms4_wizard.watch.cli import build_parser as build

    return build()


def _keys() -> list[str]:
    from ms4 import settings
    from ms4_wizard.answers import Answers

    return settings.field_names(Answers)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="ms4-wizard",
        description="Write a project that fine-tunes Mistral Small 4: answer questions on "
        "screens,\nor give the answers in a file. Relative paths in answers are relative to "
        "the current\ndirectory. `ms4-wizard watch DIR` shows how a project's run goes.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ms4 {ms4.__version__}")
    parser.add_argument(
        "directory",
        type=_directory,
        nargs="?",
        metavar="DIR",
        help=f"where the project is written (default: {DEFAULT_DIRECTORY}), or a project to open",
    )
    parser.add_argument(
        "--answers",
        metavar="FILE",
        help="take the answers from a YAML or JSON file (- for standard input); no screens",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set an answer, for example --set adapters.rank=16; may be given several times",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="with --answers: print the memory plan and the files, and write nothing",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="with --answers: replace files of the project that were edited (kept as NAME.bak)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="with --answers: print one JSON object for programs, also of what is wrong",
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="with --answers: print the configuration, with paths as they are, and write nothing",
    )
    parser.add_argument(
        "--print-schema",
        action="store_true",
        help="print the JSON schema of an answers file",
    )
    completion.add_argument(
        parser,
        keys=_keys,
        commands=lambda: {"watch": _watch_parser()},
    )
    return parser


# Without screens.


def headless(arguments: argparse.Namespace, directory: Path) -> None:
    """Write the project of an answers file, or say what would be written.

    Raises:
        Ms4Error: the answers are wrong, or the project cannot be written.
    """
    from ms4 import config
    from ms4_wizard import costs, writing
    from ms4_wizard.answers_file import read_answers

    answers = read_answers(arguments.answers, arguments.set)
    if arguments.print_config:
        sys.stdout.write(config.dump(answers.configuration()))
        return
    found = costs.cost(answers)
    changes: list[Change] = []
    if arguments.json:
        changes = writing.preview(answers, directory)  # while there is a difference
    else:
        costs.show(found)
    told = writing.write_from_answers(
        answers, directory, dry_run=arguments.dry_run, overwrite=arguments.overwrite
    )
    if arguments.json:
        report = _report(answers, directory, found, changes, arguments.dry_run)
        print(json.dumps(report, indent=2))
    else:
        print(printable("\n".join(["", *told])))


def _report(
    answers: Answers,
    directory: Path,
    found: Cost,
    changes: list[Change],
    dry_run: bool,
) -> dict[str, Any]:
    """What was done, for programs. `files` is the same for a dry run and for what it announces:
    the files that writing changes, and what becomes of each."""
    from ms4_wizard import writing
    from ms4_wizard.speed import speed

    took = speed(answers, found, None)
    return {
        "ok": True,
        "exit_code": 0,
        "directory": str(directory),
        "written": not dry_run,
        "files": {change.name: change.what for change in sorted(changes, key=lambda c: c.name)},
        "next": writing.next_commands(answers, directory),
        "plan": {
            "device": found.kind,
            "components": dict(found.plan.components),
            "peak_bytes": found.plan.peak,
            "budget_bytes": found.budget,
            "fits": found.fits,
            "host_bytes": found.plan.host,
            "disk_bytes": found.plan.disk,
            "checkpointing": found.config.train.checkpointing,
        },
        "speed": {
            "kind": took.kind,
            "source": took.source,
            "tokens_per_s": took.tokens_per_s,
            "tokens_per_step": took.tokens_per_step,
            "steps": took.steps,
            "hours": took.hours,
            "kwh": took.kwh,
        },
        "answers": answers.model_dump(mode="json"),
    }


def _refusal(error: Ms4Error) -> dict[str, Any]:
    """What is wrong, for programs."""
    from ms4_wizard import project
    from ms4_wizard.answers_file import FaultyAnswersError

    faulty = isinstance(error, FaultyAnswersError)
    return {
        "ok": False,
        "exit_code": 2,
        "error": str(error),
        "missing": error.missing if isinstance(error, FaultyAnswersError) else [],
        "faults": error.faults if isinstance(error, FaultyAnswersError) else [],
        "kind": "answers"
        if faulty
        else "edited"
        if isinstance(error, project.EditedError)
        else "other",
    }


# With screens.


def screens(directory: Path, settings: Sequence[str], given: bool) -> list[str] | None:
    """Show the screens; what to say then, or None if nothing was written.

    Args:
        directory: of the project.
        settings: `key=value` over what the project says.
        given: the directory was named on the command line.

    Raises:
        Ms4Error: there is no terminal, or the directory holds something else.
    """
    if not all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout)):
        raise Ms4Error(
            "there is no terminal for the screens. Give the answers in a file: "
            "ms4-wizard --answers FILE DIR (--print-schema says what it may hold)."
        )
    # Textual is imported for the screens only.
    from ms4_wizard.app import WizardApp
    from ms4_wizard.drafts import Store
    from ms4_wizard.preferences import Preferences

    store = Store(directory)
    if not settings and store.is_empty() and _is_not_there(directory):
        make = partial(_flow, directory, store)
        return WizardApp(make, welcome=True, preferences=Preferences()).run()
    from ms4_wizard import project
    from ms4_wizard.answers_file import with_settings

    exists = project.read_note(directory) is not None
    flow = _flow(directory, store, exists)
    flow.draft = with_settings(flow.draft, settings)
    kept = store.load()
    if kept is not None and not kept.adds_to(flow.draft, directory):
        kept = None
    app = WizardApp(
        flow,
        welcome=not exists and not (given and settings),
        kept=kept,
        preferences=Preferences(),
    )
    return app.run()


def _is_not_there(directory: Path) -> bool:
    """Whether it is plain that there is no such directory: so no project, and nothing else."""
    try:
        os.lstat(directory)
    except FileNotFoundError:
        return ".." not in directory.parts
    except (OSError, ValueError):
        pass  # reading the project will say what is wrong with it
    return False


def _flow(directory: Path, store: Store, opened: bool = False) -> Flow:
    """The state of a session that begins with the answers of a project, or with none.

    Raises:
        Ms4Error: the project cannot be read.
    """
    from ms4_wizard import project
    from ms4_wizard.draft import Draft
    from ms4_wizard.flow import Flow
    from ms4_wizard.looking import Looker

    draft = Draft.of(project.read_project(directory)) if opened else Draft({})
    return Flow(draft, directory, opened=opened, store=store, looker=Looker())


def _has_a_current_directory() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return False
    return True


def _only_with_answers(arguments: argparse.Namespace) -> None:
    if arguments.answers is None:
        names = ("dry_run", "overwrite", "json", "print_config")
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name)]
        if given:
            raise Ms4Error(f"{', '.join(given)}: only with --answers FILE.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    return to_a_reader(lambda: _run(words))


def _run(words: list[str]) -> int:
    if words[:1] == ["watch"]:
        from ms4_wizard.watch.cli import main as watch

        return watch(words[1:])
    arguments = build_parser().parse_args(words)
    try:
        if arguments.print_schema:
            from ms4_wizard.answers import schema

            sys.stdout.write(schema())
            return 0
        _only_with_answers(arguments)
        directory = arguments.directory or DEFAULT_DIRECTORY
        if arguments.answers is not None:
            headless(arguments, directory)
            return 0
        told = screens(directory, arguments.set, arguments.directory is not None)
        if told is None:
            print("Nothing was written.")
            return 1
        print(printable("\n".join(told)))
    except FileNotFoundError as error:
        if _has_a_current_directory():
            raise
        print(f"ms4-wizard: the current directory is gone ({error.strerror}).", file=sys.stderr)
        return 2
    except Ms4Error as error:
        if arguments.json:
            print(json.dumps(_refusal(error), indent=2))
        print(printable(f"ms4-wizard: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ms4-wizard: interrupted.", file=sys.stderr)
        return 130
    return 0
