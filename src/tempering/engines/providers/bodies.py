"""Reading bodies of replies, which may hold half characters, NaN, endless integers or no UTF-8."""

from __future__ import annotations

import json
import math
from typing import Any

from tempering.files import whole_characters


def text_of_bytes(data: bytes) -> str:
    """Bytes of a body as text; bytes that are no character become U+FFFD."""
    return data.decode(json.detect_encoding(data), errors="replace").lstrip("\ufeff")


def load(data: bytes) -> Any:
    """The JSON of a body, also with NaN, integers of any length and bytes that are no UTF-8.

    Raises ValueError when the body is no JSON.
    """
    text = text_of_bytes(data)
    while text.startswith(":"):  # a comment that keeps a connection open, as gateways send it
        text = text.partition("\n")[2].lstrip()
    try:
        return json.loads(text, parse_int=_number)
    except RecursionError:
        raise ValueError("brackets are nested too deep") from None


def _number(text: str) -> int | float:
    """An integer; one of 20 digits or more, which is no count of tokens, as a float."""
    return int(text) if len(text) < 20 else float(text)


def count(value: Any) -> int | None:
    """A count of tokens, or None where the value is no count: null, negative, NaN, a word."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 16:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not (math.isfinite(value) and 0 <= value < 2**53):
        return None
    return int(value)


def first(value: Any) -> dict[str, Any]:
    """The first mapping of a list, or {} without one."""
    items = value if isinstance(value, list) else [value]
    return next((item for item in items if isinstance(item, dict)), {})


def mapping(value: Any) -> dict[str, Any]:
    """A value if it is a mapping, else {}."""
    return value if isinstance(value, dict) else {}


def text_of(content: Any, depth: int = 0) -> str:
    """The text of a message's content: a text, or a list of parts.

    A part is a text, or a mapping with "text", itself a text or {"value": text}. Parts that hold
    thinking or calls of tools are left out. Content nested deeper than any provider's is ignored.
    """
    if isinstance(content, str) or depth > 8:
        return content if isinstance(content, str) else ""
    if isinstance(content, list):
        return "".join(text_of(part, depth + 1) for part in content)
    if isinstance(content, dict):
        if content.get("thought") or content.get("type") not in (None, "text", "output_text"):
            return ""
        inner = content.get("text", content.get("value"))
        return text_of(inner, depth + 1)
    return ""


def word(value: Any) -> str | None:
    """A short word of the provider's, such as why a reply ended; None where it gives none."""
    if value is None or isinstance(value, dict | list):
        return None
    return whole_characters(str(value))[:80] or None
