"""What the processes of a group tell each other before a fit: errors, and the sizes of parts."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from tempering.errors import DataError, InputError

T = TypeVar("T")


def process_group(distributed: bool) -> bool | None:
    """True for torch.distributed's default group, None for one process alone.

    The group itself is never kept: one that outlives `destroy_process_group`, in a fitted object
    or a traceback, ends the interpreter with SIGABRT. InputError when there is none.
    """
    if not distributed:
        return None
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise InputError(
            "distributed = True, but torch.distributed has no process group; call "
            "torch.distributed.init_process_group in every process, started by torchrun"
        )
    return True


def gathered(group: bool | None, mine: T) -> list[T]:
    """What every rank has to say, in rank order."""
    if group is None:
        return [mine]
    told: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(told, mine)
    return told


def same_on_all(group: bool | None, given: Mapping[str, Any]) -> None:
    """InputError on every rank where one was given another value than the first."""
    if group is None:
        return
    first, *others = gathered(group, {name: _text(value) for name, value in given.items()})
    for rank, other in enumerate(others, 1):
        for name, value in first.items():
            if other[name] != value:
                raise InputError(
                    f"rank {rank} was given {name} = {other[name]}, and rank 0 {value}; give every "
                    "rank the same"
                )


def _text(value: Any) -> str:
    text = repr(value.tolist() if hasattr(value, "tolist") else value)
    return text if len(text) <= 80 else f"{text[:60]}... ({zlib.crc32(text.encode()):08x})"


def agreed(group: bool | None, check: Callable[[], T]) -> T:
    """The result of a check of this rank's part; an error on one rank is raised on all.

    Else the others would wait for that rank until their time-out.
    """
    if group is None:
        return check()
    failed: Exception | None = None
    try:
        value = check()
    except Exception as error:  # scikit-learn's own are of many kinds
        failed = error
    told = gathered(group, None if failed is None else str(failed))
    if failed is not None:
        raise failed
    for rank, text in enumerate(told):
        if text is not None:
            raise DataError(f"the rows of rank {rank} can't be used: {text}")
    return value
