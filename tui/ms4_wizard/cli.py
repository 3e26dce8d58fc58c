"""The command `ms4-wizard`: screens on a terminal, or the same from a file of answers.

Exit codes: 0 done, 1 left without writing (or a bug: traceback), 2 something that the user can
mend (one message), 130 interrupted.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import ms4
from ms4 import config, yaml_text
from ms4.errors import Ms4Error, printable
from ms4_wizard import costs, emit, project, questions
from ms4_wizard.questions import Answers, Draft

DEFAULT_DIRECTORY = Path("ms4-project")


def _directory(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("is empty (an unset variable?)")
    return Path(text)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="ms4-wizard",
        description="Write a project that fine-tunes Mistral Small 4: answer questions on screens, "
        "or give the answers in a file. Relative paths in answers are relative to the current "
        "directory.",
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
        "--print-config",
        action="store_true",
        help="with --answers: print the configuration, with paths as they are, and write nothing",
    )
    parser.add_argument(
        "--print-schema",
        action="store_true",
        help="print the JSON schema of an answers file",
    )
    return parser


def read_answers(name: str, settings: Sequence[str]) -> Answers:
    """The answers of a file, with settings over them.

    Raises:
        Ms4Error: the file or a setting is wrong; all faults of the file are named together.
    """
    where = "standard input" if name == "-" else name
    try:
        if name == "-" and sys.stdin is None:
            raise Ms4Error("standard input is closed.")
        text = sys.stdin.read() if name == "-" else yaml_text.read(Path(name), "answers file")
    except UnicodeDecodeError as error:
        raise Ms4Error(f"{where}: cannot be read ({error}).") from error
    values, root = yaml_text.parse(text, where)
    draft = _with_settings(Draft(values), settings)
    return config.check(draft.values, where, root, Answers)


def _with_settings(draft: Draft, settings: Sequence[str]) -> Draft:
    for setting in settings:
        draft.set(*questions.read_setting(setting))
    return draft


def write_from_answers(
    answers: Answers, directory: Path, *, dry_run: bool = False, overwrite: bool = False
) -> list[str]:
    """Write the project of the answers (or say what would be written); returns what to print.

    Raises:
        Ms4Error: it cannot fit, data are missing, or the directory holds something else.
    """
    project.read_note(directory)  # before anything else: whether it can be written there
    emit.check_data(answers, Path.cwd())
    refused = costs.refusal(answers, costs.cost(answers))
    if refused is not None:
        raise refused
    files = emit.project_files(emit.relocate(answers, Path.cwd(), directory))
    told = project.write_project(
        directory, files, answers.where, overwrite=overwrite, dry_run=dry_run
    )
    if dry_run:
        return [f"This would be done in {directory}:", *(f"  {line}" for line in told)]
    return [
        *told,
        f"The project is in {directory}. Next:",
        f"  cd {shlex.quote(str(directory) if directory.is_absolute() else f'./{directory}')}",
        f"  snakemake --profile {answers.where.run}",
    ]


def _has_a_current_directory() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return False
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    try:
        if arguments.print_schema:
            sys.stdout.write(questions.schema())
            return 0
        directory = arguments.directory or DEFAULT_DIRECTORY
        if arguments.answers is not None:
            answers = read_answers(arguments.answers, arguments.set)
            if arguments.print_config:
                sys.stdout.write(config.dump(answers.configuration()))
                return 0
            costs.show(costs.cost(answers))
            told = write_from_answers(
                answers, directory, dry_run=arguments.dry_run, overwrite=arguments.overwrite
            )
            print(printable("\n".join(["", *told])))
            return 0
        if arguments.dry_run or arguments.overwrite or arguments.print_config:
            raise Ms4Error("--dry-run, --overwrite and --print-config go with --answers FILE.")
        if not all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout)):
            raise Ms4Error(
                "there is no terminal for the screens. Give the answers in a file: "
                "ms4-wizard --answers FILE DIR (--print-schema says what it may hold)."
            )
        exists = project.read_note(directory) is not None
        draft = Draft.of(project.read_project(directory)) if exists else Draft({})
        draft = _with_settings(draft, arguments.set)
        # Textual is imported for the screens only.
        from ms4_wizard.app import WizardApp
        from ms4_wizard.flow import Flow

        written = WizardApp(Flow(draft, directory, write_from_answers, opened=exists)).run()
        if written is None:
            print("Nothing was written.")
            return 1
        print(printable("\n".join(written)))
    except FileNotFoundError as error:
        if _has_a_current_directory():
            raise
        print(f"ms4-wizard: the current directory is gone ({error.strerror}).", file=sys.stderr)
        return 2
    except Ms4Error as error:
        print(printable(f"ms4-wizard: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ms4-wizard: interrupted.", file=sys.stderr)
        return 130
    return 0
