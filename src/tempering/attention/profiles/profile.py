"""T[layer, head]: a temperature for every head of a model, relative to the model's own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tempering.attention.examining.layout_of import layout
from tempering.attention.examining.subject import adapters_of, unwrapped
from tempering.attention.layout import Layout
from tempering.attention.profiles.changing import (
    LONGEST,
    can_be_moved,
    constants_at,
    moved_rules,
    scaled_rule,
)
from tempering.attention.profiles.fingerprint import (
    Walked,
    describe_model,
    fingerprint,
    quick_fingerprint,
)
from tempering.attention.profiles.fitting import (
    check_row,
    check_scales,
    describe_rows,
    rows_by_layer,
    rules_by_layer,
)
from tempering.attention.profiles.format import fields_of, json_of
from tempering.attention.profiles.length_base import LengthRule
from tempering.attention.profiles.making import rows_of_matrix, rows_of_schedule
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
    output_scale: for each row the factors on the outputs of its heads, as `repair` learns them
        beside T: head h of layer l gives s[l, h] sum_j p_j v_j. () for 1 everywhere.
    """

    rows: tuple[Tensor, ...]
    names: tuple[str, ...] | None = None
    partial: bool = False
    untempered: tuple[str, ...] = ()
    model: Mapping[str, Any] | None = None
    pattern: str | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)
    rules: tuple[Rule | None, ...] = ()
    output_scale: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        if not self.rows:
            raise ProfileError("a profile needs the temperatures of at least one layer")
        if self.names is not None and len(set(self.names)) != len(self.rows):
            raise ProfileError(
                f"{len(self.rows)} rows of temperatures need as many names, each another; "
                f"these are {', '.join(self.names)}"
            )
        for index, row in enumerate(self.rows):
            check_row(row, self.names[index] if self.names else f"layer {index}")
        if self.rules:
            check_rules(self.rules, self.rows)
        if self.output_scale:
            check_scales(self.output_scale, self.rows)

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
        model_layout = model if isinstance(model, Layout) else layout(model)
        pattern = as_schedule(schedule)
        rows = rows_of_schedule(pattern, model_layout, layers, heads, stack)
        return cls._for(model_layout, rows, model, pattern=str(pattern))

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
        model_layout = layout(model)
        rows = rows_of_matrix(table, model_layout)
        cls(tuple(rows)).resolve(model_layout)
        return cls._for(model_layout, rows, model)

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
    def from_rows(cls, rows: Sequence[Tensor], model_layout: Layout) -> Profile:
        """A profile from one tensor of temperatures for each layer of a layout."""
        return cls._for(model_layout, list(rows), model_layout)

    @classmethod
    def neutral(cls, model: nn.Module | Layout) -> Profile:
        """T = 1 everywhere."""
        model_layout = model if isinstance(model, Layout) else layout(model)
        return cls._for(model_layout, [torch.ones(heads) for heads in model_layout.heads], model)

    @classmethod
    def _for(
        cls, model_layout: Layout, rows: Sequence[Tensor], model: nn.Module | Layout, **more: Any
    ) -> Profile:
        return cls(
            tuple(row.detach().to("cpu", torch.float64) for row in rows),
            model_layout.names,
            untempered=model_layout.untempered,
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
        return describe_rows(self.rows)

    @property
    def changes_nothing(self) -> bool:
        """Whether the model under it is the untempered model."""
        numbers = (*self.rows, *self.output_scale)
        return not any(self.rules) and all(bool((row == 1).all()) for row in numbers)

    def resolve(
        self, model_layout: Layout, *, rules: bool = False, scales: bool = False
    ) -> list[Tensor]:
        """One row for each attention layer of a layout, or a ProfileError with both shapes.

        RefusedError when the profile has rules or output scales, unless the caller applies them
        too (rules=True, scales=True).
        """
        if not rules:
            self.refuse_rules("temperatures that depend on the query act in transformers alone")
        if not scales:
            self.refuse_scales("they act in transformers and in baked models alone, so bake it")
        return rows_by_layer(self.rows, self.names, self.partial, model_layout)

    def rules_by_layer(self, model_layout: Layout) -> tuple[Rule | None, ...]:
        """The rule of each attention layer of a layout; None where it has none."""
        return rules_by_layer(self.rules, self.names, model_layout)

    def scales_by_layer(self, model_layout: Layout) -> list[Tensor] | None:
        """The output scales of each attention layer of a layout; None without any."""
        if not self.output_scale:
            return None
        return rows_by_layer(self.output_scale, self.names, self.partial, model_layout)

    def refuse_scales(self, why: str) -> None:
        """RefusedError that says why, when the profile has output scales."""
        if self.output_scale:
            raise RefusedError(
                f"this profile has output scales of heads beside temperatures: {why}; or use "
                "temperatures alone, such as smollm2/text, or those of tempering repair --no-scales"
            )

    def refuse_rules(self, why: str) -> None:
        """RefusedError that says why, when the profile has rules; offers constants if there are."""
        if not any(self.rules):
            return
        named = ", ".join(dict.fromkeys(item.label for item in self.rules if item))
        offer = ""
        if all(isinstance(item, LengthRule | None) for item in self.rules):
            offer = (
                "; the best constants for texts of N tokens are profile.at_length(N), in a shell "
                "tempering profile constant FILE --length N --out CONSTANT.json"
            )
        raise RefusedError(f"this profile has rules ({named}): {why}{offer}")

    def check_model(self, model: nn.Module, walked: Walked | None = None) -> None:
        """ProfileError unless `model` is the one that the profile was made for.

        walked: what `walk` gave for the model just now, for a quick look (`quick_fingerprint`).
        """
        if self.model is None:
            return
        model = unwrapped(model)
        name = fingerprint(model) if walked is None else quick_fingerprint(model, walked)
        if name == self.model.get("fingerprint"):
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
        model_layout = layout(model)
        rows = self.resolve(model_layout, rules=True, scales=True)
        return replace(
            Profile._for(model_layout, rows, model),
            pattern=self.pattern,
            evidence=self.evidence,
            rules=self.rules_by_layer(model_layout) if any(self.rules) else (),
            output_scale=tuple(self.scales_by_layer(model_layout) or ()),
        )

    # -- changing one

    def scaled(self, room: float) -> Profile:
        """T ** room: 0 is the untempered model, 1 this profile, -1 its mirror image.

        Output scales go along: s ** room. Of rules, `power` alone can be scaled.
        """
        rules = tuple(scaled_rule(item, room) for item in self.rules)
        if [item is None for item in rules] != [item is None for item in self.rules]:
            self.refuse_rules("they can't be scaled; change their level or their bounds")
        return self._changed(lambda rows: tuple(row**room for row in rows), rules)

    def shuffled(self, seed: SupportsIndex) -> Profile:
        """The same values permuted over all heads of all layers: a control.

        Slopes of `power` go along with the temperatures of their heads.
        """
        if any(self.rules) and not can_be_moved(self.rules):
            self.refuse_rules("they can't be shuffled over heads")
        generator = torch.Generator().manual_seed(whole_number(seed, "seed"))
        sizes = [len(row) for row in self.rows]
        order = torch.randperm(sum(sizes), generator=generator)
        rules = moved_rules(self.rules, sizes, order) if any(self.rules) else ()
        return self._changed(lambda rows: torch.cat(rows)[order].split(sizes), rules)

    def with_rules(self, rules: Sequence[Rule | None]) -> Profile:
        """The same temperatures under other rules, one (or None) for each row."""
        return replace(self, rules=tuple(rules), pattern=None, evidence={})

    def at_length(
        self, length: SupportsIndex, windows: int | Sequence[int | None] | None = None
    ) -> Profile:
        """The best constants for texts of so many tokens, in place of rules of length.

        log T[l, h] is the mean of log T[l, h](n) over the queries of such a text, n = 1..length,
        which is closest to them in squares.

        windows: keys that a query sees at most: in all layers, or in each (None: no window). A
        profile doesn't know them; configurations of transformers name theirs sliding_window.

        Raises RefusedError for rules that read logits.
        """
        tokens = whole_number(length, "length")
        if tokens < 1:
            raise ProfileError(f"a text has at least 1 token, not {tokens}")
        if tokens > LONGEST:
            raise ProfileError(f"constants are for texts of up to {LONGEST} tokens, not {tokens}")
        given = [windows] * len(self.rows) if isinstance(windows, int | None) else list(windows)
        if len(given) != len(self.rows):
            raise ProfileError(
                f"{len(given)} windows were given for {len(self.rows)} layers; give one for each, "
                "None where there is none"
            )
        own = [None if x is None else whole_number(x, "a window", 1) for x in given]
        if not all(isinstance(item, LengthRule | None) for item in self.rules):
            self.refuse_rules("only rules of length have constants for a length")
        rules = self.rules or (None,) * len(self.rows)
        return self._changed(
            lambda rows: tuple(constants_at(rows, rules, tokens, own)), scales=False
        )

    def _changed(
        self,
        change: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]],
        rules: tuple[Rule | None, ...] = (),
        *,
        scales: bool = True,
    ) -> Profile:
        """The profile with other temperatures; scales: whether its output scales change too."""
        output = change(self.output_scale) if self.output_scale and scales else self.output_scale
        return replace(
            self,
            rows=change(self.rows),
            rules=rules,
            output_scale=output,
            pattern=None,
            evidence={},
        )

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
