"""The one exception that a user is meant to see, and how its text reaches a terminal."""

import unicodedata


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
