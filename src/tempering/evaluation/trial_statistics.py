"""Trials over the same tasks: which is clearly worse than the best, and which may be as good.

Scores are those of trials under the same seeds, task by task, so every comparison is paired.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from scipy import stats

from tempering.evaluation.paired import mean_estimate

WORSE = 0.1  # of Wilcoxon's test, as Optuna's WilcoxonPruner has it


def clearly_worse(own: Sequence[float], best: Sequence[float]) -> bool:
    """Whether a trial lies below the best on the tasks that it has so far.

    Wilcoxon's signed-rank test of own - best, one-sided, p < 0.1; equal scores count for both
    sides (zsplit). best: may have more tasks; the first ones count.
    """
    differences = [a - b for a, b in zip(own, best, strict=False)]
    if not any(differences):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns where few tasks differ
        found = stats.wilcoxon(differences, alternative="less", zero_method="zsplit")
    return bool(found.pvalue < WORSE)


def may_be_best(own: Sequence[float], best: Sequence[float]) -> bool:
    """Whether the tasks don't tell a trial from the best: the 95% interval of own - best reaches 0.

    The interval is Student's, paired by task; a single task tells nothing. best: as above.
    """
    found = mean_estimate([a - b for a, b in zip(own, best, strict=False)])
    return found.n == 1 or found.high >= 0
