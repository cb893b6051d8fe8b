"""One run on several processes, each with a share of the work; a run on one has size 1.

`torchrun --nproc-per-node 2 -m tempering tune ...` starts the processes, called ranks, and so does
any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. All ranks run the same code on
the same data. What takes long, loops over pieces of data, is shared:

    with ranks.together():               # an error in here reaches all ranks
        for place in ranks.mine(count):  # this rank's pieces
            found[place] = ...           # float64, 0 for the others' pieces
    (found,) = ranks.sum(found)          # now every rank has all of them, bit for bit

So all ranks take the same decisions. Where a decision rests on floating-point algebra, which may
differ in its last digit from one processor to another, `same` gives that of rank 0. Only rank 0
writes files.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, TypeVar

from tempering.errors import RankError, TemperingError
from tempering.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

Value = TypeVar("Value")

# How long a rank waits for the others, beyond its own share of the work. A rank that ends is
# noticed at once; this is for one that hangs, or whose machine is lost.
WAIT = timedelta(minutes=30)
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_INTERRUPTED = "interrupted"
_LAST_WORDS, _PATIENCE = "tempering/last words", timedelta(seconds=2)


class Ranks:
    """This process among those that share a run.

    rank: its number, from 0. size: how many there are. local_rank: its number on its machine.

    Every method but `mine` is called by all ranks, in the same order.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._asked = False  # Ctrl-C, which all ranks act on together
        self._inside = False

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes."""
        return self.rank == 0

    def mine(self, count: int) -> Iterator[int]:
        """This rank's places among `count` pieces; none where there are fewer than ranks."""
        for place in range(self.rank, count, self.size):
            if self._asked:
                raise KeyboardInterrupt
            yield place

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work of this rank's own; where it fails on one rank, it fails on all.

        Raises RankError with the message of the first rank that failed, or KeyboardInterrupt where
        it was interrupted; a rank's own exception stays what it is.
        """
        if self.size == 1:
            yield
            return
        own: BaseException | None = None
        self._inside = True
        try:
            yield
            if self._asked:
                raise KeyboardInterrupt
        except RankError:  # this rank was told to end; the others were too
            raise
        except (Exception, KeyboardInterrupt) as error:
            own = error
        finally:
            self._inside = False
        told = None
        if own is not None:
            told = _INTERRUPTED if isinstance(own, KeyboardInterrupt) else _message(own)
        failed = [(rank, why) for rank, why in enumerate(self.each(told)) if why is not None]
        if not failed:
            return
        self._asked = False
        if own is not None:
            raise own
        rank, why = failed[0]
        if why == _INTERRUPTED:
            raise KeyboardInterrupt
        raise RankError(f"rank {rank} of {self.size} failed: {why}")

    def sum(self, *values: Tensor) -> list[Tensor]:
        """The sums over ranks of tensors, which become float64 on the CPU; all ranks get them.

        A tensor has the same shape on every rank. What is 0 on all ranks but one comes as it was
        there, NaN and infinity included.
        """
        import torch

        wide = [value.detach().to("cpu", torch.float64) for value in values]
        if self.size == 1:
            return wide
        flat = torch.cat([value.flatten() for value in wide])
        if len(flat):
            self._collect(torch.distributed.all_reduce, flat)
        parts = flat.split([value.numel() for value in wide])
        return [part.view(value.shape) for part, value in zip(parts, wide, strict=True)]

    def each(self, value: Value) -> list[Value]:
        """The values of all ranks, in their order."""
        if self.size == 1:
            return [value]
        import torch

        found: list[Any] = [None] * self.size
        self._collect(torch.distributed.all_gather_object, found, value)
        return found

    def same(self, value: Value) -> Value:
        """The value of rank 0; what the other ranks give is dropped."""
        if self.size == 1:
            return value
        import torch

        kept: list[Any] = [value if self.first else None]
        self._collect(torch.distributed.broadcast_object_list, kept, 0)
        return kept[0]

    def agree(self, given: Mapping[str, Any]) -> None:
        """RankError on all ranks where one has another value than rank 0 of anything here.

        given: what it is (named in the error) -> its value, as text.
        """
        if self.size == 1:
            return
        own = {name: str(value) for name, value in given.items()}
        every = self.each((platform.node(), own))
        place, ours = every[0]
        for rank, (node, theirs) in enumerate(every):
            for name, value in ours.items():
                if theirs.get(name) != value:
                    raise RankError(
                        f"rank {rank} of {self.size} (on {node}) has another {name} than rank 0 "
                        f"(on {place}): {_short(theirs.get(name))}, and not {_short(value)}; give "
                        "every rank the same"
                    )

    def interrupt(self) -> None:
        """Ask all ranks to stop, at the next piece of this one; a second time, stop this one."""
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def said_by_first(self, message: str) -> bool:
        """Whether rank 0 ends with this message too, so that this rank need not repeat it.

        A rank waits a moment for that of rank 0; this is no collective, and nobody waits for it.
        """
        if self.size == 1:
            return False
        import torch

        try:
            store = torch.distributed.distributed_c10d._get_default_store()
            if self.first:
                store.set(_LAST_WORDS, message)
                return False
            store.wait([_LAST_WORDS], _PATIENCE)
            said = store.get(_LAST_WORDS).decode()
            return message in said or said in message
        except RuntimeError:  # rank 0 says nothing, or kept the store and is gone
            return False

    def _collect(self, operation: Any, *arguments: Any) -> None:
        if self._inside:
            raise RuntimeError("ranks meet outside of together(), where each does its own work")
        try:
            operation(*arguments)
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank} of {self.size} lost the others: one of them ended (killed, or "
                f"out of memory), or didn't answer within {WAIT.total_seconds() / 60:.0f} minutes "
                f"({_short(error)})"
            ) from error


ALONE = Ranks()
_HERE = ALONE


def here() -> Ranks:
    """The ranks of this run; those of one process, unless `joined` is in force."""
    return _HERE


def started() -> bool:
    """Whether a launcher started this process as one of several."""
    size = os.environ.get("WORLD_SIZE", "")
    return all(name in os.environ for name in _ENVIRONMENT) and size.isdigit() and int(size) > 1


@contextmanager
def joined() -> Iterator[Ranks]:
    """Meet the other ranks that a launcher started, and share work with them until the end.

    Where the default process group of torch.distributed is there already, it is used, and left.
    Ctrl-C (SIGINT) reaches all ranks together, at the end of a piece; a second one ends this rank
    alone. SIGTERM, which launchers send when another rank has ended, is a RankError.

    Raises RankError where the others can't be met, or have other versions of the packages that
    decide the numbers.
    """
    global _HERE
    import torch

    if _HERE is not ALONE:
        raise RuntimeError("the ranks are joined already")
    own = not torch.distributed.is_initialized()
    if own:
        try:
            torch.distributed.init_process_group("gloo", timeout=WAIT)
        except (RuntimeError, ValueError) as error:
            raise RankError(
                f"can't meet the other ranks at {os.environ.get('MASTER_ADDR', 'no address')}: "
                f"{_short(error)}; are {', '.join(_ENVIRONMENT)} those of a launcher such as "
                "torchrun, on all machines? (Without them a command runs in one process)"
            ) from error
    local = os.environ.get("LOCAL_RANK", "0")
    found = Ranks(
        torch.distributed.get_rank(),
        torch.distributed.get_world_size(),
        int(local) if local.isdigit() else 0,
    )
    try:
        with _signals(found):
            found.agree(_versions())
            _HERE = found
            yield found
    finally:
        _HERE = ALONE
        if own:
            with contextlib.suppress(RuntimeError):
                torch.distributed.destroy_process_group()


@contextmanager
def _signals(ranks: Ranks) -> Iterator[None]:
    if ranks.size == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ended(number: int, frame: Any) -> None:
        raise RankError(
            f"rank {ranks.rank} of {ranks.size} was told to end (SIGTERM), as launchers do when "
            "another rank has ended"
        )

    before = signal.signal(signal.SIGINT, lambda number, frame: ranks.interrupt())
    term = signal.signal(signal.SIGTERM, ended)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, term)


def _versions() -> dict[str, str]:
    found = {"Python": ".".join(map(str, sys.version_info[:2])), "tempering": __version__}
    for name in ("torch", "transformers", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return {f"version of {name}": number for name, number in found.items()}


def _message(error: BaseException) -> str:
    said = str(error) or type(error).__name__
    return said if isinstance(error, TemperingError) else f"{type(error).__name__}: {said}"


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 160 else text[:160] + "..."
