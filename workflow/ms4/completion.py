"""Completion of a command line in bash, zsh and fish, made from the parser that reads it.

What is printed is a script for the shell that asks for nothing at run time: pressing Tab starts no
Python. Names of files and directories are completed by the shell itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["file", "directory", "key", "choice", "text"]
"""What a value is: `key` is one of the fields of a configuration, written `key=`."""

KINDS: Mapping[str, Kind] = {
    "FILE": "file",
    "DIR": "directory",
    "SOURCE": "directory",
    "TARGET": "directory",
    "REPO_OR_PATH": "directory",
    "KEY=VALUE": "key",
}
"""By the name that the help gives a value."""


@dataclass(frozen=True)
class Value:
    """A value, of an option or by its place."""

    kind: Kind
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Option:
    """An option."""

    names: tuple[str, ...]
    help: str
    value: Value | None
    """None: it takes none."""


@dataclass
class Command:
    """A command, or the program itself."""

    name: str
    help: str = ""
    options: list[Option] = field(default_factory=list)
    places: list[Value] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)

    def takes(self) -> Iterator[tuple[str, Value]]:
        """Each name of an option that takes a value, with that value."""
        for option in self.options:
            if option.value is not None:
                yield from ((name, option.value) for name in option.names)


def describe(parser: argparse.ArgumentParser, name: str, help_text: str = "") -> Command:
    """What a parser takes."""
    command = Command(name, help_text)
    for action in parser._actions:  # argparse has no public list of them
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            command.commands += [
                describe(sub, key, helps.get(key, "")) for key, sub in action.choices.items()
            ]
            continue
        takes = action.nargs != 0
        choices = tuple(map(str, action.choices or ()))
        kind: Kind = "choice" if choices else KINDS.get(str(action.metavar), "text")
        value = Value(kind, choices) if takes else None
        words = " ".join((action.help or "").split()) % vars(action) if action.help else ""
        if action.option_strings:
            command.options.append(Option(tuple(action.option_strings), words, value))
        elif value is not None:
            command.places.append(value)
    return command


class PrintCompletion(argparse.Action):
    """`--print-completion SHELL`: prints the script and ends, as `--help` does."""

    def __init__(
        self,
        option_strings: Sequence[str],
        dest: str,
        keys: Callable[[], Sequence[str]] = tuple,
        commands: Callable[[], Mapping[str, argparse.ArgumentParser]] = dict,
        **others: Any,
    ) -> None:
        """
        Args:
            option_strings: as argparse has them.
            dest: as argparse has it.
            keys: gives the fields that a value `KEY=VALUE` may name.
            commands: gives parsers of words that the program handles before its own parser.
            others: as argparse has them.
        """
        others |= {"choices": tuple(SHELLS), "default": argparse.SUPPRESS, "metavar": "SHELL"}
        super().__init__(option_strings, dest, **others)
        self._keys = keys
        self._commands = commands

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Print it."""
        command = describe(parser, parser.prog)
        command.commands += [
            describe(sub, name, sub.description or "") for name, sub in self._commands().items()
        ]
        sys.stdout.write(SHELLS[values](command, self._keys()))
        parser.exit()


def add_argument(parser: argparse.ArgumentParser, **more: Any) -> None:
    """Give a parser the option; `more` goes to `PrintCompletion`."""
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        help="print a completion script for bash, zsh or fish: "
        f'eval "$({parser.prog} --print-completion bash)" in .bashrc',
        **more,
    )


def _quoted(text: str) -> str:
    """A word in single quotes, for bash and zsh."""
    return "'" + text.replace("'", "'\\''") + "'"


def _function(command: Command) -> str:
    return "_" + command.name.replace("-", "_")


def _short(text: str) -> str:
    """The first clause of a help text."""
    return text.split("; ")[0].split(". ")[0].removesuffix(".")[:80]


# bash


def bash(program: Command, keys: Sequence[str]) -> str:
    """The script for bash."""
    name = _function(program)
    names = " ".join(command.name for command in program.commands)
    lines = [
        f"# {program.name}: completion for bash",
        f"{name}() {{",
        "    local IFS=$'\\n' cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}",
        "    local command= word i",
        "    COMPREPLY=()",
        "    # In `--option=value`, the shell takes `=` for a word of its own.",
        '    [ "$cur" != = ] || cur=',
        '    [ "$prev" != = ] || prev=${COMP_WORDS[COMP_CWORD-2]}',
        "    for ((i = 1; i < COMP_CWORD; i++)); do",
        "        word=${COMP_WORDS[i]}",
        f"        case $word in {'|'.join(c.name for c in program.commands) or '--'})",
        "            command=$word; break;;",
        "        esac",
        "    done",
        '    case "$command $prev" in',
    ]
    for command in (program, *program.commands):
        key = command.name if command is not program else ""
        for flag, value in command.takes():
            lines.append(f"        {_quoted(f'{key} {flag}')}) {_bash(value, keys)}; return;;")
    lines += ["    esac", "    case $command in"]
    for command in (*program.commands, program):
        flags = "\\n".join(flag for option in command.options for flag in option.names)
        pattern = command.name if command is not program else "*"
        lines.append(f"        {pattern})")
        lines.append('            if [ "${cur:0:1}" = - ]; then')
        lines.append(f"                COMPREPLY=($(compgen -W $'{flags}' -- \"$cur\"))")
        lines.append("                return")
        lines.append("            fi")
        if command.places:
            lines.append(f"            {_bash(command.places[0], keys)};;")
        else:
            lines.append("            ;;")
    lines += ["    esac"]
    if names:
        listed = names.replace(" ", "\\n")
        lines += [
            '    if [ -z "$command" ]; then',
            f"        COMPREPLY+=($(compgen -W $'{listed}' -- \"$cur\"))",
            "    fi",
        ]
    lines += ["}", f"complete -F {name} {program.name}", ""]
    return "\n".join(lines)


