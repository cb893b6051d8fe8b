"""What a run of tuning minimises, and what it must keep: objectives and constraints.

An objective is a list of pieces, each run through the model at once: a chunk of text, a prompt
with its answer, or a Python function of the model. Its value is the mean over all targets,

    L = sum_i n_i L_i / sum_i n_i        n_i targets in piece i, L_i its mean loss, nats

and several objectives add up by their weights. A constraint holds another text to within so many
nats per token of the untempered model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.attention.examining.layout_of import layout_reached
from tempering.attention.examining.subject import unwrapped
from tempering.attention.tuning.batches import (
    Batch,
    answer_batches,
    example_batches,
    target_losses,
    text_batches,
)
from tempering.chunks import mixed_chunks, token_chunks, token_ids
from tempering.errors import DataError, InputError
from tempering.inputs.example import as_inputs
from tempering.text_tables import TextTable


@dataclass(frozen=True, eq=False)
class Piece:
    """What is run through the model at once.

    source: a Batch, or a function (model) -> differentiable loss, nats.
    count: targets in it. origin: names it, in errors.
    """

    source: Batch | Callable[[Any], Tensor]
    count: int
    origin: str

    @property
    def rows(self) -> int:
        """Rows with temperatures of their own in a gradient pass."""
        return len(self.source.ids) if isinstance(self.source, Batch) else 1

    @property
    def digest(self) -> str:
        """SHA-256 of the tokens, targets and lessons; of a function, its name."""
        if not isinstance(self.source, Batch):
            return hashlib.sha256(f"{self.origin}\0{self.count}".encode()).hexdigest()
        content = self.source.ids.cpu().numpy().tobytes() + self.source.targets.numpy().tobytes()
        for name, item in sorted(self.source.arguments.items()):
            content += name.encode() + item.cpu().numpy().tobytes()
        taught = "".join(lesson.identity for lesson in self.source.lessons)
        return hashlib.sha256(content + taught.encode()).hexdigest()

    def losses(self, model: Any) -> Float[Tensor, "rows"]:
        """The mean loss of each row's targets, nats; InputError for what is no such loss."""
        if isinstance(self.source, Batch):
            return row_means(target_losses(model, self.source), self.source)
        loss = self.source(model)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            given = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)[:40]
            raise InputError(
                f"{self.origin} gave {given}; an objective returns one number as a tensor that "
                "depends on the model's outputs. For scores without a gradient use search(...)"
            )
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise InputError(
                f"{self.origin} gave a loss without a gradient: it doesn't depend on the model's "
                "outputs, or was detached. For scores without a gradient use search(...)"
            )
        return loss.reshape(1)


def row_means(values: Float[Tensor, "targets"], batch: Batch) -> Float[Tensor, "rows"]:
    """Means over the targets of each row."""
    return torch.stack([part.mean() for part in values.split(batch.counts)])


@dataclass(frozen=True, eq=False)
class Objective:
    """A weighted part of what is minimised; make one with `from_text`, `from_inputs`, ...

    kind: "text", "answers" or "function".
    """

    name: str
    kind: Literal["text", "answers", "function"]
    pieces: tuple[Piece, ...]
    weight: float | int = 1.0

    def __post_init__(self) -> None:
        if not self.pieces:
            raise DataError(f"the objective '{self.name}' is empty; give it some data")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise InputError(
                f"the weight of '{self.name}' is a positive number, not {self.weight:g}"
            )

    @property
    def count(self) -> int:
        """Number of targets."""
        return sum(piece.count for piece in self.pieces)

    @property
    def digest(self) -> str:
        """SHA-256 over all pieces, in order."""
        return hashlib.sha256("".join(p.digest for p in self.pieces).encode()).hexdigest()

    def having(self, pieces: Sequence[Piece]) -> Objective:
        """The same objective on other pieces."""
        return replace(self, pieces=tuple(pieces))


@dataclass(frozen=True)
class Constraint:
    """No more than `within` nats per token away from the untempered model on other data.

    kind: "cost", the mean rise of -log q(token), or "divergence", the mean KL(p || q).
    """

    objective: Objective
    within: float | int
    kind: str = "cost"

    def __post_init__(self) -> None:
        if not 0 < self.within < math.inf:
            raise InputError(
                f"a constraint is a positive number of nats per token, not {self.within:g}"
            )
        if self.kind not in ("cost", "divergence"):
            raise InputError(f"a constraint is on 'cost' or 'divergence', not '{self.kind}'")
        if self.objective.kind == "function":
            raise InputError("a constraint is on text or answers, not on a Python function")


