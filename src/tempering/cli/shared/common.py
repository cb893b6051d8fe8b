"""What the commands share: options, the model, profiles from options, and where results go."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tempering.cli.shared.telling import counted as counted
from tempering.cli.shared.telling import note as note
from tempering.cli.shared.telling import silence as silence
from tempering.cli.shared.telling import staged as staged
from tempering.errors import InputError
from tempering.ranks import here

if TYPE_CHECKING:
    from typer import Context

    from tempering.reports.record import Record
    from tempering.text_tables import TextTable
else:
    # typer passes an instance of this base class, not of typer.Context.
    Context = typer.Context.__base__

Model = Annotated[
    str, typer.Option("--model", help="A name of `tempering models`, a directory, or a hub id.")
]
Device = Annotated[str | None, typer.Option(help="Where to run, e.g. cuda; the CPU by default.")]
Dtype = Annotated[str, typer.Option(help="Of the weights: float32, bfloat16 or float16.")]
Out = Annotated[Path, typer.Option(help="Directory for the record and the report.")]
Json = Annotated[bool, typer.Option("--json", help="Print the record as JSON on stdout.")]
Seed = Annotated[int, typer.Option(help="Of all random numbers.", min=0, max=2**63 - 1)]
Amplitude = Annotated[
    float | None,
    typer.Option(
        help="Map the pattern onto temperatures from 1/A to A (1 or more); read as support: from "
        "the model's own at 0 to the pattern at 1."
    ),
]
Reading = Annotated[
    str,
    typer.Option(
        "--read-as",
        help="What pattern values are: temperature (relative to the model's own), support (keys "
        "alive), or relative-support (ratios of the model's own support).",
    ),
]
Layers = Annotated[str | None, typer.Option(help="Only these layers, e.g. 0-5,12.")]
Heads = Annotated[str | None, typer.Option(help="Only these heads, e.g. 0,3-5.")]
Chunk = Annotated[int, typer.Option(help="Tokens in a chunk of text.")]
Limit = Annotated[int | None, typer.Option("--chunks", help="Chunks at most, spread evenly.")]
FromFile = Annotated[
    Path | None, typer.Option("--file", help="Read it from this file; - is standard input.")
]
TextSource = Annotated[
    Path | None,
    typer.Option(
        "--text",
        help="UTF-8 text file, or Parquet or .jsonl files (one or a folder) with a column text; "
        "a text of the package by default.",
    ),
]
TextFile = Annotated[
    Path | None, typer.Option("--text", help="UTF-8 text file; a text of the package by default.")
]

RUNS = Path("runs")
# Six digits are more layers or heads than any model has; they keep a range small.
_RANGE = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")


def given(context: Context) -> set[str]:
    """The parameters that were written on the command line, e.g. "budget_tokens"."""
    source = context.get_parameter_source
    return {name for name in context.params if getattr(source(name), "name", "") == "COMMANDLINE"}


def unread(context: Context, names: Iterable[str], because: str) -> None:
    """InputError when one of these options was given, since nothing would read it."""
    if found := given(context).intersection(names):
        options = (max(each.opts, key=len) for each in context.command.params if each.name in found)
        raise InputError(f"{because}: leave out {', '.join(sorted(options))}")


def text_argument(text: str | None, file: Path | None, what: str) -> str | None:
    """A text from the command line: itself, standard input where it is "-", or from a file.

    Raises InputError for both, DataError for a file that is no text.
    """
    from tempering.files import decoded, read_text

    if file is not None and text is not None:
        raise InputError(f"give the {what} on the command line or by --file, not both")
    if file is not None and str(file) != "-":
        return read_text(file).strip()
    if text == "-" or file is not None:
        return decoded(sys.stdin.buffer.read(), "standard input").strip()
    return text


def open_model(
    name: str, device: str | None = None, dtype: str = "float32", *, any_kind: bool = False
) -> tuple[Any, Any]:
    """Model and tokenizer by name; any_kind: or any other model of transformers, and its processor.

    Raises ModelError for another than a causal language model, where none is wanted.
    """
    import torch

    from tempering.engines.loading.catalogue import check_writes_text
    from tempering.engines.loading.hub import load_model
    from tempering.errors import ModelError
    from tempering.inputs.example import predicts_next

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in kinds:
        raise InputError(f"--dtype is {', '.join(kinds)}, not '{dtype}'")
    if device == "cuda" and here().size > 1 and torch.cuda.device_count() > 1:
        device = f"cuda:{here().local_rank % torch.cuda.device_count()}"  # one for each rank
    if not any_kind:
        check_writes_text(name)
    model, processor = load_model(name, device=device, dtype=kinds[dtype])
    if not any_kind and not predicts_next(model):
        raise ModelError(
            f"the model {name!r} is {type(model).__name__}, and this command takes a causal "
            "language model; give a decoder such as Llama, Qwen or GPT-2"
        )
    return model, processor


def text_of(path: Path | None) -> tuple[str, str]:
    """A text and its name; the package's own without a path."""
    if path is None:
        from tempering.data import sample_text

        return sample_text("demo"), "demo (a text of the package)"
    from tempering.files import read_text

    return read_text(path), path.name


