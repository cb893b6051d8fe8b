"""Tuning: temperatures learned with every weight frozen, for a text, a task, or any loss.

from_text, from_lengths, from_pairs, from_inputs, from_functions, from_batches    the goal
Constraint                                             what other data may lose
tune(model, objectives)                                -> Tuned, with a Profile
tune_context(model, ids, seconds=20)                   the same for one context, in so much time
search(model, score)                                   the same for scores without a gradient
"""

from tempering.attention.tuning.basis import Basis, make_basis, pattern_basis, uniform_basis
from tempering.attention.tuning.context import ContextFit, tune_context
from tempering.attention.tuning.fit import tune
from tempering.attention.tuning.objectives import (
    Constraint,
    Objective,
    from_batches,
    from_functions,
    from_inputs,
    from_lengths,
    from_pairs,
    from_text,
)
from tempering.attention.tuning.outcome import ConstraintError, HeldOut, Step, TradeOff, Tuned
from tempering.attention.tuning.search import Searched, Trial, search
from tempering.attention.tuning.split import refuse_overlap
from tempering.inputs.pairs import read_pairs

__all__ = [
    "Basis",
    "Constraint",
    "ConstraintError",
    "ContextFit",
    "HeldOut",
    "Objective",
    "Searched",
    "Step",
    "TradeOff",
    "Trial",
    "Tuned",
    "from_batches",
    "from_functions",
    "from_inputs",
    "from_lengths",
    "from_pairs",
    "from_text",
    "make_basis",
    "pattern_basis",
    "read_pairs",
    "refuse_overlap",
    "search",
    "tune",
    "tune_context",
    "uniform_basis",
]
