"""The command `ms4`: one thin subcommand a stage, and `data`, `resume`, `summary`, `schema`.

Exit codes: 0 done, 1 an unexpected error (a bug: traceback), 2 something that the user can mend
(one message, no traceback), 130 interrupted, 141 who read the output left before its end.
"""

from __future__ import annotations

import argparse
import importlib
import io
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO

import ms4
from ms4 import completion, config, lock, settings
from ms4.errors import Ms4Error, printable, to_a_reader

CONFIG = Path("config/config.yaml")
"""A project's configuration file."""

STAGE_MODULES: dict[str, str] = {
    "fetch": "ms4.weights.hub",
    "descale": "ms4.weights.convert",
    "verify": "ms4.weights.verify",
    "preprocess": "ms4.data.dataset",
    "plan": "ms4.plan",
    "train": "ms4.train.loop",
    "evaluate": "ms4.evaluate.compare",
    "deliver": "ms4.report.card",
}
"""Stage → module with `run_stage(config)`. Imported on demand: some need torch."""

STAGE_HELP = {
    "fetch": "fetch the weights from a hub or a local directory",
    "descale": "turn FP8 weights with scales into the base that is trained on",
    "verify": "check the base against the model's table and the source",
    "preprocess": "turn conversations into packed tokens and loss masks",
    "plan": "compute the memory that the run takes and check it against the budget",
    "train": "train the adapters",
    "evaluate": "compare the untuned and the tuned model on the held-out sets",
    "deliver": "write the report, the model card and the run record",
}


STAGE_USAGE = {
    "fetch": "ms4 fetch [--config FILE]\n       ms4 fetch REPO_OR_PATH DIR [--revision R] "
    "[--layout hf|native] [--convert bf16|nf4|fp8] [--free-source]",
    "descale": "ms4 descale [--config FILE]\n       ms4 descale SOURCE TARGET --to bf16|nf4|fp8 "
    "[--softmax-scale plain|yarn]",
    "verify": "ms4 verify [--config FILE]\n       ms4 verify TARGET [--source SOURCE] [--json] "
    "[--output FILE]",
    "plan": "ms4 plan [--config FILE]\n       ms4 plan [--config FILE] [--set KEY=VALUE ...] "
    "[--budget GIB] [--json]",
}
"""Of the stages that are useful outside a project too."""


def _fetch_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", nargs="?", metavar="REPO_OR_PATH", help="hub id or directory")
    command.add_argument("directory", nargs="?", type=Path, metavar="DIR", help="where it goes")
    command.add_argument("--revision", metavar="R", help="commit, tag or branch on the hub")
    command.add_argument("--layout", choices=("hf", "native"), help="which files (default: hf)")
    command.add_argument(
        "--convert",
        choices=("bf16", "nf4", "fp8"),
        help="convert each shard as soon as it is whole",
    )
    command.add_argument(
        "--free-source", action="store_true", help="remove shards that are converted and verified"
    )


def _descale_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", nargs="?", type=Path, metavar="SOURCE", help="FP8 checkpoint")
    command.add_argument("target", nargs="?", type=Path, metavar="TARGET", help="where it goes")
    command.add_argument("--to", choices=("bf16", "nf4", "fp8"), help="how experts are stored")
    command.add_argument("--softmax-scale", choices=("plain", "yarn"), help="(default: plain)")


def _verify_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("target", nargs="?", type=Path, metavar="TARGET", help="converted base")
    command.add_argument("--source", type=Path, help="the FP8 checkpoint that it was made from")
    command.add_argument("--json", action="store_true", help="print the findings as JSON")
    command.add_argument(
        "--output", type=Path, metavar="FILE", help="write the findings to this file, as JSON"
    )


def _plan_arguments(command: argparse.ArgumentParser) -> None:
    command.description = (
        "In a project: the stage, which measures this machine and writes results/plan.json. With "
        "--set, --budget or --json, or in another directory: what a run would take on a GPU "
        "(run.device=cpu: on a CPU), from the file that --config names or else for the full-size "
        "model with the defaults; no data and no weights are needed, and nothing is written. "
        "Throughput, hours and kWh are estimates from published ceilings."
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set a field, for example --set adapters.rank=16; may be given several times",
    )
    command.add_argument("--budget", type=float, metavar="GIB", help="memory of the device in GiB")
    command.add_argument("--json", action="store_true", help="print the plan as JSON")


