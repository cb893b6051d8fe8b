"""Results as the sections of a record (see `tempering.reports.sections`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tempering.attention.profiles.profile import UNTEMPERED

if TYPE_CHECKING:
    from tempering.attention.measuring.law import MeasuredLaw
    from tempering.attention.measuring.measure import Measurement
    from tempering.attention.profiles.profile import Profile
    from tempering.evaluation.compare import Comparison
    from tempering.evaluation.depth import DepthStudy
    from tempering.evaluation.explore import Exploration


def pattern_section(
    profiles: dict[str, Profile], neutral: Profile | None = None
) -> list[dict[str, Any]]:
    """Temperatures over depth, the untempered model first."""
    first = neutral if neutral is not None else next(iter(profiles.values()))
    ones = [[1.0] * len(row) for row in first.rows]
    section: list[dict[str, Any]] = [
        {"label": UNTEMPERED, "text": "constant(1)", "temperature": ones, "baseline": True}
    ]
    for label, profile in profiles.items():
        rows = [row.tolist() for row in profile.rows]
        section.append({"label": label, "text": profile.pattern or "", "temperature": rows})
    return section


UNITS = {
    "entropy": "nats",
    "support_without_sink": "keys",
    "support_simpson": "keys",
    "peak": "share",
    "sink_share": "share",
    "mean_energy": "nats",
    "heat_capacity": "nats",
    "saturation": "share",
    "distance": "tokens",
    "distance_without_sink": "tokens",
}


def support_section(
    before: Measurement, after: dict[str, Measurement], names: Sequence[str] = tuple(UNITS)
) -> dict[str, Any]:
    """Support before and after, and the other quantities named."""
    quantities = {
        name: {
            "before": _matrix(getattr(before, name)),
            "after": {label: _matrix(getattr(item, name)) for label, item in after.items()},
            "unit": _unit(before, name),
        }
        for name in names
    }
    return {
        "layers": [layer.name for layer in before.layers],
        "before": _matrix(before.support),
        "after": {label: _matrix(item.support) for label, item in after.items()},
        "quantities": quantities,
    }


def _unit(measured: Measurement, quantity: str) -> str:
    """Of a quantity; distances are in what the layers count, tokens, frames or patches."""
    if quantity == "support":
        return "keys"
    if UNITS[quantity] == "tokens":
        return " or ".join(dict.fromkeys(measured.units)) or "tokens"
    return UNITS[quantity]


def parts_section(before: Measurement, after: dict[str, Measurement]) -> list[dict[str, Any]]:
    """Encoder, decoder and cross-attention apart, tower by tower: mean support and distance."""
    rows = []
    for label, item in {UNTEMPERED: before, **after}.items():
        for part, found in item.parts().items():
            rows.append(
                {
                    "label": label,
                    "part": part,
                    "layers": found.layers,
                    "support": found.support,
                    "low": _number(found.low),
                    "high": _number(found.high),
                    "distance": _number(found.distance),
                    "distance_without_first": _number(found.distance_without_sink),
                    "unit": found.unit,
                }
            )
    return rows


def traced(step: Any) -> dict[str, Any]:
    """A sampled token as a row of a record's trace."""
    return {
        "token": step.text,
        "phase": step.known.phase,
        "temperature": step.known.temperature,
        "entropy": step.known.entropy_after,
        "support": step.known.support,
        "token_id": step.token,
        "entropy_before": step.known.entropy_before,
        "log_probability_raw": step.raw,
        "log_probability": step.tempered,
    }


def rules_section(measured: Measurement) -> list[dict[str, Any]]:
    """For each rule: in how many layers, and the share of queries with T at a bound."""
    found: dict[str, list[Any]] = {}
    for counts in measured.rules.values():
        for count in counts:
            found.setdefault(count.rule, []).append(count)
    rows = []
    for text, counts in found.items():
        queries = sum(count.queries for count in counts)
        ends = {
            end: sum(getattr(count, end) for count in counts) / max(queries, 1)
            for end in ("coldest", "hottest")
        }
        rows.append({"rule": text, "layers": len(counts), "queries": queries, **ends})
    return rows


def law_section(measured: MeasuredLaw) -> list[dict[str, Any]]:
    """For each layer, the mean slopes of log T in log n over its heads, and their range."""
    rows = []
    for index, layer in enumerate(measured.layers):
        support = measured.slopes["support"][index]
        known = support[support.isfinite()]
        rows.append(
            {
                "layer": layer.name,
                "length": measured.length,
                **{name: float(item[index].nanmean()) for name, item in measured.slopes.items()},
                "least": float(known.min()) if len(known) else None,
                "most": float(known.max()) if len(known) else None,
                "exponent": float(measured.exponent[index].nanmean()),
                **({"own law": layer.law} if layer.law else {}),
            }
        )
    return rows


def positions_section(before: Measurement, after: dict[str, Measurement]) -> dict[str, Any]:
    """Every quantity by layer, head and part of the text, to six digits."""
    return {
        "edges": [list(edge) for edge in before.positions],
        "quantities": {
            name: {
                "before": _cube(before.by_position[name]),
                "after": {label: _cube(item.by_position[name]) for label, item in after.items()},
                "unit": _unit(before, name),
            }
            for name in ("support", *UNITS)
        },
    }


def _cube(table: Any) -> list[list[list[float | None]]]:
    return [
        [[None if math.isnan(x) else float(f"{x:.6g}") for x in head] for head in layer]
        for layer in table.tolist()
    ]


def _matrix(table: Any) -> list[list[float | None]]:
    return [[None if math.isnan(x) else x for x in row] for row in table.tolist()]


