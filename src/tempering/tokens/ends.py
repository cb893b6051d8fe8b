"""Which tokens end a text."""

from __future__ import annotations

from numbers import Integral
from typing import Any


def end_tokens(config: Any) -> list[int]:
    """The ids that end a sequence, by the `eos_token_id` of a generation config or a tokenizer.

    transformers keeps none (None), one (a whole number) or several (a list) there.
    """
    ends = getattr(config, "eos_token_id", None)
    if ends is None:
        return []
    return [int(ends)] if isinstance(ends, Integral) else [int(end) for end in ends]
