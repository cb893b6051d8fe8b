"""tempering profile: look at profiles, at how two of them differ, and make one from a rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from tempering.cli.shared import common

app = typer.Typer(
    help="Show profiles, compare two, or make one from a rule.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

SHOW = """Examples:

  tempering profile show tuned.json

  tempering profile show tuned.json --json
"""
RULE = """Examples:

  tempering profile rule 'support(12,0.5,2)' --out held.json

  tempering profile rule 'support(throb(12,3,2,12))' --layers 8-20 --out held.json

  tempering profile rule 'power(-0.05,2048)' --base tuned.json --out longer.json
"""
CONSTANT = """Examples:

  tempering profile constant power.json --length 4096 --out at4096.json
"""
DIFF = """Examples:

  tempering profile diff before.json after.json
"""

File = Annotated[str, typer.Argument(help="Profile file.")]


@app.command(epilog=SHOW)
def show(profile: File, as_json: common.Json = False) -> None:
    """Print a profile's temperatures by layer, its model and what was measured about it."""
    from tempering.attention.profiles.profile import Profile

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
    rules = chosen.rules or (None,) * len(names)
    scales = chosen.output_scale or (None,) * len(names)
    for name, row, rule, scale in zip(names, chosen.rows, rules, scales, strict=True):
        print(f"{name:{width}}  {_numbers(row)}" + (f"  {rule}" if rule else ""))
        if scale is not None:
            print(f"{'output scales':>{width}}  {_numbers(scale)}")
    for name in chosen.untempered:
        print(f"{name:{width}}  no softmax")
    _print_evidence(chosen.evidence)


def _numbers(row: Any) -> str:
    return " ".join(f"{value:.3f}" for value in row.tolist())


def _print_evidence(evidence: Any) -> None:
    if not evidence:
        return
    from rich.console import Console

    from tempering.cli.shared.evidence import evidence_grids
    from tempering.reports import print_grid

    print()
    for grid in evidence_grids(evidence):
        print_grid(grid, Console())


@app.command(epilog=RULE)
def rule(
    text: Annotated[
        str,
        typer.Argument(
            help="support(N), entropy(S), polynomial(), power(slope, n0), log_length(n0), "
            "ssmax(s), affine(a, b), log_steps(a, step); bounds of T may follow."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Profile file to write.")],
    layers: common.Layers = None,
    base: Annotated[
        str | None, typer.Option(help="Profile whose temperatures stand beneath the rule.")
    ] = None,
    model: common.Model = "smollm2",
) -> None:
    """Write a profile whose temperatures depend on the query, by a rule."""
    from tempering.attention.profiles.adaptive import adaptive_profile
    from tempering.attention.profiles.profile import Profile

    common.check_file(out, "--out", ".json")
    beneath = None if base is None else Profile.load(base)
    network, _ = common.open_model(model)
    if beneath is not None:
        beneath.check_model(network)
    chosen = adaptive_profile(
        text, network, layers=common.numbers(layers, "--layers"), base=beneath
    )
    common.note(f"profile: {chosen.save(out)}")


@app.command(epilog=CONSTANT)
def constant(
    profile: File,
    length: Annotated[int, typer.Option(help="Tokens of the texts that the constants are for.")],
    out: Annotated[Path, typer.Option(help="Profile file to write.")],
    windows: Annotated[
        str | None,
        typer.Option(
            help="Keys that a query sees at most, where layers have windows: of all layers, or of "
            "each, such as 512,512,0 (0: no window)."
        ),
    ] = None,
) -> None:
    """Write the best constants for texts of one length, in place of rules of length.

    They fold into weights, and serve engines that take numbers.
    """
    from tempering.attention.profiles.profile import Profile

    common.check_file(out, "--out", ".json")
    given = common.numbers(windows, "--windows")
    each = None if given is None else [window or None for window in given]
    chosen = Profile.load(profile).at_length(length, each[0] if each and len(each) == 1 else each)
    common.note(f"profile: {chosen.save(out)}")


@app.command(epilog=DIFF)
def diff(first: File, second: File, as_json: common.Json = False) -> None:
    """Print the ratio of two profiles' temperatures, layer by layer."""
    from tempering.attention.profiles.profile import Profile
    from tempering.errors import ProfileError

    one, two = Profile.load(first), Profile.load(second)
    for path, one_of in ((first, one), (second, two)):
        if any(one_of.rules) or one_of.output_scale:
            what = "rules" if any(one_of.rules) else "output scales"
            raise ProfileError(f"{path} has {what}; only temperatures have a ratio")
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
        if any(abs(value - 1) > 1e-9 for value in row):  # beyond rounding, in float64
            changed += 1
            print(f"{name:{width}}  " + " ".join(f"{value:.3f}" for value in row))
    print(f"{changed} of {len(ratios)} layers differ (ratio second/first)")
