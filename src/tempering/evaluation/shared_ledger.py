"""Finished pieces of a run on several ranks: rank 0 keeps them in its journal, for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from tempering.evaluation.journal import Journal
from tempering.ranks import here

Found = TypeVar("Found")


class SharedLedger:
    """Results by name, on all ranks; without a journal they are kept in memory alone.

    journal: of rank 0; the others give None.
    """

    def __init__(self, journal: Journal | None) -> None:
        self._journal = journal if here().first else None
        self._known: dict[str, Any] = dict(here().same({} if journal is None else journal.entries))
        self._new: dict[str, Any] = {}  # since the ranks last met

    def __contains__(self, name: str) -> bool:
        return name in self._known

    def __getitem__(self, name: str) -> Any:
        return self._known[name]

    def put(self, name: str, value: Any) -> None:
        """Keep one result; on rank 0 at once, from the other ranks at the end of the round."""
        if self._journal is not None:
            self._journal.put(name, value)
        self._known[name] = self._new[name] = value

    def rounds(self, count: int, work: Callable[[int], Found]) -> Iterator[list[Found]]:
        """`work(place)` for `count` places, a place for each rank at a time: rounds of results.

        In one process a round is one place. An interruption is raised when all ranks have finished
        their places, whose results are kept.
        """
        ranks = here()
        for start in range(0, count, ranks.size):
            left = min(ranks.size, count - start)
            own: list[Found] = []
            stopped: KeyboardInterrupt | None = None
            try:
                with ranks.together():
                    own = [work(start + place) for place in ranks.mine(left)]
            except KeyboardInterrupt as error:
                stopped = error
            every = ranks.each((own, self._new))
            with ranks.together():
                for _, new in every:
                    for name in new.keys() - self._known.keys():
                        self.put(name, new[name])
            self._new = {}
            if stopped is not None:
                raise stopped
            yield [found for mine, _ in every for found in mine]
