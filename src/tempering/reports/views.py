"""Shared by the renderers: layer means, labels, and numbers as text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from statistics import geometric_mean
from typing import Any

Number = float | int | None

BASELINE = "untempered"

# Characters that must reach neither a terminal nor an SVG.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ufffe\uffff]")


def present(values: Iterable[Number]) -> list[float]:
    """The values that were measured: neither null nor NaN."""
    return [float(v) for v in values if v is not None and not math.isnan(v)]


def is_support(quantity: str) -> bool:
    """Whether a quantity counts hypotheses, and so is drawn and averaged in logs."""
    return "support" in quantity


def layer_means(matrix: Sequence[Sequence[Number] | None], quantity: str) -> list[float | None]:
    """One value a layer, the mean over its heads; None where no head was measured.

    Support (any of its kinds) is averaged in logs, exp(mean log N): the exponential of the mean
    entropy. Everything else is averaged plainly.
    """
    result: list[float | None] = []
    for row in matrix:
        values = present(row or ())
        if not values:
            result.append(None)
        elif is_support(quantity) and min(values) > 0:
            result.append(geometric_mean(values))
        else:
            result.append(math.fsum(values) / len(values))
    return result


def quantities(support: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every measured quantity of a support section by name, support itself first."""
    own = {"before": support["before"], "after": support["after"], "unit": "keys"}
    return {"support": own, **support.get("quantities", {})}


def curves(quantity: str, measured: dict[str, Any]) -> dict[str, list[float | None]]:
    """Layer means of one quantity: untempered first, then one curve a pattern."""
    result = {BASELINE: layer_means(measured["before"], quantity)}
    for label, matrix in measured["after"].items():
        result[label] = layer_means(matrix, quantity)
    return result


def words(name: str) -> str:
    """A field's name as words: "sink_share" -> "sink share"."""
    return name.replace("_", " ")


def shorten(label: str, width: int = 40) -> str:
    """A label on one line, of at most `width` characters, cut in the middle."""
    label = _UNPRINTABLE.sub("\ufffd", " ".join(label.split()))
    if len(label) <= width:
        return label
    tail = width // 3
    return f"{label[: width - tail - 1]}…{label[-tail:]}"


def shown(value: object, digits: int = 3) -> str:
    """A value as text: numbers to `digits` significant digits, null as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if math.isinf(value):
            return "∞" if value > 0 else "−∞"
        if math.isnan(value):
            return "nan"
        return f"{value:.{digits}g}" if 1e-4 <= abs(value) < 1e5 or not value else f"{value:.2e}"
    if isinstance(value, list):
        return ", ".join(shown(item, digits) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {shown(item, digits)}" for key, item in value.items())
    return str(value)


def numeric(cell: str) -> bool:
    """Whether a cell's text is a number, an interval of numbers, a dash or nothing."""
    return (
        not cell
        or cell in ("nan", "–")
        or re.fullmatch(r"[-+−]?[\d.∞e+−-]+( to .*)?", cell) is not None
    )


def signed(value: Number) -> str:
    """A difference in nats per token: always with its sign, four decimals."""
    if value is None or not math.isfinite(value):
        return shown(value)
    return f"{value:+.4f}".replace("-", "−")


def interval(row: dict[str, Any], low: str = "low", high: str = "high") -> str:
    """The interval of a row as text, a dash where none was recorded."""
    if row.get(low) is None or row.get(high) is None:
        return "–"
    return f"{signed(row[low])} to {signed(row[high])}"


def verdict(row: dict[str, Any]) -> str:
    """The reading of a cost's interval: "costs", "gains", "not told from 0", or "" without one."""
    low, high = row.get("low"), row.get("high")
    if low is None or high is None or math.isnan(low) or math.isnan(high):
        return ""
    return "costs" if low > 0 else "gains" if high < 0 else "not told from 0"


def whisker(row: dict[str, Any], value: str = "cost") -> tuple[float, float] | None:
    """Ends of a row's error bar: its interval, else the value ± 2 standard errors, else None."""
    centre, low, high, se = row.get(value), row.get("low"), row.get("high"), row.get("se")
    if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
        return float(low), float(high)
    if centre is not None and se is not None and math.isfinite(centre) and math.isfinite(se):
        return float(centre - 2 * se), float(centre + 2 * se)
    return None


def level(rows: Sequence[dict[str, Any]]) -> str:
    """ "95% intervals" where all rows state the same level, else "intervals"."""
    levels = {row.get("level") for row in rows}
    if len(levels) == 1 and (value := levels.pop()) is not None:
        return f"{100 * value:.3g}% intervals"
    return "intervals"


def order(results: dict[str, Any]) -> dict[str, int]:
    """Label -> its position in order of appearance, the same in every figure and table.

    The untempered model is not counted.
    """
    labels = [row["label"] for row in results.get("pattern", []) if not row.get("baseline")]
    support = results.get("support", {})
    labels += support.get("after", {})
    labels += [x for quantity in support.get("quantities", {}).values() for x in quantity["after"]]
    for section in ("cost", "benefit", "frontier"):
        labels += [row["label"] for row in results.get(section, [])]
    skip = {BASELINE} | {row["label"] for row in results.get("pattern", []) if row.get("baseline")}
    return {label: i for i, label in enumerate(dict.fromkeys(x for x in labels if x not in skip))}


def done(stage: dict[str, Any]) -> int:
    """How many workers of a stage finished without an error."""
    return sum(worker.get("error") is None for worker in stage["workers"])