def source_of(path: Path | None) -> tuple[str | TextTable, str]:
    """`text_of`, or a Parquet or JSON-lines file, or a folder of them."""
    from tempering.text_tables import TextTable, is_table

    return (TextTable(path), path.name) if path is not None and is_table(path) else text_of(path)


def numbers(text: str | None, option: str) -> list[int] | None:
    """Parse "0-5,12" into a list of integers."""
    if text is None:
        return None
    chosen: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise InputError(f"{option} takes numbers and ranges, e.g. 0-5,12; not '{text}'")
        low, high = int(match[1]), int(match[2] or match[1])
        if high < low:
            raise InputError(f"{option}: {part.strip()} runs backwards; write {high}-{low}")
        chosen += range(low, high + 1)
    return chosen


def check_context(model: Any, tokens: int, what: str, *, beyond: bool = False) -> None:
    """InputError when so many tokens are more than the model can read at once.

    beyond: a model that computes its positions, and was only never trained so far, gets a note.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(longest, int) or tokens <= longest:
        return
    if beyond and getattr(model.config, "rope_parameters", None):
        note(f"note: {what}: the model was trained to read {longest} tokens at once")
        return
    raise InputError(f"{what}: the model reads at most {longest} tokens at once")


def note_rules(rules: list[dict[str, Any]]) -> None:
    """Say where a level could not be held."""
    for row in rules:
        for end in ("coldest", "hottest"):
            if row[end]:
                note(
                    f"note: {row['rule']}: T stands at its {end} for {row[end]:.1%} of the "
                    "queries, where the rule's bound holds it"
                )


def model_section(model: Any, name: str) -> dict[str, Any]:
    """The model's part of a record."""
    from tempering.attention.examining.layout_of import layout
    from tempering.attention.profiles.fingerprint import describe_model

    plan = layout(model)
    return {
        **describe_model(model),
        "name": Path(name).name,
        "layers": len(plan.layers),
        "heads": max(plan.heads),
        **({"parts": dict(plan.depths)} if len(plan.depths) > 1 else {}),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": str(model.config._attn_implementation),
    }


def check_out(out: Path) -> None:
    """OutputError now rather than after the work, when results could not be written."""
    from tempering.errors import OutputError
    from tempering.files import write_atomic

    with here().together():
        if not here().first:
            return
        # 64 KiB, as much as a small record, since a full disk still has room for an empty file.
        try:
            write_atomic(out / f".writable-{os.getpid()}", bytes(65536)).unlink()
        except OSError as error:
            reason = getattr(error.__cause__, "strerror", None) or error
            raise OutputError(
                f"can't write into {out}: {reason}; free some space, or name another place"
            ) from error


def check_file(path: Path | None, option: str, *suffixes: str) -> None:
    """Refuse, before the work, a file that couldn't be written after it, or of another suffix."""
    if path is None:
        return
    if path.suffix.lower() not in suffixes or path.is_dir():
        raise InputError(
            f"{option} takes a file that ends in {' or '.join(suffixes)}, not '{path}'"
        )
    check_out(path.parent)


def finish(record: Record, out: Path, as_json: bool, path: Path | None = None) -> None:
    """Save record and report, print the tables (or the JSON), and say where they were saved.

    path: from `reserve`, where other files already have its name. Where a run has several ranks,
    rank 0 does it.
    """
    if not here().first:
        return
    from tempering.reports import print_record, save_html

    saved: list[str] = []
    try:
        path = reserve(record, out) if path is None else path
        try:
            record.save(path)
            saved.append(f"record: {path}")
            saved.append(f"report: {save_html(record, path.with_suffix('.html'))}")
        finally:
            if not saved:
                path.unlink(missing_ok=True)
    finally:
        # Results are shown even where they can't be saved, and the place of what was saved is
        # printed even where nobody reads stdout.
        try:
            if as_json:
                print(record.to_json(), flush=True)
            else:
                print_record(record)
        finally:
            for line in saved:
                note(line)


def reserve(record: Record, out: Path) -> Path:
    """An empty file for a record, of a free name, also where two runs end in the same second.

    The run's other files have that name too, so they need no check of their own.
    """
    from tempering.errors import OutputError

    stem = f"{record.kind}-{record.created[:19].replace(':', '').replace('-', '')}"
    path, count = out / f"{stem}.json", 1
    while True:
        try:
            out.mkdir(parents=True, exist_ok=True)
            path.touch(exist_ok=False)
        except FileExistsError:
            count += 1
            path = out / f"{stem}-{count}.json"
        except OSError as error:
            raise OutputError(
                f"can't write {path}: {error.strerror}; name another place with --out"
            ) from error
        else:
            return path
