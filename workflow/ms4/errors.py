"""The one exception that a user is meant to see, and how its text reaches a terminal."""

import errno
import io
import json
import os
import select
import signal
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What writing, and nothing else, ends with where there is no room."""


class Ms4Error(Exception):
    """Something that the user can mend.

    The message says what is wrong, where (file and line, or configuration field)
    and what to do. `ms4` prints it without a traceback and exits with code 2.
    """


def printable(text: str) -> str:
    """A text for a terminal: control characters (of a file's name, say) become escapes, but for
    line breaks."""

    def shown(c: str) -> str:
        control = c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")
        return ascii(c)[1:-1] if control else c

    return "".join(map(shown, text))


def to_a_reader(run: Callable[[], int]) -> int:
    """Run a command for whoever reads what it writes; returns its exit code.

    What standard output and error cannot encode is written as escapes: a terminal may know ASCII
    alone, and a file's name need not be UTF-8. If the reader leaves, as `| head` does, the command
    ends without a word, with the code that the shell has for programs that the signal ends. To a
    closed standard output nothing is written; one that takes no more is told, and the code is 2.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - until Python ends
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return run()
        finally:
            sys.stdout.flush()  # here and not when Python ends: it may be what meets no reader
    except BrokenPipeError:
        gone = _without_reader()
        if not gone:
            raise  # of another pipe: a bug
        for number in gone:  # what is still to be written goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is not None or error.errno not in _FULL:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        print(
            f"standard output, or a file, cannot be written ({error.strerror}); make room and run "
            "again",
            file=sys.stderr,
        )
        return 2


def _without_reader() -> list[int]:
    """Which of standard output and error are pipes whose reader has left."""
    found = []
    for number in (1, 2):
        poll = select.poll()
        poll.register(number, 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            found.append(number)
    return found


def print_json(value: Any) -> None:
    """Print JSON for a program: with escapes for what standard output cannot encode."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    print(text)
