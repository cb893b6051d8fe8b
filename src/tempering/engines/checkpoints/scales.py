"""Bake a profile into a quantised checkpoint by its scales alone: every integer stays as it is.

The model is dequantised into a directory of its own for the while, where the plan is found and
proved as for any other; what folds into rows of a weight there goes into the scales of those rows.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tempering.attention.baking.bake_mark import make_mark
from tempering.attention.baking.comparison import (
    ROUNDING,
    check_deviation,
    rounding,
)
from tempering.attention.baking.folds import PLAIN, Fold
from tempering.attention.baking.widened import widened
from tempering.attention.control.tempered import BAKED_MARK
from tempering.attention.profiles.profile import Profile
from tempering.engines.checkpoints.bake import (
    BakeResult,
    beside,
    free_place,
    located,
    open_checkpoint,
    refuse_baked_checkpoint,
    write_card,
    write_config,
)
from tempering.engines.checkpoints.files import Checkpoint, copy_settings
from tempering.engines.checkpoints.quantised import Quantised, reader_of
from tempering.engines.checkpoints.target import bake_target
from tempering.engines.loading.hub import load_model
from tempering.errors import BakeError

Parts = dict[str, list[tuple[Fold, Tensor]]]


def bake_scales(
    name: str | Path,
    profile: Profile,
    out: str | Path,
    *,
    say: Callable[[str], None] = lambda line: None,
) -> BakeResult:
    """Write a copy of a quantised checkpoint whose scales hold the temperatures of `profile`.

    The files keep their size and their integers; `config.json` gets the mark of a bake.

    Parameters
    ----------
    name: a directory in transformers' format with safetensors, or a hub id. `quantised` lists
        the layouts.
    profile, out, say: as in `bake_checkpoint`.

    Raises what `bake_checkpoint` does; BakeError names a layout that isn't known, and a scale that
    serves heads of different temperatures. Nothing is written then.
    """
    out = free_place(out)
    checkpoint = open_checkpoint(name)
    refuse_baked_checkpoint(checkpoint.config, str(name))
    say("dequantising the model")
    with _plain(checkpoint, str(name), out) as (plain, weights):
        model, tokenizer = load_model(plain)
        profile.check_model(model)
        target = bake_target(model, tokenizer, profile, say)
        own = Checkpoint(plain)
        in_plain = located(model, own, target.folds)
        with widened(model, target.folds):
            exact = target.deviation(model)
        check_deviation(exact, "the baked model")
        del model
        in_files: Parts = {}
        for key, parts in in_plain.items():
            for fold, beta in parts:
                if key in weights:
                    fold = on_scales(fold, beta, weights[key], checkpoint)
                in_files.setdefault(fold.parameter, []).append((fold, beta))
        say(f"writing {out}")
        with beside(out) as partial:
            checkpoint.write(partial, in_files)
            mark = make_mark(target.profile, in_files)
            write_config(partial, {**checkpoint.config, BAKED_MARK: mark})
            say("loading it back")
            with _plain(Checkpoint(partial), str(name), out) as (again, _):
                lost = _lost(own, Checkpoint(again), in_plain)
                model, _ = load_model(again)
                stored = target.check_stored(model, "checkpoint")
            kinds = sorted({checkpoint.tensors[key].dtype for key in in_files})
            result = BakeResult(
                out, target.verdict, len(in_files), ", ".join(kinds), exact, stored, lost
            )
            write_card(partial, name, target.profile, result)
    return result


def on_scales(fold: Fold, beta: Tensor, weight: Quantised, checkpoint: Checkpoint) -> Fold:
    """The fold of a weight's scales that equals a fold of its rows.

    Raises BakeError where one scale serves rows of different temperatures.
    """
    rows, columns = weight.values.shape
    if fold.axis != 0 or fold.form != PLAIN:
        raise BakeError(f"{fold.parameter}: its heads aren't rows, and {weight.scales} scales rows")
    shape = checkpoint.tensors[weight.scales].shape
    if not shape:
        raise BakeError(
            f"{weight.scales} is one scale for all of {fold.parameter}; quantise it by row "
            "(channel), group or block"
        )
    labels = fold.labels(rows)
    # Rows in no run keep their temperature, as those of a head at T = 1 do.
    factors = torch.where(labels < 0, 1.0, beta[labels.clamp(min=0)])
    count = shape[weight.axis or 0]
    entries = torch.arange(count)
    if weight.axis is None:
        size = rows * columns // count
        first, last = entries * size // columns, ((entries + 1) * size - 1) // columns
    else:
        size = -(-rows // count)
        first, last = entries * size, ((entries + 1) * size).clamp(max=rows) - 1
    changes = torch.cat((torch.zeros(1), (factors[1:] != factors[:-1]).cumsum(0)))
    mixed = (changes[first] != changes[last]).nonzero().flatten().tolist()
    if mixed:
        start, stop = int(first[mixed[0]]), int(last[mixed[0]])
        part = factors[start : stop + 1]
        raise BakeError(
            f"{weight.scales} has one scale for rows {start} to {stop} of {fold.parameter}, "
            f"which belong to heads at 1/T = {float(part.min()):.3g} to "
            f"{float(part.max()):.3g}; give these heads one temperature, or quantise it by row"
        )
    return Fold.of(weight.scales, weight.axis or 0, labels[first])


@contextmanager
def _plain(
    checkpoint: Checkpoint, name: str, out: Path
) -> Iterator[tuple[Path, dict[str, Quantised]]]:
    """A directory with the dequantised model in it, and its quantised weights without values."""
    settings = checkpoint.config.get("quantization_config")
    if not settings:
        raise BakeError(
            f"{name} isn't quantised, so it has no scales; bake it without --in-place-scales"
        )
    suffix, read = reader_of(settings, name)
    modules = [key.removesuffix(suffix) for key in checkpoint.tensors if key.endswith(suffix)]
    if not modules:
        raise BakeError(
            f"{name} has no tensor called *{suffix}, though config.json says {settings}"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-plain-", dir=out.parent) as folder:
        plain = Path(folder)
        copy_settings(checkpoint.directory, plain)
        config = {**checkpoint.config, "dtype": "float32"}
        for key in ("quantization_config", "torch_dtype", BAKED_MARK):
            config.pop(key, None)
        write_config(plain, config)
        weights: dict[str, Quantised] = {}
        places: dict[str, str] = {}
        used: set[str] = set()
        for index, module in enumerate(modules):
            item = read(checkpoint, module, settings)
            file = f"model-{index}.safetensors"
            save_file({f"{module}.weight": item.values.contiguous()}, plain / file)
            places[f"{module}.weight"] = file
            weights[f"{module}.weight"] = replace(item, values=item.values.to("meta"))
            used |= {*item.used}
        rest = {
            key: checkpoint.read(key)
            for key in checkpoint.tensors
            if key not in used and not _beside_weight(key, modules)
        }
        save_file(rest, plain / "model-rest.safetensors")
        places.update(dict.fromkeys(rest, "model-rest.safetensors"))
        index_text = json.dumps({"metadata": {}, "weight_map": places})
        (plain / "model.safetensors.index.json").write_text(index_text, encoding="utf-8")
        yield plain, weights


def _beside_weight(key: str, modules: list[str]) -> bool:
    """Whether a tensor only helps a quantised layer at run time (scales of its activations)."""
    module, _, part = key.rpartition(".")
    return part in {"input_scale", "activation_scale", "input_zero_point"} and module in modules


def _lost(before: Checkpoint, after: Checkpoint, folds: Parts) -> float:
    """The share of a head's weights that rounding lost, the worst; BakeError where it is much."""
    worst = 0.0
    for key, parts in folds.items():
        exact, stored = before.read(key), after.read(key)
        for fold, beta in parts:
            fold.apply_(exact, beta)
        lost = max(rounding(fold, exact, stored) for fold, _ in parts)
        if not lost <= ROUNDING:
            raise BakeError(
                f"{key} would lose {lost:.2g} of a head to the rounding of its scales (allowed "
                f"{ROUNDING:.2g}); take temperatures nearer to 1 for its layer"
            )
        worst = max(worst, lost)
    return worst
