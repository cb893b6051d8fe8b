"""The model that a console drives, as the page sees it: its layers, and profiles made for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tempering.attention.control.tempered import tempered
from tempering.attention.examining.layout_of import layout
from tempering.attention.layout import Layout
from tempering.attention.limits import COLDEST, HOTTEST
from tempering.attention.profiles.adaptive import adaptive_profile
from tempering.attention.profiles.fingerprint import describe_model
from tempering.attention.profiles.profile import Profile
from tempering.attention.profiles.rules import KNOWN, Rule, is_rule, rule
from tempering.console.fields import MOST_COLUMNS
from tempering.data.gallery import gallery
from tempering.errors import InputError, ProfileError, TemperingError
from tempering.schedules import PATTERNS, schedule
from tempering.tokens.grammar import POLICIES

_CURVE = 129  # points of the curve that is drawn while one types


@dataclass(frozen=True)
class Subject:
    """A model with what is known of it.

    name: what the user calls it. refused: why its attention can't be tempered, or None.
    model, tokenizer: None where they are elsewhere, on a server.
    """

    name: str
    model: Any
    tokenizer: Any
    plan: Layout
    stated: dict[str, Any]
    refused: str | None = None

    @classmethod
    def of(cls, name: str, model: Any, tokenizer: Any) -> Subject:
        """Examine a model and run its self-check; a refusal is kept for the page."""
        try:
            plan = layout(model)
            with tempered(model, Profile.neutral(plan)):
                pass
        except TemperingError as error:
            empty = Layout((), (), {})
            return cls(name, model, tokenizer, empty, {}, str(error))
        return cls(name, model, tokenizer, plan, describe_model(model))

    @property
    def context(self) -> int | None:
        """The longest text that the model reads, in tokens."""
        if self.model is None:
            return None
        found = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return found if isinstance(found, int) else None

    @property
    def vocabulary(self) -> int:
        """Rows of the output layer: token ids are below it."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    def require(self) -> None:
        """Raise what the self-check raised."""
        if self.refused is not None:
            raise InputError(self.refused)

    def check_length(self, tokens: int) -> None:
        """InputError for a text that is longer than the model reads."""
        if self.context is not None and tokens > self.context:
            raise InputError(
                f"the text has {tokens} tokens, more than the {self.context} that the model reads"
            )

    def for_page(self) -> dict[str, Any]:
        """All that the page needs before anything is painted."""
        return {
            "name": self.name,
            "refused": self.refused,
            "fingerprint": self.stated.get("fingerprint"),
            "architecture": self.stated.get("architecture", type(self.model).__name__),
            "rows": _grid_rows(self.plan),
            "layers": [
                {"name": layer.name, "stack": layer.part, "index": layer.index, "heads": own}
                for layer, own in zip(self.plan.layers, self.plan.heads, strict=True)
            ],
            "context": self.context,
            "columns": MOST_COLUMNS,
            "chat": self.tokenizer is None or bool(self.tokenizer.chat_template),
            "coldest": COLDEST,
            "hottest": HOTTEST,
            "gallery": list(gallery()),
            "patterns": [[*entry] for entry in PATTERNS.values()],
            "rules": [kind.signature for kind in KNOWN.values()],
            "policies": [[*entry] for entry in POLICIES.values()],
        }

    # -- profiles

    def profile(self, data: Any) -> Profile:
        """A profile from what the page holds: {rows, rules, pattern}.

        rows: for each layer of the plan a list of temperatures, or one number for all its heads.
        """
        self.require()
        if not isinstance(data, dict) or not isinstance(data.get("rows"), list):
            raise ProfileError(f"a profile has a list of rows; the page sent {data!r:.60}")
        rows, layers = data["rows"], self.plan.layers
        if len(rows) != len(layers):
            raise ProfileError(
                f"the profile has {len(rows)} layers, the model has {self.plan.describe()}"
            )
        found = [
            _row(row, layer.heads, layer.name) for row, layer in zip(rows, layers, strict=True)
        ]
        made = replace(
            Profile.from_rows(found, self.plan),
            model=self.stated or None,
            rules=_rules(data.get("rules"), self.plan),
        )
        pattern = data.get("pattern")
        if pattern is None:
            return made
        if not isinstance(pattern, str):
            raise ProfileError(f"a profile's pattern is a text, not {pattern!r:.40}")
        if not states(pattern, made, self.plan):
            raise ProfileError(
                f"the page sent temperatures that are not those of their pattern {pattern!r:.80} "
                "(a link that was changed?); give the pattern anew, or paint: what is painted has "
                "none"
            )
        return replace(made, pattern=pattern)

    def to_page(self, profile: Profile) -> dict[str, Any]:
        """A profile as the page holds it; ProfileError unless it fits the model's shape."""
        self.require()
        rows = profile.resolve(self.plan, rules=True)
        rules = profile.rules_by_layer(self.plan)
        found: dict[str, Any] = {
            "rows": [row.tolist() for row in rows],
            "rules": [None if item is None else str(item) for item in rules],
            "pattern": profile.pattern,
        }
        if profile.pattern is not None and not states(profile.pattern, profile, self.plan):
            found["pattern"] = None
            found["note"] = (
                f"Its pattern, {profile.pattern[:80]}, can't be told from the temperatures of this "
                "model, so what is saved here doesn't name it."
            )
        return found

    def from_text(self, text: str, amplitude: float | None) -> dict[str, Any]:
        """The profile of a schedule or a rule in its text form, with the curve of a schedule.

        Raises ScheduleError or ProfileError with the column.
        """
        self.require()
        if is_rule(text):
            if amplitude is not None:
                raise InputError(f"{text} is a rule for every query; it has no amplitude")
            made = adaptive_profile(text, self.plan)
            return {**self.to_page(made), "text": text, "curve": None}
        plan = schedule(text)
        if amplitude is not None:
            plan = plan.amplitude(amplitude)
        made = Profile.from_schedule(plan, self.plan)
        return {**self.to_page(made), "text": str(plan), "curve": _curve(plan, self.plan)}

    def read(self, data: Any, where: str) -> dict[str, Any]:
        """A profile's JSON for the page, with a note where it was made for another model."""
        return self._noted(Profile.from_json(data, where))

    def load(self, name: str) -> dict[str, Any]:
        """A profile of the gallery. The page names no files of this machine."""
        if name not in gallery():
            raise InputError(f"the gallery has no profile {name!r}; it has {', '.join(gallery())}")
        return self._noted(Profile.load(name))

    def _noted(self, profile: Profile) -> dict[str, Any]:
        found = self.to_page(profile)
        made_for = (profile.model or {}).get("fingerprint")
        if made_for is not None and made_for != self.stated.get("fingerprint"):
            noted = (
                f"This profile was made for {(profile.model or {}).get('architecture')} "
                f"({made_for}). Its shape fits this model, so it is shown; what was measured "
                "about it holds for the other one."
            )
            found["note"] = f"{noted} {found['note']}" if "note" in found else noted
        return found


