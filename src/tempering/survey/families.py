"""Which architectures are tried: every class that one of transformers' auto classes knows."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, NamedTuple

from tempering.errors import InputError

CAUSAL, ENCODER, ENCODER_DECODER = "causal", "encoder", "encoder-decoder"
VISION, AUDIO, VIDEO, MULTIMODAL, OTHER = "vision", "audio", "video", "multimodal", "other"

# A class of these is tried in all ways. The other heads of its model type attend by the same
# modules, so decoding and baking are not tried again on them.
_WHOLE = (
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForImageTextToText",
    "AutoModel",
)


class Task(NamedTuple):
    """An architecture to try: its type in configurations, a class, the auto classes it is under.

    whole: whether it is tried in all ways, as the main class of its type.
    """

    model_type: str
    model_class: str
    autos: tuple[str, ...]
    whole: bool = True

    @property
    def name(self) -> str:
        """What tells it from all others, e.g. "llama LlamaForCausalLM"."""
        return f"{self.model_type} {self.model_class}"


def tasks(only: Iterable[str] | None = None, *, causal: bool = False) -> list[Task]:
    """Every architecture, or those of the model types `only`; InputError for one not known.

    The classes of one type follow each other, the main one first. causal: only those that are
    under AutoModelForCausalLM.
    """
    types = _by_type()
    if only is not None:
        only = list(only)
        for name in only:
            if name not in types:
                near = difflib.get_close_matches(name, types, n=3)
                hint = f"; near it: {', '.join(near)}" if near else ""
                raise InputError(f"'{name}' is no model type of transformers{hint}")
    return [
        task
        for name in sorted(types)
        if only is None or name in only
        for task in types[name]
        if not causal or "AutoModelForCausalLM" in task.autos
    ]


def task_of(model_type: str, model_class: str) -> Task:
    """The task of one class; InputError for one that no auto class knows under this type."""
    known = tasks([model_type])
    for task in known:
        if task.model_class == model_class:
            return task
    classes = ", ".join(task.model_class for task in known)
    raise InputError(f"'{model_class}' is no class of {model_type}; these are: {classes}")


def _by_type() -> dict[str, list[Task]]:
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    autos: dict[str, dict[str, list[str]]] = {}
    for name in sorted(vars(modeling_auto)):
        mapping = getattr(vars(modeling_auto)[name], "_model_mapping", None)
        if not name.startswith("Auto") or mapping is None:
            continue
        for model_type, classes in mapping._model_mapping.items():
            if model_type not in CONFIG_MAPPING_NAMES:
                continue
            for kind in (classes,) if isinstance(classes, str) else classes:
                autos.setdefault(model_type, {}).setdefault(kind, []).append(name)
    return {name: _tasks_of(name, classes) for name, classes in autos.items()}


def _tasks_of(model_type: str, classes: dict[str, list[str]]) -> list[Task]:
    found = [
        Task(model_type, kind, tuple(names), whole=_place(names) < len(_WHOLE) - 1)
        for kind, names in classes.items()
    ]
    found.sort(key=lambda task: (_place(task.autos), task.model_class))
    if not any(task.whole for task in found):
        found[0] = found[0]._replace(whole=True)
    return found


def _place(autos: Iterable[str]) -> int:
    return min(_WHOLE.index(name) if name in _WHOLE else len(_WHOLE) for name in autos)


def family_of(task: Task, model_class: Any) -> str:
    """The table that a class belongs to, by its auto class and by what it takes."""
    if "AutoModelForCausalLM" in task.autos:
        return CAUSAL
    taken = model_class.input_modalities
    modalities = {taken} if isinstance(taken, str) else set(taken)
    if modalities == {"text"}:
        return ENCODER_DECODER if is_encoder_decoder(model_class) else ENCODER
    if "text" in modalities and len(modalities) > 1 and "image" in modalities | {"video"}:
        return MULTIMODAL
    for family in (AUDIO, VIDEO):
        if family in modalities and "image" not in modalities:
            return family
    return VISION if "image" in modalities else OTHER


def is_encoder_decoder(model_class: Any) -> bool:
    """Whether the configurations of a class say so by default."""
    return bool(getattr(model_class.config_class, "is_encoder_decoder", False))
