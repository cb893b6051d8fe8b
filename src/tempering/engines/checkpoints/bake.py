"""Bake a profile into a checkpoint on disk, and take it out again.

Weights stay in their files, mapped into memory: the plan is found and proved, and logits are
compared, with one layer at a time in float32; files are written one tensor at a time. The result
is loaded back and compared before it gets its name, so there is a whole and verified model in DIR
or none.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tempering.attention.baking.bake_mark import make_mark, read_mark
from tempering.attention.baking.comparison import (
    check_deviation,
    deviation,
    logits_of,
    refuse_rounding,
)
from tempering.attention.baking.file_rows import locate
from tempering.attention.baking.folds import Fold
from tempering.attention.baking.widened import folded_copy, widened
from tempering.attention.control.tempered import BAKED_MARK
from tempering.attention.profiles.profile import Profile
from tempering.engines.checkpoints.card import model_card
from tempering.engines.checkpoints.files import Checkpoint
from tempering.engines.checkpoints.target import bake_target
from tempering.engines.loading.hub import find_model, load_model
from tempering.errors import BakeError, ModelError, OutputError


@dataclass(frozen=True)
class BakeResult:
    """What was written, and how far it is from the controlled model.

    path: the new checkpoint. verdict: "per head" or "per layer" (see `foldable`).
    tensors: number of tensors that changed. dtype: how they are stored.
    deviation: of the logits from the controlled model's, folded in float32, in standard
        deviations of the logits; at most 1e-4.
    stored: the same for the weights as stored, rounded to their dtype.
    rounding: share of its weights that a head lost to the rounding of scales, at the worst head;
        None where weights that aren't quantised were folded.
    """

    path: Path
    verdict: str
    tensors: int
    dtype: str
    deviation: float
    stored: float
    rounding: float | None = None


def bake_checkpoint(
    name: str | Path,
    profile: Profile,
    out: str | Path,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> BakeResult:
    """Write a copy of a model whose own attention temperatures are those of `profile`.

    Parameters
    ----------
    name: a known model, a directory in transformers' format with safetensors, or a hub id.
    profile: temperatures; layers at T = 1 stay as they are.
    out: the directory to write; it must not exist.
    say: called with one line before each step.

    Raises BakeError (names the layer and the reason), ProfileError, ModelError (a shard is
    missing, ...), CheckError (the result disagrees), OutputError. Nothing is written then.
    """
    out = free_place(out)
    checkpoint = open_checkpoint(name)
    refuse_checkpoint(checkpoint.config, str(name))
    say("loading the model")
    model, tokenizer = load_model(name, dtype=checkpoint.main_dtype)
    profile.check_model(model)
    with widened(model):
        target = bake_target(model, tokenizer, profile, say)
    in_files = located(model, checkpoint, target.folds)
    with widened(model, target.folds):
        rounded = logits_of(model, target.inputs)
    exact = stored = deviation(rounded, target.wanted)
    check_deviation(exact, "the baked model")
    if _rounds(model, checkpoint, target.folds, in_files):
        with widened(model, target.folds, rounded=True):
            rounded = logits_of(model, target.inputs)
        stored = deviation(rounded, target.wanted)
    del model
    dtypes = sorted({str(checkpoint.dtype(key)).removeprefix("torch.") for key in in_files})
    result = BakeResult(out, target.verdict, len(in_files), ", ".join(dtypes), exact, stored)
    say(f"writing {out}")
    with beside(out) as partial:
        checkpoint.write(partial, in_files)
        write_config(
            partial, {**checkpoint.config, BAKED_MARK: make_mark(target.profile, in_files)}
        )
        write_card(partial, name, target.profile, result)
        say("loading it back")
        again, _ = load_model(partial, dtype=checkpoint.main_dtype)
        with widened(again):
            check_deviation(
                deviation(logits_of(again, target.inputs), rounded), "the model loaded back"
            )
    return result


def undo_checkpoint(name: str | Path, out: str | Path) -> int:
    """Write a baked checkpoint's original weights, to rounding; the number of tensors changed.

    Raises BakeError when it carries no mark of a bake, OutputError when `out` exists.
    """
    out = free_place(out)
    checkpoint = open_checkpoint(name)
    _, folds = read_mark(checkpoint.config.get(BAKED_MARK), str(name))
    missing = [key for key in folds if key not in checkpoint.tensors]
    if missing:
        raise BakeError(
            f"the mark of {name} names {missing[0]}, which its files lack; undo the checkpoint "
            "as it was baked"
        )
    inverse = {
        key: [(fold, beta.reciprocal()) for fold, beta in parts] for key, parts in folds.items()
    }
    with beside(out) as partial:
        checkpoint.write(partial, inverse)
        plain = {key: value for key, value in checkpoint.config.items() if key != BAKED_MARK}
        write_config(partial, plain)
    return len(folds)


def open_checkpoint(name: str | Path) -> Checkpoint:
    """The files of a model: a known one, a directory, or a hub id."""
    place, remote = find_model(name)
    return Checkpoint(_hub_directory(place) if remote else Path(place))


def _hub_directory(name: str) -> Path:
    """The hub cache's directory of a model, fetched as far as it isn't there."""
    from huggingface_hub import snapshot_download

    kept = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*"]
    try:
        return Path(snapshot_download(name, allow_patterns=kept))
    except Exception as error:
        raise ModelError(
            f"the model {name!r} can't be fetched from the hub whole "
            f"({' '.join(str(error).split())[:200]})"
        ) from error


def refuse_checkpoint(config: dict[str, Any], name: str) -> None:
    """BakeError for a configuration whose weights are quantised or baked already."""
    refuse_baked_checkpoint(config, name)
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown method")
        raise BakeError(
            f"the weights of {name} are quantised ({method}), which can't be folded exactly; "
            "bake the model that they were quantised from, then quantise it; or change their "
            "scales: --in-place-scales"
        )


def refuse_baked_checkpoint(config: dict[str, Any], name: str) -> None:
    """BakeError for the configuration of a model that carries the mark of a bake."""
    if config.get(BAKED_MARK):
        raise BakeError(
            f"{name} was baked with a temperature profile already; bake the original, or take "
            f"the profile out first: tempering bake {name} --undo --out DIR"
        )


def free_place(out: str | Path) -> Path:
    """The path of a result, which must not exist yet."""
    out = Path(out).expanduser()
    if out.exists() or out.is_symlink():
        raise OutputError(f"{out} exists; name a place that doesn't, or remove it first")
    return out


@contextlib.contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A temporary directory that takes the name `out` at the end, or vanishes after an error."""
    partial: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        yield partial
        # mkdtemp makes a private directory; give it what a plain mkdir would.
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o777 & ~umask)
        free_place(out)
        partial.rename(out)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"can't write {out}: {error.strerror or error}; nothing was written. "
            "Free some space or name another place"
        ) from error
    finally:
        if partial is not None and partial.exists():
            shutil.rmtree(partial, ignore_errors=True)