def _data_arguments(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Say which format data files have, how many conversations, turns and tokens, what would be "
        "trained, how they pack, and every fault with its file and line. No project, weights or "
        "GPU are needed; the faults are written to a file, and nothing else."
    )
    command.add_argument(
        "files", nargs="+", metavar="FILE", help="files, patterns, hub:ID@REVISION"
    )
    command.add_argument("--json", action="store_true", help="print the findings as JSON")
    command.add_argument(
        "--show", type=int, metavar="N", help="print sample N as the model will see it"
    )
    command.add_argument(
        "--effort",
        choices=("none", "high", "per-sample"),
        help="reasoning effort of the samples (default: the configuration's, or per-sample)",
    )
    command.add_argument("--config", type=Path, metavar="FILE", help="take settings from this file")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set a field, for example --set data.format=alpaca; may be given several times",
    )
    command.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="a tekken.json (default: that of "
        "the project's weights, or else the one that mistral-common ships)",
    )


def _data(arguments: argparse.Namespace) -> int:
    """Answer `ms4 data`; returns the exit code."""
    code: int = importlib.import_module("ms4.data.preview").run(
        arguments.files,
        as_json=arguments.json,
        show=arguments.show,
        effort=arguments.effort,
        config_file=arguments.config,
        overrides=arguments.set,
        tokenizer_file=arguments.tokenizer,
    )
    return code


ALONE = {
    "fetch": _fetch_arguments,
    "descale": _descale_arguments,
    "verify": _verify_arguments,
    "plan": _plan_arguments,
}
"""Stage → what adds its arguments for use outside a project."""


def _run_alone(arguments: argparse.Namespace) -> bool:
    """Run fetch, descale or verify on directories, if the command line names some; plan without a
    project.

    Raises:
        Ms4Error: some are named, but not all that it takes.
    """
    command = arguments.command
    if command == "plan":
        return _plan_alone(arguments)
    given = {key: value for key, value in vars(arguments).items() if value not in (None, False)}
    if command not in ALONE or not given.keys() - {"command", "config"}:
        return False
    usage = STAGE_USAGE[command].split("\n")[1].strip()
    needed = {"fetch": ("source", "directory"), "descale": ("source", "target", "to")}
    missing = [name for name in needed.get(command, ("target",)) if name not in given]
    if missing or arguments.config is not None:
        fault = f"lacks {', '.join(missing)}" if missing else "takes no --config beside directories"
        raise Ms4Error(f"{fault}: {usage}")
    with _installed(command):
        if command == "fetch":
            fetch = importlib.import_module("ms4.weights.hub")
            if arguments.free_source and arguments.convert is None:
                raise Ms4Error("--free-source frees what is converted: it goes with --convert.")
            fetch.fetch_directory(
                arguments.source,
                arguments.directory,
                revision=arguments.revision,
                layout=arguments.layout or "hf",
                convert=arguments.convert,
                free=arguments.free_source,
            )
        elif command == "descale":
            importlib.import_module("ms4.weights.convert").descale_directory(
                arguments.source, arguments.target, arguments.to, arguments.softmax_scale or "plain"
            )
        else:
            importlib.import_module("ms4.weights.verify").verify_directory(
                arguments.target,
                arguments.source,
                as_json=arguments.json,
                output=arguments.output,
            )
    return True


def _plan_alone(arguments: argparse.Namespace) -> bool:
    """Answer `ms4 plan`, unless it is the stage of a project."""
    asked = arguments.set or arguments.budget is not None or arguments.json
    if not asked and CONFIG.is_file():
        return False
    importlib.import_module("ms4.plan").answer(
        arguments.config, arguments.set, arguments.budget, arguments.json
    )
    return True


LOGS = Path("logs")
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def _last_state(line: str) -> str:
    return line.removesuffix("\r").rsplit("\r", 1)[-1]


