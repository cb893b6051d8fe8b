"""Bake a profile into a GGUF file, for llama.cpp, and take it out again."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tempering.attention.baking.bake_mark import make_mark, read_mark
from tempering.attention.baking.comparison import (
    ROUNDING,
    check_deviation,
    rounding,
)
from tempering.attention.baking.file_rows import locate
from tempering.attention.baking.folds import Fold, folded
from tempering.attention.profiles.profile import Profile
from tempering.engines.checkpoints.bake import free_place
from tempering.engines.checkpoints.gguf_blocks import Parts, values_of
from tempering.engines.checkpoints.gguf_write import sidecar, write_anew, write_in_place
from tempering.engines.checkpoints.target import bake_target
from tempering.engines.loading.gguf_files import load_gguf, open_gguf
from tempering.engines.loading.gguf_mark import (
    MARK,
    beside_of,
    is_baked,
    loaded_mark,
    order_of,
    read_beside,
)
from tempering.errors import BakeError, CheckError, OutputError
from tempering.files import replace_atomic, write_atomic


@dataclass(frozen=True)
class GgufResult:
    """What was written, and how far it is from the controlled model.

    path: the new file. verdict: "per head" or "per layer".
    kept: tensors changed in their own type, by type; widened: those that take a wider one.
    rounding: share of its changed weights that a head lost to rounding, at the worst head.
    deviation, stored: of the logits, as in `BakeResult`.
    mark: the file beside it that undoes it, when scales were changed in place.
    """

    path: Path
    verdict: str
    kept: dict[str, int]
    widened: dict[str, int]
    rounding: float
    deviation: float
    stored: float
    mark: Path | None = None


def bake_gguf(
    source: str | Path,
    profile: Profile,
    out: str | Path | None = None,
    *,
    in_place: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> GgufResult:
    """Write a copy of a GGUF file whose own attention temperatures are those of `profile`.

    Tensors keep their type: beta goes into the scales of their blocks, and no code is
    requantised. Where float16 can't hold the scales, the tensor is stored wider, and the result
    says so.

    Parameters
    ----------
    source: a GGUF file whose architecture transformers reads.
    profile: temperatures; layers at T = 1 stay as they are.
    out: the file to write; it must not exist. None with `in_place` replaces `source` itself,
        whole or not at all.
    in_place: change nothing but scales (weights, in tensors of plain numbers): the file keeps
        its size to the byte, its types and its integers, and a tensor that can't is refused.
        How such a file is marked as baked is in `gguf_mark`.
    say: called with one line before each step.

    Raises BakeError (names the layer or the tensor, and the reason), ProfileError, ModelError,
    CheckError, OutputError. Nothing is written then.
    """
    source = Path(source).expanduser()
    out = _itself(source) if out is None and in_place else free_place(_given(out))
    reader = open_gguf(source)
    if is_baked(reader):
        raise BakeError(
            f"{source} was baked with a temperature profile already; bake the original, or take "
            f"the profile out first: tempering bake {source} --undo --out FILE.gguf"
        )
    beside = _free_beside(out) if in_place else None
    say("loading the model")
    model, tokenizer = load_gguf(source)
    profile.check_model(model)
    target = bake_target(model, tokenizer, profile, say)
    in_file = _located(model, target.folds, reader)
    with folded(model, target.folds):
        exact = target.deviation(model)
        check_deviation(exact, "the baked model")
        kept_exact = {
            fold.parameter: model.get_parameter(fold.parameter).detach().clone()
            for fold, _ in target.folds
        }
    del model
    say(f"writing {out}")
    results: list[GgufResult] = []

    def fill(partial: Path) -> None:
        mark = make_mark(target.profile, in_file)
        if beside is None:
            written = write_anew(reader, partial, in_file, json.dumps(mark))
        else:
            written = write_in_place(reader, source, partial, in_file, ROUNDING)
        say("loading it back")
        again, _ = load_gguf(partial)
        _check_weights(again, target.folds, kept_exact)
        stored = target.check_stored(again, "GGUF file")
        results.append(GgufResult(out, target.verdict, *written, exact, stored, beside))
        if beside is not None:
            write_atomic(beside, json.dumps(sidecar(reader, partial, mark)) + "\n")

    mode = stat.S_IMODE(source.stat().st_mode)
    try:
        replace_atomic(out, fill)
    except BaseException:
        if beside is not None:
            beside.unlink(missing_ok=True)
        raise
    if out == source:
        out.chmod(mode)
    return results[0]


def undo_gguf(source: str | Path, out: str | Path) -> int:
    """Write a baked GGUF file's original weights, to rounding; the number of tensors changed."""
    source, out = Path(source).expanduser(), free_place(out)
    reader = open_gguf(source)
    field = reader.get_field(MARK)
    mark = read_beside(reader, source) if field is None else loaded_mark(reader, source)
    if mark is None:
        raise BakeError(f"{source} carries no mark of a bake; only a baked model can be undone")
    _, folds = read_mark(mark, str(source))
    inverse = {
        name: [(fold, beta.reciprocal()) for fold, beta in parts] for name, parts in folds.items()
    }

    def fill(partial: Path) -> None:
        if field is None:
            now = order_of(reader)
            first = [key for key in mark["order"] if key in now]
            order = first + [key for key in now if key not in first]
            write_in_place(reader, source, partial, inverse, math.inf, order)
        else:
            write_anew(reader, partial, inverse, None)

    replace_atomic(out, fill)
    return len(inverse)


def _given(out: str | Path | None) -> str | Path:
    if out is None:
        raise OutputError("name the file to write; only in_place=True may do without")
    return out


def _itself(source: Path) -> Path:
    """The file to replace by itself; OutputError where that would do something else."""
    if source.is_symlink():
        raise OutputError(
            f"{source} is a link to {source.resolve()}, which others may use; give --out FILE.gguf"
        )
    if source.exists() and not os.access(source, os.W_OK):
        raise OutputError(f"{source} is read-only; give --out FILE.gguf, or allow writing")
    return source


def _free_beside(out: Path) -> Path:
    beside = beside_of(out)
    if beside.exists() or beside.is_symlink():
        raise OutputError(
            f"{beside} exists, which undoes an earlier bake of a file with this name; move it to "
            "that file, or remove it first"
        )
    return beside


def _located(model: Any, chosen: list[tuple[Fold, Tensor]], reader: Any) -> dict[str, Parts]:
    """The folds of the file's tensors, by tensor."""
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    shapes = {name: tuple(map(int, reversed(item.shape))) for name, item in tensors.items()}
    in_file: dict[str, Parts] = {}
    for fold, beta in chosen:
        weights = model.get_parameter(fold.parameter)
        for item in locate(
            fold,
            beta,
            weights,
            [fold.parameter],
            shapes,
            lambda name: values_of(tensors[name].data, tensors[name].tensor_type),
        ):
            in_file.setdefault(item.parameter, []).append((item, beta))
    return in_file


def _check_weights(
    again: Any, chosen: list[tuple[Fold, Tensor]], exact: Mapping[str, Tensor]
) -> None:
    """CheckError unless the folded weights came back, up to the rounding that is allowed."""
    for fold, _ in chosen:
        lost = rounding(fold, exact[fold.parameter], again.get_parameter(fold.parameter).detach())
        if not lost <= ROUNDING:
            raise CheckError(
                f"{fold.parameter} came back from the GGUF file off by {lost:.2g} of itself "
                f"(allowed {ROUNDING:.2g}); nothing was written"
            )
