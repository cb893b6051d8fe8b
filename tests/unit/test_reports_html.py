"""The HTML report: one page, nothing loaded, nothing run, every section there."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tempering.errors import OutputError
from tempering.reports import Record, figure_cost, render_html, save_html
from tempering.reports.html import inline
from tempering.reports.style import palette

SAMPLE = Path(__file__).with_name("test_reports_sample.json")
HOSTILE = '</style></svg><script>alert(1)</script><img src=x onerror="alert(2)"> {{ 7*7 }} $x_$ ]]>'
VOID = {"meta", "link", "img", "br", "input"}


class Page(HTMLParser):
    """The elements of a page; refuses one that closes what it never opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def new(results, **changes):
    return Record.new("compare", **{"settings": {}, "results": results, **changes})


@pytest.fixture(scope="module")
def sample() -> Record:
    return Record.load(SAMPLE)


@pytest.fixture(scope="module")
def page(sample) -> str:
    return render_html(sample)


def test_the_page_loads_and_runs_nothing(page):
    parsed = Page(page)
    tags = {tag for tag, _ in parsed.found}
    assert not tags & {"script", "img", "iframe", "object", "embed", "base", "form", "image"}
    for tag, attributes in parsed.found:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href", "action", "srcset", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, name, value)
    policy = next(a["content"] for t, a in parsed.found if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    assert "script-src" not in policy
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    assert "http" not in re.sub(r"data:application/json;base64,[\w+/=]*", "", page).replace(
        "http-equiv", ""
    )


def test_the_page_has_every_section(page):
    text = Page(page).text
    for heading in (
        "Generations", "Stages", "Pattern over depth", "Support by layer and head",
        "Cost, nats/token", "Benefit", "Frontier", "Reliability", "Training", "The run",
    ):  # fmt: skip
        assert heading in text
    assert "+0.0121" in text
    assert "+0.0038 to +0.0204" in text
    assert "not told from 0" in text
    assert "failed: timed out after 30 s" in text
    assert "11 of 12" in text
    assert "LlamaForCausalLM" in text
    assert page.count("<svg") == 15


def test_the_download_is_the_record(page, sample):
    raw = re.search(r'href="data:application/json;base64,([^"]+)"', page)[1]
    assert Record.from_json(base64.b64decode(raw).decode()) == sample


def test_the_same_record_gives_the_same_bytes(sample):
    small = new({name: sample.results[name] for name in ("cost", "pattern")})
    assert render_html(small) == render_html(small)


def test_text_of_models_and_users_never_becomes_markup():
    token = {"token": HOSTILE, "phase": HOSTILE, "temperature": 0.5}
    worker = {"prompt": HOSTILE, "output": HOSTILE, "error": HOSTILE, HOSTILE: HOSTILE}
    results = {
        "generations": {
            "prompt": HOSTILE,
            "samples": [
                {"label": HOSTILE, "seed": 0, "text": HOSTILE, "tokens": 1, "finish": HOSTILE},
                {"label": "b", "seed": None, "text": "", "tokens": 1, "trace": [token]},
            ],
        },
        "pattern": [{"label": HOSTILE, "text": HOSTILE, "temperature": [1.0, 2.0]}],
        "cost": [{"label": HOSTILE, "cost": 0.1, "unit": HOSTILE, HOSTILE: HOSTILE}],
        "frontier": [
            {"label": "a", "family": HOSTILE, "cost": 0.1, "benefit": 1.0, "metric": HOSTILE}
        ],
        "stages": [{"stage": HOSTILE, "width": 1, "workers": [worker]}],
        HOSTILE: [{HOSTILE: HOSTILE}],
    }
    page = render_html(new(results, settings={HOSTILE: HOSTILE}, model={"name": HOSTILE}))
    parsed = Page(page)
    assert not {tag for tag, _ in parsed.found} & {"script", "img"}
    assert not any("onerror" in attributes for _, attributes in parsed.found)
    assert parsed.text.count("{{ 7*7 }} $x_$ ]]>") > 15


def test_absent_sections_are_left_out():
    text = Page(render_html(new({}))).text
    assert "The run" in text
    for heading in (
        "Generations",
        "Stages",
        "Pattern",
        "Support",
        "Benefit",
        "Frontier",
        "Training",
    ):
        assert heading not in text


def test_a_section_of_another_name_is_shown_as_it_is():
    found = {
        "depth_needed": [{"layers": 8, "cost": 0.5, "note": None}, {"layers": 16, "cost": 0.25}],
        "answer": {"best_of": 12, "intervals": [0.1, 0.2]},
        "lone": 3.5,
    }
    text = Page(render_html(new(found))).text
    assert "Depth needed layers cost 8 0.5 16 0.25" in text
    assert "Answer best of 12 intervals 0.1, 0.2" in text
    assert "Lone lone 3.5" in text


def test_tokens_are_coloured_by_their_temperature():
    temperatures = [0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 100.0, float("inf"), None, float("nan")]
    trace = [{"token": f"t{i}", "temperature": t} for i, t in enumerate(temperatures)]
    sample = {"label": "a", "seed": 0, "text": "", "tokens": 10, "trace": trace}
    page = render_html(new({"generations": {"prompt": "", "samples": [sample]}}))
    classes = re.findall(r'<span class="([^"]*)" title="[^"]*">t\d</span>', page)
    assert classes == ["c0", "c0", "c4", "c8", "c12", "c16", "c16", "c16", "", ""]


def test_figures_follow_the_theme_and_share_no_id(sample, page):
    for theme in ("light", "dark"):
        assert len(set(palette(theme).values())) == len(palette(theme))
    figures = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    left = set(re.findall(r"#[0-9a-f]{6}\b", figures)) - {"#000000"}
    assert not left, "colours that a dark page would not change"
    for names in (palette("light"), palette("dark")):
        assert set(re.findall(r"var\(--(\w+)\)", page)) <= names.keys()
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([\w.-]+)', figures)) <= set(ids)
    assert "font-family" not in inline(figure_cost(sample), "x", "cost")


def test_a_report_is_written_whole_or_not_at_all(tmp_path):
    record = new({})
    assert save_html(record, tmp_path / "run.html").read_text() == render_html(record)
    with pytest.raises(OutputError, match="can't write"):
        save_html(record, "/proc/run.html")


def test_every_figure_has_a_name_of_its_own_for_screen_readers(page):
    names = [attributes.get("aria-label") for tag, attributes in Page(page).found if tag == "svg"]
    assert names and all(names)
    assert len(set(names)) > 1
    assert any(name.startswith("Cost") for name in names)


@pytest.mark.parametrize("field", ["task", "prompt"])
def test_the_head_shows_what_was_asked(field):
    asked = "Plan a <b>picnic</b> & say why."
    record = new({}, settings={field: asked})
    head = Page(render_html(record)).text.split("The run")[0]
    assert asked in head


def test_details_are_open_in_print(page):
    rule = re.search(r"@media print\{(.*)\}", page)
    assert rule is not None and "details:not([open])::details-content" in rule[1]
