"""The model card of a baked model: what was folded, from what, and how to take it out."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import Any

from torch import Tensor

from tempering.attention.profiles.profile import Profile


def model_card(base: str, profile: Profile, results: Mapping[str, Any], undo: str) -> str:
    """Markdown for README.md.

    Parameters
    ----------
    base: the name of the model that was baked.
    profile: bound to it, with a row for each layer.
    results: lines of a table, name to value.
    undo: the command that takes the profile out.
    """
    names = profile.names or tuple(f"layer {i}" for i in range(len(profile.rows)))
    lines = [
        "---",
        f"base_model: {base}",
        "library_name: transformers",
        "tags: [tempering, attention-temperature]",
        "---",
        "",
        f"# {base}, baked with attention temperatures",
        "",
        f"Head h of layer l attends with softmax(logits / T[l, h]), where 1 is {base}'s own "
        "temperature. The temperatures are folded into the weights, so the model runs anywhere "
        f"at no cost. Made by tempering {metadata.version('tempering')}; licence and limits are "
        f"those of {base}.",
        "",
        f"Profile: {profile.describe()}"
        + (f", {profile.pattern}" if profile.pattern else "")
        + (f", made for {profile.model.get('fingerprint')}" if profile.model else "")
        + ". `config.json` holds it whole, under `tempering`.",
        "",
    ]
    scaled = "" if not profile.output_scale else " factor on their outputs |"
    lines += [f"| layer | T of its heads |{scaled}", "|---|---|" + ("---|" if scaled else "")]
    for place, (name, row) in enumerate(zip(names, profile.rows, strict=True)):
        factors = f" {_short(profile.output_scale[place])} |" if scaled else ""
        lines.append(f"| {name} | {_short(row)} |{factors}")
    if profile.evidence:
        lines += ["", "Measured about the profile when it was made:", ""]
        lines += [f"- {key}: {value}" for key, value in profile.evidence.items()]
    lines += ["", "| check | value |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in results.items()]
    lines += ["", f"To take the profile out again: `{undo}`", ""]
    return "\n".join(lines)


def _short(row: Tensor) -> str:
    """The numbers of a layer's heads; one, where they are the same."""
    values = row.tolist()
    same = all(value == values[0] for value in values)
    return f"{values[0]:.4g}" if same else " ".join(f"{value:.4g}" for value in values)