def cost_section(comparison: Comparison) -> list[dict[str, Any]]:
    """Rows of cost with their intervals."""
    return [
        {
            "label": item.label,
            "cost": item.cost.value,
            "se": _number(item.cost.se),
            "low": _number(item.cost.low),
            "high": _number(item.cost.high),
            "n": item.cost.n,
            # An engine that gives no distributions leaves the KL out.
            **(
                {}
                if math.isnan(item.kl.value)
                else {"kl": item.kl.value, "kl_se": _number(item.kl.se)}
            ),
            "unit": item.unit,
            "level": 0.95,
        }
        for item in comparison.costs
    ]


def benefit_section(comparison: Comparison) -> list[dict[str, Any]]:
    """Rows of diversity with their intervals."""
    return [
        {
            "label": item.label,
            "metric": item.metric,
            "value": item.estimate.value,
            "low": _number(item.estimate.low),
            "high": _number(item.estimate.high),
            "n": item.estimate.n,
            "k": item.k,
            "level": 0.95,
        }
        for item in comparison.benefits
    ]


def frontier_section(comparison: Comparison, metric: str = "spread") -> list[dict[str, Any]]:
    """Diversity against cost, for every variant that has both."""
    points = []
    for item in comparison.benefits:
        if item.metric != metric:
            continue
        variant = next((v for v in comparison.variants if v.label == item.label), None)
        cost = comparison.cost(item.label).cost if variant else None
        points.append(
            {
                "label": item.label,
                "family": variant.family if variant else "sampling temperature",
                "cost": cost.value if cost else 0.0,
                "cost_se": _number(cost.se) if cost else 0.0,
                "benefit": item.estimate.value,
                "benefit_low": _number(item.estimate.low),
                "benefit_high": _number(item.estimate.high),
                "metric": metric,
            }
        )
    return points


def depth_section(study: DepthStudy) -> list[dict[str, Any]]:
    """One row a case: where it runs, its cost, its controls' cost, the difference, the spread."""
    spread = {item.label: item.estimate for item in study.benefits if item.metric == "spread"}
    rows = []
    for case, cost, shuffled, difference in zip(
        study.cases, study.costs, study.shuffled, study.difference, strict=True
    ):
        row = {
            "label": case.label,
            "family": case.family,
            "place": case.place,
            "cycles": case.cycles,
            "first": case.first,
            "last": case.last,
            "layers": case.layers,
            "layers_a_stage": case.layers_a_stage,
            "cost": cost.cost.value,
            "se": _number(cost.cost.se),
            "low": _number(cost.cost.low),
            "high": _number(cost.cost.high),
            "shuffled": shuffled.value,
            "difference": difference.value,
            "difference_low": _number(difference.low),
            "difference_high": _number(difference.high),
            "n": cost.cost.n,
            "unit": cost.unit,
            "level": 0.95,
        }
        if case.label in spread:
            found = spread[case.label]
            row |= {
                "spread": found.value,
                "spread_low": _number(found.low),
                "spread_high": _number(found.high),
            }
        rows.append(row)
    return rows


def depth_answer(study: DepthStudy) -> dict[str, Any]:
    """The study in a few lines: what more cycles cost, and which cases differ from their control.

    An interval over chunks doesn't include the variation between random orders. With few shuffles
    a difference says that this order differs from those, not that the pattern's order matters.
    """
    cycles = [i for i, case in enumerate(study.cases) if case.family == "cycles"]
    first, last = cycles[0], cycles[-1]
    told = [
        case.label
        for case, item in zip(study.cases, study.difference, strict=True)
        if item.low > 0 or item.high < 0
    ]
    answer: dict[str, Any] = {
        f"cost of {study.cases[first].label}": study.costs[first].cost.value,
        f"cost of {study.cases[last].label}": study.costs[last].cost.value,
        "cases that differ from their shuffled values": f"{len(told)} of {len(study.cases)}",
        "shuffled orders a case": min(len(case.controls) for case in study.cases),
    }
    if told:
        answer["they are"] = ", ".join(told)
    spread = [item.estimate for item in study.benefits if item.metric == "spread"]
    if spread:
        answer["spread of samples, untempered"] = spread[0].value
    return answer


def explore_sections(result: Exploration, k: int) -> dict[str, Any]:
    """Means, paired differences from the first strategy, right samples by kind, fates of replies,
    and warnings."""
    means = [
        {
            "label": row.label,
            "metric": row.metric,
            "value": row.estimate.value,
            "low": _number(row.estimate.low),
            "high": _number(row.estimate.high),
            "n": row.estimate.n,
            "k": k,
            "level": 0.95,
        }
        for row in result.compared
    ]
    differences = [
        {
            "strategy": row.label,
            "against": result.compared[0].label,
            "metric": row.metric,
            "difference": row.difference.value,
            "low": _number(row.difference.low),
            "high": _number(row.difference.high),
            "tasks": row.difference.n,
        }
        for row in result.compared
        if row.difference is not None
    ]
    sections: dict[str, Any] = {"benefit": means, "paired_differences": differences}
    if result.by_kind:
        sections["right_samples_and_solved_tasks"] = result.by_kind
    if result.replies:
        sections["replies"] = result.replies
    if result.warnings:
        sections["warnings"] = [{"warning": text} for text in result.warnings]
    return sections


def budget_section(comparison: Comparison) -> list[dict[str, Any]]:
    """The largest amplitude within the budget, for every pattern."""
    return [
        {
            "pattern": pattern,
            "budget": budget.nats_per_token,
            "amplitude": budget.amplitude,
            "cost": budget.cost.value if budget.cost else None,
            "se": _number(budget.cost.se) if budget.cost else None,
            "bounded": budget.bounded,
        }
        for pattern, budget in comparison.budgets.items()
    ]


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
