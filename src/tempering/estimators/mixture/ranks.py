"""What the processes of a group tell each other before a fit: errors, and the sizes of parts."""

from __future__ import annotations

from collections.abc import Callable
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


def agreed(group: bool | None, check: Callable[[], T]) -> T:
    """The result of a check of this rank's part; an error on one rank is raised on all.

    Else the others would wait for that rank until their time-out.
    """
    if group is None:
        return check()
    try:
        value, failed = check(), None
    except InputError as error:
        failed = error
    told = gathered(group, None if failed is None else str(failed))
    if failed is not None:
        raise failed
    for rank, text in enumerate(told):
        if text is not None:
            raise DataError(f"the rows of rank {rank} can't be used: {text}")
    return value
