"""tempering repair: temperatures and output scales that give back what compression took."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tempering.cli.shared import common
from tempering.cli.shared import tuning_runs as learning

EPILOG = """Examples:

  tempering repair smollm2-3bit --reference smollm2 --out repaired.json

  tempering repair DIR --reference BIG_DIR --data notes.txt --samples 0

  tempering repair DIR --data notes.txt

  tempering repair smollm2-3bit --reference smollm2 --by support

The profile goes with the compressed model: tempering generate --model smollm2-3bit --profile
repaired.json, or tempering bake.
"""


def repair(
    compressed: Annotated[
        str, typer.Argument(help="The compressed model: a name, directory or GGUF file.")
    ],
    reference: Annotated[
        str | None, typer.Option(help="The model it was compressed from; its teacher.")
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Text or .jsonl to learn from; texts of the package without it."),
    ] = None,
    samples: Annotated[
        int, typer.Option(help="Chunks that the reference writes itself.", min=0)
    ] = 16,
    by: Annotated[
        str,
        typer.Option(help="learning (gradients), or support (one forward pass, gives less)."),
    ] = "learning",
    top: Annotated[
        int,
        typer.Option(help="Tokens kept of each of the reference's distributions; 0: all.", min=0),
    ] = 128,
    test: learning.Tests = None,
    elsewhere: learning.Elsewhere = 6,
    shuffles: learning.Shuffles = 2,
    per: learning.Per = "head",
    scales: Annotated[
        bool,
        typer.Option(help="Learn factors on the heads' outputs too, one for each value head."),
    ] = True,
    constraint: learning.ConstraintFile = None,
    within: learning.Within = 0.01,
    passes: Annotated[int, typer.Option(help="Times through the data.", min=1)] = 1,
    rows: Annotated[int, typer.Option(help="Chunks of each text in a step.", min=1)] = 2,
    held_out: learning.HeldOutShare = 0.1,
    checkpoint: learning.Checkpointing = False,
    resume: learning.Resume = False,
    chunk: common.Chunk = 512,
    limit: common.Limit = 24,
    seed: common.Seed = 0,
    device: common.Device = None,
    dtype: common.Dtype = "float32",
    out: learning.ProfileOut = Path("repaired.json"),
    as_json: common.Json = False,
) -> None:
    """Give back what compression took, weights frozen.

    A temperature for each head, and a factor on the output of each value head, bring a compressed
    model back towards its reference. Ctrl-C keeps what was done; the same command with --resume
    goes on.
    """
    from tempering.cli.shared.repairing.material import RepairOptions
    from tempering.cli.shared.repairing.run import run_repair
    from tempering.errors import InputError

    common.check_file(out, "--out", ".json")
    if by not in ("learning", "support"):
        raise InputError(f"--by is learning or support, not '{by}'")
    if reference is None and (by == "support" or samples):
        if by == "support":
            raise InputError("--by support needs a --reference, whose support is restored")
        samples = 0
    settings: dict[str, Any] = {
        "by": by,
        "samples": samples,
        "top": top or None,
        "per": per,
        "output scales": scales and by == "learning",
        "passes": passes,
        "rows": rows,
        "held_out": held_out,
        "chunk": chunk,
        "chunks": limit,
        "within": within if constraint else None,
    }
    run_repair(
        RepairOptions(
            compressed=compressed,
            reference=reference,
            data=data or [],
            tests=test or [],
            constraint=constraint,
            elsewhere=elsewhere,
            shuffles=shuffles,
            checkpoint=checkpoint,
            resume=resume,
            seed=seed,
            device=device,
            dtype=dtype,
            out=out,
            as_json=as_json,
            settings=settings,
        )
    )
