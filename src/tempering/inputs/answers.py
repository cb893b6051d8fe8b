"""What a model says of an example: logits over tokens or classes, or features.

logits      of a decoder's tokens, a classifier's classes, an encoder's positions
features    where a model gives none: its embeddings, or the last hidden states of its tokens
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.errors import InputError, RefusedError, TemperingError
from tempering.inputs.example import NO_GOAL, Example


class Answers(NamedTuple):
    """What a model gave for rows of one shape; one of the two.

    logits: at each position, over tokens or classes; a classifier has one position.
    features: vectors, of which the direction counts.
    """

    logits: Float[Tensor, "rows positions classes"] | None = None
    features: Float[Tensor, "rows vectors width"] | None = None


# Outputs that hold the features of models with towers, in the order of preference.
_EMBEDDED = ("image_embeds", "text_embeds", "audio_embeds", "embeddings")


def answers(model: Any, example: Example, device: torch.device) -> Answers:
    """What the model says of one example; RefusedError for outputs that are no answers."""
    return answers_of(model, called_on(model, example, device))


def on(model: Any, arguments: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Arguments where the model takes them, numbers in the dtype that it computes in.

    What is no tensor (a flag, say, or a mapping) stays as it is.
    """
    dtype = getattr(model, "dtype", torch.float32)

    def moved(item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        return item.to(device, dtype) if item.is_floating_point() else item.to(device)

    return {name: moved(item) for name, item in arguments.items()}


def called(model: Any, arguments: Mapping[str, Any], *, cache: bool = False) -> Any:
    """The model's output, without a cache unless asked; some models know none."""
    try:
        return model(**arguments, use_cache=cache)
    except TypeError as error:
        if "use_cache" not in str(error):
            raise
        return model(**arguments)


def called_on(model: Any, example: Example, device: torch.device) -> Any:
    """The model's output for an example; InputError in one line where the model fails on it."""
    try:
        return called(model, on(model, example.arguments, device))
    except (torch.OutOfMemoryError, TemperingError):
        raise
    except (ValueError, TypeError, IndexError, KeyError, RuntimeError) as error:
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in example.arguments.items())
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(
            f"{example.origin or 'this row'}: {type(model).__name__} fails on {shapes}: {reason}; "
            "load the processor from the model's own directory, and give all that the model reads"
        ) from error


def answers_of(model: Any, output: Any) -> Answers:
    """The answers in a model's output."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        if logits.ndim == 4:  # of a segmentation: [rows, classes, height, width]
            return Answers(logits=logits.flatten(2).transpose(1, 2))
        return Answers(logits=logits[:, None] if logits.ndim == 2 else logits)
    embedded = [getattr(output, name, None) for name in _EMBEDDED]
    found = [item for item in embedded if isinstance(item, Tensor) and item.ndim == 2]
    if found:
        alike = [item for item in found if item.shape == found[0].shape]
        return Answers(features=torch.stack(alike, dim=1))
    hidden = getattr(output, "last_hidden_state", None)
    if isinstance(hidden, Tensor) and hidden.ndim == 3:
        return Answers(features=hidden)
    if isinstance(hidden, Tensor) and hidden.ndim == 4:  # [rows, channels, height, width]
        return Answers(features=hidden.flatten(2).transpose(1, 2))
    raise RefusedError(
        f"{type(model).__name__} gives no logits, embeddings or hidden states "
        f"({', '.join(getattr(output, 'keys', tuple)()) or type(output).__name__}), so what "
        "temperatures change can't be told; give the model with its head, or a Python objective"
    )


def check_goals(model: Any, logits: Tensor, goals: Tensor | None, origin: str) -> None:
    """Errors for logits [rows, positions, classes] that can't name these goals.

    RefusedError for logits that are no distribution over tokens or classes; InputError for more
    goals than positions, or a goal that is none of the classes.
    """
    problem = getattr(model.config, "problem_type", None)
    if logits.shape[-1] < 2 or problem in ("regression", "multi_label_classification"):
        what = "one number" if logits.shape[-1] < 2 else f"numbers for a {problem}"
        raise RefusedError(
            f"{type(model).__name__} gives {what} and no distribution over classes, which has no "
            "negative log-likelihood; give its body (model.base_model), or a Python objective"
        )
    positions, classes = logits.shape[-2:]
    if goals is None or goals.numel() == 0:
        return
    if goals.shape[-1] > positions:
        raise InputError(
            f"{origin}: {goals.shape[-1]} answers are given for {positions} positions at which "
            f"{type(model).__name__} answers"
        )
    most, least = int(goals.max()), int(goals[goals != NO_GOAL].min())
    if most >= classes or least < 0:
        wrong = most if most >= classes else least
        raise InputError(
            f"{origin}: the answer {wrong} is none of the {classes} that {type(model).__name__} "
            "knows, 0 and up"
        )
