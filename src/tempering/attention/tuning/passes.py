"""One pass over pieces of data: the loss of each row, and its gradient in the numbers.

Every row of a batch has its own copy of theta as the leaf of its temperatures, so one backward
pass gives the gradient of each row's mean loss by itself. Gradients of the same forward pass for
tokens drawn from the model's own distribution are what Newton steps take for curvature: the mean
of their squares is the Fisher matrix, the Hessian of KL(untempered || tempered) at theta = 0.

Where a run has several ranks, each runs a part of the batches, and all get what all found.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tempering.attention.tuning.batches import Batch, divergences, losses_of, target_logits
from tempering.attention.tuning.objectives import Piece, row_means
from tempering.attention.tuning.tunable import Tunable
from tempering.errors import RefusedError
from tempering.ranks import here

Kind = Literal["loss", "divergence"]
Report = Callable[[int], None]


class Pass(NamedTuple):
    """What a pass over pieces found, a row for each piece.

    losses: mean loss of a piece's targets, nats (or KL). counts: its targets.
    gradients: of those means in theta; no rows after a pass without gradients.
    drawn: the same gradients with targets drawn from the model; None where none were drawn.
    """

    losses: Float[Tensor, "pieces"]
    counts: Float[Tensor, "pieces"]
    gradients: Float[Tensor, "pieces_or_none numbers"]
    drawn: Float[Tensor, "draws pieces numbers"] | None = None

    @property
    def mean(self) -> float:
        """The mean loss over all targets, nats."""
        return float((self.losses * self.counts).sum() / self.counts.sum())

    @property
    def gradient(self) -> Float[Tensor, "numbers"]:
        """Of `mean`."""
        return (self.gradients * (self.counts / self.counts.sum())[:, None]).sum(0)


def gradient_pass(
    live: Tunable,
    theta: Float[Tensor, "numbers"],
    pieces: Sequence[Piece],
    *,
    kind: Kind = "loss",
    rows: int = 1,
    step: int = 0,
    draws: int = 0,
    seed: int = 0,
    report: Report | None = None,
) -> Pass:
    """Losses and gradients of the pieces; `rows` equally long ones run side by side.

    kind: "loss", or "divergence" for KL(untempered || tempered).
    draws: times that the targets of every piece are drawn from the tempered model, by the seed;
    one more backward pass each. Functions have no targets to draw.
    Raises RefusedError for a loss or gradient that is not finite; it names the head and the step.
    """
    # With draws, batches are the same on any number of ranks: each has random numbers of its own.
    batches = _Batches(pieces, rows, split=not draws, report=report)
    losses = torch.zeros(batches.rows, dtype=torch.float64)
    gradients = losses.new_zeros(batches.rows, len(theta))
    drawn = losses.new_zeros(draws, batches.rows, len(theta))
    with here().together():
        for place, span, group in batches.mine():
            leaf = theta.detach().expand(group.rows, -1).clone().requires_grad_()
            if draws:
                values, logits, goals = _with_logits(live, leaf, group)
            else:
                values = _losses(live, leaf, group, kind)
            _check(values, live, theta, group, step)
            if draws:
                place_seed = (seed * 1_000_003 + place) % 2**63
                found = _drawn_gradients(leaf, values, logits, goals, group, draws, place_seed)
            else:
                found = list(torch.autograd.grad(values.sum(), leaf))
            for gradient in found:
                if not bool(gradient.isfinite().all()):
                    raise RefusedError(
                        f"step {step}, {group.origin}: the gradient is not finite; "
                        + live.trouble(theta, group, gradient)
                    )
            losses[span] = values.detach().to("cpu", torch.float64)
            gradients[span] = found[0]
            for own, gradient in zip(drawn, found[1:], strict=True):
                own[span] = gradient
    losses, gradients, drawn = here().sum(losses, gradients, drawn)
    return Pass(losses, _counts(pieces), gradients, drawn if draws else None)


def loss_pass(
    live: Tunable,
    theta: Float[Tensor, "numbers"] | None,
    pieces: Sequence[Piece],
    *,
    kind: Kind = "loss",
    rows: int = 1,
    step: int = 0,
    report: Report | None = None,
) -> Pass:
    """Losses alone, forward only; theta None runs the untempered model."""
    batches = _Batches(pieces, rows, split=True, report=report)
    losses = torch.zeros(batches.rows, dtype=torch.float64)
    with here().together(), torch.no_grad():
        for _, span, group in batches.mine():
            values = _losses(live, theta, group, kind)
            _check(values, live, theta, group, step)
            losses[span] = values.to("cpu", torch.float64)
    (losses,) = here().sum(losses)
    numbers = 0 if theta is None else len(theta)
    return Pass(losses, _counts(pieces), torch.zeros(0, numbers, dtype=torch.float64))


class _Batches:
    """Pieces in batches of up to `rows` rows, and those of this rank.

    split: whether batches may be smaller, so that each rank gets some.
    """

    def __init__(
        self, pieces: Sequence[Piece], rows: int, *, split: bool, report: Report | None
    ) -> None:
        most = math.ceil(len(pieces) / here().size) if split else rows
        self.groups = grouped(pieces, min(rows, most))
        self.starts = [0, *itertools.accumulate(group.rows for group in self.groups)]
        self.rows = self.starts[-1]
        self.report = report

    def mine(self) -> Iterator[tuple[int, slice, Piece]]:
        """(place among all, rows among all, batch), each reported when it is done.

        The other ranks are taken to be as far as this one.
        """
        told = 0
        for place in here().mine(len(self.groups)):
            group = self.groups[place]
            yield place, slice(self.starts[place], self.starts[place + 1]), group
            done = min(self.rows, told + group.rows * here().size)
            if self.report is not None:
                self.report(done - told)
            told = done
        if self.report is not None and told < self.rows:
            self.report(self.rows - told)


def grouped(pieces: Sequence[Piece], rows: int) -> list[Piece]:
    """Neighbours of equal length merged into batches of up to `rows` rows."""
    merged: list[list[Piece]] = []
    for piece in pieces:
        last = merged[-1] if merged else []
        if last and len(last) < rows and _alike(last[0], piece):
            last.append(piece)
        else:
            merged.append([piece])
    return [_merge(group) for group in merged]


def _alike(one: Piece, other: Piece) -> bool:
    if not isinstance(one.source, Batch) or not isinstance(other.source, Batch):
        return False
    shapes = [
        {name: item.shape for name, item in {"ids": batch.ids, **batch.arguments}.items()}
        for batch in (one.source, other.source)
    ]
    # Of several images in a row, which belongs to which can't be told in a batch.
    whole = all(shape[0] == 1 for shape in shapes[0].values())
    return shapes[0] == shapes[1] and (whole or not one.source.arguments)


def _merge(group: list[Piece]) -> Piece:
    batches = [piece.source for piece in group if isinstance(piece.source, Batch)]
    if len(group) == 1 or not batches:
        return group[0]
    origin = f"{group[0].origin} to {group[-1].origin}"
    batch = Batch(
        torch.cat([item.ids for item in batches]),
        torch.cat([item.targets for item in batches]),
        origin,
        tuple(lesson for item in batches for lesson in item.lessons),
        {name: torch.cat([b.arguments[name] for b in batches]) for name in batches[0].arguments},
    )
    return Piece(batch, batch.count, origin)


def _counts(pieces: Sequence[Piece]) -> Tensor:
    return torch.tensor([piece.count for piece in pieces], dtype=torch.float64)


def _losses(live: Tunable, theta: Tensor | None, piece: Piece, kind: Kind) -> Tensor:
    reference = None
    if kind == "divergence" and isinstance(piece.source, Batch):
        live.untempered()
        with torch.no_grad():
            reference = target_logits(live.model, piece.source)[0]
    if theta is None:
        live.untempered()
    else:
        live.set(theta)
    if reference is None or not isinstance(piece.source, Batch):
        return piece.losses(live.model)
    return row_means(divergences(live.model, piece.source, reference)[0], piece.source)


def _with_logits(live: Tunable, theta: Tensor, piece: Piece) -> tuple[Tensor, Tensor, Tensor]:
    """The mean loss of each row, and the logits and targets behind them."""
    live.set(theta)
    logits, goals = target_logits(live.model, _batch(piece))
    return row_means(losses_of(logits, goals, _batch(piece)), _batch(piece)), logits, goals


def _batch(piece: Piece) -> Batch:
    if isinstance(piece.source, Batch):
        return piece.source
    raise RefusedError(f"{piece.origin} is a function: it has no targets to draw")


def _drawn_gradients(
    leaf: Tensor,
    values: Float[Tensor, "rows"],
    logits: Float[Tensor, "targets vocabulary"],
    goals: Int[Tensor, "targets"],
    piece: Piece,
    draws: int,
    seed: int,
) -> list[Float[Tensor, "rows numbers"]]:
    """The gradient of the mean losses, and what it were with targets drawn from the model.

    In the logits it is (q_v - 1[v = target]) / n, with q = softmax(logits) and n targets in a row.
    One table of q / n, and one of the sums of q to draw from, serve all backward passes.
    """
    batch = _batch(piece)
    q = logits.detach().float().softmax(-1)
    tokens = _draw(q, draws, seed)
    counts = torch.tensor(batch.counts, device=q.device)
    share = counts.repeat_interleave(counts).to(q).reciprocal()[:, None]
    errors = q.mul_(share)
    found: list[Tensor] = []
    if batch.lessons:  # its targets are a teacher's distributions
        found += torch.autograd.grad(values.sum(), leaf, retain_graph=True)
    else:
        tokens = [goals[:, None], *tokens]
    for left, drawn in zip(range(len(tokens) - 1, -1, -1), tokens, strict=True):
        expected = errors.gather(1, drawn)
        errors.scatter_(1, drawn, expected - share)
        found += torch.autograd.grad(logits, leaf, errors.to(logits.dtype), retain_graph=left > 0)
        errors.scatter_(1, drawn, expected)
    return found


def _draw(
    q: Float[Tensor, "targets vocabulary"], draws: int, seed: int
) -> list[Int[Tensor, "targets 1"]]:
    """Tokens drawn by the probabilities q: the first whose sum of q exceeds a number."""
    sums = q.cumsum(-1)
    total = sums[:, -1:].clone()
    # Rounding may leave a number that no sum exceeds: then it is the last token that can be drawn.
    last = torch.searchsorted(sums, total)
    generator = torch.Generator(q.device).manual_seed(int(seed))
    numbers = (torch.rand(total.shape, generator=generator, device=q.device) for _ in range(draws))
    return [torch.searchsorted(sums, u * total, right=True).minimum(last) for u in numbers]


def _check(values: Tensor, live: Tunable, theta: Tensor | None, piece: Piece, step: int) -> None:
    if not bool(values.detach().isfinite().all()):
        bad = values.detach()[~values.detach().isfinite()][0]
        raise RefusedError(
            f"step {step}, {piece.origin}: the loss is {float(bad):g}; "
            + live.trouble(theta, piece, None)
        )
