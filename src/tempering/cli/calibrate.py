"""tempering calibrate: the temperature that calibrates a classifier or language model."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tempering.cli.shared import common
from tempering.errors import InputError
from tempering.ranks import here

if TYPE_CHECKING:
    import numpy as np

    from tempering.estimators import CalibrationReport, Logits, TemperatureScaler

EPILOG = """Examples:

  tempering calibrate logits.npz --labels labels.npy --report out.html

  tempering calibrate probabilities.parquet --probabilities --labels labels.npy --per input

  tempering calibrate logits.csv --labels labels.csv --classes cat,dog,eel

  tempering calibrate --model smollm2 --text notes.txt

  tempering calibrate --model smollm2 --choices questions.jsonl
"""

# Tokens: the losses of neighbouring tokens are correlated, so blocks of this many are resampled as
# one. A block is about a paragraph.
_BLOCK = 64


def calibrate(
    logits: Annotated[
        Path | None, typer.Argument(help="Logits, rows by classes: .npy, .npz, .parquet or .csv.")
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="The right class of each row: .npy, .npz, .parquet, .csv or .txt."),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            help="The labels of the columns in their order, e.g. cat,dog, or a file of them. "
            "Without it labels are 0..K-1."
        ),
    ] = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="The file holds probabilities, not logits.")
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Calibrate the model's next tokens on this UTF-8 text, or Parquet file or folder."
        ),
    ] = None,
    choices: Annotated[
        Path | None,
        typer.Option(
            help='JSON lines {"prompt": ..., "choices": [...], "answer": ...}: calibrate the '
            "model's answers."
        ),
    ] = None,
    per: Annotated[
        str, typer.Option(help="What T depends on: global, class, group or input.")
    ] = "global",
    groups: Annotated[
        Path | None,
        typer.Option(help="The group of each row, for --per group and a report on each."),
    ] = None,
    prior: Annotated[
        tuple[float, float] | None, typer.Option(help="Mean and sd of log T, e.g. 0 0.5.")
    ] = None,
    fraction: Annotated[
        float,
        typer.Option(help="Share of the rows to fit on; the rest is reported on. 1: all, twice."),
    ] = 0.5,
    model: common.Model = "smollm2",
    chunk: common.Chunk = 256,
    limit: common.Limit = None,
    device: common.Device = None,
    dtype: common.Dtype = "float32",
    seed: common.Seed = 0,
    report: Annotated[
        Path | None,
        typer.Option(help="Write the report here, and the record beside it as .json."),
    ] = None,
    out: common.Out = common.RUNS,
    as_json: common.Json = False,
) -> None:
    """Fit the temperature of a classifier or language model."""
    if sum(source is not None for source in (logits, text, choices)) != 1:
        raise InputError("give a file of logits, --text or --choices: one of the three")
    if not 0 < fraction <= 1:
        raise InputError(f"--fraction is above 0 and at most 1, not {fraction:g}")
    if logits is None and (labels, classes, groups, probabilities) != (None, None, None, False):
        raise InputError(
            "--labels, --classes, --groups and --probabilities go with a file of logits"
        )
    if per == "group" and groups is None:
        raise InputError("--per group needs --groups FILE, the group of each row")
    if logits is not None and labels is None:
        raise InputError(f"{logits} needs --labels FILE, the right class of each row")
    if report is not None and report.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--report names an HTML file, e.g. out.html; not {report}")
    common.check_out(report.parent if report is not None else out)

    from tempering.attention.profiles.fingerprint import agree_on_model
    from tempering.estimators import TemperatureScaler
    from tempering.reports import Record

    scaler = TemperatureScaler(
        inputs="probabilities" if probabilities else "logits", per=per, prior=prior
    )
    section = None
    with _noted_warnings() as told:
        if logits is not None:
            measured = _on_file(scaler, logits, labels, classes, groups, fraction, seed)
            name = logits.name
        else:
            network, tokenizer = common.open_model(model, device, dtype)
            agree_on_model(network)
            section = common.model_section(network, model)
            if text is not None:
                measured = _on_tokens(
                    scaler, network, tokenizer, text, chunk, limit, fraction, seed
                )
            else:
                measured = _on_answers(scaler, network, tokenizer, choices, fraction, seed)
            name = (text or choices or Path()).name
    if not here().first:
        return
    results = {"temperature": _temperature_rows(scaler), **measured.results()}
    if told:
        results["warnings"] = [{"warning": line} for line in told]
    settings = {
        "data": name,
        "inputs": scaler.inputs,
        "per": per,
        "prior": prior,
        "bounds": scaler.bounds,
        "fitted share": fraction,
        "rows reported on": measured.n,
        "reported on unseen rows": fraction < 1,
        "level": measured.level,
        "resampled units": measured.units,
    }
    record = Record.new("calibrate", settings=settings, results=results, model=section, seed=seed)
    if report is None:
        common.finish(record, out, as_json)
    else:
        _finish_at(record, report, as_json)


@contextlib.contextmanager
def _noted_warnings() -> Iterator[list[str]]:
    """Warnings of the library as notes on stderr, and in a list; their advice names CLI options."""
    from tempering.errors import TemperingWarning
    from tempering.estimators.calibration.advice import Advice, advising

    options = Advice(
        given_probabilities="--probabilities says that it is",
        for_probabilities="add --probabilities",
        for_logits="leave --probabilities out",
        classes="add --classes, the labels of the columns in order, such as --classes cat,dog",
        prior="--prior 0 0.5",
        more_passes="",
        lower_bound="",
        wider_bounds="",
        groups="--per group needs --groups FILE, the group of each row",
    )
    told: list[str] = []
    shown = warnings.showwarning

    def show(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, TemperingWarning):
            told.append(str(message))
            common.note(f"note: {message}")
        else:
            shown(message, category, *rest, **more)

    with warnings.catch_warnings(), advising(options):
        warnings.simplefilter("always", TemperingWarning)
        warnings.showwarning = show
        yield told


def _masks(rows: int, fraction: float, seed: int, unit: str) -> tuple[np.ndarray, np.ndarray]:
    """Masks of the rows to fit on and to report on, drawn at random."""
    import numpy as np

    if fraction == 1:
        every = np.ones(rows, np.bool_)
        return every, every
    count = round(rows * fraction)
    if not 0 < count < rows:
        raise InputError(
            f"--fraction {fraction:g} of {rows} {unit} leaves none to "
            f"{'fit on' if count == 0 else 'report on'}; give more data or another fraction"
        )
    fit = np.zeros(rows, np.bool_)
    fit[np.random.default_rng(seed).permutation(rows)[:count]] = True
    return fit, ~fit


def _on_file(
    scaler: TemperatureScaler,
    path: Path,
    labels_path: Path | None,
    classes: str | None,
    groups_path: Path | None,
    fraction: float,
    seed: int,
) -> CalibrationReport:
    """Fit and report on a file of logits."""
    from tempering.estimators.calibration.files import open_logits, open_vector

    logits = open_logits(path)
    y = open_vector(labels_path or Path(), "labels")
    groups = None if groups_path is None else open_vector(groups_path, "groups")
    if classes is not None:
        scaler.set_params(classes=_labels(classes))
    return _fit_and_report(scaler, logits, y, groups, fraction, seed)


def _labels(classes: str) -> np.ndarray:
    """The labels that --classes lists, or those in the file that it names."""
    import numpy as np

    from tempering.estimators.calibration.files import open_vector

    if Path(classes).is_file():
        return open_vector(classes, "classes")
    names = np.array([name.strip() for name in classes.split(",")])
    try:
        return names.astype(np.int64)
    except ValueError:
        return names


def _on_answers(
    scaler: TemperatureScaler,
    model: Any,
    tokenizer: Any,
    path: Path | None,
    fraction: float,
    seed: int,
) -> CalibrationReport:
    """Fit and report on a model's answers to multiple-choice questions."""
    import numpy as np

    from tempering.estimators.calibration.language import answer_logits, read_questions
    from tempering.estimators.calibration.source import ArrayLogits

    questions = read_questions(path or Path())
    here().agree({"questions": hashlib.sha256(repr(questions).encode()).hexdigest()[:16]})
    with common.counted("questions", "questions") as progress:
        table = answer_logits(model, tokenizer, questions, progress)
    y = np.array([question.answer for question in questions])
    return _fit_and_report(scaler, ArrayLogits(table, "the answers"), y, None, fraction, seed)


