"""Examples: the arguments of a forward call, a row at a time, and the answers that are right."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tempering.errors import InputError

# PyTorch's cross entropy and transformers' labels leave positions with this number out.
NO_GOAL = -100
# Arguments that are text; for it, models are examined on a padded sample of their own.
_TARGET = ("decoder_input_ids", "decoder_attention_mask")
_TEXT = {"input_ids", "attention_mask", "token_type_ids", *_TARGET}
_TARGETS = 5


@dataclass(frozen=True, eq=False)
class Example:
    """One row of what a model reads.

    arguments: keyword arguments of a forward call, each with one row.
    goals: the token (or class) that the logits of each position should name, `NO_GOAL` where none
        is asked for; None where the right answer is not known.
    origin: names the file, the chunk or the row, in errors.
    """

    arguments: Mapping[str, Tensor]
    goals: Int[Tensor, "positions"] | None = None
    origin: str = ""


@dataclass(frozen=True, eq=False)
class Inputs:
    """Examples to run a model on.

    unit: what one of them is called: "chunks", "images", "clips", "pairs" or "rows".
    own: whether the goals are the model's own answers, since no others were given.
    """

    examples: tuple[Example, ...]
    unit: str = "rows"
    own: bool = False

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self.examples)

    def __getitem__(self, part: slice) -> Inputs:
        return Inputs(self.examples[part], self.unit, self.own)

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that name these arguments and goals."""
        digest = hashlib.sha256()
        for example in self.examples:
            for name, item in sorted({**example.arguments, "goals": example.goals}.items()):
                if item is not None:
                    digest.update(f"{name} {item.dtype} {tuple(item.shape)}".encode())
                    digest.update(item.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def sample(self) -> dict[str, Tensor] | None:
        """The first example twice over, to examine a model with; None where that is text alone."""
        first = self.examples[0].arguments
        if set(first) <= _TEXT:
            return None
        # A target as long as its source would hide which attention crosses from one to the other.
        short = {n: x[:, :_TARGETS] if n in _TARGET else x for n, x in first.items()}
        return {name: torch.cat([item, item]) for name, item in short.items()}


def as_inputs(given: Any, model: Any) -> Inputs:
    """What callers give, as examples for `model`.

    Parameters
    ----------
    given: Inputs; token ids, Int[Tensor, "chunks length"]; what a processor gives (a mapping of
        names to tensors, with `labels` where the right answers are known), of a row or more; or a
        sequence of such mappings, one a row, where rows differ in shape.

    Raises InputError for anything else, and for arguments that the model doesn't take.
    """
    if isinstance(given, Inputs):
        found = given
    elif isinstance(given, Tensor):
        found = _of_tokens(given, model)
    elif hasattr(given, "keys"):
        found = Inputs(tuple(_rows(given, model)))
    elif isinstance(given, Sequence) and given and all(hasattr(item, "keys") for item in given):
        rows = [row for item in given for row in _rows(item, model)]
        found = Inputs(tuple(rows))
    else:
        raise InputError(
            "a model is run on token ids [chunks, length], or on what its processor gives, such "
            f"as {{'pixel_values': images}}; this is {type(given).__name__}"
        )
    if not found.examples:
        raise InputError("there is nothing to run the model on: give at least one row")
    check_taken(model, found.examples[0].arguments, found.examples[0].origin)
    return found


# What carries an example in; a model that doesn't name one of these can't read it.
_CARRIERS = ("input_ids", "pixel_values", "input_features", "input_values")


def taken_by(model: Any) -> list[str]:
    """The names of the arguments of a model's forward."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = inspect.signature(model.forward).parameters.values()
    return [item.name for item in found if item.kind in kinds]


def check_taken(model: Any, arguments: Mapping[str, Tensor], origin: str) -> None:
    """InputError for arguments that a model's forward can't take: of another model's processor."""
    taken = taken_by(model)
    signature = inspect.signature(model.forward).parameters.values()
    hands_on = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in signature)
    unknown = [
        name for name in arguments if name not in taken and (name in _CARRIERS or not hands_on)
    ]
    if unknown:
        where = f"{origin}: " if origin else ""
        raise InputError(
            f"{where}the processor doesn't fit the model: it makes {', '.join(unknown)}, and "
            f"{type(model).__name__} takes {', '.join(taken[:8])}; load the processor from the "
            "model's own directory"
        )


def _of_tokens(ids: Tensor, model: Any) -> Inputs:
    if ids.ndim != 2 or ids.numel() == 0 or ids.is_floating_point():
        raise InputError(
            "token ids are whole numbers of shape [chunks, length], at least one chunk; this is "
            f"{str(ids.dtype).removeprefix('torch.')} {list(ids.shape)}"
        )
    predicts = predicts_next(model)
    return Inputs(
        tuple(
            Example({"input_ids": row[None]}, row[1:] if predicts else None, f"chunk {i}")
            for i, row in enumerate(ids)
        ),
        "chunks",
    )


