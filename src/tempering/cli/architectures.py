"""tempering architectures: on which architectures attention temperature is exact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tempering.cli.shared import common
from tempering.errors import CheckError, InputError

if TYPE_CHECKING:
    from tempering.evaluation.journal import Journal
    from tempering.survey.families import Task
    from tempering.survey.judge import Verdict

EPILOG = """Examples:

  tempering architectures --only llama --only gpt_oss

  tempering architectures --causal

  tempering architectures --write docs/architectures.md
"""


def architectures(
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only this model type, e.g. llama; may be given again. All by default."),
    ] = None,
    causal: Annotated[
        bool, typer.Option("--causal", help="Only the classes that generate text.")
    ] = False,
    write: Annotated[
        Path | None, typer.Option(help="Write the table of all as a Markdown page.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes, of one thread each.", min=1)] = 2,
    out: Annotated[
        Path, typer.Option(help="Directory that keeps what was finished of a stopped run.")
    ] = common.RUNS,
    as_json: common.Json = False,
) -> None:
    """Try attention temperature on every architecture.

    A tiny random model of each is built, tempered and checked against a float64 reference. All
    of them take some 25 minutes on two cores. Ctrl-C keeps what was finished; the same command
    goes on from there.
    """
    from tempering.cli.shared.keeping import resumable
    from tempering.evaluation.journal import Journal
    from tempering.survey.families import tasks
    from tempering.survey.judge import WRONG
    from tempering.survey.workers import state_of_code

    if write is not None and (only or causal):
        raise InputError(
            "--write is for the table of all architectures; leave out --only, --causal"
        )
    common.check_file(write, "--write", ".md")
    common.check_out(out)
    chosen = tasks(only, causal=causal)
    journal = Journal(out, "architectures", state_of_code())
    with resumable(journal):
        verdicts = _verdicts(chosen, jobs, journal)
    if write is not None:
        _write(write, verdicts)
    if as_json:
        print(json.dumps([verdict.to_json() for verdict in verdicts], indent=1))
    elif write is None:
        _show(verdicts)
    journal.finish()
    wrong = [one.model_class for one in verdicts if WRONG in (one.eager, one.sdpa)]
    if wrong:
        raise CheckError(f"wrong without a refusal: {', '.join(wrong)}; this is a defect")


def _verdicts(chosen: list[Task], jobs: int, journal: Journal) -> list[Verdict]:
    """The verdicts on the tasks, those of the journal first."""
    from tempering.survey.judge import Verdict
    from tempering.survey.workers import survey

    known = {task: Verdict.from_json(journal[task.name]) for task in chosen if task.name in journal}
    waiting = [task for task in chosen if task not in known]

    def progress(done: int, total: int, verdict: Verdict) -> None:
        journal.put(verdict.task.name, verdict.to_json())
        common.note(f"[{done}/{total}] {verdict.task.name} ({verdict.family}): {verdict.eager}")

    found = survey(waiting, workers=jobs, progress=progress)
    known |= dict(zip(waiting, found, strict=True))
    return [known[task] for task in chosen]


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

    table = Table("Class", "Family", "eager", "sdpa", "Decoding", "Bakes", "Why not more")
    for one in verdicts:
        bakes = one.bake if one.layers and one.whole else ""
        table.add_row(
            one.model_class, one.family, one.eager, one.sdpa, one.decoding, bakes, why(one)
        )
    console = Console()
    console.print(table)
    console.print(summary(verdicts))
