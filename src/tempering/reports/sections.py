"""The sections that a record's `results` may hold, and the shape of each.

All are optional; a renderer draws those that are there. Sections under other names are allowed
and shown as they are. [L][H] is a list over layers of lists over heads; a layer without softmax
is null or a row of nulls, rows may differ in length. "row" means that further single values may
be added under any name and become columns. A trailing ? marks an optional field; where a number
"or null" is allowed, null means not measured.

    pattern       [{label, text, temperature: [L] or [L][H], baseline?}]
                  temperature relative to the model's own; baseline marks the untempered model
    support       {layers: [names], before: [L][H], after: {label: [L][H]},
                   quantities?: {name: {before: [L][H], after: {label: [L][H]}, unit?}}}
                  names in use: entropy, peak, sink_share, support_without_sink; others are welcome;
                  may also hold positions?: {edges: [[first, last]], quantities: {name: {before:
                  [L][H][B], after: {label: [L][H][B]}, unit?}}}, the same for B parts of a text
    cost          [row {label, cost, se?, low?, high?, n?, kl?, kl_se?, unit, level?}]
    benefit       [row {label, metric, value, low?, high?, n?, k?, level?}]
                  level: the intervals' confidence, e.g. 0.95
    frontier      [row {label, family, cost, cost_se?, benefit, benefit_low?, benefit_high?,
                  metric?}]
                  family: "sampling temperature", "attention pattern", "control", or any other name
    generations   {prompt, samples: [{label, seed, text, tokens, finish?, trace?: [token]}]}
                  token: row {token (its text), phase?, temperature?, entropy?, support?}
    stages        [{stage, width, round?, workers: [row {prompt, output, temperature_asked?,
                  temperature_sent?, seed?, tokens_in?, tokens_out?, error?}]}]
    reliability   {before: [bin], after?: [bin],
                   metrics?: [row {metric, before, after?, low?, high?}]}
                  bin: row {confidence, accuracy, n, low?, high?}
    depth         [row {label, family, place, cycles, first, last, layers, layers_a_stage, cost,
                  se?, low?, high?, n?, unit, level?, shuffled, difference?, difference_low?,
                  difference_high?, spread?, spread_low?, spread_high?}]
                  family: "cycles" or "sub-stack"; shuffled: cost of the same values in other orders
    repair        [row {label, test, compressed, repaired, returned?, returned_low?, returned_high?,
                  damage?, share?, low?, high?, n?, level?}]
                  nats per token; share, of the damage, where a reference is known
    trials        [row {trial, policy, score, tasks?, left?, chosen?}]
                  trial 0 is the untuned policy; every other field is a number that was searched;
                  left: before its last task, so that the score is an estimate
    training      {history: [row {step, loss, held_out?}], trade_off?: [row {label, objective, cost,
                  chosen?}]}
"""

from __future__ import annotations

from typing import Any

from tempering.errors import DataError
from tempering.reports.schema import (
    a_count,
    a_flag,
    a_number,
    a_scalar,
    a_text,
    a_whole_number,
    an_object,
    anything,
    fail,
    listed,
    mapped,
    maybe,
)

_value = maybe(a_number)
_matrix = listed(maybe(listed(_value)))
_interval = {"low": _value, "high": _value, "n": maybe(a_count), "level": _value}


def _temperature(value: Any, where: str) -> None:
    """[L] or [L][H] temperatures, 0 or more."""
    if not isinstance(value, list) or not value:
        raise fail(where, "a list over layers of temperatures, or of lists over heads", value)
    for layer, row in enumerate(value):
        for head, cell in enumerate(row if isinstance(row, list) else [row]):
            place = f"{where}[{layer}]" + (f"[{head}]" if isinstance(row, list) else "")
            _value(cell, place)
            if cell is not None and not cell >= 0 and cell == cell:
                raise fail(place, "a temperature of 0 or more, or null", cell)


def _same_shape(value: Any, like: list[Any], where: str) -> None:
    if len(value) != len(like):
        raise DataError(f"{where}: expected {len(like)} layers, as in 'before', got {len(value)}")
    for layer, (row, other) in enumerate(zip(value, like)):
        if row is not None and other is not None and len(row) != len(other):
            raise DataError(
                f"{where}[{layer}]: expected {len(other)} heads, as in 'before', got {len(row)}"
            )


def _after(value: Any, where: str) -> None:
    """One matrix a pattern."""
    mapped(_matrix)(value, where)
    if "untempered" in value:
        raise DataError(f"{where}: 'untempered' is what 'before' holds; give the pattern a name")


_quantity = an_object({"before": _matrix, "after": _after}, {"unit": a_text})
_cube = listed(maybe(listed(maybe(listed(_value)))))
_positions = an_object(
    {
        "edges": listed(listed(a_count)),
        "quantities": mapped(
            an_object({"before": _cube, "after": mapped(_cube)}, {"unit": a_text})
        ),
    }
)