def from_batches(
    name: str,
    batches: Sequence[Batch],
    *,
    kind: Literal["text", "answers"] = "text",
    weight: float | int = 1.0,
) -> Objective:
    """An objective on batches of token ids; each row becomes a piece."""
    pieces = [
        Piece(
            Batch(
                ids[None],
                targets[None],
                batch.origin,
                arguments={name: item[row : row + 1] for name, item in batch.arguments.items()}
                if len(batch.ids) > 1
                else batch.arguments,
            ),
            int(targets[1:].sum()),
            batch.origin,
        )
        for batch in batches
        for row, (ids, targets) in enumerate(zip(batch.ids, batch.targets, strict=True))
    ]
    for piece in pieces:
        if piece.count == 0:
            raise DataError(f"{piece.origin}: no token is a target; leave this row out")
    return Objective(name, kind, tuple(pieces), weight)


def from_text(
    tokenizer: Any,
    text: str | TextTable,
    *,
    chunk: int = 512,
    limit: int | None = None,
    weight: float | int = 1.0,
    name: str = "text",
) -> Objective:
    """Next-token loss on a text, cut into chunks of `chunk` tokens, `limit` at most.

    Raises DataError when the text is shorter than one chunk.
    """
    try:
        chunks = token_chunks(tokenizer, text, chunk, limit)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    return from_batches(name, text_batches(chunks, name), weight=weight)


def from_lengths(
    tokenizer: Any,
    text: str | TextTable,
    lengths: Sequence[int],
    *,
    held_length: int | None = None,
    limit: int | None = None,
    weight: float | int = 1.0,
    name: str = "text",
) -> tuple[Objective, Objective | None]:
    """Next-token loss on chunks of several lengths, and on a length that is never learned from.

    Parameters
    ----------
    lengths: tokens of chunks; each length has about as many tokens (see `mixed_chunks`).
    held_length: the last fifth of the text, one chunk at least, is cut into chunks of this length:
        the second objective, to test on. None for none.
    limit: rounds over the lengths, at most.

    Raises DataError when the text is too short for the lengths asked for.
    """
    ids = token_ids(tokenizer, text)
    held = None
    if held_length is not None:
        if held_length < 2:
            raise InputError(f"a held-out length is at least 2 tokens, not {held_length}")
        kept = max(1, len(ids) // 5 // held_length) * held_length
        if kept > len(ids):
            raise DataError(
                f"{name}: the text has {len(ids)} tokens, less than one chunk of the held-out "
                f"length {held_length}; give a longer text or a shorter length"
            )
        ids, rest = ids[: len(ids) - kept], ids[len(ids) - kept :]
        label = f"{name}, {held_length} tokens"
        chunks = rest.view(-1, held_length)
        held = from_batches(label, text_batches(chunks, label))
    try:
        mixed = mixed_chunks(ids, lengths, limit)
    except DataError as error:
        behind = f" before those held out for {held_length}" if held_length else ""
        raise DataError(f"{name}{behind}: {error}") from error
    batches = [
        Batch(chunk[None], torch.ones_like(chunk[None], dtype=torch.bool), f"{name}, chunk {i}")
        for i, chunk in enumerate(mixed)
    ]
    return from_batches(name, batches, weight=weight), held


def from_pairs(
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    weight: float | int = 1.0,
    name: str = "answers",
) -> Objective:
    """Loss on the answers of (prompt, answer) pairs; the prompt's tokens don't count."""
    batches = answer_batches(tokenizer, pairs, name)
    return from_batches(name, batches, kind="answers", weight=weight)


def from_inputs(name: str, inputs: Any, model: Any, *, weight: float | int = 1.0) -> Objective:
    """Loss on the right answers to images, sound, pairs, or whatever a processor gives.

    inputs: as `tempering.inputs.as_inputs` takes them, with labels; of `read_inputs`, for example.
    Raises DataError for a row whose right answer isn't known.
    """
    found = as_inputs(inputs, unwrapped(model))
    layout_reached(model, found.sample)
    text = found.unit == "chunks"
    batches = example_batches(found)
    return from_batches(name, batches, kind="text" if text else "answers", weight=weight)


def from_functions(
    name: str,
    functions: Sequence[Callable[[Any], Tensor]],
    *,
    counts: Sequence[int] | None = None,
    weight: float | int = 1.0,
) -> Objective:
    """Python objectives: each takes the model and returns a differentiable loss in nats.

    functions: one a piece of the data, several so that some can be held out.
    counts: how many independent targets each averages over, 1 without it.
    """
    if counts is not None and (len(counts) != len(functions) or min(counts, default=1) < 1):
        raise InputError(
            f"'{name}' has {len(functions)} functions and counts {list(counts)}; "
            "give one positive count for each function"
        )
    pieces = [
        Piece(function, 1 if counts is None else counts[i], f"{name}, part {i}")
        for i, function in enumerate(functions)
    ]
    return Objective(name, "function", tuple(pieces), weight)
