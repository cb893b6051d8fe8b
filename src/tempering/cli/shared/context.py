"""A context of a prompt, read from a file, and temperatures fitted to it."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from tempering.cli.shared import common
from tempering.errors import InputError

if TYPE_CHECKING:
    from tempering.attention.profiles.profile import Profile

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(s|m)")


def duration(text: str) -> float:
    """Seconds of a text such as 20s or 1.5m; InputError for anything else."""
    match = _DURATION.fullmatch(text.strip())
    seconds = float(match[1]) * {"s": 1, "m": 60}[match[2]] if match else math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise InputError(f"--fit takes seconds or minutes, e.g. 20s or 1.5m, not '{text}'")
    return seconds


def fitted(
    network: Any, tokenizer: Any, context: str, seconds: float, seed: int
) -> tuple[Profile, dict[str, Any]]:
    """Temperatures fitted to a context, and the section of the record that says what came of it."""
    from tempering.attention.tuning import tune_context
    from tempering.chunks import start_ids, token_ids

    ids, start = token_ids(tokenizer, context), start_ids(tokenizer)
    with common.staged() as shown:
        fit = tune_context(network, ids, seconds=seconds, start=start, seed=seed, progress=shown)
    common.note(
        f"fitted to the context in {fit.seconds:.1f} s: loss on spans held out "
        f"{fit.tuned.before:.4f} -> {fit.tuned.after:.4f} nats, {fit.spans} spans drawn"
    )
    return fit.profile, {
        "seconds": fit.seconds,
        "spans": fit.spans,
        "tokens": len(ids),
        "held out before": fit.tuned.before,
        "held out after": fit.tuned.after,
        "step": fit.tuned.step,
        "stopped because": fit.tuned.stopped_because,
    }
