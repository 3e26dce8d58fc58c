"""The one exception that a user is meant to see, and how its text reaches a terminal."""

import io
import json
import sys
import unicodedata
from typing import Any, TextIO


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


def write_anything(*streams: TextIO) -> None:
    """Let these streams write what they cannot encode as escapes: a terminal may know ASCII alone,
    and a file's name need not be UTF-8."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_json(value: Any) -> None:
    """Print JSON for a program: with escapes for what standard output cannot encode."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    print(text)