def _fit_and_report(
    scaler: TemperatureScaler, logits: Logits, y: Any, groups: Any, fraction: float, seed: int
) -> CalibrationReport:
    """Fit on a random share of the rows, report on the rest."""
    from tempering.estimators.calibration.labels import encode_labels, vector
    from tempering.estimators.calibration.source import Part

    y = vector(y, "labels", logits.n_rows)
    # From all rows, because some of them may lack the label that tells 1..K from 0..K-1.
    columns = max(2, logits.n_columns)  # one score a row is for two classes
    names = logits.column_names
    _, classes = encode_labels(y, logits.n_rows, columns, scaler.classes, names, in_order=False)
    scaler.set_params(classes=classes)
    groups = None if groups is None else vector(groups, "groups", logits.n_rows)
    fit, rest = _masks(logits.n_rows, fraction, seed, "rows")
    fit_groups = groups if scaler.per == "group" else None
    scaler.fit(Part(logits, fit), y[fit], groups=None if fit_groups is None else fit_groups[fit])
    return scaler.report(
        Part(logits, rest),
        y[rest],
        groups=None if fit_groups is None else fit_groups[rest],
        by=None if groups is None else groups[rest],
        seed=seed,
    )


def _on_tokens(
    scaler: TemperatureScaler,
    model: Any,
    tokenizer: Any,
    path: Path,
    chunk: int,
    limit: int | None,
    fraction: float,
    seed: int,
) -> CalibrationReport:
    """Fit and report on the next tokens of a text, window by window."""
    import numpy as np
    import torch

    from tempering.chunks import chunks_digest, token_chunks
    from tempering.estimators.calibration.language import TokenLogits, token_classes

    windows = token_chunks(tokenizer, common.source_of(path)[0], chunk, limit)
    here().agree({"text": chunks_digest(windows)})
    fit, rest = _masks(len(windows), fraction, seed, f"windows of {chunk} tokens")
    # Most of a vocabulary never occurs in a text, so a warning of that says nothing.
    warnings.filterwarnings("ignore", r"\d+ of \d+ classes never occur")
    with common.staged() as show:
        passes = itertools.count(1)
        at = {"stage": ""}

        def progress(done: int, total: int) -> None:
            if done == 1:
                at["stage"] = f"fit, pass {next(passes)}"
            show(at["stage"], done, total)

        data = TokenLogits(model, windows[torch.from_numpy(fit)], progress)
        scaler.fit(data, data.labels)
    with common.counted("report", "windows") as counted:
        data = TokenLogits(model, windows[torch.from_numpy(rest)], counted)
        return scaler.report(
            data,
            data.labels,
            by=token_classes(tokenizer, data.windows),
            clusters=np.arange(data.n_rows) // _BLOCK,
            seed=seed,
        )


