"""T[layer, head]: a temperature for every head of a model, relative to the model's own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tempering.attention.examining.layout_of import layout
from tempering.attention.examining.subject import adapters_of, unwrapped
from tempering.attention.layout import Layout
from tempering.attention.limits import check_values
from tempering.attention.profiles.fingerprint import (
    Walked,
    describe_model,
    fingerprint,
    quick_fingerprint,
)
from tempering.attention.profiles.format import fields_of, json_of
from tempering.attention.profiles.rules import Rule, check_rules
from tempering.counts import whole_number
from tempering.data.gallery import gallery_text, names_gallery
from tempering.errors import ProfileError, RefusedError, TemperatureError
from tempering.files import read_json, read_text, write_atomic
from tempering.schedules import Schedule, as_schedule

UNTEMPERED = "untempered"  # a model without a profile, in tables, figures and a server's answers


@dataclass(frozen=True, eq=False)
class Profile:
    """Temperatures of attention heads, relative to the model's own (1 changes nothing).

    The attention of head h of layer l becomes softmax(logits / T[l, h]).

    rows: one Float[Tensor, "heads"] (float64) for each attention layer.
    names: module names of the rows; None for a bare matrix, which fits by shape alone.
    partial: layers that are not named keep their own temperature.
    untempered: names of the model's layers without softmax.
    model: architecture and fingerprint of the model it was made for, if any.
    pattern: the schedule it was read from, if any.
    evidence: what was measured about it, if anything (see `tune`).
    rules: for each row a rule that adapts T to the query, or None (see `adaptive_profile`).
    """

    rows: tuple[Tensor, ...]
    names: tuple[str, ...] | None = None
    partial: bool = False
    untempered: tuple[str, ...] = ()
    model: Mapping[str, Any] | None = None
    pattern: str | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)
    rules: tuple[Rule | None, ...] = ()

    def __post_init__(self) -> None:
        if not self.rows:
            raise ProfileError("a profile needs the temperatures of at least one layer")
        if self.names is not None and len(set(self.names)) != len(self.rows):
            raise ProfileError(
                f"{len(self.rows)} rows of temperatures need as many names, each another; "
                f"these are {', '.join(self.names)}"
            )
        for index, row in enumerate(self.rows):
            _check_row(row, self.names[index] if self.names else f"layer {index}")
        if self.rules:
            check_rules(self.rules, len(self.rows))

    # -- making one

    @classmethod
    def from_schedule(
        cls,
        schedule: str | float | Schedule,
        model: nn.Module | Layout,
        *,
        layers: Iterable[int] | None = None,
        heads: Iterable[int] | None = None,
        stack: str | None = None,
    ) -> Profile:
        """Read a schedule over depth: layer l of L has the value at l/(L-1).

        Parameters
        ----------
        schedule: a pattern of relative temperatures, e.g. "throb(12,3,1,12)|amplitude(1.15)".
        model: the model, or its layout.
        layers, heads: restrict it to these; the others keep T = 1.
        stack: "encoder", "decoder" or "cross"; by default each stack has the whole pattern.

        Raises ScheduleError when the pattern has more stages than the stack has layers, and
        ProfileError for layers or heads that the model doesn't have.
        """
        plan = model if isinstance(model, Layout) else layout(model)
        pattern = as_schedule(schedule)
        stacks = [stack] if stack else list(plan.depths)
        for name in stacks:
            if name not in plan.depths:
                raise ProfileError(
                    f"this model has no stack '{name}'; it has {', '.join(plan.depths)}"
                )
        values = {name: pattern.sample(plan.depths[name]) for name in stacks}
        chosen = _chosen(layers, "layer", max(plan.depths.values()))
        chosen_heads = _chosen(heads, "head", max(plan.heads))
        rows = []
        for layer in plan.layers:
            row = torch.ones(layer.heads, dtype=torch.float64)
            if layer.stack in values and (chosen is None or layer.index in chosen):
                value = float(values[layer.stack][layer.index])
                where = (
                    slice(None)
                    if chosen_heads is None
                    else [h for h in chosen_heads if h < layer.heads]
                )
                row[where] = value
            rows.append(row)
        return cls._for(plan, rows, model, pattern=str(pattern))

    @classmethod
    def from_matrix(cls, matrix: Tensor | Sequence[Any], model: nn.Module | None = None) -> Profile:
        """A profile from T[layer, head] (or T[layer], with `model`), checked against `model`.

        On a model with layers that have no softmax, rows may be given for all its layers; those
        of the layers without one must then be NaN or 1.
        """
        try:
            table = torch.as_tensor(matrix, dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise ProfileError(
                f"a matrix of temperatures holds numbers, as many in each row: {error}"
            ) from error
        if table.ndim not in (1, 2) or table.numel() == 0:
            raise ProfileError(
                f"a matrix of temperatures has shape [layers, heads]; this has {tuple(table.shape)}"
            )
        if model is None:
            if table.ndim == 1:
                raise ProfileError("one temperature a layer needs the model: from_matrix(T, model)")
            return cls(tuple(table.clone()))
        plan = layout(model)
        if len(table) != len(plan.layers) and len(table) == sum(plan.depths.values()):
            table = _softmax_rows(table, plan)
        if len(table) != len(plan.layers):
            raise ProfileError(f"{len(table)} rows were given, the model has {plan.describe()}")
        rows = (
            list(table)
            if table.ndim == 2
            else [value.expand(heads) for value, heads in zip(table, plan.heads, strict=True)]
        )
        cls(tuple(rows)).resolve(plan)
        return cls._for(plan, rows, model)

    @classmethod
    def by_module(cls, temperatures: Mapping[str, Sequence[float] | float]) -> Profile:
        """A profile from {module name: [T per head]} (a number serves all heads of the module).

        Modules that are not named keep their own temperature.
        """
        if not temperatures:
            raise ProfileError("no module was named; give {module name: [T per head]}")
        rows = []
        for name, value in temperatures.items():
            try:
                rows.append(torch.atleast_1d(torch.as_tensor(value, dtype=torch.float64)))
            except (TypeError, ValueError) as error:
                raise ProfileError(f"{name}: temperatures are numbers, not {value!r}") from error
        return cls(tuple(rows), tuple(temperatures), partial=True)

    @classmethod
    def from_rows(cls, rows: Sequence[Tensor], plan: Layout) -> Profile:
        """A profile from one tensor of temperatures for each layer of a layout."""
        return cls._for(plan, list(rows), plan)

    @classmethod
    def neutral(cls, model: nn.Module | Layout) -> Profile:
        """T = 1 everywhere."""
        plan = model if isinstance(model, Layout) else layout(model)
        return cls._for(plan, [torch.ones(heads) for heads in plan.heads], model)

    @classmethod
    def _for(
        cls, plan: Layout, rows: Sequence[Tensor], model: nn.Module | Layout, **more: Any
    ) -> Profile:
        return cls(
            tuple(row.detach().to("cpu", torch.float64) for row in rows),
            plan.names,
            untempered=plan.untempered,
            model=None if isinstance(model, Layout) else describe_model(model),
            **more,
        )

    # -- reading one

    @property
    def temperature(self) -> Float[Tensor, "layers heads"]:
        """T[layer, head]; NaN where a layer has fewer heads than the widest one."""
        wide = max(len(row) for row in self.rows)
        table = torch.full((len(self.rows), wide), math.nan, dtype=torch.float64)
        for index, row in enumerate(self.rows):
            table[index, : len(row)] = row
        return table

    def describe(self) -> str:
        """A short text for messages, e.g. "30 layers x 9 heads"."""
        counts = sorted({len(row) for row in self.rows})
        heads = str(counts[0]) if len(counts) == 1 else f"{counts[0]}..{counts[-1]}"
        return f"{len(self.rows)} layers x {heads} heads"

    def resolve(self, plan: Layout, *, rules: bool = False) -> list[Tensor]:
        """One row for each attention layer of a layout, or a ProfileError with both shapes.

        RefusedError when the profile has rules, unless the caller minds them (rules=True).
        """
        if not rules:
            self.refuse_rules("temperatures that depend on the query act in transformers alone")
        if self.names is None:
            if [len(row) for row in self.rows] != list(plan.heads):
                raise ProfileError(
                    f"the profile has {self.describe()}, the model has {plan.describe()}"
                )
            return list(self.rows)
        given = dict(zip(self.names, self.rows, strict=True))
        unknown = given.keys() - set(plan.names)
        if unknown:
            self._refuse_name(next(name for name in given if name in unknown), plan)
        rows = []
        for layer in plan.layers:
            row = given.get(layer.name)
            if row is None and not self.partial:
                raise ProfileError(
                    f"the profile has {self.describe()} and none for {layer.name}; "
                    f"the model has {plan.describe()}"
                )
            if row is None:
                row = torch.ones(layer.heads, dtype=torch.float64)
            elif self.partial and len(row) == 1:
                row = row.expand(layer.heads)
            if len(row) != layer.heads:
                raise ProfileError(
                    f"{layer.name} has {layer.heads} heads, the profile has {len(row)} for it; "
                    f"the profile has {self.describe()}, the model {plan.describe()}"
                )
            rows.append(row)
        return rows

    def refuse_rules(self, why: str) -> None:
        """RefusedError that says why, when the profile has rules."""
        if any(self.rules):
            named = ", ".join(dict.fromkeys(str(item) for item in self.rules if item))
            raise RefusedError(f"this profile has rules ({named}): {why}")

    def _refuse_name(self, name: str, plan: Layout) -> None:
        if any(name == other or name.startswith(other + ".") for other in plan.untempered):
            raise ProfileError(
                f"{name} has no temperature: it has no softmax, or text does not reach it; "
                "leave it out of the profile"
            )
        if not self.partial:
            raise ProfileError(
                f"the profile was made for another model: it has {self.describe()} "
                f"with a module {name}, the model has {plan.describe()} and no such module"
            )
        raise ProfileError(
            f"the model has no attention module '{name}'; its modules are called "
            f"{plan.names[0]} .. {plan.names[-1]}"
        )

    def check_model(self, model: nn.Module, walked: Walked | None = None) -> None:
        """ProfileError unless `model` is the one that the profile was made for.

        walked: what `walk` gave for the model just now, for a quick look (`quick_fingerprint`).
        """
        if self.model is None:
            return
        model = unwrapped(model)
        found = fingerprint(model) if walked is None else quick_fingerprint(model, walked)
        if found == self.model.get("fingerprint"):
            return
        other = f"this model is {_naming(describe_model(model))}{adapters_of(model)}"
        try:
            self.adopt(model)
        except (ProfileError, RefusedError) as error:
            prompted = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
            advice = (
                "its prompt is peft's and its layers are those of model.get_base_model(): give that"
                if prompted
                else f"it doesn't fit: {error}"
            )
        else:
            advice = "if it is meant for this one too, rebind it: profile.adopt(model)"
        raise ProfileError(f"the profile was made for {_naming(self.model)}, {other}; {advice}")

    def adopt(self, model: nn.Module) -> Profile:
        """The same temperatures bound to `model`; ProfileError when the shapes differ."""
        plan = layout(model)
        rows = self.resolve(plan, rules=True)
        return replace(
            Profile._for(plan, rows, model),
            pattern=self.pattern,
            evidence=self.evidence,
            rules=rules_for(self, plan) if any(self.rules) else (),
        )

    # -- changing one

    def scaled(self, room: float) -> Profile:
        """T ** room: 0 is the untempered model, 1 this profile, -1 its mirror image."""
        self.refuse_rules("they can't be scaled; change their level or their bounds")
        return replace(self, rows=tuple(row**room for row in self.rows), pattern=None, evidence={})

    def shuffled(self, seed: SupportsIndex) -> Profile:
        """The same values permuted over all heads of all layers: a control."""
        self.refuse_rules("they can't be shuffled over heads")
        generator = torch.Generator().manual_seed(whole_number(seed, "seed"))
        values = torch.cat(self.rows)
        values = values[torch.randperm(len(values), generator=generator)]
        rows = values.split([len(row) for row in self.rows])
        return replace(self, rows=tuple(rows), pattern=None, evidence={})

    # -- files

    def to_json(self) -> dict[str, Any]:
        return json_of(self)

    def save(self, path: str | Path) -> Path:
        """Write the profile as JSON, whole or not at all."""
        return write_atomic(path, self.to_text())

    def to_text(self) -> str:
        """The JSON of a profile's file."""
        return json.dumps(self.to_json(), indent=1) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a profile: a file, or one of the package by name, "smollm2/text".

        DataError or ProfileError says what is wrong with the file.
        """
        text = gallery_text(str(path)) if names_gallery(path) else read_text(path)
        data = read_json(text, str(path), "give a profile saved by tempering")
        return cls.from_json(data, str(path))

    @classmethod
    def from_json(cls, data: Any, where: str = "profile") -> Profile:
        """The inverse of `to_json`; `where` names the source in errors."""
        fields = fields_of(data, where)
        try:
            return cls(**fields)
        except (ProfileError, TemperatureError) as error:
            raise type(error)(f"{where}: {error}") from error


def _naming(model: Mapping[str, Any]) -> str:
    return f"{model.get('architecture')} with {model.get('shape')} ({model.get('fingerprint')})"


def _chosen(items: Iterable[int] | None, what: str, count: int) -> set[int] | None:
    if items is None:
        return None
    chosen = set(items)
    wrong = sorted(item for item in chosen if not 0 <= item < count)
    if wrong or not chosen:
        named = ", ".join(map(str, wrong)) or "(none)"
        raise ProfileError(f"{what} {named}: the model has {what}s 0 to {count - 1}")
    return chosen


def _softmax_rows(table: Tensor, plan: Layout) -> Tensor:
    keep = {(layer.stack, layer.index) for layer in plan.layers}
    rows, index = [], 0
    for stack, depth in plan.depths.items():
        for layer in range(depth):
            if (stack, layer) in keep:
                rows.append(table[index])
            elif not bool(((table[index] == 1) | table[index].isnan()).all()):
                raise ProfileError(
                    f"layer {layer} of the {stack} has no softmax and so no temperature; "
                    "its row must be 1 or NaN"
                )
            index += 1
    return torch.stack(rows)


def _check_row(row: Tensor, where: str) -> None:
    if row.ndim != 1 or len(row) == 0:
        raise ProfileError(f"{where}: temperatures have shape [heads]; this has {tuple(row.shape)}")
    check_values(row, where)


def rules_for(profile: Profile, plan: Layout) -> tuple[Rule | None, ...]:
    """The rule of each attention layer of a layout; None where it has none."""
    if not profile.rules:
        return (None,) * len(plan.layers)
    if profile.names is None:
        return profile.rules
    given = dict(zip(profile.names, profile.rules, strict=True))
    return tuple(given.get(name) for name in plan.names)
