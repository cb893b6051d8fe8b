"""tempering compare: cost and benefit of patterns, beside the untempered model and controls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from tempering.cli.shared import common, compare_vllm, data, llamacpp_runs, profiles
from tempering.ranks import here

EPILOG = """Examples:

  tempering compare --text notes.txt --pattern 'throb(12,3,1,12)|amplitude(1.2)' --controls

  tempering compare --text notes.txt --pattern 'support(12,0.8,1.25)' --pattern 'polynomial()'

  tempering compare --text notes.txt --pattern 'throb(12,3,1,12)' --budget 0.01

  tempering compare --pattern 'linear(1.1,0.9)' --profile tuned.json --samples 8

  tempering compare --model whisper-tiny.en --audio speech --pattern 'constant(1.2)' --stack cross
"""


def compare(
    text: common.TextSource = None,
    images: data.Images = None,
    audio: data.Audio = None,
    pairs: data.Pairs = None,
    pattern: Annotated[
        list[str] | None, typer.Option(help="Schedule over depth; repeat for several.")
    ] = None,
    profile: Annotated[list[Path] | None, typer.Option(help="Profile file; repeatable.")] = None,
    amplitude: common.Amplitude = None,
    reading: common.Reading = "temperature",
    stack: data.Stack = None,
    controls: Annotated[
        bool,
        typer.Option(
            "--controls",
            help="Also uniform, reversed, upside down and shuffled; with --samples plain "
            "sampling temperatures.",
        ),
    ] = False,
    budget: Annotated[
        float | None, typer.Option(help="Find the largest amplitude within so many nats/token.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples a prompt for diversity.", min=0)] = 0,
    prompts: Annotated[int, typer.Option(help="Prompts, cut from the text.", min=2)] = 4,
    max_tokens: Annotated[int, typer.Option(help="New tokens a sample.", min=1)] = 32,
    model: common.Model = "smollm2",
    chunk: common.Chunk = 512,
    limit: common.Limit = None,
    seed: common.Seed = 0,
    device: common.Device = None,
    dtype: common.Dtype = "float32",
    engine: Annotated[
        str,
        typer.Option(
            help="transformers; or costs only, no KL: vllm, vllm:ADDRESS,ADDRESS (running servers, "
            "or a file of them) or llamacpp (a GGUF file)."
        ),
    ] = "transformers",
    out: common.Out = common.RUNS,
    as_json: common.Json = False,
) -> None:
    """Measure what patterns cost, with intervals.

    The cost is in nats per token (or answer; for a model of features 1 - their cosine); --samples
    measures diversity too.

    Ctrl-C keeps what was finished; the same command goes on from there.
    """
    from tempering.attention.profiles.rules import is_rule
    from tempering.cli.shared.keeping import conclude, opened_journal, resumable
    from tempering.errors import InputError
    from tempering.evaluation.compare import compare as run

    if not pattern and not profile:
        raise InputError("name at least one --pattern or --profile")
    if not pattern:
        profiles.only_patterns(amplitude, reading, stack=stack)
        if budget is not None:
            raise InputError("--budget finds the amplitude of a --pattern; a profile has none")
    if samples == 1:
        raise InputError("--samples 1 has no diversity; give 2 or more, or 0 to leave it out")
    if budget is not None and not 0 < budget < float("inf"):
        raise InputError(f"--budget is a positive number of nats per token, not {budget:g}")
    if budget is not None and any(is_rule(item) for item in pattern or ()):
        raise InputError("--budget finds the amplitude of a pattern over depth; a rule has none")
    if budget is not None and (amplitude is not None or reading != "temperature"):
        raise InputError("--budget finds the amplitude itself; leave --amplitude and --read-as out")
    served = engine.startswith("vllm:")
    if engine != "transformers" and here().size > 1:
        raise InputError("ranks share the work of the engine transformers; leave torchrun out")
    if engine not in ("transformers", "vllm", "llamacpp") and not served:
        raise InputError(
            f"--engine is transformers, vllm, vllm:ADDRESS or llamacpp, not '{engine}'"
        )
    if engine != "transformers":
        compare_vllm.only_costs(budget, samples, reading, device, dtype, engine)
    source = data.Source(text, images, audio, pairs)
    source.check()
    if source.media is not None and (samples or reading != "temperature"):
        raise InputError("--samples and --read-as support are of text: leave them out")
    if engine != "transformers" and (source.media is not None or stack is not None):
        raise InputError(f"--engine {engine} reads text alone, in decoders of one stack")
    common.check_out(out)
    words, name = ("", "") if source.media is not None else common.source_of(text)
    settings: dict[str, Any] = {
        **({"text": name} if source.media is None else {}),
        "patterns": list(pattern or ()),
        "profiles": [path.name for path in profile or ()],
        "amplitude": amplitude,
        "read as": reading,
        "stack": stack,
        "controls": controls,
        "budget": budget,
        "samples": samples,
        "prompts": prompts,
        "tokens": max_tokens,
        "chunk": chunk,
        "chunks": limit,
        "engine": engine,
    }
    if served:
        comparison, section, replicas, kept = compare_vllm.compare_served(
            words,
            list(pattern or ()),
            list(profile or ()),
            amplitude,
            controls,
            spec=engine.removeprefix("vllm:"),
            model=model,
            chunk=chunk,
            limit=limit,
            out=out,
            settings=settings,
        )
        record = _record(comparison, settings, section, seed, device)
        record.results["replicas"] = replicas
        conclude(record, out, as_json, kept, True)
        return
    scorers: dict[str, Callable[..., Any]] = {
        "vllm": partial(compare_vllm.compare_vllm, dtype=dtype),
        "llamacpp": llamacpp_runs.compare_llamacpp,
    }
    if engine in scorers:
        comparison, section = scorers[engine](
            words,
            list(pattern or ()),
            list(profile or ()),
            amplitude,
            controls,
            model=model,
            chunk=chunk,
            limit=limit,
        )
        common.finish(_record(comparison, settings, section, seed, device), out, as_json)
        return
    network, tokenizer = common.open_model(model, device, dtype, any_kind=True)
    given = data.read_data(source, network, tokenizer, chunk, limit)
    settings |= given.settings
    section = common.model_section(network, model)
    chosen = _patterns(
        network, tokenizer, words, pattern, profile, amplitude, reading, stack, chunk, limit
    )
    key = {
        **settings,
        "seed": seed,
        "dtype": dtype,
        "data": given.digest,
        "fingerprint": section["fingerprint"],
        "profile rows": [item[1].to_json() for item in chosen if isinstance(item, tuple)],
    }
    journal = opened_journal(out, "compare", key)
    with resumable(journal) as report:
        comparison = run(
            network,
            tokenizer,
            given.inputs,
            chosen,
            with_controls=controls,
            budget=budget,
            samples=samples,
            prompts=prompts,
            new_tokens=max_tokens,
            seed=seed,
            stack=stack,
            journal=journal,
            progress=report,
        )
    record = _record(comparison, settings, section, seed, device)
    conclude(record, out, as_json, journal, comparison.complete)


def _patterns(
    network: Any,
    tokenizer: Any,
    words: Any,
    patterns: list[str] | None,
    files: list[Path] | None,
    amplitude: float | None,
    reading: str,
    stack: str | None,
    chunk: int,
    limit: int | None,
) -> list[Any]:
    """Schedules as they are; supports and files as labelled profiles."""
    from tempering.attention.profiles.profile import Profile
    from tempering.attention.profiles.rules import is_rule
    from tempering.schedules import schedule

    chosen: list[Any] = []
    for text in patterns or ():
        if reading == "temperature" and not is_rule(text):
            plan = schedule(text)
            chosen.append(plan if amplitude is None else plan.amplitude(amplitude))
            continue
        by_reading = profiles.pattern_profile(
            network,
            tokenizer,
            text,
            amplitude=amplitude,
            reading=reading,
            stack=stack,
            text=words,
            chunk=chunk,
            limit=limit,
        )
        chosen.append((by_reading.pattern or text, by_reading))
    chosen += [(path.stem, Profile.load(path)) for path in files or ()]
    return chosen


def _record(
    comparison: Any, settings: dict[str, Any], model: dict[str, Any], seed: int, device: str | None
) -> Any:
    from tempering.cli.shared import sections
    from tempering.reports import Record

    profiles = {v.label: v.profile for v in comparison.variants if v.profile is not None}
    results: dict[str, Any] = {
        "pattern": sections.pattern_section(profiles),
        "cost": sections.cost_section(comparison),
    }
    if comparison.benefits:
        results["benefit"] = sections.benefit_section(comparison)
        results["frontier"] = sections.frontier_section(comparison)
    if comparison.budgets:
        results["budget"] = sections.budget_section(comparison)
    return Record.new(
        "compare",
        settings={**settings, "complete": comparison.complete, "chunks": comparison.chunks},
        results=results,
        model=model,
        seed=seed,
        device=device or "cpu",
    )
