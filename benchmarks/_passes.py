"""Gradients of text at T = 1: taken once, and kept in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from _texts import LONG, SHORT, as_objective, calibration, in_lengths
from torch import Tensor

from tempering.attention.tuning.objectives import Piece
from tempering.attention.tuning.passes import Pass, gradient_pass
from tempering.attention.tuning.steps import Quadratic, damped_step, quadratic

# Of the targets of each short chunk, for the Fisher matrix; a long one would tell it no more.
DRAWS = 3
PRIOR_SD, DAMPING, RADIUS = 0.2, 1.0, 0.4


class Chunks(NamedTuple):
    """Chunks of one length, their kinds, and the pass over them."""

    kinds: list[str]
    pieces: tuple[Piece, ...]
    run: Pass

    def left(self, leave: int | None) -> range:
        """Places of the chunks that are left out: every so many, so of all kinds alike."""
        return range(0, 0 if leave is None else len(self.kinds), leave or 1)


class Text(NamedTuple):
    """The calibration text in short and in long chunks."""

    short: Chunks
    long: Chunks

    def near(self, kind: str | None = None, leave: int | None = None) -> Quadratic:
        """Its mean loss near T = 1: the gradient of all chunks, the Fisher matrix of the short.

        kind: of that one alone. leave: without every so many chunks (see `Chunks.left`).
        """
        runs = []
        for chunks in self:
            left = chunks.left(leave)
            known = [kind in (None, own) for own in chunks.kinds]
            runs.append(_of(chunks.run, [i for i, k in enumerate(known) if k and i not in left]))
        both = quadratic(*(torch.cat([getattr(run, name) for run in runs]) for name in _PLAIN))
        short = quadratic(runs[0].losses, runs[0].gradients, runs[0].counts, runs[0].drawn)
        return both._replace(curvature=short.curvature)

    @property
    def tokens(self) -> int:
        """Targets, of both lengths."""
        return int(self.short.run.counts.sum() + self.long.run.counts.sum())


_PLAIN = ("losses", "gradients", "counts")


def _of(run: Pass, places: list[int]) -> Pass:
    drawn = None if run.drawn is None else run.drawn[:, places]
    return Pass(run.losses[places], run.counts[places], run.gradients[places], drawn)


def best_for_text(near: Quadratic, tokens: int) -> Tensor:
    """The damped Newton step from T = 1, under a weak prior."""
    zero = torch.zeros_like(near.gradient)
    prior = 1 / (PRIOR_SD**2 * tokens)
    return damped_step(near, zero, prior=prior, damping=DAMPING, radius=RADIUS)


def text_pass(live: Any, tokenizer: Any, keep: Path | None, parts: int | None = None) -> Text:
    """Passes over the calibration text; keep: a folder for what they find.

    parts: chunks of each length, spread evenly; all without it.
    """
    texts = calibration(tokenizer)
    found = []
    for length, draws in ((SHORT, DRAWS), (LONG, 0)):
        cut = in_lengths(texts, length)
        if parts is not None and parts < len(cut):
            cut = [cut[int(i)] for i in torch.linspace(0, len(cut) - 1, parts).round()]
        pieces = as_objective("calibration", [ids for _, ids in cut]).pieces
        file = keep and keep / f"text_{length}.pt"
        run = _kept(live, pieces, draws, file)
        found.append(Chunks([kind for kind, _ in cut], pieces, run))
    return Text(*found)


def _kept(live: Any, pieces: tuple[Piece, ...], draws: int, file: Path | None) -> Pass:
    key = {"data": [piece.digest for piece in pieces], "numbers": live.size, "draws": draws}
    if file is not None and file.exists():
        found = torch.load(file)
        if found["key"] == key:
            return Pass(**{name: found[name] for name in Pass._fields})
    done = [0]

    def say(more: int) -> None:
        done[0] += more
        print(f"text gradient {done[0]} of {len(pieces)}", flush=True)

    theta = torch.zeros(live.size, dtype=torch.float64)
    run = gradient_pass(live, theta, pieces, draws=draws, report=say)
    if file is not None:
        torch.save({"key": key, **run._asdict()}, file)
    return run
