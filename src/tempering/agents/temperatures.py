"""Which temperatures a model takes: a dated table, and a policy for those that it doesn't take.

Ranges belong to models, not to vendors: some models take a range, some one value, some none, some
temperature or top_p but not both. `models.yaml` beside this file says which, with date and source.
Rows of a user's file in the same form come first.

One normalised temperature t, 0 cold to 1 hot, serves all models: it stands for
cold + t (hot - cold) on the row's `scale`, which is its range unless it says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from tempering.agents import strict_yaml
from tempering.errors import InputError, TemperatureError
from tempering.files import read_text

POLICIES = STRICT, CLAMP, OMIT = ("strict", "clamp", "omit")
# The range that every model in the table with a range takes.
COMMON = (0.0, 1.0)

ENTRY = """models:
  - provider: {provider}
    match: "{model}"
    range: [0, 1]        # or   fixed: 1   or   forbidden: true
    date: {today}
    source: https://where-the-provider-says-so"""


class Sent(NamedTuple):
    """What goes into a request: temperature and top_p (None: left out), and further fields.

    note: for the record, where what is sent differs from what was asked for.
    """

    temperature: float | None
    top_p: float | None
    extra: dict[str, Any]
    note: str | None


@dataclass(frozen=True)
class ProviderRule:
    """One row of the table.

    provider: openai, anthropic, gemini, server (any other OpenAI-compatible one) or local.
    match: names of models, with * and ?.
    range: the temperatures that are accepted, or the provider's scale where none is.
    scale: what a normalised 0 and 1 stand for.
    fixed: the one value that is accepted. forbidden: none is accepted, or all are ignored.
    exclusive: temperature or top_p, not both. advisory: the value that the provider advises.
    seed: whether a seed may be sent. send: fields that go with every temperature or top_p.
    refuses: which of "top_p" and "stop" the model doesn't take.
    note: what the record of every call should say about this model.
    date, source: when and where this row was read.
    """

    provider: str
    match: str
    range: tuple[float, float]
    scale: tuple[float, float]
    date: str
    source: str
    fixed: float | None = None
    forbidden: bool = False
    exclusive: bool = False
    advisory: float | None = None
    seed: bool = False
    send: dict[str, Any] = field(default_factory=dict)
    refuses: tuple[str, ...] = ()
    note: str | None = None

    def temperature(self, normalised: float) -> float:
        """cold + t (hot - cold) for t in [0, 1]."""
        if not 0 <= normalised <= 1:
            raise TemperatureError(
                f"a normalised temperature lies in 0 (cold) .. 1 (hot), got {normalised:g}"
            )
        cold, hot = self.scale
        return cold + normalised * (hot - cold)

    def settle(self, asked: float | None, top_p: float | None, policy: str, model: str) -> Sent:
        """What to send when `asked` is wanted; TemperatureError where the policy says so."""
        if policy not in POLICIES:
            raise InputError(f"a policy is {', '.join(POLICIES)}; got '{policy}'")
        dropped = None
        if top_p is not None and "top_p" in self.refuses:
            if top_p != 1 and policy == STRICT:
                raise self._refused(model, f"top_p {top_p:g}", "takes no top_p", policy)
            # Without top_p a model samples from all tokens, as with top_p = 1. So leaving it out is
            # exact for 1, and comes nearest to any other value.
            dropped = "top_p left out: the model takes none" if top_p != 1 else None
            top_p = None
        temperature, note = asked, None
        if asked is not None:
            temperature, top_p, note = self._settled(asked, top_p, policy, model)
        notes = [text for text in (note, dropped, self.note) if text is not None]
        extra = {} if temperature is None and top_p is None else dict(self.send)
        return Sent(temperature, top_p, extra, "; ".join(notes) or None)

    def _settled(
        self, asked: float, top_p: float | None, policy: str, model: str
    ) -> tuple[float | None, float | None, str | None]:
        """(temperature, top_p, note) for a temperature that was asked for."""
        what = f"temperature {asked:g}"
        low, high = self.range
        if self.forbidden:
            if policy != OMIT:
                raise self._refused(model, what, "takes no temperature", policy)
            return None, top_p, "temperature left out: the model takes none"
        if self.exclusive and top_p is not None:
            if policy != OMIT:
                raise self._refused(model, what, "takes temperature or top_p, not both", policy)
            return asked, None, "top_p left out: it excludes temperature"
        allowed = asked if self.fixed is None else self.fixed
        allowed = min(max(allowed, low), high)
        if allowed != asked:
            if policy == STRICT:
                only = f"only {self.fixed:g}" if self.fixed is not None else f"{low:g} to {high:g}"
                raise self._refused(model, what, f"takes {only}", policy)
            if policy == OMIT:
                return None, top_p, f"temperature left out: {asked:g} is not taken"
            return allowed, top_p, f"clamped from {asked:g}"
        if self.advisory is not None and asked != self.advisory:
            return asked, top_p, f"the provider advises {self.advisory:g}"
        return asked, top_p, None

    def _refused(self, model: str, what: str, why: str, policy: str) -> TemperatureError:
        mend = "leave it out with the policy omit"
        if what.startswith("top_p"):
            mend += " or clamp"
        elif self.fixed is not None:
            mend += f", send {self.fixed:g} with the policy clamp"
        elif not self.forbidden and not self.exclusive:
            mend += ", or send the nearest with the policy clamp"
        return TemperatureError(
            f"{model} {why}; asked for {what} under the policy {policy} "
            f"(row '{self.match}' of {self.date}, {self.source}). To mend it: {mend}, "
            "or choose another model"
        )


