"""tempering profile: look at profiles, and at how two of them differ."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from tempering.cli import common

app = typer.Typer(
    help="Show profiles, and how two of them differ.", no_args_is_help=True, rich_markup_mode=None
)

SHOW = """Examples:

  tempering profile show tuned.json

  tempering profile show tuned.json --json
"""
DIFF = """Examples:

  tempering profile diff before.json after.json
"""

File = Annotated[str, typer.Argument(help="Profile file.")]


@app.command(epilog=SHOW)
def show(profile: File, as_json: common.Json = False) -> None:
    """Print a profile's temperatures by layer, its model and what was measured about it."""
    from tempering.attention.profile import Profile

    chosen = Profile.load(profile)
    if as_json:
        print(json.dumps(chosen.to_json(), indent=1))
        return
    values = chosen.temperature
    print(
        f"{chosen.describe()}, T {values.nan_to_num(1).min():.4g} to "
        f"{values.nan_to_num(1).max():.4g}" + (f", {chosen.pattern}" if chosen.pattern else "")
    )
    if chosen.model:
        print(
            f"model: {chosen.model.get('architecture')} {chosen.model.get('shape')} "
            f"({chosen.model.get('fingerprint')})"
        )
    names = chosen.names or tuple(f"layer {i}" for i in range(len(chosen.rows)))
    width = max(len(name) for name in names)
    for name, row in zip(names, chosen.rows, strict=True):
        print(f"{name:{width}}  " + " ".join(f"{value:.3f}" for value in row.tolist()))
    for name in chosen.untempered:
        print(f"{name:{width}}  no softmax")
    _print_evidence(chosen.evidence)


def _print_evidence(evidence: Any) -> None:
    if not evidence:
        return
    from rich.console import Console

    from tempering.cli.evidence import evidence_grids
    from tempering.reports import print_grid

    print()
    for grid in evidence_grids(evidence):
        print_grid(grid, Console())


@app.command(epilog=DIFF)
def diff(first: File, second: File, as_json: common.Json = False) -> None:
    """Print the ratio of two profiles' temperatures, layer by layer."""
    from tempering.attention.profile import Profile
    from tempering.errors import ProfileError

    one, two = Profile.load(first), Profile.load(second)
    if [len(row) for row in one.rows] != [len(row) for row in two.rows] or (
        one.names and two.names and one.names != two.names
    ):
        raise ProfileError(
            f"{first} has {one.describe()}, {second} has {two.describe()} or other modules; "
            "only profiles of one shape can be compared"
        )
    ratios = [(b / a).tolist() for a, b in zip(one.rows, two.rows, strict=True)]
    names = one.names or two.names or tuple(f"layer {i}" for i in range(len(ratios)))
    if as_json:
        print(json.dumps({"layers": list(names), "ratio": ratios}))
        return
    width = max(len(name) for name in names)
    changed = 0
    for name, row in zip(names, ratios, strict=True):
        if any(abs(value - 1) > 1e-9 for value in row):
            changed += 1
            print(f"{name:{width}}  " + " ".join(f"{value:.3f}" for value in row))
    print(f"{changed} of {len(ratios)} layers differ (ratio second/first)")
