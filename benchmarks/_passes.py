"""Gradients of text at T = 1, for each chunk and for drawn tokens: taken once, kept in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from _texts import as_objective, calibration, mixed_lengths

from tempering.attention.tuning.passes import Pass, gradient_pass
from tempering.attention.tuning.steps import Quadratic, quadratic

DRAWS = 3  # of the targets of each chunk, for the Fisher matrix


def text_pass(live: Any, tokenizer: Any, keep: Path | None) -> tuple[list[str], Pass]:
    """The kind of each chunk of the calibration text, and the pass over all of them."""
    pieces = mixed_lengths(calibration(tokenizer))
    kinds = [kind for kind, _ in pieces]
    objective = as_objective("calibration", [ids for _, ids in pieces])
    key = {"data": objective.digest, "numbers": live.size, "draws": DRAWS}
    if keep is not None and keep.exists():
        found = torch.load(keep)
        if found["key"] == key:
            return kinds, Pass(**{name: found[name] for name in Pass._fields})
    done = [0]

    def say(more: int) -> None:
        done[0] += more
        print(f"text gradient {done[0]} of {len(pieces)}", flush=True)

    theta = torch.zeros(live.size, dtype=torch.float64)
    run = gradient_pass(live, theta, objective.pieces, draws=DRAWS, report=say)
    if keep is not None:
        torch.save({"key": key, **run._asdict()}, keep)
    return kinds, run


def part(run: Pass, places: list[int] | None = None) -> Quadratic:
    """The text's loss near T = 1, of all its chunks or of some."""
    own = slice(None) if places is None else places
    drawn = None if run.drawn is None else run.drawn[:, own]
    return quadratic(run.losses[own], run.gradients[own], run.counts[own], drawn)
