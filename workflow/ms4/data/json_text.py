"""JSON without surprises: what Python's reader would silently change is refused."""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter
from typing import Any

from ms4.data.faults import SampleFault

_HALVES = re.compile("[\ud800-\udfff]")


def parse_json(text: str, changed: Counter[str] | None = None) -> Any:
    """Parse JSON, refusing what would silently become something else.

    Args:
        text: one value.
        changed: is told under "surrogates" how many halves of surrogate pairs became U+FFFD; None:
            they are refused.

    Raises:
        SampleFault: not JSON, a key given twice, NaN or Infinity, half of a surrogate pair.
    """
    try:
        value = json.loads(
            text.rstrip("\r\n"),  # else a line that ends too early has its fault in the next one
            object_pairs_hook=_object_of_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
        if "\\u" in text:  # only an escape can bring in a surrogate: UTF-8 has none
            value = _mended(value, changed)
    except json.JSONDecodeError as error:
        raise SampleFault(
            f"not valid JSON: {error.msg} (column {error.colno}); correct it (in JSONL, each line "
            "is an object of its own)"
        ) from error
    except RecursionError as error:
        raise SampleFault("JSON nested too deeply; flatten it") from error
    except ValueError as error:  # Python reads no longer ones, whose time is quadratic
        raise SampleFault(
            f"not readable as JSON: a number of more than {sys.get_int_max_str_digits():,} digits; "
            "write it as text"
        ) from error
    return value


def list_of(value: object) -> list[Any] | None:
    """A list, or the one that a text holds as JSON, as tables have them; None: it is neither."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse_json(value)
        except SampleFault:
            return None
    return value if isinstance(value, list) else None


def without_halves(text: str) -> tuple[str, int]:
    """A text with U+FFFD for each half of a surrogate pair, as mistral-common takes it, and how
    many those were. Two halves that belong together become the character they stand for."""
    if text.isascii() or not _HALVES.search(text):
        return text, 0
    mended = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return mended, mended.count("\ufffd") - text.count("\ufffd")


def _mended(value: Any, changed: Counter[str] | None) -> Any:
    if isinstance(value, str):
        mended, halves = without_halves(value)
        if halves and changed is None:
            raise SampleFault(
                "half of a surrogate pair (\\ud800 to \\udfff), which stands for no character; "
                "remove it or write the whole pair"
            )
        if halves and changed is not None:
            changed["surrogates"] += halves
        return mended
    if isinstance(value, list):
        return [_mended(item, changed) for item in value]
    if isinstance(value, dict):
        pairs = [(_mended(k, changed), _mended(v, changed)) for k, v in value.items()]
        return _object_of_unique_keys(pairs)
    return value


def _object_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, number in counts.items() if number > 1)
        raise SampleFault(f"the key {twice!a} stands twice in one object; keep one of them")
    return result


def _refuse_constant(name: str) -> Any:
    raise SampleFault(f"{name} is not valid JSON; write null or a number")


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise SampleFault(f"the number {digits[:20]} is too large; write it as text")
    return value


def kind_of(value: object) -> str:
    """What a value is, in words for a message."""
    if value is None:
        return "null"
    names = {bool: "a boolean", str: "text", list: "a list", dict: "an object"}
    names |= {int: "a number", float: "a number", bytes: "bytes"}
    return names.get(type(value), f"a {type(value).__name__}")


def short(value: object) -> str:
    """A value in at most 40 plain characters."""
    text = ascii(value[:60] if isinstance(value, (str, bytes, list)) else value)
    return text if len(text) <= 40 else text[:37] + "..."
