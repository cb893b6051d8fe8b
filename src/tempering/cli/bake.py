"""tempering bake: fold a profile into a model's weights, check whether it folds, or undo it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tempering.cli.shared import common
from tempering.errors import InputError

if TYPE_CHECKING:
    from tempering.attention.baking.foldable import Foldable

EPILOG = """Examples:

  tempering bake smollm2 --check

  tempering bake smollm2 --profile tuned.json --out warm

  tempering bake model.gguf --profile tuned.json --out warm.gguf

  tempering bake model.gguf --profile tuned.json --in-place-scales

  tempering bake warm --undo --out original
"""


def bake(
    model: Annotated[
        str,
        typer.Argument(
            help="A name of `tempering models`, a directory with safetensors, a hub id, or a .gguf "
            "file. With --out FILE.gguf a name stands for the GGUF file that it comes in."
        ),
    ],
    profile: Annotated[str | None, typer.Option(help="Profile file to fold in.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory (or .gguf file) to write; it must not exist.")
    ] = None,
    in_place: Annotated[
        bool,
        typer.Option(
            "--in-place-scales",
            help="Change nothing but the scales of a GGUF file or of a quantised checkpoint: same "
            "size, same integers. Without --out a GGUF file is replaced itself, whole or not at "
            "all.",
        ),
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Say what folds: per head, per layer or not, and why.")
    ] = False,
    undo: Annotated[
        bool, typer.Option("--undo", help="Take the profile out of a baked model.")
    ] = False,
    as_json: common.Json = False,
) -> None:
    """Fold a profile into the weights, to run anywhere."""
    if check and undo:
        raise InputError("--check and --undo exclude each other")
    if check:
        if out is not None or in_place:
            raise InputError("--check writes nothing: it takes no --out and no --in-place-scales")
        _check(model, profile, as_json)
        return
    if in_place and undo:
        raise InputError(
            "--undo needs no --in-place-scales: it reads from the mark what was changed"
        )
    itself = in_place and model.endswith(".gguf")
    if (out is None and not itself) or (profile is None) != undo:
        wanted = "--undo --out DIR" if undo else "--profile FILE --out DIR (or --check, or --undo)"
        raise InputError(f"give tempering bake MODEL {wanted}")
    source = Path(model).expanduser() if out is None else _gguf_source(model, out)
    if undo and out is not None:
        _undo(model if source is None else str(source), out, as_json)
        return
    from tempering.attention.profiles.profile import Profile

    chosen = Profile.load(profile or "")
    result: Any
    if source is not None:
        from tempering.engines.checkpoints.gguf import bake_gguf

        result = bake_gguf(source, chosen, out, in_place=in_place, say=common.note)
        types = ", ".join(f"{count} {kind}" for kind, count in result.kept.items()) or "none"
        wide = ", ".join(f"{count} {kind}" for kind, count in result.widened.items()) or "none"
        changed = (
            f"tensors changed in their own type: {types}; in a wider one: {wide}\n"
            f"rounding: at most {result.rounding:.2g} of a head's weights"
        )
        stored = "as stored"
    else:
        from tempering.engines.checkpoints.bake import bake_checkpoint
        from tempering.engines.checkpoints.scales import bake_scales

        write = bake_scales if in_place else bake_checkpoint
        result = write(model, chosen, out or "", say=common.note)
        changed = f"tensors changed: {result.tensors} ({result.dtype})"
        stored = f"as stored in {result.dtype}"
        if result.rounding is not None:
            changed += f"\nrounding: at most {result.rounding:.2g} of a head's weights"
    if as_json:
        print(json.dumps(vars(result), default=str))
        return
    print(f"wrote {result.path}: {chosen.describe()} folded ({result.verdict})")
    print(changed)
    print(
        "logits against the controlled model, in their standard deviations: "
        f"{result.deviation:.2g} folded in float32, {result.stored:.2g} {stored}"
    )
    if source is not None and in_place:
        print(
            f"same size, nothing changed but scales; {result.mark} says how to undo it: keep it "
            "beside the file"
        )


def _check(model: str, profile: str | None, as_json: bool) -> None:
    from tempering.attention.profiles.profile import Profile
    from tempering.engines.checkpoints.check import check_model

    chosen = Profile.load(profile) if profile is not None else None
    found = check_model(model, chosen)
    if as_json:
        layers = [
            {"name": layer.name, "verdict": layer.verdict, "reason": layer.reason}
            for layer in found.plan
        ]
        print(json.dumps({"verdict": found.verdict, "reason": found.reason, "layers": layers}))
        return
    print(f"{model}: {_sentence(found)}")
    if chosen is not None:
        print(f"{profile}: {chosen.describe()}, folds")


def _sentence(found: Foldable) -> str:
    from tempering.attention.baking.foldable import NO, PER_HEAD, PER_LAYER

    if found.verdict == PER_HEAD:
        return "folds per head"
    counts = {
        verdict: sum(layer.verdict == verdict for layer in found.plan)
        for verdict in (PER_HEAD, PER_LAYER, NO)
    }
    detail = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    kind = "folds per layer only" if found.verdict == PER_LAYER else "does not fold"
    of = f" ({len(found.plan)} layers: {detail})" if found.plan else ""
    return f"{kind}: {found.reason}{of}"


def _undo(model: str, out: Path, as_json: bool) -> None:
    if model.endswith(".gguf"):
        from tempering.engines.checkpoints.gguf import undo_gguf

        count = undo_gguf(model, out)
    else:
        from tempering.engines.checkpoints.bake import undo_checkpoint

        count = undo_checkpoint(model, out)
    if as_json:
        print(json.dumps({"path": str(out), "tensors": count}))
    else:
        print(f"wrote {out}: the profile is out of {count} tensors, to rounding")


def _gguf_source(model: str, out: Path) -> Path | None:
    """The GGUF file to bake; None for a checkpoint."""
    from tempering.engines.loading.catalogue import MODELS

    wanted = out.suffix == ".gguf"
    if model.endswith(".gguf"):
        if not wanted:
            raise InputError(f"{model} is a GGUF file, so --out is a .gguf file too, not {out}")
        return Path(model).expanduser()
    if not wanted:
        return None
    if model not in MODELS:
        raise InputError(
            f"--out {out} is a GGUF file, and {model} is none; give MODEL.gguf, or a directory "
            "for --out"
        )
    from tempering.engines.loading.gguf_files import embedded_gguf

    return embedded_gguf(model)
