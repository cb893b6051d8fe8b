"""Records what the tokens of each row were sampled from, for the trace of a generate() run.

Which rows are kept, and with which last tokens, is known only from what generate() returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from tempering.errors import InputError
from tempering.tokens.trace import TraceRow, TraceStep


@dataclass
class _Node:
    """One history: the step taken from it, and the (raw, tempered) log probabilities of tokens."""

    step: TraceStep | None = None
    drawn: dict[int, tuple[float, float]] = field(default_factory=dict)
    children: dict[int, _Node] = field(default_factory=dict)
    call: int = -1  # number of the last call with this history
    row: int = -1  # its row in that call

    def child(self, token: int) -> _Node:
        return self.children.setdefault(token, _Node())


class Recorder:
    """A tree of histories, in which beams branch; the branches that were dropped are never read.

    Whole rows of log probabilities are kept for the last call only: when the next call shows which
    token was sampled, its log probability is looked up there. Tokens that end a sequence may not be
    shown (a finished beam isn't passed again), so theirs are kept at every step.

    Parameters
    ----------
    prompt_length: tokens before the first generated one, padding included.
    samples: n of a ladder, else None.
    ends: ids of the tokens that end a sequence.
    text: the text of a token id, for the table.
    """

    def __init__(
        self,
        prompt_length: int,
        samples: int | None,
        ends: Sequence[int],
        text: Callable[[int], str],
    ) -> None:
        self.prompt_length = prompt_length
        self.samples = samples
        self.ends = list(ends)
        self.text = text
        self._roots: dict[tuple[bytes, int], _Node] = {}
        self._nodes: list[_Node] = []
        self._last_logs: tuple[Tensor, Tensor] | None = None
        self._call = 0

    def record(
        self,
        rows: NDArray[np.int64],
        parents: Sequence[int | None],
        steps: Sequence[TraceStep],
        raw: Float[Tensor, "batch vocab"],
        after: Float[Tensor, "batch vocab"],
    ) -> None:
        """One call: rows of tokens, what each continues, and log probabilities of what follows."""
        nodes = []
        for row, parent in enumerate(parents):
            if parent is None or not self._nodes:
                node = self._walk(rows[row], row)
            else:
                before, token = self._nodes[parent], int(rows[row, -1])
                before.drawn[token] = self._looked_up(before, token)
                node = before.child(token)
            nodes.append(node)
        self._call += 1
        self._nodes, self._last_logs = nodes, (raw, after)
        ends = list(zip(*(logs[:, self.ends].tolist() for logs in (raw, after))))
        for row, (node, step, (end_raw, end_after)) in enumerate(zip(nodes, steps, ends)):
            node.step, node.call, node.row = step, self._call, row
            node.drawn.update(zip(self.ends, zip(end_raw, end_after)))

    def rows(self, sequences: NDArray[np.int64], first: int) -> Iterator[TraceRow]:
        """The trace rows of the sequences that generate() returned, numbered from `first`."""
        for index, sequence in enumerate(sequences):
            node = self._roots.get(self._key(sequence, index))
            for position, token in enumerate(sequence[self.prompt_length :].tolist()):
                if node is None or node.step is None:
                    raise self._missing(index, position)
                if token not in node.drawn:
                    if node.call != self._call:
                        raise self._missing(index, position)
                    node.drawn[token] = self._looked_up(node, token)
                yield TraceRow(
                    first + index,
                    position,
                    token,
                    self.text(token),
                    *node.step,
                    *node.drawn[token],
                )
                if token in self.ends:
                    break  # the rest is padding
                node = node.children.get(token)

    def _key(self, row: NDArray[np.int64], index: int) -> tuple[bytes, int]:
        sample = index % self.samples if self.samples else 0
        return row[: self.prompt_length].tobytes(), sample

    def _walk(self, row: NDArray[np.int64], index: int) -> _Node:
        node = self._roots.setdefault(self._key(row, index), _Node())
        for token in row[self.prompt_length :].tolist():
            node = node.child(token)
        return node

    def _looked_up(self, node: _Node, token: int) -> tuple[float, float]:
        if self._last_logs is None:
            raise InputError("no log probabilities were recorded; the trace has no call yet")
        raw, after = self._last_logs
        return raw[node.row, token].item(), after[node.row, token].item()

    def _missing(self, index: int, position: int) -> InputError:
        return InputError(
            f"sequence {index}: the trace has no record of the token at position {position}; give "
            "complete() what the traced generate() returned, whole and unchanged"
        )
