"""tempering architectures: on which architectures attention temperature is exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tempering.cli.shared import common
from tempering.errors import CheckError, InputError

if TYPE_CHECKING:
    from tempering.survey.judge import Verdict

EPILOG = """Examples:

  tempering architectures --only llama --only gpt_oss

  tempering architectures --write docs/architectures.md
"""


def architectures(
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only this model type, e.g. llama; may be given again. All by default."),
    ] = None,
    write: Annotated[
        Path | None, typer.Option(help="Write the table of all as a Markdown page.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes, of one thread each.", min=1)] = 2,
    as_json: common.Json = False,
) -> None:
    """Try attention temperature on every architecture.

    A tiny random model of each is built, tempered and checked against a float64 reference. All
    of them take some minutes on two cores.
    """
    from tempering.survey.families import tasks
    from tempering.survey.judge import WRONG
    from tempering.survey.workers import survey

    if write is not None and only:
        raise InputError("--write is for the table of all architectures; leave out --only")
    common.check_file(write, "--write", ".md")
    chosen = tasks(only)

    def progress(done: int, total: int, verdict: Verdict) -> None:
        common.note(f"[{done}/{total}] {verdict.model_type} ({verdict.family}): {verdict.eager}")

    verdicts = survey(chosen, workers=jobs, progress=progress)
    if write is not None:
        _write(write, verdicts)
    if as_json:
        print(json.dumps([verdict.to_json() for verdict in verdicts], indent=1))
    elif write is None:
        _show(verdicts)
    wrong = [one.model_type for one in verdicts if WRONG in (one.eager, one.sdpa)]
    if wrong:
        raise CheckError(f"wrong without a refusal: {', '.join(wrong)}; this is a defect")


def _write(path: Path, verdicts: list[Verdict]) -> None:
    from importlib.metadata import version

    from tempering.cli.shared.keeping import write_somewhere
    from tempering.survey.table import document

    versions = {name: version(name).split("+")[0] for name in ("torch", "transformers")}
    common.note(f"wrote {write_somewhere(path, document(verdicts, versions))}")


def _show(verdicts: list[Verdict]) -> None:
    from rich.console import Console
    from rich.table import Table

    from tempering.survey.table import summary, why

    table = Table("Type", "Family", "eager", "sdpa", "Decoding", "Bakes", "Why not more")
    for one in verdicts:
        bakes = one.bake if one.layers else ""
        table.add_row(
            one.model_type, one.family, one.eager, one.sdpa, one.decoding, bakes, why(one)
        )
    console = Console()
    console.print(table)
    console.print(summary(verdicts))
