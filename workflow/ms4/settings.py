"""`--set key=value` over a tree of values: the same words in the wizard and in `ms4 plan`."""

from __future__ import annotations

import difflib
from contextlib import suppress
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

from ms4 import yaml_text
from ms4.errors import Ms4Error


def field_type(field: str, model: type[BaseModel]) -> Any:
    """The type of a dotted field of `model`, with its limits.

    Raises:
        Ms4Error: there is no such field.
    """
    found: Any = model
    limits: list[Any] = []
    for position, name in enumerate(parts := field.split(".")):
        if isinstance(found, type) and issubclass(found, BaseModel):
            known = list(found.model_fields)
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                advice = f"did you mean `{close[0]}`?" if close else f"known: {', '.join(known)}"
                raise Ms4Error(f"--set {field}: unknown key `{name}`; {advice}")
            limits = found.model_fields[name].metadata
            found = found.model_fields[name].annotation
        elif get_origin(found) is dict:
            found, limits = get_args(found)[1], []
        else:
            raise Ms4Error(f"--set {field}: `{'.'.join(parts[:position])}` has no keys")
    return Annotated[found, *limits] if limits else found


def field_names(model: type[BaseModel]) -> list[str]:
    """The dotted names of all fields of `model` that hold a value."""
    found = []
    for name, info in model.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += [f"{name}.{inner}" for inner in field_names(kind)]
        else:
            found.append(name)
    return found


def read_setting(setting: str, model: type[BaseModel]) -> tuple[str, Any]:
    """The field of `model` and the value of `key=value`.

    The text is taken as it stands if the field can hold it, else as YAML (`[a, b]`), else as the
    only item of a list. `null` and nothing at all empty a field that may be empty.

    Raises:
        Ms4Error: there is no such field, or it cannot hold that.
    """
    field, equals, text = setting.partition("=")
    if not equals:
        raise Ms4Error(f"--set {setting}: needs the form key=value, for example seed=1")
    adapter: TypeAdapter[Any] = TypeAdapter(field_type(field, model))
    candidates: list[Any] = [text]
    if text in ("", "null"):
        candidates.insert(0, None)
    # What is not YAML is text, or nothing that the field can hold.
    with suppress(Ms4Error):
        tree, _ = yaml_text.parse(f"value: {text}", "")
        candidates += [tree["value"]] if set(tree) == {"value"} else []
    candidates.append([text])
    faults = []
    for value in candidates:
        try:
            adapter.validate_python(value)
        except ValidationError as error:
            faults.append(error.errors()[0])
        else:
            return field, value
    # Of a list whose item is wrong rather than that the text is no list.
    told = max(faults, key=lambda fault: len(fault["loc"]))
    raise Ms4Error(f"--set {field}: {told['msg']} (it is {text!r})")


def put(values: dict[str, Any], field: str, value: Any) -> None:
    """Give a dotted field of a tree a value.

    Raises:
        Ms4Error: something else stands where a section should be.
    """
    *sections, name = field.split(".")
    place = values
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise Ms4Error(f"{field}: `{section}` is not a section of settings")
    place[name] = value
