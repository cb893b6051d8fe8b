"""tempering explore: what ladders of temperature buy on tasks whose answers can be checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from tempering.cli.shared import checking, common
from tempering.cli.shared import engine_options as engines

EPILOG = """Examples:

  tempering explore --generate 20

  tempering explore --generate 300 --save-tasks tasks.jsonl

  tempering explore --tasks tasks.jsonl -k 12 --ladder 0.4,1.2 --amplitude 1.2

  tempering explore --tasks mine.jsonl --checker 'regex:Answer: (.*)' --stop-support 1.5

  tempering explore --tasks mine.jsonl --temperature 1 --token-policy "$(cat policy.txt)"
"""


def explore(
    context: common.Context,
    tasks: Annotated[Path | None, typer.Option(help="JSON lines with id, prompt, answer.")] = None,
    generate: Annotated[
        int | None, typer.Option(help="Make so many tasks with known answers instead.", min=1)
    ] = None,
    kinds: Annotated[
        str, typer.Option(help="Of generated tasks: arithmetic, recall, words.")
    ] = "arithmetic,recall,words",
    levels: Annotated[
        str | None, typer.Option(help="Of difficulty, e.g. 1-3; graded by default.")
    ] = None,
    save_tasks: Annotated[
        Path | None, typer.Option(help="Write the generated tasks, and leave.")
    ] = None,
    save_profiles: engines.SaveProfiles = None,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="Leave broken lines of the file out.")
    ] = False,
    checker: checking.CheckerName = None,
    samples: Annotated[int, typer.Option("--samples", "-k", help="A task.", min=2)] = 12,
    temperature: Annotated[float, typer.Option(help="The single temperature.")] = 0.7,
    ladder: Annotated[
        str | None,
        typer.Option(
            help="Coldest and hottest rung; by default 0.4,1.2, within what the model takes."
        ),
    ] = None,
    attention: Annotated[
        str, typer.Option(help="Pattern over depth, or uniform, that the ladder scales.")
    ] = "uniform",
    amplitude: Annotated[
        float | None,
        typer.Option(
            help="Of the hottest rung's attention; 1.2 by default where the engine tempers it, "
            "else 1."
        ),
    ] = None,
    token_policy: Annotated[
        list[str] | None,
        typer.Option(
            help="Compare this policy by token too, e.g. 'support(8)'; repeatable.",
        ),
    ] = None,
    stop_support: Annotated[
        float | None, typer.Option(help="Stop a task when its answers' support is under this.")
    ] = None,
    synthesis: Annotated[
        bool, typer.Option("--synthesis", help="Also let the model merge the answers.")
    ] = False,
    engine: engines.EngineName = "local",
    model: common.Model = "smollm2",
    tokens: Annotated[int, typer.Option(help="New tokens a sample, at most.", min=1)] = 32,
    policy: engines.Policy = engines.POLICY,
    models: engines.Models = None,
    concurrency: engines.Concurrency = engines.CONCURRENCY,
    timeout: engines.Timeout = engines.TIMEOUT,
    retries: engines.Retries = engines.RETRIES,
    batch: engines.Batch = 96,
    seed: common.Seed = 0,
    device: common.Device = None,
    dtype: common.Dtype = "float32",
    out: common.Out = common.RUNS,
    as_json: common.Json = False,
) -> None:
    """Compare ways to heat the samples of a task.

    A single temperature, a ladder, an attention ladder and both, at equal samples.

    pass@k without bias, also at equal tokens, accuracy of each aggregator, tokens spent, with
    paired bootstrap intervals. Ctrl-C keeps what was finished; the same command goes on from there,
    for what is missing also with another --policy, --models, --tokens, --timeout or address of the
    server.
    """
    from tempering.agents.contract import EngineError
    from tempering.agents.ladder import strategies
    from tempering.cli.shared.keeping import JournalLedger, finish, interruptible
    from tempering.cli.shared.sections import explore_sections
    from tempering.errors import InputError
    from tempering.evaluation.explore import explore as run
    from tempering.evaluation.journal import Journal
    from tempering.evaluation.policy_strategy import policy_strategy
    from tempering.reports import Record

    if tasks is not None:
        common.unread(context, ("kinds", "levels"), "--tasks is a file of tasks")
    if save_tasks is None and save_profiles is None:
        engines.unread_by_engine(context, engine)
    found, broken = _tasks(tasks, generate, kinds, levels, seed, keep_going)
    if save_tasks is not None:
        from tempering.agents.tasks import write_tasks

        common.note(f"tasks: {write_tasks(save_tasks, found)}")
        return
    for line in broken:
        common.note(f"left out: {line}")
    checkers = checking.checkers_of(found, checker)
    if amplitude is None:
        amplitude = 1.2 if engine == "local" or engine.startswith("vllm:") else 1.0
    setup = engines.engine_options(context)
    remote = None
    if engine != "local" and save_profiles is None:
        remote = engines.build_engine(setup)
    if ladder is None:
        coldest, hottest = (0.0, 1.2) if remote is None else (
            remote[0].temperature(0.0), remote[0].temperature(1.0))  # fmt: skip
        ladder = f"{max(0.4, coldest):g},{min(1.2, hottest):g}"
    chosen = strategies(
        samples,
        temperature=temperature,
        ladder=_ladder(ladder),
        attention=attention,
        amplitude=amplitude,
    )
    texts = list(token_policy or ())
    if len({*texts}) < len(texts):
        raise InputError(f"two --token-policy of one text among {', '.join(texts)}; give one")
    chosen += [policy_strategy(text, samples) for text in texts]
    if save_profiles is not None:
        patterns = [rung.attention for strategy in chosen for rung in strategy.rungs]
        engines.write_profiles(
            patterns, {"model": model, "device": device, "dtype": dtype}, save_profiles
        )
        return
    common.check_out(out)
    settings: dict[str, Any] = {
        "samples": samples,
        "temperature": temperature,
        "ladder": ladder,
        "attention": attention,
        "amplitude": amplitude,
        "tokens": tokens,
        "token policies": texts,
        "checker": checker,
        "stop support": stop_support,
        "synthesis": synthesis,
    }
    worker, section = remote or engines.build_engine(setup, score=True)
    # Options that change no sample, or may change for the samples that are missing.
    same = ("checker", "synthesis", "stop support", "batch", "concurrency", "timeout", "retries",
            "tokens", "policy", "models")  # fmt: skip
    key = {**settings, **setup, "seed": seed, "tasks": found, **dict.fromkeys(same)}
    key |= {"engine": worker.name, "fingerprint": section.get("fingerprint")}
    journal = Journal(out, "explore", key)
    context.call_on_close(journal.close)
    made_under = {**worker.describe(), "model": model, "tokens": tokens}
    ledger = JournalLedger(journal, made_under)
    if journal.entries:
        common.note(f"resuming: {len(journal.entries)} finished samples in {journal.path}")
        other = [row for row in journal.entries.values() if row.get("part") != ledger.part]
        if other:
            common.note(
                f"note: {len(other)} of them were made under other settings, which the record "
                "lists as its parts"
            )
    with interruptible() as asked, common.staged() as report:
        result = run(
            worker,
            found,
            checkers,
            chosen,
            tokens=tokens,
            seed=seed,
            stop_support=stop_support,
            synthesise=synthesis,
            ledger=ledger,
            report=report,
            stop=lambda: asked() or ledger.failed is not None,
        )
    record = Record.new(
        "explore",
        settings={
            **settings,
            "tasks": len(result.tasks),
            "source": "generated" if tasks is None else tasks.name,
            "broken lines": len(broken),
            "samples that failed": result.failed,
            "complete": result.complete,
            **worker.describe(),
            "parts": ledger.parts,
        },
        results=explore_sections(result, samples),
        model=section,
        seed=seed,
        device=device or "cpu",
    )
    if not result.complete and ledger.failed is None:
        common.finish(record, out, as_json)
        for text in result.warnings:
            common.note(f"warning: {text}")
        why = "interrupted" if asked() else "given up, since nothing but failures came back"
        common.note(f"{why}; the numbers rest on what was finished. Run it again to go on")
        raise typer.Exit(130)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in result.rows)
    # Half a character, which some servers send, as the escape that JSON has for it.
    lines = lines.encode("utf-8", "backslashreplace").decode("utf-8")
    kept = None if result.failed else journal
    finish(record, out, as_json, kept, (".samples.jsonl", lines))
    for text in result.warnings:
        common.note(f"warning: {text}")
    if result.failed:
        common.note(
            f"{result.failed} samples failed and count as wrong; the same command tries them again"
        )
    if ledger.failed is not None:
        raise ledger.failed
    if result.unanswered:
        raise EngineError(
            f"no reply of {', '.join(map(repr, result.unanswered))} had an answer, so the "
            "comparison says nothing of the model; see the warnings"
        )


def _tasks(
    path: Path | None,
    generate: int | None,
    kinds: str,
    levels: str | None,
    seed: int,
    keep_going: bool,
) -> tuple[list[dict[str, Any]], list[str]]:
    from tempering.agents.tasks import generate_tasks, load_tasks
    from tempering.errors import InputError

    if (path is None) == (generate is None):
        raise InputError("give --tasks FILE or --generate N, one of the two")
    if path is not None:
        return load_tasks(path, keep_going=keep_going)
    names = [name.strip() for name in kinds.split(",")]
    chosen = common.numbers(levels, "--levels")
    return generate_tasks(generate or 0, seed=seed, kinds=names, levels=chosen), []


def _ladder(text: str) -> tuple[float, float]:
    from tempering.errors import InputError

    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--ladder takes two temperatures, e.g. 0.4,1.2; not '{text}'") from None
    return low, high
