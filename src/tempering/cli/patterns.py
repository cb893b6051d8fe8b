"""tempering patterns: the text form of schedules."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from tempering.cli.shared import common

EPILOG = """Examples:

  tempering patterns

  tempering patterns 'throb(12,3,1,12)|amplitude(1.3)' --points 30
"""


def patterns(
    pattern: Annotated[str | None, typer.Argument(help="Show this one's values.")] = None,
    points: Annotated[
        int, typer.Option(help="Layers, or other points of the clock.", min=1, max=1000)
    ] = 30,
    as_json: common.Json = False,
) -> None:
    """List the patterns, or show the values of one on a clock."""
    from tempering.schedules import PATTERNS, schedule

    if pattern is not None:
        plan = schedule(pattern)
        values = plan.sample(points).tolist()
        if as_json:
            print(json.dumps({"pattern": str(plan), "values": values}))
            return
        from tempering.reports import sparkline

        print(f"{plan}  {sparkline(values, log=min(values) > 0)}")
        for point, value in enumerate(values):
            print(f"{point:4d}  {value:.4g}")
        return
    rows = [
        {"name": name, "signature": item[0], "description": item[1], "example": item[2]}
        for name, item in PATTERNS.items()
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(f"{row['signature']:24} {row['description']}  e.g. {row['example']}")