def _bash(value: Value, keys: Sequence[str]) -> str:
    match value.kind:
        case "file" | "directory":
            flag = "-d" if value.kind == "directory" else "-f"
            return f'compopt -o filenames 2>/dev/null; COMPREPLY=($(compgen {flag} -- "$cur"))'
        case "key" | "choice":
            words = [f"{key}=" for key in keys] if value.kind == "key" else list(value.choices)
            listed = "\\n".join(words)
            space = "compopt -o nospace 2>/dev/null; " if value.kind == "key" else ""
            return f"{space}COMPREPLY=($(compgen -W $'{listed}' -- \"$cur\"))"
    return ":"


# zsh


def zsh(program: Command, keys: Sequence[str]) -> str:
    """The script for zsh: to be sourced, or a file of `fpath` that is called after the function."""
    name = _function(program)
    lines = [f"#compdef {program.name}", f"# {program.name}: completion for zsh", f"{name}() {{"]
    if program.commands:
        lines += [
            "    local state line context",
            "    typeset -A opt_args",
            "    local -a commands",
            "    commands=(",
            *(f"        {_quoted(f'{c.name}:{_short(c.help)}')}" for c in program.commands),
            "    )",
            *_arguments(program, keys, "    ", "'1: :->first'", "'*:: :->rest'"),
            "    case $state in",
            "        first)",
            "            _describe -t commands command commands",
            *(f"            {_zsh(value, keys)[0]}" for value in program.places[:1]),
            "            ;;",
            "        rest)",
            "            case $words[1] in",
        ]
        for command in program.commands:
            lines.append(f"                {command.name})")
            lines += _arguments(command, keys, " " * 20, *_zsh_places(command, keys))
            lines.append("                    ;;")
        lines.append("                *)")
        lines += _arguments(program, keys, " " * 20)
        lines += ["                    ;;", "            esac", "            ;;", "    esac"]
    else:
        lines += _arguments(program, keys, "    ", *_zsh_places(program, keys))
    lines += [
        "}",
        f'if [ "${{funcstack[1]}}" = {name} ]; then {name} "$@"; else compdef {name} '
        f"{program.name}; fi",
        "",
    ]
    return "\n".join(lines)


def _arguments(command: Command, keys: Sequence[str], indent: str, *more: str) -> list[str]:
    specs = []
    for option in command.options:
        words = _short(option.help).replace("[", "(").replace("]", ")").replace(":", "\\:")
        tail = ""
        if option.value is not None:
            action, label = _zsh(option.value, keys)
            tail = f":{label}:{action}"
        repeated = "*" if option.value is not None and option.value.kind == "key" else ""
        specs += [_quoted(f"{repeated}{flag}[{words}]{tail}") for flag in option.names]
    listed = [*specs, *more]
    context = "-C " if any("->" in word for word in more) else ""
    lines = [f"{indent}_arguments {context}\\"]
    return [
        *lines,
        *(f"{indent}    {spec} \\" for spec in listed[:-1]),
        f"{indent}    {listed[-1]}",
    ]


def _zsh_places(command: Command, keys: Sequence[str]) -> list[str]:
    found = []
    for number, value in enumerate(command.places, 1):
        action, label = _zsh(value, keys)
        found.append(_quoted(f"{number}:{label}:{action}"))
    return found


def _zsh(value: Value, keys: Sequence[str]) -> tuple[str, str]:
    """The action, and what it completes."""
    match value.kind:
        case "file":
            return "_files", "file"
        case "directory":
            return "_files -/", "directory"
        case "key":
            return f"compadd -S= -- {' '.join(keys)}", "key"
        case "choice":
            return f"({' '.join(value.choices)})", "value"
    return " ", "value"


# fish


def fish(program: Command, keys: Sequence[str]) -> str:
    """The script for fish."""
    lines = [f"# {program.name}: completion for fish"]
    names = " ".join(command.name for command in program.commands)
    none_yet = f"not __fish_seen_subcommand_from {names}" if names else "true"
    places = {value.kind for value in program.places}
    if "directory" not in places and "file" not in places:
        lines.append(f"complete -c {program.name} -f")
    for command in program.commands:
        words = _fish_quoted(_short(command.help))
        lines.append(
            f"complete -c {program.name} -n {_fish_quoted(none_yet)} -a {command.name} -d {words}"
        )
    for command in (program, *program.commands):
        own = f"__fish_seen_subcommand_from {command.name}"
        condition = _fish_quoted(none_yet if command is program else own)
        start = f"complete -c {program.name} -n {condition}"
        if any(value.kind == "directory" for value in command.places):
            lines.append(f"{start} -a '(__fish_complete_directories)'")
        for option in command.options:
            flags = " ".join(
                f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}"
                for flag in option.names
            )
            value = "" if option.value is None else f" {_fish(option.value, keys)}"
            lines.append(f"{start} {flags}{value} -d {_fish_quoted(_short(option.help))}")
    return "\n".join([*lines, ""])


def _fish(value: Value, keys: Sequence[str]) -> str:
    match value.kind:
        case "file":
            return "-r -F"
        case "directory":
            return "-x -a '(__fish_complete_directories)'"
        case "key":
            return f"-x -a {_fish_quoted(' '.join(f'{key}=' for key in keys))}"
        case "choice":
            return f"-x -a {_fish_quoted(' '.join(value.choices))}"
    return "-x"


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SHELLS: Mapping[str, Callable[[Command, Sequence[str]], str]] = {
    "bash": bash,
    "zsh": zsh,
    "fish": fish,
}
