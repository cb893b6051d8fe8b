"""tempering tune: learn the temperatures that make a model better at a text or a task.

--data: of attention, by head; --tokens: of sampling, by token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tempering.cli.shared import checking, common
from tempering.cli.shared import data as sources
from tempering.cli.shared import engine_options as engines
from tempering.cli.shared import tuning_runs as learning

EPILOG = """Examples:

  tempering tune --data notes.txt --out tuned.json

  tempering tune --data qa.jsonl --constraint prose.txt --within 0.01 --test held.jsonl

  tempering tune --data a.txt --data qa.jsonl --weight 1 --weight 3 --per layer

  tempering tune --data notes.txt --out tuned.json --resume

  tempering tune --data book.txt --rule power --lengths 512,2048 --held-length 4096
  tempering tune --model whisper-tiny.en --audio noisy --test clean --out noise.json

  tempering tune --tokens 'phases(thinking=?, answer=?)' --tasks tasks.jsonl --out policy.txt

A .jsonl file of --data holds lines {"prompt": "...", "answer": "..."}, or conversations
{"messages": [{"role": "user", "content": "..."}, ...]}; any other file is plain text. A Parquet
file, or a folder of Parquet or .jsonl files, holds texts of any size in a column "text".
"""


# Parameters of one kind of tuning that the other doesn't read.
_OF_ATTENTION = ("data", "images", "audio", "pairs", "weight", "per", "rule", "lengths",
                 "held_length", "constraint", "within",
                 "on", "test", "elsewhere", "shuffles", "alternatives", "method", "steps",
                 "prior_sd", "bounds", "rows", "checkpoint", "resume", "chunk",
                 "limit")  # fmt: skip
_OF_TOKENS = ("tasks", "keep_going", "checker", "against", "trials", "samples", "max_tokens",
              "engine", "policy", "models", "concurrency", "timeout", "retries",
              "batch")  # fmt: skip


def tune(
    context: common.Context,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="What to be better at: text, .jsonl, .parquet, or folder; repeatable."),
    ] = None,
    images: sources.Images = None,
    audio: sources.Audio = None,
    pairs: sources.Pairs = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Learn the ? of a policy by token on --tasks: 'phases(thinking=?, answer=?)', "
            "'entropy(T0=?, theta=?)', 'sampler(T=?[0.2,1.5], top_p=?)'."
        ),
    ] = None,
    tasks: Annotated[
        Path | None, typer.Option(help="JSON lines with id, prompt, answer, for --tokens.")
    ] = None,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Leave broken lines of --tasks out.")
    ] = False,
    checker: checking.CheckerName = None,
    against: Annotated[
        str, typer.Option(help="The untuned policy, which --tokens has to beat.")
    ] = "constant(1)",
    trials: Annotated[int, typer.Option(help="Policies to try.", min=1)] = 40,
    samples: Annotated[
        int, typer.Option("--samples", "-k", help="A task, under each policy.", min=1)
    ] = 4,
    max_tokens: Annotated[
        int, typer.Option(help="New tokens a sample of --tasks, at most.", min=1)
    ] = 256,
    weight: Annotated[
        list[float] | None, typer.Option(help="Of each --data in turn; 1 by default.")
    ] = None,
    per: learning.Per = "head",
    rule: Annotated[
        str | None,
        typer.Option(help="power: two numbers in place of one, log T = a + b log(keys seen)."),
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Chunks of these lengths, 512,2048, in place of --chunk.")
    ] = None,
    held_length: Annotated[
        int | None,
        typer.Option(help="Test on the end of texts in chunks of this length, never learned from."),
    ] = None,
    constraint: learning.ConstraintFile = None,
    within: learning.Within = 0.01,
    on: Annotated[
        str, typer.Option(help="What --within bounds: cost (rise of loss) or divergence (KL).")
    ] = "cost",
    test: learning.Tests = None,
    elsewhere: learning.Elsewhere = 6,
    shuffles: learning.Shuffles = 5,
    alternatives: Annotated[
        bool,
        typer.Option("--alternatives", help="Also fit output and uniform T, biases, LoRA rank 1."),
    ] = False,
    method: Annotated[str, typer.Option(help="newton, or adam for much data.")] = "newton",
    steps: Annotated[int | None, typer.Option(help="Steps at most.", min=1)] = None,
    prior_sd: Annotated[
        float, typer.Option(help="Standard deviation of the prior on log T.")
    ] = 0.5,
    bounds: Annotated[str, typer.Option(help="Lowest and highest T.")] = "0.2,5",
    held_out: Annotated[
        float | None,
        typer.Option(
            help="Share of the data to judge steps by, 0.2 by default; of --tasks, to measure the "
            "gain on, 0.4."
        ),
    ] = None,
    rows: learning.Rows = 1,
    checkpoint: learning.Checkpointing = False,
    resume: learning.Resume = False,
    engine: engines.EngineName = "local",
    model: common.Model = "smollm2",
    policy: engines.Policy = engines.POLICY,
    models: engines.Models = None,
    concurrency: engines.Concurrency = engines.CONCURRENCY,
    timeout: engines.Timeout = engines.TIMEOUT,
    retries: engines.Retries = engines.RETRIES,
    batch: engines.Batch = 96,
    chunk: common.Chunk = 512,
    limit: common.Limit = None,
    seed: common.Seed = 0,
    device: common.Device = None,
    dtype: common.Dtype = "float32",
    out: Annotated[
        Path | None,
        typer.Option(
            help="The profile, tuned.json by default, or the policy, policy.txt; record and report "
            "are put beside it."
        ),
    ] = None,
    as_json: common.Json = False,
) -> None:
    """Learn temperatures, for any data or task, weights frozen.

    --data: of attention, by head, in a profile that carries its evidence. Ctrl-C keeps the best so
    far; the same command with --resume goes on.

    --tokens, --tasks: of sampling, by token, in a policy's text. Every policy meets the same tasks
    and seeds; the gain over --against is measured on tasks held out. Ctrl-C keeps every sample; the
    same command goes on.
    """
    if tokens is not None:
        from tempering.cli.shared.token_tuning import tune_tokens

        common.unread(context, _OF_ATTENTION, "--tokens learns a policy by token")
        tune_tokens(context)
        return
    common.unread(context, _OF_TOKENS, "--data tunes attention")
    from tempering.attention.tuning import (
        Constraint,
        ConstraintError,
        Objective,
        from_inputs,
        refuse_overlap,
    )
    from tempering.attention.tuning import tune as run
    from tempering.cli.shared.keeping import locked
    from tempering.cli.shared.tune_results import (
        EvidenceSettings,
        Results,
        cuts_of,
        gather,
        objective,
        objective_of_lengths,
    )
    from tempering.cli.shared.tuning_runs import drop, read_bounds, say_step, state_of
    from tempering.errors import InputError
    from tempering.ranks import here

    out = Path("tuned.json") if out is None else out
    held_out = 0.2 if held_out is None else held_out
    common.check_file(out, "--out", ".json")  # another suffix may be that of the data
    source = sources.Source(None, images, audio, pairs)
    source.check()
    texts = list(data or [])
    if bool(texts) == (source.media is not None):
        raise InputError(
            "give --data, or one of --images, --audio and --pairs, to be better at; or --tokens "
            "POLICY with --tasks FILE"
        )
    weights = weight or [1.0] * max(1, len(texts))
    if len(weights) != max(1, len(texts)):
        raise InputError(f"{len(texts)} --data and {len(weights)} --weight; give one for each")
    names = [path.name for path in [*texts, *(test or [])]]
    if len(set(names)) != len(names):
        raise InputError(f"two files of one name in {', '.join(names)}; rename one")
    low, high = read_bounds(bounds)
    network, tokenizer = common.open_model(model, device, dtype, any_kind=bool(source.media))
    settings: dict[str, Any] = {"data": [path.name for path in texts]}
    cut = cuts_of(lengths, held_length, chunk)
    held_tests: list[Objective] = []
    if source.media is not None:
        if cut.of_several:
            raise InputError("--lengths and --held-length cut texts; leave them out")
        given = sources.read_data(source, network, tokenizer, chunk, limit)
        settings |= given.settings
        goals = [from_inputs(given.name, given.inputs, network, weight=weights[0])]
    else:
        if cut.of_several:
            for size in (*cut.lengths, *([cut.held] if cut.held else [])):
                common.check_context(network, size, f"chunks of {size}", beyond=True)
        found_goals = [
            objective_of_lengths(tokenizer, path, w, cut, limit)
            for path, w in zip(texts, weights, strict=True)
        ]
        goals = [goal for goal, _ in found_goals]
        held_tests = [held for _, held in found_goals if held is not None]

    def like(path: Path, most: int | None) -> Objective:
        """Other data of the kind that is tuned for."""
        if source.media is None:
            return objective(tokenizer, path, 1.0, chunk, most)
        other = sources.Source(**{source.media[0]: path})
        found = sources.read_data(other, network, tokenizer, chunk, most)
        return from_inputs(path.name, found.inputs, network)

    limits = None
    if constraint is not None:
        limits = Constraint(like(constraint, limit), within, on)
    tests = [*(like(path, None) for path in test or []), *held_tests]
    learned = [*goals, *([limits.objective] if limits else [])]
    refuse_overlap(learned, tests, "calibration and test")
    here().agree({"tests": [item.digest for item in tests]})  # before hours of work, not after
    settings |= {
        "weights": weights,
        "per": per,
        **({"rule": rule} if rule else {}),
        **({"lengths": list(cut.lengths), "held length": cut.held} if cut.of_several else {}),
        "constraint": constraint.name if constraint else None,
        "within": within if constraint else None,
        "on": on if constraint else None,
        "tests": [path.name for path in test or []],
        "method": method,
        "steps": steps,
        "prior_sd": prior_sd,
        "bounds": [low, high],
        "held_out": held_out,
        "chunk": chunk,
        "chunks": limit,
    }
    with locked(out, "tune"):
        state = state_of(out, resume)
        results = Results(out, settings, network, model, goals, limits, seed, device)
        try:
            with common.staged() as report:
                tuned = run(
                    network,
                    goals,
                    per=per,
                    rule=rule,
                    constraint=limits,
                    prior_sd=prior_sd,
                    bounds=(low, high),
                    method=method,
                    steps=steps,
                    held_out=held_out,
                    rows=rows,
                    checkpoint=checkpoint,
                    seed=seed,
                    state=state,
                    on_step=say_step,
                    progress=report,
                )
        except ConstraintError as error:
            drop(state)
            results.finish(error.tuned, [], as_json, label="closest, outside the constraint")
            raise
        results.save(tuned, [])
        complete, found = tuned.stopped_because != "interrupted", []
        if complete:
            # The texts of the package are no test of a model of images or sound.
            others = elsewhere if source.media is None else 0
            plan = EvidenceSettings(tests, others, shuffles, alternatives, held_out, chunk, seed)
            try:
                found = gather(network, tokenizer, tuned, goals, limits, plan, out)
            except KeyboardInterrupt:
                complete = False
        results.save(tuned, found)
        results.finish(tuned, found, as_json, complete=complete)
        common.note(f"profile: {out}")
        if not complete:
            common.note("interrupted; the best so far is kept. Add --resume to go on")
            raise typer.Exit(130)
        drop(state)
