"""A record as one self-contained HTML page: no network, no script, light and dark.

The page states a policy (`Content-Security-Policy: default-src 'none'`), so that even text that
got past the escaping could neither run nor load anything. It has no script; the record is
attached as a data link.
"""

from __future__ import annotations

import base64
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from tempering.files import write_atomic
from tempering.reports import figures, grids
from tempering.reports.record import Record
from tempering.reports.style import LIGHT, palette
from tempering.reports.views import (
    Number,
    done,
    is_support,
    numeric,
    order,
    present,
    quantities,
    shown,
    words,
)

_VARIABLE = {colour: f"var(--{name})" for name, colour in LIGHT.items()}
_COLOUR = re.compile(r"#[0-9a-f]{6}\b")
_TAIL = re.compile(r"(\.\d\d)\d+")  # digits of a coordinate under a hundredth of a pixel
_LOCAL = re.compile(r"(?:url\(|^)#([\w.-]+)")


def render_html(record: Record) -> str:
    """The report of a record: a self-contained page; the same record gives the same bytes."""
    environment = Environment(
        loader=PackageLoader("tempering.reports", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "shown": shown,
        "words": words,
        "heat": _heat_class,
        "cell": _cell_class,
        "done": done,
        "sentence": _sentence,
    }
    raw = base64.b64encode(record.to_json().encode()).decode("ascii")
    return environment.get_template("report.html.j2").render(
        record=record,
        results=record.results,
        light=palette("light"),
        dark=palette("dark"),
        drawn=_drawn(record),
        grids=grids,
        place=order(record.results),
        download=f"data:application/json;base64,{raw}",
    )


def save_html(record: Record, path: str | Path) -> Path:
    """Write the report to `path`, whole or not at all; OutputError when that can't be done."""
    return write_atomic(path, render_html(record))


def _drawn(record: Record) -> dict[str, list[Markup]]:
    """Figures by section, as inline SVG."""
    results = record.results
    found: dict[str, list[Figure]] = {}
    for section, draw in figures.FIGURES.values():
        if not _has(results, section):
            continue
        found.setdefault(section, []).append(draw(record))
    for row in results.get("pattern", []):
        if any(isinstance(layer, list) for layer in row["temperature"]):
            found["pattern"].append(figures.figure_pattern_heatmap(record, row["label"]))
    if results.get("support"):
        found["support"] += _support_figures(record)
    return {
        section: [
            inline(figure, f"{section}{i}", _name(section, figure))
            for i, figure in enumerate(drawn)
        ]
        for section, drawn in found.items()
    }


def _has(results: dict[str, Any], section: str) -> bool:
    """Whether there is anything to draw: a run that was stopped at once has an empty history."""
    found = results.get(section)
    return bool(found["history"] if found and section == "training" else found)


def _support_figures(record: Record) -> list[Figure]:
    """After the untempered heatmap: each pattern and what it changed, then the other quantities.

    Only the supports and the sink have heatmaps by head: drawing one takes nearly a second.
    """
    drawn = []
    for label in record.results["support"]["after"]:
        drawn.append(figures.figure_support_heatmap(record, label))
        drawn.append(figures.figure_support_change(record, label))
    for name in quantities(record.results["support"]):
        if name != "support":
            drawn.append(figures.figure_support_by_layer(record, quantity=name))
            if is_support(name) or name == "sink_share":
                drawn.append(figures.figure_support_heatmap(record, quantity=name))
    return drawn


def _name(section: str, figure: Figure) -> str:
    """The name of a figure for screen readers: its section, and the titles of its axes."""
    titles = [
        text
        for axes in figure.axes
        for text in (axes.get_title(loc="left"), axes.get_title(), axes.get_ylabel())
        if text
    ]
    return ": ".join([words(section).capitalize(), *dict.fromkeys(titles)])


def inline(figure: Figure, key: str, name: str) -> Markup:
    """A figure as SVG inside a page: colours are CSS variables, ids are unique, fonts the page's.

    key: put before every id, so that two figures never share one. name: for screen readers.
    """
    root = ET.fromstring(figures.svg(figure))
    used = {
        m for node in root.iter() for value in node.attrib.values() for m in _LOCAL.findall(value)
    }
    for parent in list(root.iter()):
        for child in list(parent):
            if _bare(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for node in root.iter():
        node.tag = _bare(node.tag)
        node.attrib = {
            _bare(name): _attribute(_bare(name), value, key)
            for name, value in node.attrib.items()
            if _bare(name) != "id" or value in used
        }
    width, height = root.attrib["viewBox"].split()[2:]
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": name,
        "width": width,
        "height": height,
    }
    return Markup(ET.tostring(root, encoding="unicode"))


def _bare(name: str) -> str:
    return name.rpartition("}")[2]


def _attribute(name: str, value: str, key: str) -> str:
    if name == "id":
        return f"{key}-{value}"
    if name == "d":
        value = _TAIL.sub(r"\1", " ".join(value.split()))
    if name == "style":
        value = re.sub(r"font-family:[^;]*;?", "", value)
        value = _COLOUR.sub(lambda m: _VARIABLE.get(m[0], m[0]), value)
    return _LOCAL.sub(lambda m: m[0].replace("#", f"#{key}-"), value)


def _heat_class(temperature: Number) -> str:
    """The colour class of a token: log2 T from -2 (c0) over 0 (c8) to 2 (c16); "" without a T."""
    found: list[Any] = present([temperature])
    if not found:
        return ""
    steps = 8 if found[0] == 1 else 16 if math.isinf(found[0]) else 0
    if 0 < found[0] < math.inf:
        steps = min(16, max(0, round(8 + 4 * math.log2(found[0]))))
    return f"c{steps}"


def _cell_class(cell: str) -> Markup:
    """The class of a cell: numbers and short texts stay on one line, long texts are wrapped."""
    return Markup(' class="whole"' if numeric(cell) or len(cell) <= 16 else ' class="long"')


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
