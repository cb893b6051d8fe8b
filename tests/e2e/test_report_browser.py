"""The HTML report in a real browser: nothing complained of, nothing loaded, nothing cut off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tempering.reports import Record, save_html
from tests.e2e.browser import needs_chromium

SAMPLE = Path(__file__).parents[1] / "unit" / "test_reports_sample.json"
pytestmark = needs_chromium


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    return save_html(Record.load(SAMPLE), tmp_path_factory.mktemp("report") / "run.html")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_report_opens_without_a_complaint(browser, report, width, dark):
    browser.open(report, width=width, dark=dark)
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.startswith("data:")] == [report.as_uri()]
    assert browser.ask("document.documentElement.scrollWidth") <= width
    assert browser.ask("document.querySelectorAll('figure svg').length") == 15
    assert browser.ask("document.scripts.length + document.images.length") == 0


def test_figures_are_readable_on_a_phone(browser, report):
    browser.open(report, width=390, dark=False)
    smallest = browser.ask(
        "Math.min(...[...document.querySelectorAll('figure svg text')].map(text => {"
        "const to = text.getScreenCTM();"
        "return parseFloat(getComputedStyle(text).fontSize) * Math.hypot(to.a, to.b); }))"
    )
    assert smallest >= 10  # CSS pixels


def colours(browser, selector: str) -> tuple[list[float], list[float]]:
    """Text colour of the first match, and the colour of the card that it stands on."""
    found = browser.ask(
        f"(() => {{ const node = document.querySelector({json.dumps(selector)});"
        "const style = getComputedStyle(node); const ground = node.closest('figure, .card, body');"
        "return [node instanceof SVGElement ? style.fill : style.color,"
        " getComputedStyle(ground).backgroundColor]; })()"
    )
    first, second = ([float(x) for x in c[c.index("(") + 1 : -1].split(",")[:3]] for c in found)
    return first, second


def contrast(a: list[float], b: list[float]) -> float:
    """The contrast ratio of WCAG 2, 1 to 21."""

    def luminance(colour: list[float]) -> float:
        parts = [c / 255 for c in colour]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("selector", ["h1", ".quiet", ".card .text", "th", "figure svg text"])
def test_text_stands_out_in_light_and_dark(browser, report, selector, dark):
    browser.open(report, width=1280, dark=dark)
    text, ground = colours(browser, selector)
    assert contrast(text, ground) >= 4.5
    assert (sum(ground) < 200) is dark


def test_hostile_text_stays_text(browser, tmp_path):
    hostile = "</script></style><script>window.hit=1</script><img src=x onerror='window.hit=1'>"
    results = {
        "generations": {
            "prompt": hostile,
            "samples": [{"label": hostile, "seed": 0, "text": hostile, "tokens": 1}],
        },
        "pattern": [{"label": hostile, "text": hostile, "temperature": [1.0, 2.0]}],
    }
    record = Record.new("generate", settings={hostile: hostile}, results=results)
    browser.open(save_html(record, tmp_path / "run.html"), width=390, dark=False)
    assert browser.ask("window.hit === undefined") is True
    assert hostile in browser.ask("document.body.innerText")
    assert browser.complaints() == []


def test_even_an_unescaped_script_could_not_run(browser, report, tmp_path):
    """The policy in the page holds by itself: a script put into it is refused, loudly."""
    spoilt = tmp_path / "spoilt.html"
    page = report.read_text().replace("<main>", "<main><script>window.hit=1</script>")
    spoilt.write_text(page)
    browser.open(spoilt, width=390, dark=False)
    assert browser.ask("window.hit === undefined") is True
    assert any("Content Security Policy" in complaint for complaint in browser.complaints())


def test_the_record_can_be_taken_from_the_page(browser, report):
    browser.open(report, width=390, dark=False)
    text = browser.ask("atob(document.querySelector('a[download]').href.split('base64,')[1])")
    assert Record.from_json(text.encode("latin-1").decode()) == Record.load(SAMPLE)
