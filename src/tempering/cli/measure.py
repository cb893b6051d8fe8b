"""tempering measure: how many keys every head keeps alive on a text, streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tempering.cli.shared import common, data, profiles
from tempering.errors import InputError
from tempering.ranks import here

EPILOG = """Examples:

  tempering measure --text notes.txt --chunks 4

  tempering measure --text notes.txt --pattern 'throb(12,3,1,12)' --amplitude 1.3 --heatmap s.png

  tempering measure --text notes.txt --pattern 'support(12,0.5,2)'

  tempering measure --text notes.txt --table heads.parquet

  tempering measure --text book.txt --chunk 8192 --chunks 1 --parts 16 --table heads.csv

  tempering measure --text book.txt --chunk 4096 --chunks 4 --law law.json

  tempering measure --model dinov2-small --images photos

  tempering measure --model whisper-tiny.en --audio speech --pattern 'linear(1.2,0.8)' --stack cross
"""


def measure(
    text: common.TextSource = None,
    images: data.Images = None,
    audio: data.Audio = None,
    pairs: data.Pairs = None,
    pattern: Annotated[
        str | None, typer.Option(help="Measure under this pattern or rule as well.")
    ] = None,
    profile: Annotated[str | None, typer.Option(help="Profile file, instead.")] = None,
    amplitude: common.Amplitude = None,
    reading: common.Reading = "temperature",
    layers: common.Layers = None,
    heads: common.Heads = None,
    stack: data.Stack = None,
    model: common.Model = "smollm2",
    chunk: common.Chunk = 512,
    limit: common.Limit = None,
    parts: Annotated[
        int | None, typer.Option(help="Parts of a chunk told apart by position; 4 by default.")
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="Write every number as Parquet or CSV.")
    ] = None,
    law: Annotated[
        Path | None,
        typer.Option(help="Write a profile whose T keeps each head's support at every length."),
    ] = None,
    heatmap: Annotated[
        Path | None, typer.Option(help="Draw support per layer and head as PNG or SVG.")
    ] = None,
    device: common.Device = None,
    dtype: common.Dtype = "float32",
    out: common.Out = common.RUNS,
    as_json: common.Json = False,
) -> None:
    """Measure how many keys each layer and head keeps alive.

    On a text, images, sound or pairs; memory is linear in --chunk, so long texts can be measured
    in one piece.
    """
    from tempering.attention import layout, measure_tokens
    from tempering.attention.measuring.law import measure_law
    from tempering.attention.profiles.profile import UNTEMPERED
    from tempering.cli.shared.sections import (
        law_section,
        parts_section,
        pattern_section,
        positions_section,
        rules_section,
        support_section,
    )
    from tempering.reports import Record, figure_support_heatmap, save_figure, write_table

    if pattern is None and profile is None:
        profiles.only_patterns(amplitude, reading, layers, heads, stack)
    source = data.Source(text, images, audio, pairs)
    source.check()
    common.check_file(table, "--table", ".parquet", ".csv")
    common.check_file(heatmap, "--heatmap", ".png", ".svg", ".pdf")
    common.check_file(law, "--law", ".json")
    common.check_out(out)
    if parts is not None and source.media is None and not 1 <= parts <= chunk:
        raise InputError(f"--parts: a chunk of {chunk} tokens has 1 to {chunk} parts, not {parts}")
    network, tokenizer = common.open_model(model, device, dtype, any_kind=True)
    given = data.read_data(source, network, tokenizer, chunk, limit, beyond=True)
    if given.text is None and reading != "temperature":
        raise InputError("a pattern read as support is solved on a text; give --text")
    results: dict[str, Any] = {}
    after = {}
    chosen = None
    if pattern is not None or profile is not None:
        chosen = profiles.chosen_profile(
            network,
            tokenizer,
            pattern,
            profile,
            amplitude=amplitude,
            reading=reading,
            layers=layers,
            heads=heads,
            stack=stack,
            text=given.text,
            chunk=chunk,
            limit=limit,
        )
        chosen.resolve(layout(network), rules=True, scales=True)
        chosen.check_model(network)
        label = chosen.pattern or Path(profile or "profile").stem
        if label == UNTEMPERED:
            raise InputError(f"'{label}' is the name of the model as it is; rename {profile}")
    with common.counted("measure", given.unit) as report:
        before = measure_tokens(network, given.inputs, buckets=parts, progress=report)
    if chosen is not None:
        with common.counted(label, given.unit) as report:
            after[label] = measure_tokens(
                network, given.inputs, profile=chosen, buckets=parts, progress=report
            )
        results["pattern"] = pattern_section({label: chosen})
        if rules := rules_section(after[label]):
            results["rules"] = rules
            common.note_rules(rules)
    if law is not None:
        if given.text is None:
            raise InputError("--law is measured on a text, whose length is known; give --text")
        with common.counted("law") as report:
            measured = measure_law(network, given.inputs, progress=report)
        results["law"] = law_section(measured)
        common.note(f"profile: {measured.profile(network).save(law)}")
    if len(before.parts()) > 1 or set(before.units) != {"tokens"}:
        results["parts"] = parts_section(before, after)
    results["support"] = support_section(before, after)
    results["support"]["positions"] = positions_section(before, after)
    if not here().first:
        return
    record = Record.new(
        "measure",
        settings={
            **given.settings,
            **({} if given.text is None else {"tokens": given.inputs.numel()}),
            "baseline": UNTEMPERED,
        },
        results=results,
        model=common.model_section(network, model),
        device=device or "cpu",
    )
    if table is not None:
        write_table(record, table)
        common.note(f"table: {table}")
    if heatmap is not None:
        save_figure(figure_support_heatmap(record), heatmap)
        common.note(f"heatmap: {heatmap}")
    common.finish(record, out, as_json)
