"""The one exception that a user is meant to see."""


class Ms4Error(Exception):
    """Something that the user can mend.

    The message says what is wrong, where (file and line, or configuration field)
    and what to do. `ms4` prints it without a traceback and exits with code 2.
    """
