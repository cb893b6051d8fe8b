"""Inputs that a model of any kind takes, found by trying: images, sound, frames, series, tokens.

The rows of a batch are alike, so that a row with a profile of its own can be told from another.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tempering.attention.examining.sample import run, sample_inputs
from tempering.survey.makers import (
    MAKERS,
    PADDING,
    ROWS,
    WANTED,
    Maker,
    bins_of,
    padded,
    parameters,
)

_MOST_TRIES = 48
# Arguments that stand for others, that training needs, or that a first call does without.
_LEFT_OUT = (
    "labels past_key_values inputs_embeds decoder_inputs_embeds encoder_outputs use_cache "
    "output_attentions output_hidden_states return_dict cache_position position_ids "
    "logits_to_keep head_mask".split()
)

_STANDS_FOR = {"inputs"}

Inputs = dict[str, Any]


class NoSampleError(Exception):
    """No inputs that were tried make a model run; its text is what the likeliest of them raised.

    errors: what each raised.
    """

    def __init__(self, errors: list[str]) -> None:
        super().__init__(errors[0])
        self.errors = errors


def find_samples(model: Any) -> Iterator[Inputs | None]:
    """Keyword arguments with which a model runs; None for the padded tokens that all text gets.

    Raises NoSampleError where there are none.
    """
    errors: list[str] = []
    found = False
    if _takes_tokens_alone(model):
        try:
            run(model, sample_inputs(model))
        except Exception as error:
            errors.append(_text(error))
        else:
            found = True
            yield None
    for inputs in itertools.islice(candidates(model), _MOST_TRIES):
        try:
            run(model, inputs)
        except Exception as error:
            errors.append(_text(error))
            continue
        found = True
        yield inputs
    if not found:
        raise NoSampleError(errors or ["no inputs of its kind are known here"])


def _text(error: Exception) -> str:
    return str(error) or type(error).__name__


def _takes_tokens_alone(model: Any) -> bool:
    modalities = model.input_modalities
    text = {modalities} if isinstance(modalities, str) else set(modalities)
    named = parameters(model)
    needed = [name for name, default in named.items() if default is inspect.Parameter.empty]
    ids = model.main_input_name == "input_ids" and set(needed) <= {"input_ids"}
    return text == {"text"} and ids


def candidates(model: Any) -> Iterator[Inputs]:
    """Inputs that a model may take, the likeliest first."""
    maker = Maker(model)
    named = {name for name in parameters(model) if name not in _LEFT_OUT}
    needed = {
        name
        for name, default in parameters(model).items()
        if default is inspect.Parameter.empty and name in MAKERS
    }
    main = model.main_input_name
    mains = {main} if isinstance(main, str) else set(main)
    if mains <= _STANDS_FOR and not needed:
        # It stands for what one of its parts reads.
        mains = {"input_values"} & named
        named -= {"input_features"} if mains else set()
    needed |= mains
    if "spatial_shapes" in named:
        needed |= {"spatial_shapes", "pixel_attention_mask"} & named
    optional = sorted(named & WANTED - needed)
    masks = [name for name in _MASKS if name in named]
    lists = [sorted(needed) + optional, sorted(needed)]
    if {"input_ids", "input_features"} <= set(lists[0]) and "decoder_input_ids" in optional:
        lists.append([name for name in lists[0] if name != "input_ids"])  # sound in place of text
    # With all that it may take; then with what it can't do without; then with masks of its frames.
    for chosen in dict.fromkeys(map(tuple, lists)):
        known = [name for name in chosen if name in MAKERS]
        if "input_ids" in known and "attention_mask" in named:
            known.append("attention_mask")
        yield from _combined(maker, known, masks)
    if "input_ids" in named:
        # Without padding, for heads that read the first token.
        for ids in MAKERS["input_ids"](maker):
            yield {"input_ids": ids}


def _combined(maker: Maker, names: list[str], masks: list[str]) -> Iterator[Inputs]:
    """Every combination of what may be given for the names; those of one size go together.

    masks: names of masks of frames of sound, which are given first and then left out.
    """
    choices = [list(MAKERS[name](maker)) for name in names]
    for values in itertools.product(*choices):
        plain = dict(zip(names, values, strict=True))
        framed = {name: mask for name in masks for mask in _frames(maker, plain)}
        for inputs in (plain | framed, plain) if framed else (plain,):
            if "input_ids" in inputs and (placed := _with_places(maker, inputs)) is not None:
                yield placed
            yield inputs


# Of frames of sound, by other names than attention_mask.
_MASKS = ("input_features_mask", "feature_attention_mask", "padding_mask")


def _frames(maker: Maker, inputs: Inputs) -> Iterator[Tensor]:
    """A mask of ones over the frames of sound: over the axis of features that has no bins."""
    for name in ("input_features", "input_values"):
        if name in inputs:
            sizes = inputs[name].shape[1:]
            lengths = [size for size in sizes if size not in bins_of(maker)]
            yield torch.ones(ROWS, max(lengths or sizes), dtype=torch.long)


# -- places for images among tokens


def _with_places(maker: Maker, inputs: Inputs) -> Inputs | None:
    """The same inputs with a special token for each feature that the model makes of them."""
    model = maker.model
    ids, places = inputs["input_ids"], []
    for kind, names in (
        ("image", ("image_token_id", "image_token_index", "media_placeholder_token_id")),
        ("audio", ("audio_token_id", "audio_token_index")),
        ("video", ("video_token_id", "video_token_index")),
    ):
        name = f"get_{kind}_features"
        owners = (module for module in model.modules() if hasattr(type(module), name))
        method = getattr(next(owners, None), name, None)
        token = next((t for name in names if (t := getattr(maker.config, name, None))), None)
        if method is None or token is None:
            continue
        taken = inspect.signature(method).parameters
        given = {name: item for name, item in inputs.items() if name in taken}
        if not any(
            isinstance(item, Tensor) and item.is_floating_point() for item in given.values()
        ):
            continue
        try:
            with torch.no_grad():
                features = method(**given)
        except Exception:
            return None
        places += [token] * (_count(features, model) // ROWS)
    if not places:
        return None
    row = torch.tensor(places).expand(ROWS, -1)
    middle = PADDING + 3
    placed = {**inputs, "input_ids": torch.cat([ids[:, :middle], row, ids[:, middle:]], 1)}
    if "attention_mask" in inputs:
        placed["attention_mask"] = padded(placed["input_ids"].shape[1])
    if "mm_token_type_ids" in parameters(model):
        placed["mm_token_type_ids"] = (placed["input_ids"] == places[0]).int()
    if "token_type_ids" in parameters(model):
        placed["token_type_ids"] = (placed["input_ids"] == places[0]).long()
    return placed


def _count(features: Any, model: Any) -> int:
    """How many vectors of the language model's width a model made."""
    width = model.config.get_text_config().hidden_size
    pooled = getattr(features, "pooler_output", None)
    features = features if pooled is None else pooled
    tensors = [features] if isinstance(features, Tensor) else list(features)
    return sum(item.numel() for item in tensors if isinstance(item, Tensor)) // width
