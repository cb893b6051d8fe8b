"""Mistakes before the first layer: a token at the start too many or too few."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tempering.audit.mistakes.base import MistakeCase, mistake, text_config


@mistake
def first_token(model: Any) -> Iterator[MistakeCase]:
    """A token put before the prompt (BOS, or BOS once more), or the prompt's first one lost."""
    bos = getattr(text_config(model), "bos_token_id", None)
    if isinstance(bos, int) and 0 <= bos < model.get_input_embeddings().weight.shape[0]:
        yield MistakeCase(
            f"a BOS (id {bos}) were put before the prompt as it was sent",
            lambda: _ids(model, lambda ids: torch.cat([torch.full_like(ids[:, :1], bos), ids], 1)),
        )
    yield MistakeCase(
        "the first token of the prompt (its BOS, if it has one) were missing",
        lambda: _ids(model, lambda ids: ids[:, 1:]),
    )


@contextlib.contextmanager
def _ids(model: Any, change: Callable[[Any], Any]) -> Iterator[None]:
    """The model reads other tokens; its logits are at the places of those that it was given.

    A place that has no logits gets those of the next one, which no score reads (`scores.FIRST`).
    """
    own = model.forward

    def forward(input_ids: Any, **kwargs: Any) -> Any:
        out = own(input_ids=change(input_ids), **kwargs)
        length = input_ids.shape[1]
        logits = out.logits[:, -length:]
        if logits.shape[1] < length:
            logits = torch.cat([logits[:, :1], logits], 1)
        out.logits = logits
        return out

    had = model.__dict__.get("forward")
    model.forward = forward
    try:
        yield
    finally:
        if had is None:
            model.__dict__.pop("forward", None)
        else:
            model.forward = had
