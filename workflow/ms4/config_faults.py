"""What is wrong with a configuration, in a person's words: a line a fault, with its place."""

from __future__ import annotations

import difflib
import reprlib
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

MOST_FAULTS = 50
"""Faults of one file that are named."""


def _line_of(root: yaml.Node | None, location: tuple[int | str, ...]) -> int | None:
    """The line (from 1) of the deepest node on the way to `location`, or None."""
    line, node = None, root
    for name in location:
        if isinstance(node, yaml.MappingNode):
            for key_node, value_node in node.value:
                if key_node.value == name:
                    line, node = key_node.start_mark.line + 1, value_node
                    break
            else:
                return line
        elif isinstance(node, yaml.SequenceNode) and isinstance(name, int):
            if name >= len(node.value):
                return line
            node = node.value[name]
            line = node.start_mark.line + 1
        else:
            return line
    return line


def _known_keys(location: tuple[int | str, ...], model: Any) -> list[str]:
    """The keys that the section at `location` of `model` may have."""
    for name in location:
        field = model.model_fields.get(name) if isinstance(name, str) else None
        model = field.annotation if field is not None else None
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return []
    return list(model.model_fields)


def describe(
    error: ValidationError, where: str, root: yaml.Node | None, model: type[BaseModel]
) -> str:
    """One line a fault: file, line, field, what is wrong, what to do.

    Args:
        error: what pydantic found.
        where: what the messages call the values: a file's name.
        root: the YAML nodes that the values came from, for line numbers.
        model: what the values were to become.
    """
    lines = []
    faults = error.errors()
    for fault in faults:
        location = fault["loc"]
        if fault["type"] == "too_short" and any(
            other["loc"][:-1] == location for other in faults if len(other["loc"]) > len(location)
        ):
            continue  # it was long enough, and its wrong items are named
        line = _line_of(root, location)
        place = f"{where}:{line}" if line is not None else where
        field = ".".join(str(part) for part in location)
        if fault["type"] == "extra_forbidden":
            known = _known_keys(location[:-1], model)
            close = difflib.get_close_matches(str(location[-1]), known, n=1)
            advice = f"did you mean `{close[0]}`?" if close else f"known: {', '.join(known)}"
            lines.append(f"{place}: {field}: unknown key; {advice}")
        elif fault["type"] == "missing":
            lines.append(f"{place}: {field}: is missing; add it")
        elif fault["type"] == "value_error" and not location:
            lines.extend(f"{place}: {text}" for text in str(fault["ctx"]["error"]).splitlines())
        else:
            lines.append(f"{place}: {field}: {fault['msg']} (it is {_short(fault['input'])})")
    more = [f"and {len(lines) - MOST_FAULTS} more"] if len(lines) > MOST_FAULTS else []
    return "\n".join(lines[:MOST_FAULTS] + more)


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60


def _short(value: Any) -> str:
    """At most a line of it, at the cost of a line: a person may have given anything."""
    try:
        text = _REPR.repr(value)
    except ValueError:  # Python does not write out a number of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."
