"""The JSON of a profile, version 1: written, and read with nothing taken on trust.

A profile with rules is version 2, one with output scales version 3, so that what reads the versions
before alone refuses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tempering.attention.profiles.rules import Rule, rule
from tempering.errors import ProfileError

FORMAT, VERSION, VERSION_WITH_RULES, VERSION_WITH_SCALES = "tempering-profile", 1, 2, 3
_VERSIONS = (VERSION, VERSION_WITH_RULES, VERSION_WITH_SCALES)


def json_of(profile: Any) -> dict[str, Any]:
    """A profile as JSON's types."""
    names = profile.names or tuple(f"layer {i}" for i in range(len(profile.rows)))
    nothing = [None] * len(names)
    version = VERSION_WITH_RULES if any(profile.rules) else VERSION
    return {
        "format": FORMAT,
        "version": VERSION_WITH_SCALES if profile.output_scale else version,
        "model": dict(profile.model) if profile.model else None,
        "pattern": profile.pattern,
        "named": profile.names is not None,
        "partial": profile.partial,
        "layers": [
            {
                "name": name,
                "temperature": row.tolist(),
                **({"rule": str(item)} if item else {}),
                **({} if scale is None else {"output_scale": scale.tolist()}),
            }
            for name, row, item, scale in zip(
                names,
                profile.rows,
                profile.rules or nothing,
                profile.output_scale or nothing,
                strict=True,
            )
        ],
        "untempered": list(profile.untempered),
        "evidence": dict(profile.evidence),
    }


def fields_of(data: Any, where: str) -> dict[str, Any]:
    """The fields of a profile from `json_of`; ProfileError names `where` and what is wrong."""
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise ProfileError(f"{where} is not a profile (its format is not '{FORMAT}')")
    if data.get("version") not in _VERSIONS:
        raise ProfileError(
            f"{where} has version {data.get('version')!r}; this tempering reads "
            f"{', '.join(map(str, _VERSIONS))}"
        )

    def field(name: str, *kinds: Any, among: Any = data, of: str = "") -> Any:
        if not isinstance(among, Mapping) or name not in among:
            raise ProfileError(f"{where} is damaged: {of or 'it'} has no field '{name}'")
        if not isinstance(among[name], kinds):
            raise ProfileError(
                f"{where} is damaged: '{name}' of {of or 'the profile'} is {among[name]!r:.40}"
            )
        return among[name]

    names, rules = [], []
    rows: list[torch.Tensor] = []
    scales: list[torch.Tensor] = []
    for index, item in enumerate(field("layers", list)):
        of = f"layer {index}"
        names.append(field("name", str, among=item, of=of))
        for key, kept in (("temperature", rows), ("output_scale", scales)):
            if key == "output_scale" and data["version"] != VERSION_WITH_SCALES:
                continue
            values = field(key, list, among=item, of=of)
            if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
                raise ProfileError(f"{where} is damaged: '{key}' of {of} holds more than numbers")
            try:
                kept.append(torch.tensor(values, dtype=torch.float64))
            except OverflowError:
                raise ProfileError(
                    f"{where} is damaged: '{key}' of {of} holds a number beyond all floats"
                ) from None
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
        "output_scale": tuple(scales),
    }


def _rule(text: str, where: str) -> Rule:
    try:
        return rule(text)
    except ProfileError as error:
        raise ProfileError(f"{where}: {error}") from error
