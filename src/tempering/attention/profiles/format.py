"""The JSON of a profile, version 1: written, and read with nothing taken on trust.

A profile with rules is version 2, so that what reads version 1 alone refuses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tempering.attention.profiles.rules import Rule, rule
from tempering.errors import ProfileError

FORMAT, VERSION, VERSION_WITH_RULES = "tempering-profile", 1, 2


def json_of(profile: Any) -> dict[str, Any]:
    """A profile as JSON's types."""
    names = profile.names or tuple(f"layer {i}" for i in range(len(profile.rows)))
    return {
        "format": FORMAT,
        "version": VERSION_WITH_RULES if any(profile.rules) else VERSION,
        "model": dict(profile.model) if profile.model else None,
        "pattern": profile.pattern,
        "named": profile.names is not None,
        "partial": profile.partial,
        "layers": [
            {"name": name, "temperature": row.tolist(), **({"rule": str(item)} if item else {})}
            for name, row, item in zip(
                names, profile.rows, profile.rules or [None] * len(names), strict=True
            )
        ],
        "untempered": list(profile.untempered),
        "evidence": dict(profile.evidence),
    }


def fields_of(data: Any, where: str) -> dict[str, Any]:
    """The fields of a profile from `json_of`; ProfileError names `where` and what is wrong."""
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise ProfileError(f"{where} is not a profile (its format is not '{FORMAT}')")
    if data.get("version") not in (VERSION, VERSION_WITH_RULES):
        raise ProfileError(
            f"{where} has version {data.get('version')!r}; this tempering reads {VERSION} and "
            f"{VERSION_WITH_RULES}"
        )

    def field(name: str, *kinds: Any, among: Any = data, of: str = "") -> Any:
        if not isinstance(among, Mapping) or name not in among:
            raise ProfileError(f"{where} is damaged: {of or 'it'} has no field '{name}'")
        if not isinstance(among[name], kinds):
            raise ProfileError(
                f"{where} is damaged: '{name}' of {of or 'the profile'} is {among[name]!r:.40}"
            )
        return among[name]

    names, rows, rules = [], [], []
    for index, item in enumerate(field("layers", list)):
        of = f"layer {index}"
        names.append(field("name", str, among=item, of=of))
        values = field("temperature", list, among=item, of=of)
        if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            raise ProfileError(f"{where} is damaged: the temperatures of {of} are not all numbers")
        rows.append(torch.tensor(values, dtype=torch.float64))
        rules.append(
            _rule(field("rule", str, among=item, of=of), f"{where}: the rule of {of}")
            if "rule" in item
            else None
        )
    untempered = field("untempered", list)
    return {
        "rows": tuple(rows),
        "names": tuple(names) if field("named", bool) else None,
        "partial": field("partial", bool),
        "untempered": tuple(map(str, untempered)),
        "model": field("model", dict, type(None)),
        "pattern": field("pattern", str, type(None)),
        "evidence": field("evidence", dict),
        "rules": tuple(rules) if any(rules) else (),
    }


def _rule(text: str, where: str) -> Rule:
    try:
        return rule(text)
    except ProfileError as error:
        raise ProfileError(f"{where}: {error}") from error
