"""YAML that people write and that we write: safe, strict, and a line for each text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ms4.errors import Ms4Error


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, but a key given twice is an error and not the last one's value, and so is
    an alias: a few of them in one another make a tree of any size."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            mark = self.get_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(None, None, "aliases are not read", mark)
        return super().compose_node(parent, index)


def _mapping_without_duplicates(loader: _UniqueKeyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is not text", key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is given twice", key_node.start_mark
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


def _refuse(loader: _UniqueKeyLoader, node: yaml.Node) -> Any:
    raise yaml.constructor.ConstructorError(None, None, "a set has no order", node.start_mark)


_UniqueKeyLoader.add_constructor("tag:yaml.org,2002:set", _refuse)
_UniqueKeyLoader.add_constructor(
    yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates
)


def parse(text: str, where: str) -> tuple[dict[str, Any], yaml.Node | None]:
    """The mapping that a YAML text holds (JSON is a subset of it), and its nodes, for `check`.

    Raises:
        Ms4Error: it is not YAML, or not a mapping, or names a key twice.
    """
    try:
        loader = _UniqueKeyLoader(text)
        root = loader.get_single_node()
        values = loader.construct_document(root) if root is not None else None
    # Beside its own errors, the reader lets through those of what it makes values with: int("abc")
    # for `!!int abc`, a date of the 30th of February, brackets in brackets in brackets.
    except (yaml.YAMLError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise Ms4Error(f"{where}: not valid YAML: {_yaml_fault(error)}") from error
    if not isinstance(values, dict):
        raise Ms4Error(f"{where}: holds no configuration; it must be a mapping of keys to values.")
    return values, root


def read(path: Path, what: str) -> str:
    """The text of a file that a person wrote.

    Raises:
        Ms4Error: it is missing or cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise Ms4Error(f"{path}: no such {what}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise Ms4Error(f"{path}: cannot be read ({error}).") from error


def _yaml_fault(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    problem = " ".join(str(problem).split())
    return f"line {mark.line + 1}: {problem}" if mark is not None else problem


class _Dumper(yaml.SafeDumper):
    """YAML's safe dumper; text that would take more than one line is written with escapes."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # U+0085 counts as a control character: the plain styles would not give it back.
    style = '"' if re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _represent_text)


def dump(values: Mapping[str, Any], flow: bool = False) -> str:
    """Plain values as YAML that a safe loader gives back; no text takes more than one line."""
    return yaml.dump(
        values,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=math.inf,
        default_flow_style=flow,
    )
