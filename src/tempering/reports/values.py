"""Python values to JSON and back: tensors become lists, NaN and infinities survive.

JSON has no NaN and no infinity, so they are written as {"$float": "nan"}, {"$float": "inf"} and
{"$float": "-inf"}. A key that starts with "$" gets one more "$", so that no other
object reads as one of these.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from tempering.errors import DataError

_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def plain_value(value: Any, where: str = "value") -> Any:
    """`value` in None, bool, int, float, str, list and dict only.

    Tensors, arrays and their scalars become (nested) lists and numbers, tuples become lists,
    dataclasses and named tuples become dicts. `where` names the value in error messages.

    Raises DataError for anything else, for keys that are not text, and for text that is not
    valid Unicode.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(str(value), where)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    elif isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {
            _key(key, where): plain_value(item, f"{where}.{key}") for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [plain_value(item, f"{where}[{i}]") for i, item in enumerate(value)]
    # Told by their methods, so that a record without tensors imports neither torch nor numpy.
    if hasattr(value, "detach"):
        value = value.detach().to("cpu")
    if hasattr(value, "tolist"):
        return plain_value(value.tolist(), where)
    raise DataError(
        f"{where} is a {type(value).__name__}, which a record can't hold; "
        "give numbers, text, lists, dicts, tensors or arrays (of a path: its name)"
    )


def _key(key: object, where: str) -> str:
    if not isinstance(key, str):
        raise DataError(f"{where} has the key {key!r}; keys of a record are text")
    return _text(key, f"a key of {where}")


def _text(text: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} is not valid Unicode (character {error.start} is half of a pair); it was "
            "probably decoded from bytes that are not UTF-8: decode them with errors='replace'"
        ) from error
    return text


def encode(value: Any) -> Any:
    """A plain value with NaN, infinities and keys that start with "$" made safe for JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {("$" + k if k.startswith("$") else k): encode(v) for k, v in value.items()}
    return value


def decode(value: Any, where: str) -> Any:
    """The inverse of `encode`; DataError for a "$" key that `encode` never writes."""
    if isinstance(value, list):
        return [decode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"$float"}:
        name = value["$float"]
        if not isinstance(name, str) or name not in _SPECIAL:
            raise DataError(f"{where}: $float is {name!r}; expected 'nan', 'inf' or '-inf'")
        return _SPECIAL[name]
    result = {}
    for key, item in value.items():
        if key.startswith("$") and not key.startswith("$$"):
            raise DataError(f"{where}: the key {key!r} is unknown; only '$float' has a single '$'")
        result[key[1:] if key.startswith("$") else key] = decode(item, f"{where}.{key}")
    return result


def dumps(value: Any) -> str:
    """JSON text of an encoded value, a leaf or a list of leaves on a line, for readable diffs."""
    return _dump(value, "") + "\n"


def _dump(value: Any, indent: str) -> str:
    deeper = indent + " "
    if isinstance(value, dict) and value and value.keys() != {"$float"}:
        lines = (f"{deeper}{_leaf(key)}: {_dump(item, deeper)}" for key, item in value.items())
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and any(
        isinstance(x, list) or (isinstance(x, dict) and x.keys() != {"$float"}) for x in value
    ):
        lines = (deeper + _dump(item, deeper) for item in value)
        return "[\n" + ",\n".join(lines) + f"\n{indent}]"
    return _leaf(value)


def _leaf(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
