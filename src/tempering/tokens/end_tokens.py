"""Which tokens end a text."""

from __future__ import annotations

from numbers import Integral
from typing import Any


def end_tokens(config: Any) -> list[int]:
    """The ids that end a sequence: the `eos_token_id` of a generation config or a tokenizer.

    transformers holds there None, a whole number, or a list of several.
    """
    ends = getattr(config, "eos_token_id", None)
    if ends is None:
        return []
    return [int(ends)] if isinstance(ends, Integral) else [int(end) for end in ends]
