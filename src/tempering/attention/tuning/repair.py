"""Repair: temperatures (and output scales) that give back what compression took from a model.

    repair(model, reference, objectives)     learned: minimise KL(reference || model) on a text
    repair_by_support(model, entropy, ids)   solved: every head's support is the reference's again

No weight changes. The first takes gradients and gives back the most; the second takes one forward
pass.

Learning goes by Adam on a few chunks a step: compression moves a model so far that a few hundred
numbers see where to go from a few thousand tokens, where Newton's method takes a full pass for one
step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tempering.attention.measuring.targets import profile_of_entropy
from tempering.attention.profiles.profile import Profile
from tempering.attention.tuning.batches import Batch, target_losses
from tempering.attention.tuning.fit import tune
from tempering.attention.tuning.objectives import Objective
from tempering.attention.tuning.outcome import Tuned
from tempering.attention.tuning.teacher import TOP, teach
from tempering.attention.tuning.tunable import frozen
from tempering.errors import InputError, ModelError

# Of T where support is solved for: heads whose support no temperature restores stay within it.
SUPPORT_BOUNDS = (0.5, 2.0)
# Times through the text, and chunks of each objective in a step.
PASSES, ROWS = 1, 2
# Adam's rate in log T where D = KL(reference || model) is 1 nat. A loss is quadratic near its
# optimum, so the way there grows as the square root of what is to be gained, and the rate with it.
RATE, RATES = 0.09, (0.015, 0.12)
FIRST_PIECES = 2  # of each objective, that D is taken from
_UNKNOWN = 0.1  # D where nothing is known of a reference


def repair(
    model: nn.Module,
    reference: nn.Module | Callable[[], nn.Module] | None,
    objectives: Objective | Sequence[Objective],
    *,
    lessons: str | Path,
    top: int | None = TOP,
    passes: int = PASSES,
    rows: int = ROWS,
    output_scales: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
    **tuning: Any,
) -> Tuned:
    """Learn the temperatures under which a compressed model is most like its reference.

        minimise  sum_t KL(reference(. | t) || model(. | t)) / n  +  the prior of `tune`

    With them, unless they are declined, a factor on the output of each group of heads that share
    values (SEAL-H of Lee et al. 2025, by value head).

    Parameters
    ----------
    model: compressed.
    reference: the uncompressed model; or a function that opens it, so that it is let go again
        before anything is learned; None learns the next tokens of the text instead.
    objectives: text or answers to learn from.
    lessons: a directory for the reference's distributions; what it holds already is not asked for
        again.
    top: how many tokens of each distribution are kept, see `lessons`; None for all.
    passes: times through the text. rows: pieces of each objective in a step, side by side.
    output_scales: learn these factors as well; they fold into the rows that make the values.
    progress: (stage, done, total).
    tuning: `per`, `constraint`, `held_out`, `seed`, `state` and others, as for `tune`.

    Raises ModelError for a reference of another architecture or vocabulary, and as `tune` does.
    """
    goals = (objectives,) if isinstance(objectives, Objective) else tuple(objectives)
    if reference is not None:
        teacher = reference if isinstance(reference, nn.Module) else reference()
        check_pair(model.config, teacher.config)
        goals = tuple(
            teach(teacher, goal, lessons, top=top, progress=_named(progress, goal.name))
            for goal in goals
        )
        del teacher
    settings = learning(model, goals, passes, rows) | tuning
    return tune(model, goals, output_scales=output_scales, progress=progress, **settings)


def learning(
    model: nn.Module, goals: Sequence[Objective], passes: int, rows: int
) -> dict[str, Any]:
    """What `tune` is asked for a repair: method, rate, and as many steps as the passes take."""
    if passes < 1 or rows < 1:
        raise InputError(f"passes and rows are at least 1; got {passes} and {rows}")
    steps = math.ceil(passes * max(len(goal.pieces) for goal in goals) / rows)
    lowest, highest = RATES
    rate = min(max(RATE * math.sqrt(_divergence(model, goals)), lowest), highest)
    return {"method": "adam", "rate": rate, "rows": rows, "steps": steps, "patience": steps}


def _divergence(model: nn.Module, goals: Sequence[Objective]) -> float:
    """From the reference at T = 1, nats per token."""
    total, count = 0.0, 0
    with frozen(model), torch.no_grad():
        for piece in (piece for goal in goals for piece in goal.pieces[:FIRST_PIECES]):
            if isinstance(piece.source, Batch) and piece.source.lessons:
                total += float(target_losses(model, piece.source).sum())
                count += piece.count
    if not count or not math.isfinite(total):
        return _UNKNOWN  # a loss that is no number is refused by `tune`, with its layer and head
    return max(total / count, 0.0)


def repair_by_support(
    model: nn.Module, entropy: Float[Tensor, "layers heads"], chunks: Int[Tensor, "chunks length"]
) -> Profile:
    """Solve the temperatures under which every head's mean entropy is the reference's again.

    Layers are solved from the first to the last inside one forward pass, each on what the repaired
    layers before it give.

    Parameters
    ----------
    model: compressed, on transformers' attention interface.
    entropy: of the reference on the same chunks, nats (`measure_tokens(reference, chunks)`).
    chunks: token ids.
    """
    return profile_of_entropy(model, chunks, entropy, bounds=SUPPORT_BOUNDS)


def check_pair(model: Any, reference: Any) -> None:
    """ModelError unless one can be the other's reference, by the configurations of both."""
    ours, theirs = (_described(item) for item in (model, reference))
    for what, one, other in zip(("architecture", "vocabulary"), ours, theirs, strict=True):
        if one != other:
            raise ModelError(
                f"the reference has another {what} ({other}) than the compressed model ({one}); "
                "give the model that it was compressed from"
            )


def _described(config: Any) -> tuple[str, str]:
    config = config.get_text_config()
    return str(config.model_type), f"{config.vocab_size} tokens"


def _named(
    progress: Callable[[str, int, int], None] | None, name: str
) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(f"reference, {name}", done, total)