def predicts_next(model: Any) -> bool:
    """Whether the logits of each token predict the next: a decoder, with images or without."""
    generates = getattr(model, "can_generate", None)
    alone = not getattr(model.config, "is_encoder_decoder", False)
    return alone and callable(generates) and bool(generates())


def _rows(given: Any, model: Any) -> Iterator[Example]:
    """The rows of what a processor gave."""
    tensors = {
        str(name): item if isinstance(item, Tensor) else torch.as_tensor(item)
        for name, item in given.items()
        if item is not None
    }
    labels = tensors.pop("labels", None)
    if not tensors or any(item.ndim == 0 for item in tensors.values()):
        raise InputError(
            "what a processor gives holds tensors with a row or more, such as "
            f"{{'pixel_values': images}}; this has {', '.join(tensors) or 'none'} "
            "(ask the processor for them: return_tensors='pt')"
        )
    counts = {name: len(item) for name, item in tensors.items()}
    rows = counts.get("input_ids", min(counts.values()))
    if labels is not None and len(labels) != rows:
        raise InputError(f"{len(labels)} labels were given for {rows} rows")
    if rows > 1 and set(counts.values()) != {rows}:
        raise InputError(
            "rows of different numbers can't be told apart: "
            + ", ".join(f"{count} of {name}" for name, count in counts.items())
            + "; give a list, with what the processor makes of each example alone"
        )
    for row in range(rows):
        own = {name: item if rows == 1 else item[row : row + 1] for name, item in tensors.items()}
        known = None if labels is None else labels[row]
        yield labelled(model, *without_padding(own, known), f"row {row}")


def without_padding(
    row: dict[str, Tensor], labels: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """A row's arguments, and its labels, without the tokens (or samples) that are padding."""
    kept = _unpadded_columns(row)
    if kept is None:
        return row, labels
    size = len(kept)
    if labels is not None and labels.ndim and len(labels) == size:
        labels = labels[kept]
    return {n: x[:, kept] if x.shape[:2] == (1, size) else x for n, x in row.items()}, labels


def _unpadded_columns(row: Mapping[str, Tensor]) -> Tensor | None:
    """Which tokens (or samples) of a row are no padding; None where all are.

    A row alone needs no padding, and queries that stand at it mean nothing.
    """
    mask = row.get("attention_mask")
    padded = row.get("input_ids", row.get("input_values"))
    if mask is None or padded is None or mask.shape != padded.shape or bool(mask.all()):
        return None
    return mask[0].bool()


def labelled(
    model: Any, arguments: Mapping[str, Tensor], labels: Tensor | None, origin: str
) -> Example:
    """An example whose right answer is `labels`, as transformers models read them.

    Decoders predict labels[1:], each from the tokens before; an encoder-decoder predicts labels
    from the start token and the labels before; all other models name labels at their positions.
    """
    if labels is None:
        return Example(arguments, None, origin)
    if labels.is_floating_point() or labels.ndim > 1:
        raise InputError(
            f"{origin}: labels name a class, or a token at each position; these are "
            f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}: give a Python "
            "objective"
        )
    goals = torch.atleast_1d(labels).long()
    if not bool((goals != NO_GOAL).any()):
        raise InputError(f"{origin}: its labels say of no position what is right; leave them out")
    if predicts_next(model):
        return Example(arguments, goals[1:], origin)
    if getattr(model.config, "is_encoder_decoder", False) and goals.ndim == 1:
        goals = goals[: int((goals != NO_GOAL).nonzero()[-1]) + 1]  # what follows is padding
        return Example(
            arguments
            if "decoder_input_ids" in arguments
            else {**arguments, "decoder_input_ids": shifted(model, goals)},
            goals,
            origin,
        )
    return Example(arguments, goals, origin)


def shifted(model: Any, goals: Int[Tensor, "positions"]) -> Int[Tensor, "1 positions"]:
    """What the decoder of an encoder-decoder reads: the start token, and all goals but the last."""
    start, pad = (_token(model, name) for name in ("decoder_start_token_id", "pad_token_id"))
    if start is None:
        start = _token(model, "bos_token_id")
    if start is None:
        raise InputError(
            f"{type(model).__name__} doesn't say with which token its decoder starts; set "
            "config.decoder_start_token_id, or give decoder_input_ids"
        )
    before = goals[:-1].masked_fill(goals[:-1] == NO_GOAL, start if pad is None else pad)
    return torch.cat([before.new_tensor([start]), before])[None]


def _token(model: Any, name: str) -> int | None:
    """A special token by its name in a model's configurations."""
    configs = (getattr(model, "generation_config", None), model.config)
    inner = (getattr(model.config, part, None) for part in ("decoder", "text_config"))
    for config in (*configs, *inner):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return None