def located(
    model: Any, checkpoint: Checkpoint, chosen: list[tuple[Fold, Tensor]]
) -> dict[str, list[tuple[Fold, Tensor]]]:
    """The folds of the files' tensors, by tensor."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found: dict[str, list[tuple[Fold, Tensor]]] = {}
    for fold, beta in chosen:
        weights = model.get_parameter(fold.parameter)
        own = names[id(weights)]
        weights = folded_copy(weights, (), rounded=False)
        for item in locate(fold, beta, weights, own, checkpoint.shapes, checkpoint.read):
            found.setdefault(item.parameter, []).append((item, beta))
    return found


def _rounds(
    model: Any,
    checkpoint: Checkpoint,
    chosen: list[tuple[Fold, Tensor]],
    in_files: dict[str, list[tuple[Fold, Tensor]]],
) -> bool:
    """Whether the files round folded parameters; BakeError where that loses much."""
    dtypes = {checkpoint.dtype(name) for name in in_files}
    if dtypes <= {torch.float32, torch.float64}:
        return False
    dtype = dtypes.pop()
    if dtypes or dtype != checkpoint.main_dtype:
        raise BakeError(
            f"the files mix {', '.join(sorted(map(str, {dtype, checkpoint.main_dtype, *dtypes})))} "
            "in what would be folded; load and save the model in one dtype, then bake that"
        )
    for fold, beta in chosen:
        weights = model.get_parameter(fold.parameter)
        exact, rounded = (folded_copy(weights, [(fold, beta)], each) for each in (False, True))
        refuse_rounding(fold, beta, weights, exact, rounded)
    return True


def write_card(directory: Path, name: str | Path, profile: Profile, result: BakeResult) -> None:
    """The model card of what was baked from the model `name`."""
    base = Path(name).name if Path(name).exists() else str(name)
    undo = f"tempering bake {result.path.name} --undo --out DIR"
    card = model_card(base, profile, _table(result), undo)
    (directory / "README.md").write_text(card, encoding="utf-8")


def _table(result: BakeResult) -> dict[str, str]:
    return {
        "logits against the controlled model, folded in float32": f"{result.deviation:.2g} std",
        f"the same, stored as {result.dtype}": f"{result.stored:.2g} std",
        "tensors changed": str(result.tensors),
        "foldable": result.verdict,
    }


def write_config(directory: Path, content: Any) -> None:
    text = json.dumps(content, indent=2) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
