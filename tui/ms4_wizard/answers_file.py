"""Answers from a file and from settings on the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ms4 import config, yaml_text
from ms4.errors import Ms4Error
from ms4_wizard import answers
from ms4_wizard.answers import Answers
from ms4_wizard.draft import Draft


def with_settings(draft: Draft, settings: Sequence[str]) -> Draft:
    """The draft with `key=value` settings over it.

    Raises:
        Ms4Error: a setting is wrong.
    """
    for setting in settings:
        draft.set(*answers.read_setting(setting))
    return draft


def _read(name: str, settings: Sequence[str]) -> tuple[dict[str, Any], str, yaml.Node | None]:
    where = "standard input" if name == "-" else name
    try:
        if name == "-" and sys.stdin is None:
            raise Ms4Error("standard input is closed.")
        text = sys.stdin.read() if name == "-" else yaml_text.read(Path(name), "answers file")
    except UnicodeDecodeError as error:
        raise Ms4Error(f"{where}: cannot be read ({error}).") from error
    values, root = yaml_text.parse(text, where)
    return with_settings(Draft(values), settings).values, where, root


def read_answers(name: str, settings: Sequence[str]) -> Answers:
    """The answers of a file (`-`: standard input), with settings over them.

    Raises:
        FaultyAnswersError: fields are missing or wrong; all of them are named together.
        Ms4Error: the file or a setting cannot be read.
    """
    values, where, root = _read(name, settings)
    try:
        return config.check(values, where, root, Answers)
    except Ms4Error as error:
        cause = error.__cause__
        if isinstance(cause, ValidationError):
            raise FaultyAnswersError(str(error), cause) from cause
        raise


class FaultyAnswersError(Ms4Error):
    """Answers that are incomplete or wrong."""

    def __init__(self, message: str, cause: ValidationError) -> None:
        super().__init__(message)
        self.missing: list[str] = []
        """Fields that must be given and are not."""
        self.faults: list[dict[str, str]] = []
        """Field and message of what is given and wrong; no field for a check across fields."""
        for fault in cause.errors():
            field = ".".join(str(part) for part in fault["loc"])
            if fault["type"] == "missing":
                self.missing.append(field)
            else:
                message = fault["msg"].removeprefix("Value error, ")
                self.faults.append({"field": field, "message": message})