def known_rules() -> tuple[ProviderRule, ...]:
    """The rows that come with the package."""
    text = resources.files(__package__).joinpath("models.yaml").read_text(encoding="utf-8")
    return parse_rules(text, "models.yaml of the package")


def user_rules(path: str | Path) -> tuple[ProviderRule, ...]:
    """The rows of a user's file, in the same form."""
    return parse_rules(read_text(path), str(path))


def parse_rules(text: str, where: str) -> tuple[ProviderRule, ...]:
    """Rows from YAML; InputError names the row and the key that is off."""
    rows = strict_yaml.fields(strict_yaml.load(text, where), where, ("models",))["models"]
    if not isinstance(rows, list):
        raise InputError(f"{where}: models is a list of rows, got {strict_yaml.shown(rows)}")
    return tuple(_rule(row, f"{where}: models[{i}]") for i, row in enumerate(rows))


def rule_for(
    provider: str, model: str, policy: str = STRICT, extra: Sequence[ProviderRule] = ()
) -> ProviderRule:
    """The first row that fits, the user's before the package's.

    Raises InputError for an unknown model under the policy strict, with the entry to add. Under
    clamp an unknown model gets the range common to all providers, 0 to 1; under omit, none.
    """
    if policy not in POLICIES:
        raise InputError(f"a policy is {', '.join(POLICIES)}; got '{policy}'")
    for rule in (*extra, *known_rules()):
        if rule.provider == provider and any(
            fnmatchcase(name, rule.match) for name in (model, _base(model))
        ):
            return rule
    if policy == STRICT:
        entry = ENTRY.format(provider=provider, model=model, today=date.today().isoformat())
        raise InputError(
            f"the table of temperatures has no row for {provider} model '{model}'; add one to a "
            f"file and give it with --models FILE:\n{entry}\nor choose the policy clamp (0 to 1) "
            "or omit (send none)"
        )
    return ProviderRule(
        provider,
        match=model,
        range=COMMON,
        scale=COMMON,
        date="unknown",
        source="no row in the table",
        forbidden=policy == OMIT,
    )


def _base(model: str) -> str:
    """The model behind a name: of "ft:gpt-4o-mini-2024-07-18:org::id" the one that was tuned, of
    "models/gemini-3.5-flash" the name without the folder."""
    if model.startswith("ft:"):
        return model.split(":")[1]
    return model.removeprefix("models/")


def _rule(row: Any, where: str) -> ProviderRule:
    row = strict_yaml.fields(
        row,
        where,
        ("provider", "match", "range", "date", "source"),
        ("scale", "fixed", "forbidden", "exclusive", "advisory", "seed", "send", "refuses", "note"),
    )
    limits = _pair(row["range"], f"{where}.range", 0.0, math.inf)
    scale = _pair(row.get("scale", list(limits)), f"{where}.scale", *limits)
    if math.isinf(scale[1]):
        raise InputError(f"{where}.scale: a range without an end needs a scale with one")
    for name in ("forbidden", "seed"):
        if not isinstance(row.get(name, False), bool):
            raise InputError(f"{where}.{name}: expected true or false")
    if row.get("exclusive", "top_p") != "top_p":
        raise InputError(f"{where}.exclusive: expected top_p, got {row['exclusive']!r}")
    if not isinstance(row.get("send", {}), dict):
        raise InputError(f"{where}.send: expected a mapping of request fields")
    refuses = row.get("refuses", [])
    if not isinstance(refuses, list) or not set(map(str, refuses)) <= {"top_p", "stop"}:
        raise InputError(
            f"{where}.refuses: expected a list of top_p and stop, got {strict_yaml.shown(refuses)}"
        )
    single = {
        name: strict_yaml.number(row[name], f"{where}.{name}", *limits)
        for name in ("fixed", "advisory")
        if name in row
    }
    if not isinstance(row["date"], date):
        raise InputError(f"{where}.date: expected a date such as 2026-11-22, got {row['date']!r}")
    return ProviderRule(
        provider=strict_yaml.text(row["provider"], f"{where}.provider"),
        match=strict_yaml.text(row["match"], f"{where}.match"),
        range=limits,
        scale=scale,
        date=row["date"].isoformat(),
        source=strict_yaml.text(row["source"], f"{where}.source"),
        forbidden=row.get("forbidden", False),
        exclusive="exclusive" in row,
        seed=row.get("seed", False),
        send=dict(row.get("send", {})),
        refuses=tuple(map(str, refuses)),
        note=strict_yaml.text(row["note"], f"{where}.note") if "note" in row else None,
        **single,
    )


def _pair(value: Any, where: str, low: float, high: float) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise InputError(f"{where}: expected [low, high], got {strict_yaml.shown(value)}")
    first, second = (strict_yaml.number(item, where, low, high) for item in value)
    if first > second:
        raise InputError(f"{where}: expected [low, high], got {strict_yaml.shown(value)}")
    return first, second
