"""What a page sent, read with nothing taken on trust."""

from __future__ import annotations

import json
import math
from typing import Any

from tempering.errors import InputError

MOST_COLUMNS = 60  # that are painted; the untempered model is one more row of the batch
MOST_BYTES = 16 * 2**20  # of one request: 80 x 128 temperatures in 60 columns are 13 MB
_DEEPEST = 50  # lists within lists


class Fields:
    """The fields of a JSON object; each is asked for by its type, and InputError names it."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data

    @classmethod
    def of(cls, body: bytes) -> Fields:
        """From the body of a request."""
        try:
            data = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise InputError(f"the page sent no JSON: {error}") from error
        if not isinstance(data, dict):
            raise InputError(f"the page sent JSON that is no object but {type(data).__name__}")
        _check(data)
        return cls(data)

    def text(self, name: str, default: str | None = None) -> str:
        """A text."""
        found = self.data.get(name, default)
        if not isinstance(found, str):
            raise InputError(f"{name} is a text, not {found!r:.40}")
        return found

    def number(self, name: str, default: float | int | None = None) -> float:
        """A finite number."""
        return float(self._number(name, default))

    def whole(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number within bounds; a seed of 63 bits keeps them all."""
        found = self._number(name, default)
        if found != int(found) or not low <= found <= high:
            raise InputError(f"{name} is a whole number from {low} to {high}, not {found}")
        return int(found)

    def _number(self, name: str, default: float | int | None) -> float | int:
        found = self.data.get(name, default)
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise InputError(f"{name} is a number, not {found!r:.40}")
        if (isinstance(found, int) and abs(found) >= 2**63) or not math.isfinite(found):
            raise InputError(f"{name} is a finite number, not {str(found)[:40]}")
        return found

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        found = self.data.get(name, default)
        if not isinstance(found, bool):
            raise InputError(f"{name} is true or false, not {found!r:.40}")
        return found

    def items(self, name: str, most: int = 1_000_000) -> list[Any]:
        """A list."""
        found = self.data.get(name)
        if not isinstance(found, list) or len(found) > most:
            raise InputError(f"{name} is a list of at most {most} items, not {found!r:.40}")
        return found

    def tokens(self, name: str, vocabulary: int) -> list[int]:
        """Token ids, at least one."""
        found = self.items(name)
        for item in found:
            if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < vocabulary:
                raise InputError(f"{name} holds token ids from 0 to {vocabulary - 1}: {item!r:.20}")
        if not found:
            raise InputError(f"{name} holds no token")
        return found


def _check(data: Any) -> None:
    """InputError for what JSON can hold and no file, tokenizer or record can.

    That is half of a surrogate pair, which UTF-8 has not, and nesting without end.
    """
    level = [data]
    for _ in range(_DEEPEST):
        for item in level:
            # Keys are texts, too.
            for text in item if isinstance(item, dict) else [item]:
                if isinstance(text, str) and not text.isascii():
                    _check_text(text)
        level = [
            inner
            for item in level
            if isinstance(item, dict | list)
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise InputError(f"the page sent JSON that is nested more than {_DEEPEST} deep")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"half a character (U+{ord(text[error.start]):04X}) stands in a text that the page "
            f"sent, at place {error.start + 1}: {text[:40]!a}; take it out"
        ) from error
