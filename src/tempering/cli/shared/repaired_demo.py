"""The demo's last lines: the model rounded to 3 bits, and what its profile gives back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

COMPRESSED, PROFILE = "smollm2-3bit", "smollm2-3bit/repair"
TEXT, CHUNK, CHUNKS = "reference", 512, 3  # nothing like this text was learned from


def repaired_rows(
    reference: Any, tokenizer: Any, *, progress: Callable[[str, int, int], None] | None = None
) -> list[dict[str, Any]]:
    """Rows of a record's `repair`: uncompressed, rounded, and rounded under the profile."""
    from tempering.attention.control.tempered import tempered
    from tempering.attention.profiles.profile import Profile
    from tempering.attention.tuning import from_text
    from tempering.cli.shared import common
    from tempering.data import sample_text
    from tempering.evaluation.returned import returned, score

    name = f"{TEXT}, {CHUNK} tokens, 3 bits a weight"
    test = from_text(tokenizer, sample_text(TEXT), chunk=CHUNK, limit=CHUNKS, name=name)
    known = score(reference, [test], label="uncompressed", progress=progress)[name]
    network, _ = common.open_model(COMPRESSED)
    before = score(network, [test], label="3 bits", progress=progress)[name]
    with tempered(network, Profile.load(PROFILE)):
        after = score(network, [test], label="3 bits, repaired", progress=progress)[name]
    return [{"label": PROFILE, **returned(test, known, before, after).row()}]