class _Tee(io.TextIOBase):
    """Writes to a stream and, in whole lines and without its terminal escapes, to a log.

    Of a line that is rewritten in place, a progress bar, the log keeps the last state: it would
    else be one line of thousands of bars.
    """

    def __init__(self, stream: TextIO, log: TextIO) -> None:
        self._stream, self._log = stream, log
        self._line = ""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + _ESCAPES.sub("", text)).split("\n")
        if lines:
            self._log.writelines(f"{_last_state(line)}\n" for line in lines)
            self._log.flush()
        # "\r\n" ends a line, so that a "\r" at the end may not begin a new state yet.
        self._line = self._line[self._line.rfind("\r", 0, -1) + 1 :]
        return self._stream.write(text)

    def end(self) -> None:
        """Log what no line break followed."""
        if rest := _last_state(self._line):
            self._log.write(f"{rest}\n")
        self._line = ""

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


@contextmanager
def _logged(stage: str) -> Iterator[None]:
    """Keep what the stage prints, and how it fails, in `logs/STAGE.log`.

    The rules declare that file. `ms4` writes it and not a `| tee` in the shell line: Slurm ends a
    job by SIGTERM to all of its processes, and a stage must outlive its reader to save its work.
    """
    path = LOGS / f"{stage}.log"
    try:
        LOGS.mkdir(exist_ok=True)
        # What cannot be encoded (a file name's odd byte) must not end a stage.
        opened = path.open("a", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise Ms4Error(
            f"{path}: cannot be written ({error.strerror}); make the project's directory writable."
        ) from error
    with opened as log:
        out, err = _Tee(sys.stdout, log), _Tee(sys.stderr, log)
        try:
            with redirect_stdout(out), redirect_stderr(err):
                try:
                    yield
                finally:
                    out.end()
                    err.end()
        except Ms4Error as error:
            log.write(f"ms4 {stage}: {error}\n")
            raise
        except Exception:
            traceback.print_exc(file=log)
            raise


def run_stage(stage: str, configuration: config.RunConfig) -> None:
    """Run one stage in the current directory, under its lock.

    Raises:
        Ms4Error: bad input, or another process runs the same stage here.
    """
    # The lock comes before the import: `ms4 resume` sees at once that the stage is at work.
    with _logged(stage), lock.hold(stage), _installed(stage):
        importlib.import_module(STAGE_MODULES[stage]).run_stage(configuration)


@contextmanager
def _installed(command: str) -> Iterator[None]:
    """Say what to install if a package is missing: the light install has no torch."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "ms4":
            raise
        raise Ms4Error(
            f"`ms4 {command}` needs {error.name}, which is not installed: pip install 'ms4[train]'"
        ) from error


def build_parser() -> argparse.ArgumentParser:
    """The command line, stages first."""
    parser = argparse.ArgumentParser(prog="ms4", description=ms4.__doc__)
    parser.add_argument("--version", action="version", version=f"ms4 {ms4.__version__}")
    completion.add_argument(parser, keys=lambda: settings.field_names(config.RunConfig))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for stage in config.STAGES:
        command = commands.add_parser(stage, help=STAGE_HELP[stage], usage=STAGE_USAGE.get(stage))
        command.add_argument(
            "--config",
            type=Path,
            metavar="FILE",
            help="configuration file of a project (default: config/config.yaml)",
        )
        if stage in ALONE:
            ALONE[stage](command)
    resume = commands.add_parser(
        "resume", help="go on after a kill: wait for what still runs, unlock, run Snakemake"
    )
    resume.add_argument("directory", type=Path, nargs="?", default=Path(), metavar="DIR")
    resume.add_argument("--profile", default="local", help="Snakemake profile (default: local)")
    _data_arguments(
        commands.add_parser(
            "data", help="say what data files hold, and what training would make of them"
        )
    )
    commands.add_parser("summary", help="print the evaluation table and where the report is")
    commands.add_parser("schema", help="print the JSON schema of the configuration")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return to_a_reader(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        match arguments.command:
            case "schema":
                sys.stdout.write(config.json_schema())
            case "resume":
                from ms4.resume import resume

                return resume(arguments.directory, arguments.profile)
            case "data":
                with _installed("data"):
                    return _data(arguments)
            case "summary":
                from ms4.report.table import print_summary

                print_summary(Path())
            case stage:
                if not _run_alone(arguments):
                    run_stage(stage, config.load(arguments.config or CONFIG))
    except Ms4Error as error:
        print(printable(f"ms4 {arguments.command}: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        does = "starts anew" if arguments.command == "data" else "goes on"
        print(f"ms4 {arguments.command}: interrupted; the same command {does}.", file=sys.stderr)
        return 130
    return 0
