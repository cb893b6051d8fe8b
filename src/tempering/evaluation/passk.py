"""pass@k without bias, and accuracies, over tasks whose answers can be checked.

    pass@k = 1 - C(n - c, k) / C(n, k)      n samples of a task, c of them right

is the probability that k samples, drawn without replacement from the n, hold a right one (Chen et
al. 2021, arXiv 2107.03374). Where the samples are a ladder, k of its rungs are drawn at random.
Intervals are bootstraps over tasks; differences are paired by task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, SupportsIndex

import torch

from tempering.counts import whole_number
from tempering.errors import InputError
from tempering.evaluation.paired import IntervalEstimate, bootstrap_mean


def pass_at_k(n: SupportsIndex, c: SupportsIndex, k: SupportsIndex) -> float:
    """1 - C(n - c, k) / C(n, k), as a product that doesn't overflow.

    Raises InputError unless 1 <= k <= n and 0 <= c <= n.
    """
    n, c, k = (whole_number(value, name, 0) for value, name in ((n, "n"), (c, "c"), (k, "k")))
    if not 1 <= k <= n or not 0 <= c <= n:
        raise InputError(f"pass@k needs 1 <= k <= n and 0 <= c <= n; got n={n}, c={c}, k={k}")
    missed = 1.0
    for i in range(k):
        missed *= max(0, n - c - i) / (n - i)
    return 1.0 - missed


def pass_at_share(n: int, c: int, k: float) -> float:
    """pass@k of a number of samples that isn't whole: on the line between those beside it.

    pass@0 is 0. Raises InputError unless 0 <= k <= n.
    """
    if not 0 <= k <= n:
        raise InputError(f"pass@k needs 0 <= k <= n; got n={n}, k={k:g}")
    whole = min(int(k), n - 1)
    below = pass_at_k(n, c, whole) if whole else 0.0
    return below + (k - whole) * (pass_at_k(n, c, whole + 1) - below)


class Compared(NamedTuple):
    """A mean over tasks, and its paired difference from the first strategy (None for that one)."""

    label: str
    metric: str
    estimate: IntervalEstimate
    difference: IntervalEstimate | None


def compared(
    values: Mapping[str, Sequence[float]], metric: str, *, seed: int, draws: int = 2000
) -> list[Compared]:
    """Means over tasks with bootstrap intervals, and differences from the first entry.

    values: label -> one value a task, the same tasks in the same order.
    """
    labels = list(values)
    if len({len(column) for column in values.values()}) > 1:
        raise InputError(f"'{metric}' has other numbers of tasks for different strategies")
    base = torch.tensor(values[labels[0]], dtype=torch.float64)
    found = []
    for label in labels:
        column = torch.tensor(values[label], dtype=torch.float64)
        difference = None
        if label != labels[0]:
            difference = bootstrap_mean(column - base, seed=seed, draws=draws)
        mean = bootstrap_mean(column, seed=seed, draws=draws)
        found.append(Compared(label, metric, mean, difference))
    return found
