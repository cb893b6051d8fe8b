"""tempering audit: at which temperature does an engine really run?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tempering.cli.shared import common

EPILOG = """Examples:

  tempering audit --reference DIR --engine http://localhost:8000/v1 --served NAME

  tempering audit --reference DIR --engine vllm --precision bfloat16

  tempering audit --reference DIR --engine llamacpp --served FILE.gguf

  tempering audit --reference DIR --engine scores.jsonl

  tempering audit --reference DIR --engine vllm --profile tuned.json

Exit status: 0 the engine is right, 1 it is wrong, 2 it can't be told.
"""


def audit(
    reference: Annotated[
        str, typer.Option(help="What the engine should run: as for --model, or a GGUF file.")
    ] = "smollm2",
    engine: Annotated[
        str,
        typer.Option(
            help="The address of an OpenAI-compatible server that echoes log probabilities, vllm "
            "or llamacpp (started here), or a file of JSON lines."
        ),
    ] = "vllm",
    served: Annotated[
        str | None,
        typer.Option(help="What the engine serves, where it isn't --reference: a name or file."),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="That the engine computes in: float32, bfloat16, float16, or q8 (quantised "
            "weights); float32 by default, with llamacpp as its file says."
        ),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="The profile that the engine was given, to be checked.")
    ] = None,
    text: common.TextFile = None,
    chunk: common.Chunk = 256,
    limit: common.Limit = 8,
    layers: Annotated[
        bool, typer.Option("--layers/--no-layers", help="Also fit T of each layer: slower.")
    ] = True,
    seed: common.Seed = 0,
    device: common.Device = None,
    timeout: Annotated[float, typer.Option(help="Seconds for one request.", min=0.1)] = 120.0,
    out: common.Out = common.RUNS,
    as_json: common.Json = False,
) -> None:
    """Say at which temperature an engine runs a model.

    And which known mistake explains it.

    Its log probabilities of a text are compared with those of the reference, run in this process.
    """
    from tempering.attention.profiles.profile import Profile
    from tempering.audit.audit import audit as run
    from tempering.audit.rounding import check_precision
    from tempering.cli.shared.audit_results import audit_sections, open_reference, prompts_of
    from tempering.reports import Record

    if precision is not None:
        check_precision(precision)
    common.check_out(out)
    wanted = None if profile is None else Profile.load(profile)
    network, tokenizer = open_reference(reference, device, precision)
    section = common.model_section(network, reference)
    with common.staged() as report:
        said, name, kind = prompts_of(
            network,
            tokenizer,
            engine,
            served or reference,
            profile=wanted,
            text=text,
            chunk=chunk,
            limit=limit,
            precision=precision,
            timeout=timeout,
            report=report,
        )
        found = run(
            network,
            said,
            name=name,
            precision=kind,
            profile=wanted,
            layers=layers,
            seed=seed,
            progress=report,
        )
    settings: dict[str, Any] = {
        "engine": name,
        "served": served,
        "precision": kind,
        "profile": None if profile is None else profile.name,
        "text": None if text is None else text.name,
        "chunk": chunk,
        "chunks": limit,
        "layers": layers,
    }
    record = Record.new(
        "audit",
        settings=settings,
        results=audit_sections(found, tokenizer),
        model=section,
        seed=seed,
        device=device or "cpu",
    )
    common.finish(record, out, as_json)
    if not as_json:
        print(found.verdict)
    if found.exit_code:
        raise typer.Exit(found.exit_code)
