"""Which architectures are tried: those that transformers' auto classes know, by family."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import NamedTuple

from tempering.errors import InputError

CAUSAL, ENCODER, ENCODER_DECODER = "causal", "encoder", "encoder-decoder"

# The others of this mapping take sound or images, or have no configuration of their own.
_ENCODER_DECODERS = (
    "bart bigbird_pegasus blenderbot blenderbot-small fsmt led longt5 m2m_100 marian mbart mt5 mvp "
    "nllb-moe pegasus pegasus_x plbart prophetnet switch_transformers t5 t5gemma umt5"
).split()


class Task(NamedTuple):
    """An architecture to try: its family, its type in configurations, its class."""

    family: str
    model_type: str
    model_class: str


def tasks(only: Iterable[str] | None = None) -> list[Task]:
    """Every architecture, or those of the model types `only`; InputError for one not known."""
    from transformers.models.auto import modeling_auto as auto

    found = [Task(CAUSAL, *item) for item in sorted(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items())]
    sequences = dict(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
    found += [
        Task(ENCODER, *item)
        for item in sorted(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.items())
        if item[0] not in sequences
    ]
    found += [
        Task(ENCODER_DECODER, name, sequences[name])
        for name in _ENCODER_DECODERS
        if name in sequences
    ]
    if only is None:
        return found
    chosen = list(only)
    known = {task.model_type for task in found}
    for name in chosen:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise InputError(f"'{name}' is no model type of a language model{hint}")
    return [task for task in found if task.model_type in chosen]
