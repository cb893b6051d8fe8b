"""A rotation of queries and keys in a model, and the same with other settings, to be undone."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Change = Callable[[], AbstractContextManager[None]]
_LABELS = {"yarn": "YaRN", "longrope": "longrope", "llama3": "llama3", "linear": "linear RoPE"}


@dataclass(frozen=True)
class Rotation:
    """The frequencies of one kind of layer in one module.

    A model has one such module for all of its layers, or one for each (Granite with windows).
    name: of the frequencies: inv_freq, or sliding_attention_inv_freq.
    """

    module: Any
    name: str

    @property
    def kind(self) -> str:
        """The kind of layer, e.g. sliding_attention; empty where there are no kinds."""
        return self.name.removesuffix("inv_freq").removesuffix("_")

    @property
    def told(self) -> str:
        """The kind of layer, in words that end a sentence."""
        return f" in its {self.kind.replace('_attention', '')} layers" if self.kind else ""

    @property
    def settings(self) -> dict[str, Any]:
        """rope_type, rope_theta, factor, ..., from the configuration."""
        return _settings(getattr(self.module, "config", None), self.kind)

    @property
    def rope_type(self) -> str:
        """yarn, llama3, ...; default where positions aren't stretched."""
        return str(self.settings.get("rope_type", "default"))

    @property
    def label(self) -> str:
        """The stretching's own name."""
        return _LABELS.get(self.rope_type, self.rope_type)

    @property
    def limit(self) -> int:
        """Tokens of the longest text that longrope calls short."""
        return int(self.settings["original_max_position_embeddings"])

    def attribute(self, name: str) -> str:
        """The name of an attribute of the module for this kind of layer."""
        return f"{self.kind}_{name}" if self.kind else name

    def retuned(self, change: dict[str, Any]) -> Change | None:
        """The module with its settings changed; None where that changes no frequency.

        Where frequencies depend on a text's length (longrope, dynamic) the forward pass computes
        them, from the module's configuration: there that is changed too. Elsewhere it stays, for
        models look modules up by its base (Granite with windows).
        """
        module, config = self.module, self._changed(change)
        settings = _settings(config, self.kind)
        values, own = ([item for item, _ in self._computed(c)] for c in (config, module.config))
        if not values or values[0].shape != getattr(module, self.name).shape:
            return None
        if len(values) == len(own) and all(map(torch.equal, values, own)):
            return None
        types: Any = settings.get("rope_type", "default")
        changes: dict[str, Any] = {
            self.name: values[0],
            self.attribute("original_inv_freq"): values[0],
            self.attribute("long_inv_freq"): values[-1],
        }
        if types == "longrope" or "dynamic" in types:
            changes["config"] = config
        if isinstance(getattr(module, "rope_type", None), dict):
            types = {**module.rope_type, self.kind: types}
        return lambda: _with(module, rope_type=types, **changes)

    def attention_factor(self, change: dict[str, Any]) -> float:
        """What cosines and sines are multiplied by with settings changed."""
        return self._computed(self._changed(change))[0][1]

    def _changed(self, change: dict[str, Any]) -> Any:
        config = copy.deepcopy(self.module.config)
        (config.rope_parameters[self.kind] if self.kind else config.rope_parameters).update(change)
        return config

    def _computed(self, config: Any) -> list[tuple[Tensor, float]]:
        """Frequencies and attention factor that a configuration gives, by transformers.

        longrope has two sets, for short texts and for long ones.
        """
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        rope_type = _settings(config, self.kind).get("rope_type", "default")
        function = ROPE_INIT_FUNCTIONS.get(rope_type)
        if rope_type == "default":
            function = getattr(self.module, "compute_default_rope_parameters", None)
        if function is None:
            return []
        own = getattr(self.module, self.name)
        options: dict[str, Any] = {"layer_type": self.kind} if self.kind else {}
        lengths = [None, self.limit + 1] if rope_type == "longrope" else [None]
        found = []
        for length in lengths:
            more = options if length is None else {**options, "seq_len": length}
            values, factor = function(config, device=own.device, **more)
            found.append((values.to(own), float(factor)))
        return found


def rotations(model: nn.Module) -> list[Rotation]:
    """Every rotation of a model whose settings are known, in order of modules."""
    found = [
        Rotation(module, name)
        for module in model.modules()
        for name, value in module._buffers.items()
        if isinstance(value, Tensor) and name.endswith("inv_freq") and "original" not in name
    ]
    return [rotation for rotation in found if rotation.settings]


def _settings(config: Any, kind: str) -> dict[str, Any]:
    found = getattr(config, "rope_parameters", None)
    if kind and isinstance(found, dict):
        found = found.get(kind)
    return dict(found) if isinstance(found, dict) else {}


@contextlib.contextmanager
def _with(module: Any, **values: Any) -> Iterator[None]:
    """A module with these attributes, of those that it has, and then all of its own again.

    Its forward pass writes frequencies itself, and into them: they are copies, and what it has
    written is taken back too.
    """
    before, buffers = dict(vars(module)), dict(module._buffers)
    try:
        for name, value in values.items():
            if hasattr(module, name):
                setattr(module, name, value.clone() if isinstance(value, Tensor) else value)
        yield
    finally:
        module._buffers.clear()
        module._buffers.update(buffers)
        for name in set(vars(module)) - set(before):
            delattr(module, name)
        vars(module).update(before)
