"""The words with which messages name an option: Python's arguments, or a command's options."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Advice:
    """The text for each change that a message may advise; by default Python's arguments."""

    given_probabilities: str = "inputs='probabilities'"
    for_probabilities: str = "say inputs='probabilities'"
    for_logits: str = "say inputs='logits'"
    classes: str = "say classes=[...], the labels of the columns in order"
    prior: str = "prior=(0.0, 0.5)"
    more_passes: str = "raise max_iter ({max_iter}), or "
    lower_bound: str = "lower the bound, or "
    wider_bounds: str = ", or widen the bounds"
    groups: str = "per='group' needs the group of each row: pass groups"


_PYTHON = Advice()
_current: ContextVar[Advice] = ContextVar("advice", default=_PYTHON)


def advised() -> Advice:
    """The texts in force in this thread or task."""
    return _current.get()


@contextmanager
def advising(advice: Advice) -> Iterator[None]:
    """Use these texts in messages raised inside the block."""
    token = _current.set(advice)
    try:
        yield
    finally:
        _current.reset(token)
