"""Quantiles for intervals."""

from __future__ import annotations


def t_quantile(degrees: int, level: float = 0.975) -> float:
    """Quantile of Student's t distribution, for intervals over chunks."""
    from scipy.stats import t

    return float(t.ppf(level, degrees))
