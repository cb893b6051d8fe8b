"""Bodies as they come: half characters, NaN, endless integers, bytes that are no UTF-8."""

from __future__ import annotations

import json
import math
from typing import Any

from tempering.files import whole_characters


def text_of_bytes(data: bytes) -> str:
    """Bytes of a body as text; what is no character becomes U+FFFD."""
    return data.decode(json.detect_encoding(data), errors="replace").lstrip("\ufeff")


def load(data: bytes) -> Any:
    """The JSON of a body, also with NaN, integers of any length and bytes that are no UTF-8.

    Raises ValueError when it is none.
    """
    try:
        return json.loads(text_of_bytes(data), parse_int=_number)
    except RecursionError:
        raise ValueError("brackets within brackets without end") from None


def _number(text: str) -> int | float:
    """An integer; a long one, which nothing here counts, as a float."""
    return int(text) if len(text) < 20 else float(text)


def count(value: Any) -> int | None:
    """A count of tokens, or None where it is none: null, negative, NaN, a word."""
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
    """The text of a content: a text, or parts of which those that think or call tools are left out.

    A part is a text or a mapping with "text", itself a text or {"value": text}.
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