def states(pattern: str, profile: Profile, plan: Layout) -> bool:
    """Whether a profile's temperatures are those that its pattern gives.

    A pattern may have been read for some layers or heads alone; the others then have T = 1.
    """
    try:
        if is_rule(pattern):
            wanted = adaptive_profile(pattern, plan).rules
            own = profile.rules_by_layer(plan)
            return any(own) and all(item in (None, rule) for item, rule in zip(own, wanted))
        given = Profile.from_schedule(pattern, plan).rows
    except TemperingError:
        return False
    pairs = list(zip(profile.resolve(plan, rules=True), given, strict=True))
    same = [torch.isclose(own, row, rtol=1e-9, atol=0) for own, row in pairs]
    return any(bool(each.any()) for each in same) and all(
        bool((each | (own == 1)).all()) for each, (own, _) in zip(same, pairs, strict=True)
    )


def _rules(given: Any, plan: Layout) -> tuple[Rule | None, ...]:
    """The rules that the page sent, a text or null for each layer; () for none."""
    if given is None:
        return ()
    layers = plan.layers
    if not isinstance(given, list) or len(given) not in (0, len(layers)):
        raise ProfileError(f"a profile has a rule, or none, for each of {len(layers)} layers")
    for layer, text in zip(layers, given, strict=False):
        if text is not None and not isinstance(text, str):
            raise ProfileError(f"{layer.name}: a rule is a text or null, not {text!r:.40}")
    if all(text is None for text in given):
        return ()
    return tuple(None if text is None else rule(text) for text in given)


def _row(given: Any, heads: int, where: str) -> Tensor:
    values = [given] * heads if isinstance(given, int | float) else given
    if not isinstance(values, list) or len(values) != heads:
        raise ProfileError(f"{where} has {heads} heads; the page sent {given!r:.60}")
    if any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
        raise ProfileError(f"{where}: temperatures are numbers; the page sent {given!r:.60}")
    try:
        return torch.tensor(values, dtype=torch.float64)
    except (OverflowError, RuntimeError) as error:
        raise ProfileError(f"{where}: a temperature is beyond all bounds") from error


def _grid_rows(plan: Layout) -> list[dict[str, Any]]:
    """The rows of the grid in order of depth: a layer of the plan each, or None for no softmax."""
    places: dict[tuple[str, int], int] = {
        (layer.part, layer.index): i for i, layer in enumerate(plan.layers)
    }
    return [
        {"stack": part, "index": index, "layer": places.get((part, index))}
        for part, depth in plan.depths.items()
        for index in range(depth)
    ]


def _curve(plan: Any, model: Layout) -> dict[str, Sequence[float | None]]:
    """The schedule over progress, and where the layers read it."""
    try:
        values = plan(torch.linspace(0, 1, _CURVE, dtype=torch.float64)).tolist()
    except TemperingError:  # a control (`shuffle`) exists only on a clock
        values = []
    depth = max(model.depths.values())
    points = plan.sample(depth).tolist()
    return {"values": [_finite(v) for v in values], "points": [_finite(v) for v in points]}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
