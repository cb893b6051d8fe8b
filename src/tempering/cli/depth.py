"""tempering depth: how much depth a pattern needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tempering.cli.shared import common, data

EPILOG = """Examples:

  tempering depth

  tempering depth --pattern 'throb(12,3,1,12)' --amplitude 1.5 --text notes.txt --chunks 16

  tempering depth --cycles 3 --samples 8 --prompts 8 --figure depth.png

  tempering depth --model dinov2-small --images photos --pattern 'linear(1.3,0.77)'
"""


def depth(
    text: common.TextFile = None,
    images: data.Images = None,
    audio: data.Audio = None,
    pairs: data.Pairs = None,
    pattern: Annotated[str, typer.Option(help="Schedule over depth.")] = "throb(12,3,1,12)",
    amplitude: Annotated[
        float, typer.Option(help="Map the pattern onto temperatures from 1/A to A (1 or more).")
    ] = 1.3,
    cycles: Annotated[
        int, typer.Option(help="Run the pattern up to so many times over depth.", min=1)
    ] = 6,
    shuffles: Annotated[
        int, typer.Option(help="Controls a case: its values in another order.", min=1)
    ] = 1,
    samples: Annotated[int, typer.Option(help="Samples a prompt for diversity.", min=0)] = 0,
    prompts: Annotated[int, typer.Option(help="Prompts, cut from the text.", min=2)] = 4,
    max_tokens: Annotated[int, typer.Option(help="New tokens a sample.", min=1)] = 32,
    stack: Annotated[
        str | None,
        typer.Option(help="Of several stacks the one to study: encoder, decoder, cross, vision."),
    ] = None,
    model: common.Model = "smollm2",
    chunk: common.Chunk = 512,
    limit: common.Limit = 8,
    seed: common.Seed = 0,
    device: common.Device = None,
    dtype: common.Dtype = "float32",
    figure: Annotated[Path | None, typer.Option(help="Draw the result as PNG or SVG.")] = None,
    out: common.Out = common.RUNS,
    as_json: common.Json = False,
) -> None:
    """Measure how much depth a pattern needs.

    The pattern runs once, twice and more often over all layers, and once over parts of them.

    Each case is compared with the same values in the same layers in another order. Ctrl-C keeps
    what was finished; the same command goes on from there.
    """
    from tempering.cli.shared.keeping import conclude, resumable
    from tempering.errors import InputError
    from tempering.evaluation.depth import depth_cases, study_depth
    from tempering.evaluation.journal import Journal
    from tempering.reports import save_figure
    from tempering.schedules import schedule

    if samples == 1:
        raise InputError("--samples 1 has no diversity; give 2 or more, or 0 to leave it out")
    common.check_file(figure, "--figure", ".png", ".svg", ".pdf")
    common.check_out(out)
    source = data.Source(text, images, audio, pairs)
    source.check()
    if source.media is not None and samples:
        raise InputError("--samples are continuations of text: leave them out")
    course = schedule(pattern).amplitude(amplitude)
    network, tokenizer = common.open_model(model, device, dtype, any_kind=True)
    given = data.read_data(source, network, tokenizer, chunk, limit)
    cases = depth_cases(course, network, cycles=cycles, shuffles=shuffles, seed=seed, stack=stack)
    settings: dict[str, Any] = {
        **given.settings,
        "pattern": str(course),
        "stack": stack,
        "cycles": cycles,
        "shuffles": shuffles,
        "samples": samples,
        "prompts": prompts,
        "tokens": max_tokens,
    }
    section = common.model_section(network, model)
    key = {**settings, "seed": seed, "dtype": dtype, "data": given.digest,
           "fingerprint": section["fingerprint"]}  # fmt: skip
    journal = Journal(out, "depth", key)
    with resumable(journal) as report:
        study = study_depth(
            network,
            given.inputs,
            cases,
            samples=samples,
            prompts=prompts,
            prompt_tokens=min(32, chunk),
            new_tokens=max_tokens,
            seed=seed,
            journal=journal,
            progress=report,
        )
    record = _record(study, settings, section, seed, device)
    if figure is not None:
        from tempering.reports import figure_depth

        save_figure(figure_depth(record), figure)
        common.note(f"figure: {figure}")
    conclude(record, out, as_json, journal, study.complete)


def _record(
    study: Any, settings: dict[str, Any], model: dict[str, Any], seed: int, device: str | None
) -> Any:
    from tempering.cli.shared.sections import depth_answer, depth_section
    from tempering.reports import Record

    return Record.new(
        "depth",
        settings={**settings, "complete": study.complete},
        results={"depth": depth_section(study), "answer": depth_answer(study)},
        model=model,
        seed=seed,
        device=device or "cpu",
    )