def _temperature_rows(scaler: TemperatureScaler) -> list[dict[str, Any]]:
    """The fitted temperatures as rows of a table."""
    import numpy as np

    ended = {"converged": scaler.converged_, "passes": scaler.n_iter_}
    if scaler.per in ("class", "group"):
        names = scaler.classes_ if scaler.per == "class" else scaler.groups_
        values = np.stack([scaler.temperature_, scaler.standard_error_], 1).tolist()
        return [
            {scaler.per: str(name), "temperature": t, "se_of_log_T": se, **ended}
            for name, (t, se) in zip(names, values)
        ]
    row = {"temperature": scaler.temperature_, "se_of_log_T": scaler.standard_error_, **ended}
    if scaler.per == "input":
        terms = ("entropy", "log peak")
        for name, c, mean, sd in zip(
            terms, scaler.coef_[1:], scaler.feature_mean_, scaler.feature_sd_
        ):
            row |= {f"log T per sd of {name}": float(c), f"mean {name}": float(mean)}
            row[f"sd of {name}"] = float(sd)
    return [row]


def _finish_at(record: Any, path: Path, as_json: bool) -> None:
    """Write the report to `path` and the record beside it; print the result."""
    from tempering.reports import print_record, save_html

    saved = record.save(path.with_suffix(".json"))
    page = save_html(record, path)
    if as_json:
        print(record.to_json())
    else:
        print_record(record)
    common.note(f"record: {saved}")
    common.note(f"report: {page}")