def _support(value: Any, where: str) -> None:
    """The section `support`, all of one shape."""
    an_object(
        {"layers": listed(a_text), "before": _matrix, "after": _after},
        {"quantities": mapped(_quantity), "positions": _positions},
    )(value, where)
    before = value["before"]
    if not before:
        raise fail(f"{where}.before", "at least one layer", before)
    if len(value["layers"]) != len(before):
        raise DataError(
            f"{where}: {len(value['layers'])} names in 'layers' for {len(before)} rows in 'before'"
        )
    for label, matrix in value["after"].items():
        _same_shape(matrix, before, f"{where}.after.{label}")
    for name, quantity in value.get("quantities", {}).items():
        place = f"{where}.quantities.{name}"
        _same_shape(quantity["before"], before, f"{place}.before")
        for label, matrix in quantity["after"].items():
            _same_shape(matrix, before, f"{place}.after.{label}")
    for name, quantity in value.get("positions", {"quantities": {}})["quantities"].items():
        place = f"{where}.positions.quantities.{name}"
        for label, cube in {"before": quantity["before"], **quantity["after"]}.items():
            _same_shape(cube, before, f"{place}.{label}")
            _parts(cube, len(value["positions"]["edges"]), f"{place}.{label}")


def _parts(cube: list[Any], parts: int, where: str) -> None:
    for layer, row in enumerate(cube):
        for head, cells in enumerate(row or ()):
            if cells is not None and len(cells) != parts:
                raise DataError(
                    f"{where}[{layer}][{head}]: expected {parts} parts, as in 'edges', "
                    f"got {len(cells)}"
                )


_token = an_object(
    {"token": a_text},
    {"phase": maybe(a_text), "temperature": _value, "entropy": _value, "support": _value},
    extra=a_scalar,
)
_sample = an_object(
    {"label": a_text, "seed": maybe(a_whole_number), "text": a_text, "tokens": a_count},
    {"finish": maybe(a_text), "trace": listed(_token)},
)
_worker = an_object(
    {"prompt": a_text, "output": maybe(a_text)},
    {
        "temperature_asked": _value,
        "temperature_sent": _value,
        "seed": maybe(a_whole_number),
        "tokens_in": maybe(a_count),
        "tokens_out": maybe(a_count),
        "error": maybe(a_text),
    },
    extra=a_scalar,
)
_bin = an_object(
    {"confidence": _value, "accuracy": _value, "n": a_count},
    {"low": _value, "high": _value},
    extra=a_scalar,
)

SECTIONS = {
    "pattern": listed(
        an_object(
            {"label": a_text, "text": a_text, "temperature": _temperature}, {"baseline": a_flag}
        )
    ),
    "support": _support,
    "cost": listed(
        an_object(
            {"label": a_text, "cost": _value, "unit": a_text},
            {**_interval, "se": _value, "kl": _value, "kl_se": _value},
            extra=a_scalar,
        )
    ),
    "benefit": listed(
        an_object(
            {"label": a_text, "metric": a_text, "value": _value},
            {**_interval, "k": maybe(a_count)},
            extra=a_scalar,
        )
    ),
    "frontier": listed(
        an_object(
            {"label": a_text, "family": a_text, "cost": a_number, "benefit": a_number},
            {"cost_se": _value, "benefit_low": _value, "benefit_high": _value, "metric": a_text},
            extra=a_scalar,
        )
    ),
    "depth": listed(
        an_object(
            {
                "label": a_text,
                "family": a_text,
                "place": a_text,
                "cycles": a_count,
                "first": a_count,
                "last": a_count,
                "layers": a_count,
                "layers_a_stage": a_number,
                "cost": _value,
                "shuffled": _value,
                "unit": a_text,
            },
            {**_interval, "se": _value},
            extra=a_scalar,
        )
    ),
    "repair": listed(
        an_object(
            {"label": a_text, "test": a_text, "compressed": _value, "repaired": _value},
            {
                **_interval,
                "returned": _value,
                "returned_low": _value,
                "returned_high": _value,
                "damage": _value,
                "share": _value,
            },
            extra=a_scalar,
        )
    ),
    "generations": an_object({"prompt": a_text, "samples": listed(_sample)}),
    "stages": listed(
        an_object(
            {"stage": a_text, "width": a_count, "workers": listed(_worker)},
            {"round": maybe(a_count)},
        )
    ),
    "reliability": an_object(
        {"before": listed(_bin)},
        {
            "after": listed(_bin),
            "metrics": listed(
                an_object(
                    {"metric": a_text, "before": _value},
                    {"after": _value, "low": _value, "high": _value},
                    extra=a_scalar,
                )
            ),
        },
    ),
    "trials": listed(
        an_object(
            {"trial": a_count, "policy": a_text, "score": _value},
            {"tasks": a_count, "left": a_flag, "chosen": a_flag},
            extra=_value,
        )
    ),
    "training": an_object(
        {
            "history": listed(
                an_object({"step": a_count, "loss": _value}, {"held_out": _value}, extra=a_scalar)
            )
        },
        {
            "trade_off": listed(
                an_object(
                    {"label": a_text, "objective": _value, "cost": _value},
                    {"chosen": a_flag},
                    extra=a_scalar,
                )
            )
        },
    ),
}


def check_results(results: dict[str, Any], where: str = "results") -> None:
    """Check every known section of `results`; DataError names the first entry that is wrong."""
    for name, section in results.items():
        SECTIONS.get(name, anything)(section, f"{where}.{name}")
