"""The JSON of a profile, version 1: written, and read with nothing taken on trust."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tempering.errors import ProfileError

FORMAT, VERSION = "tempering-profile", 1


def json_of(profile: Any) -> dict[str, Any]:
    """A profile as JSON's types."""
    names = profile.names or tuple(f"layer {i}" for i in range(len(profile.rows)))
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": dict(profile.model) if profile.model else None,
        "pattern": profile.pattern,
        "named": profile.names is not None,
        "partial": profile.partial,
        "layers": [
            {"name": name, "temperature": row.tolist()}
            for name, row in zip(names, profile.rows, strict=True)
        ],
        "untempered": list(profile.untempered),
        "evidence": dict(profile.evidence),
    }


def fields_of(data: Any, where: str) -> dict[str, Any]:
    """The fields of a profile from `json_of`; ProfileError names `where` and what is wrong."""
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise ProfileError(f"{where} is not a profile (its format is not '{FORMAT}')")
    if data.get("version") != VERSION:
        raise ProfileError(
            f"{where} has version {data.get('version')!r}; this tempering reads {VERSION}"
        )

    def field(name: str, *kinds: Any, among: Any = data, of: str = "") -> Any:
        if not isinstance(among, Mapping) or name not in among:
            raise ProfileError(f"{where} is damaged: {of or 'it'} has no field '{name}'")
        if not isinstance(among[name], kinds):
            raise ProfileError(
                f"{where} is damaged: '{name}' of {of or 'the profile'} is {among[name]!r:.40}"
            )
        return among[name]

    names, rows = [], []
    for index, item in enumerate(field("layers", list)):
        of = f"layer {index}"
        names.append(field("name", str, among=item, of=of))
        values = field("temperature", list, among=item, of=of)
        if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            raise ProfileError(f"{where} is damaged: the temperatures of {of} are not all numbers")
        rows.append(torch.tensor(values, dtype=torch.float64))
    untempered = field("untempered", list)
    return {
        "rows": tuple(rows),
        "names": tuple(names) if field("named", bool) else None,
        "partial": field("partial", bool),
        "untempered": tuple(map(str, untempered)),
        "model": field("model", dict, type(None)),
        "pattern": field("pattern", str, type(None)),
        "evidence": field("evidence", dict),
    }
