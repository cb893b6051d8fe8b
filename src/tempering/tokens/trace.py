"""The trace of sampled tokens: phase, temperature, entropies, support, log probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.errors import InputError
from tempering.files import replace_atomic
from tempering.posterior import entropy, support
from tempering.tokens.token_state import TokenState


class TraceStep(NamedTuple):
    """What a token is sampled from; entropies in nats.

    `entropy_before` is at T = 1, on the logits that the policy was given; `entropy_after` and
    `support` are those of the tempered posterior. Both are taken before top-k, top-p and min-p.
    """

    phase: str
    temperature: float
    entropy_before: float
    entropy_after: float
    support: float


class TraceRow(NamedTuple):
    """One sampled token. Log probabilities are in nats, `log_probability_raw` at T = 1."""

    sequence: int
    position: int
    token_id: int
    token: str
    phase: str
    temperature: float
    entropy_before: float
    entropy_after: float
    support: float
    log_probability_raw: float
    log_probability: float


def trace_steps(
    energies: Float[Tensor, "batch vocab"],
    temperature: Float[Tensor, " batch"],
    states: Sequence[TokenState],
) -> list[TraceStep]:
    """The `TraceStep` of each row, from its energies and its temperature."""
    columns = (
        temperature,
        entropy(energies),
        entropy(energies, temperature),
        support(energies, temperature),
    )
    values = torch.stack(columns, -1).tolist()
    return [TraceStep(state.phase, *row) for state, row in zip(states, values)]


def trace_entry(token: int, step: TraceStep, raw: float, tempered: float) -> dict[str, Any]:
    """A token over HTTP, by the names of `TraceRow`; JSON has no inf, so it is a word."""
    numbers = {**step._asdict(), "log_probability_raw": raw, "log_probability": tempered}
    phase = numbers.pop("phase")
    found = {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
    return {"token_id": token, "phase": phase, **found}


class Trace:
    """The sampled tokens of one or more runs, in order of sequence and position.

    Engines add rows; `rows()` and `to_parquet()` return them. In transformers, give the trace to
    `TemperingLogitsProcessor`, and call `complete(sequences)` with what generate() returned: only
    that says which tokens were sampled last, and which beams were kept.
    """

    def __init__(self) -> None:
        self._rows: list[TraceRow] = []
        self._recorder: Any = None

    def add(self, rows: Iterable[TraceRow]) -> None:
        """Append sampled tokens."""
        self._rows.extend(rows)

    @property
    def sequences(self) -> int:
        """How many sequences the trace holds."""
        return 1 + max((row.sequence for row in self._rows), default=-1)

    def watch(self, recorder: Any) -> None:
        """Take rows from a recorder when `complete` is called (for engines)."""
        if self._recorder is not None and self._recorder is not recorder:
            raise InputError(
                "this trace still waits for an earlier run: call trace.complete(sequences) with "
                "what generate() returned, or trace the next run with a new Trace"
            )
        self._recorder = recorder

    def complete(self, sequences: Any) -> None:
        """Add the rows of a traced generate() run.

        Parameters
        ----------
        sequences: what generate() returned: the tensor [rows, tokens], or an output that has it
            as `.sequences`.

        Raises
        ------
        InputError: nothing was traced since the last call, or these are not its sequences.
        """
        if self._recorder is None:
            raise InputError(
                "nothing was traced: give this trace to TemperingLogitsProcessor(..., trace=trace) "
                "and run generate() before complete()"
            )
        ids = getattr(sequences, "sequences", sequences)
        self.add(self._recorder.rows(ids.cpu().numpy(), self.sequences))
        self._recorder = None

    def rows(self) -> list[dict[str, Any]]:
        """One dict for each sampled token, with the fields of `TraceRow`."""
        self._check_complete()
        return [row._asdict() for row in self._rows]

    def to_parquet(self, path: str | Path) -> Path:
        """Write the rows as a Parquet table, whole or not at all; OutputError where that fails."""
        import pyarrow as pa
        from pyarrow import parquet

        self._check_complete()
        names = TraceRow._fields
        kinds = [pa.int32(), pa.int32(), pa.int64(), pa.string(), pa.string()] + [pa.float64()] * (
            len(names) - 5
        )
        columns = list(zip(*self._rows)) or [()] * len(names)
        table = pa.table(
            [pa.array(column, kind) for column, kind in zip(columns, kinds)], names=list(names)
        )
        return replace_atomic(path, lambda temporary: parquet.write_table(table, temporary))

    def _check_complete(self) -> None:
        if self._recorder is not None:
            raise InputError(
                "the trace waits for its last tokens: call trace.complete(sequences) with what "
                "generate() returned"
            )
