"""What commands that learn temperatures share: options, the file of a stopped run, its lines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tempering.cli.shared import common
from tempering.errors import InputError
from tempering.ranks import here

if TYPE_CHECKING:
    from tempering.attention.tuning import Step

Per = Annotated[
    str, typer.Option(help="One temperature for each head, layer, kv, type, or spline knot.")
]
ConstraintFile = Annotated[
    Path | None, typer.Option("--constraint", help="Text that must not lose more than --within.")
]
Within = Annotated[float, typer.Option(help="Nats per token that it may lose.")]
Tests = Annotated[
    list[Path] | None,
    typer.Option("--test", help="Data to test on, never learned from; repeatable."),
]
Elsewhere = Annotated[
    int, typer.Option(help="Chunks of each text of the package to test on too.", min=0)
]
Shuffles = Annotated[int, typer.Option(help="Shuffled controls on the tests.", min=0)]
HeldOutShare = Annotated[float, typer.Option(help="Share of the data to judge steps by.")]
Rows = Annotated[int, typer.Option(help="Chunks side by side; more fills a GPU.", min=1)]
Checkpointing = Annotated[
    bool, typer.Option("--checkpoint", help="Less memory for a third more time.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")]
ProfileOut = Annotated[Path, typer.Option(help="The profile; record and report are put beside it.")]


def read_bounds(text: str) -> tuple[float, float]:
    """Lowest and highest T from "0.2,5"."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--bounds are two numbers, e.g. 0.2,5; not '{text}'") from error
    return low, high


def state_of(out: Path, resume: bool) -> Path:
    """Where the run is kept; a stopped one is left there only to go on with it."""
    state = out.with_name(out.name + ".state")
    if not here().first:
        return state
    if state.exists() and not resume:
        common.note(f"starting anew; the stopped run in {state} is dropped (--resume goes on)")
        state.unlink()
    elif resume and not state.exists():
        common.note(f"no stopped run in {state}; starting from the beginning")
    return state


def drop(state: Path) -> None:
    """Remove the file of a run that is over."""
    if here().first:
        state.unlink(missing_ok=True)


def say_step(step: Step) -> None:
    """One line a step on stderr."""
    loss = "" if step.loss is None else f"loss {step.loss:.4f}, "
    cost = "" if step.cost is None else f", constraint {step.cost:+.4f}"
    moved = f"; moved: {step.moved}" if step.moved else ""
    common.note(
        f"step {step.step}: {loss}held out {step.held_out:.4f}{cost}, "
        f"T {step.coldest:.3f} to {step.hottest:.3f}{moved}"
    )
