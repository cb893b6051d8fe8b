"""Bake a profile into a GGUF file, for llama.cpp, and take it out again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tempering.attention.baking.bake import foldable
from tempering.attention.baking.bake_mark import make_mark, read_mark
from tempering.attention.baking.comparison import (
    ROUNDING,
    check_deviation,
    controlled_logits,
    deviation,
    logits_of,
    rounding,
    verification_inputs,
)
from tempering.attention.baking.file_rows import locate
from tempering.attention.baking.folds import Fold, folded
from tempering.attention.baking.profile_folds import betas
from tempering.attention.control.tempered import BAKED_MARK
from tempering.attention.examining.layout_of import layout
from tempering.attention.profiles.profile import Profile
from tempering.engines.checkpoints.bake import free_place, real_input
from tempering.engines.checkpoints.gguf_blocks import Parts, fold_tensor, values_of
from tempering.engines.loading import embedded
from tempering.engines.loading.quiet import quiet
from tempering.errors import BakeError, CheckError, ModelError
from tempering.files import replace_atomic

MARK = "tempering.bake"
# Of the standard deviation of the logits, for weights rounded as `ROUNDING` allows.
_STORED = 0.1


@dataclass(frozen=True)
class GgufResult:
    """What was written, and how far it is from the controlled model.

    path: the new file. verdict: "per head" or "per layer".
    kept: tensors changed in their own type, by type; widened: those that take a wider one.
    deviation, stored: of the logits, as in `BakeResult`.
    """

    path: Path
    verdict: str
    kept: dict[str, int]
    widened: dict[str, int]
    deviation: float
    stored: float


def bake_gguf(
    source: str | Path,
    profile: Profile,
    out: str | Path,
    *,
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
    out: the file to write; it must not exist.
    say: called with one line before each step.

    Raises BakeError (names the layer and the reason), ProfileError, ModelError, CheckError,
    OutputError. Nothing is written then.
    """
    source, out = Path(source).expanduser(), free_place(out)
    reader = _reader(source)
    if reader.get_field(MARK) is not None:
        raise BakeError(
            f"{source} was baked with a temperature profile already; bake the original, or take "
            f"the profile out first: tempering bake {source} --undo --out FILE.gguf"
        )
    say("loading the model")
    model, tokenizer = load_gguf(source)
    profile.check_model(model)
    profile.resolve(layout(model))
    say("finding what folds, layer by layer")
    found = foldable(model)
    chosen = betas(found, model, profile)
    bound = profile.adopt(model)
    say("comparing with the controlled model")
    inputs = [*verification_inputs(model, None), real_input(model, tokenizer)]
    wanted = controlled_logits(model, bound, inputs)
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
    with folded(model, chosen):
        exact = deviation(logits_of(model, inputs), wanted)
        check_deviation(exact, "the baked model")
        kept_exact = {
            fold.parameter: model.get_parameter(fold.parameter).detach().clone()
            for fold, _ in chosen
        }
    del model
    say(f"writing {out}")
    results: list[GgufResult] = []

    def fill(partial: Path) -> None:
        mark = json.dumps(make_mark(bound, in_file))
        kept, widened = _write(reader, partial, in_file, mark)
        say("loading it back")
        again, _ = load_gguf(partial)
        _check_weights(again, chosen, kept_exact)
        stored = deviation(logits_of(again, inputs), wanted)
        if not stored <= _STORED:
            raise CheckError(
                f"the GGUF file loaded back disagrees with the controlled model: its logits are "
                f"off by {stored:.2g} of their standard deviation (allowed {_STORED:g}); "
                "nothing was written"
            )
        results.append(GgufResult(out, found.verdict, kept, widened, exact, stored))

    replace_atomic(out, fill)
    return results[0]


def undo_gguf(source: str | Path, out: str | Path) -> int:
    """Write a baked GGUF file's original weights, to rounding; the number of tensors changed."""
    source, out = Path(source).expanduser(), free_place(out)
    reader = _reader(source)
    field = reader.get_field(MARK)
    if field is None:
        raise BakeError(f"{source} carries no mark of a bake; only a baked model can be undone")
    _, folds = read_mark(_mark(field, source), str(source))
    inverse = {
        name: [(fold, beta.reciprocal()) for fold, beta in parts] for name, parts in folds.items()
    }
    replace_atomic(out, lambda partial: _discard(_write(reader, partial, inverse, None)))
    return len(inverse)


def _mark(field: Any, source: Path) -> Any:
    try:
        return json.loads(field.contents())
    except (TypeError, ValueError) as error:
        raise BakeError(f"the mark of {source} is damaged: it is not JSON ({error})") from error


def _discard(result: object) -> None:
    return None


def _reader(source: Path) -> Any:
    from gguf import GGUFReader

    if not source.is_file():
        raise ModelError(f"no GGUF file {source}")
    try:
        reader = GGUFReader(source)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise ModelError(f"can't read {source} as a GGUF file: {error}") from error
    split = reader.get_field("split.count")
    if split is not None and int(split.contents()) > 1:
        raise BakeError(
            f"{source} is one part of a split model; join the parts first: llama-gguf-split --merge"
        )
    return reader


def embedded_gguf(name: str) -> Path:
    """The GGUF file that an embedded model comes in."""
    return embedded._find(embedded.MODELS[name]).path


def load_gguf(source: Path) -> tuple[Any, Any]:
    """Model (float32) and tokenizer of a GGUF file that transformers can read."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = str(source.parent), source.name
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
            model = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=file, dtype=torch.float32
            )
        except Exception as error:  # the loaders raise every kind
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"transformers can't read {source}: {reason}") from error
    if field := _reader(source).get_field(MARK):
        setattr(model.config, BAKED_MARK, _mark(field, source))
    return model.eval(), tokenizer


def _write(
    reader: Any, target: Path, folds: Mapping[str, Parts], mark: str | None
) -> tuple[dict[str, int], dict[str, int]]:
    """Copy a GGUF file with folds in its tensors; how many kept their type, and how many not."""
    from gguf import GGUFValueType, GGUFWriter

    architecture = reader.get_field("general.architecture").contents()
    writer = GGUFWriter(target, architecture, endianess=reader.endianess)
    writer.data_alignment = reader.alignment
    for field in reader.fields.values():
        name = field.name
        if name in ("general.architecture", MARK) or name.startswith("GGUF."):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    if mark is not None:
        writer.add_string(MARK, mark)
    kept: dict[str, int] = {}
    widened: dict[str, int] = {}
    changed: dict[str, Any] = {}
    for tensor in reader.tensors:
        data, kind = tensor.data, tensor.tensor_type
        if tensor.name in folds:
            data, kind = fold_tensor(data, kind, folds[tensor.name], ROUNDING)
            changed[tensor.name] = data
            own = kind == tensor.tensor_type
            text = kind.name if own else f"{tensor.tensor_type.name} -> {kind.name}"
            count = kept if own else widened
            count[text] = count.get(text, 0) + 1
        writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in reader.tensors:
            writer.write_tensor_data(changed.pop(tensor.name, tensor.data))
    finally:
        writer.close()
    return kept, widened


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
