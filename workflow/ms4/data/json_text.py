"""JSON without surprises: what Python's reader would silently change is refused."""

from __future__ import annotations

import json
import math
from typing import Any

from ms4.data.faults import SampleFault


def parse_json(text: str) -> Any:
    """Parse JSON, refusing what would silently become something else.

    Raises:
        SampleFault: not JSON, a key given twice, NaN or Infinity, half of a surrogate pair.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object_of_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
        if "\\u" in text:  # only an escape can bring in a surrogate: UTF-8 has none
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise SampleFault(
            f"not valid JSON: {error.msg} (column {error.colno}); write one JSON object a line"
        ) from error
    except UnicodeEncodeError as error:
        raise SampleFault(
            "half of a surrogate pair (\\ud800 to \\udfff), which stands for no character; "
            "remove it or write the whole pair"
        ) from error
    except RecursionError as error:
        raise SampleFault("JSON nested too deeply; flatten it") from error
    except ValueError as error:  # an integer of thousands of digits
        raise SampleFault(f"not readable as JSON ({error}); write long numbers as text") from error
    return value


def _object_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
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
