"""The console for everybody: keys alone, names, contrast, motion, narrow and wide windows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.e2e.browser import needs_chromium
from tests.e2e.console_page import STATUS, WRITING, Page

pytestmark = needs_chromium
STATIC = Path(__file__).parents[2] / "src" / "tempering" / "console" / "static"


def luminance(colour: list[float]) -> float:
    """Relative luminance of WCAG 2.1, from 0 to 1."""
    linear = [
        c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4
        for c in colour[:3]
    ]
    return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(a: list[float], b: list[float]) -> float:
    """Contrast ratio of WCAG 2.1, from 1 to 21."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_the_standard():
    assert contrast([0, 0, 0], [255, 255, 255]) == 21
    assert contrast([118, 118, 118], [255, 255, 255]) == pytest.approx(4.54, abs=0.01)
    assert contrast([119, 119, 119], [255, 255, 255]) < 4.5


# Everything that may be shown is shown, with a word that can't be broken.
FILLED = """
(() => {
  const word = 'word'.repeat(100);
  for (const e of document.querySelectorAll('main [hidden]')) e.hidden = false;
  for (const e of document.querySelectorAll('details')) e.open = true;
  const empty = 'p, pre, h3 > code, li, h1 span, #put-facts, #low, #high, #token-low, #token-high';
  for (const e of document.querySelectorAll(empty)) if (!e.children.length) e.textContent = word;
  const add = (id, html) => document.getElementById(id).append(
    document.createRange().createContextualFragment(html.replaceAll('W', word)));
  add('texts', '<div class="column active"><h3>W</h3><div class="body">'
    + '<span class="token chosen">W</span><span class="changed">┊</span></div>'
    + '<p class="quiet">W</p></div>');
  add('tree', '<li><strong>W</strong><ul><li class="worker running"><span class="quiet">W</span>'
    + '<span>W</span><div class="output">W</div></li></ul></li>');
  add('records', '<li><a href="#">W</a><span class="quiet">W</span><button>Go on</button></li>');
  add('attended', '<li><button type="button">W</button> 1% → 2%</li>');
  add('cannot', '<li>W</li>');
  for (const [name, html] of [['alternatives', '<th scope="row"><code>W</code></th><td>1%</td>'],
                              ['answers', '<td>W</td><td>1</td><td>2</td>']]) {
    const row = document.createElement('tr');
    document.querySelector(`#${name} tbody`).append(row);
    row.innerHTML = html.replaceAll('W', word);
  }
})()
"""


@pytest.mark.parametrize("width", [400, 640, 899, 900, 1499, 1500, 2560])
def test_no_width_scrolls_sideways_however_long_a_word(browser, server, width):
    page = Page(browser, server)
    page.open(width=width)
    page.quiet()
    browser.ask(FILLED)
    wide = browser.ask(
        "(() => { const most = document.documentElement.clientWidth;"
        "const scrolls = e => { for (; e; e = e.parentElement)"
        " if (['auto', 'scroll'].includes(getComputedStyle(e).overflowX)) return true; };"
        "return [...document.querySelectorAll('body *')]"
        ".filter(e => e.getBoundingClientRect().right > most + 1 && !scrolls(e.parentElement))"
        ".map(e => e.tagName + '#' + e.id + '.' + e.className); })()"
    )
    assert wide == []
    assert browser.ask("document.documentElement.scrollWidth") <= width


COLOURS = """
(() => {
  const rgb = t => { const v = t.match(/[\\d.]+/g).map(Number); return v; };
  const ground = e => {
    for (; e; e = e.parentElement) {
      const v = rgb(getComputedStyle(e).backgroundColor);
      if (v.length < 4 || v[3] > 0) return v;
    }
    return [255, 255, 255];
  };
  const name = e => e.tagName + '#' + e.id + '.' + e.className;
  const all = [...document.querySelectorAll('body *')].filter(e => !e.disabled
    && !['SCRIPT', 'NOSCRIPT', 'DATALIST', 'OPTION', 'OPTGROUP', 'CANVAS'].includes(e.tagName)
    && !e.closest('noscript, datalist'));
  const texts = [], edges = [];
  for (const e of all) {
    const style = getComputedStyle(e);
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    const text = (what, colour) => texts.push([name(e) + what, rgb(colour), ground(e)]);
    const edge = (colour) => edges.push([name(e), rgb(colour), ground(e.parentElement)]);
    if (own || e.matches('input, textarea, select')) text('', style.color);
    if (e.matches('input[placeholder], textarea'))
      text(' placeholder', getComputedStyle(e, '::placeholder').color);
    if (e.matches('button, input:not([type=range],[type=checkbox],[type=file]), select, textarea'))
      edge(style.borderTopColor);
    if (e.matches('.column.active')) edge(style.borderTopColor);
    if (e.matches('.token.chosen')) edge(style.outlineColor);
  }
  const probe = document.getElementById('write');
  probe.focus();
  const ring = rgb(getComputedStyle(probe).outlineColor);
  edges.push(['focus', ring, ground(probe.parentElement)]);
  edges.push(['focus on the page', ring, ground(document.body)]);
  return {texts, edges};
})()
"""


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_edges_stand_out(browser, server, dark):
    """AA: 4.5 for text, 3 for what shows where a control is and which one has the focus."""
    page = Page(browser, server)
    page.open(dark=dark)
    page.quiet()
    browser.ask(FILLED)
    browser.key("Tab")  # so that the focus is shown as for a keyboard
    found = browser.ask(COLOURS)
    assert len(found["texts"]) > 120 and len(found["edges"]) > 45
    poor = [n for n, ink, ground in found["texts"] if contrast(ink, ground) < 4.5]
    assert poor == []
    assert [n for n, ink, ground in found["edges"] if contrast(ink, ground) < 3] == []
    red, *_ = browser.ask("getComputedStyle(document.body).color.match(/\\d+/g).map(Number)")
    assert (red > 128) is dark


def schemes(name: str) -> list[dict[str, list[float]]]:
    """Colours by name of a style sheet, in light and in dark."""
    light, dark = (STATIC / name).read_text().split("prefers-color-scheme: dark", 1)

    def named(text: str) -> dict[str, list[float]]:
        found = re.findall(r"--([a-z-]+): #([0-9a-f]{6})", text)
        return {key: [int(code[i : i + 2], 16) for i in (0, 2, 4)] for key, code in found}

    return [named(light), {**named(light), **named(dark)}]


@pytest.mark.parametrize("name", ["console.css", "widget.css"])
def test_the_colours_of_the_style_sheets(name):
    for colours in schemes(name):
        grounds = [colours[key] for key in ("card", "ground") if key in colours]
        assert grounds
        for ground in grounds:
            for ink in ("ink", "quiet", "accent", "bad", "mark"):
                if ink in colours:
                    assert contrast(colours[ink], ground) >= 4.5, (name, ink, ground)
        if "on-accent" in colours:
            assert contrast(colours["on-accent"], colours["accent"]) >= 4.5


def test_every_control_has_a_name(page):
    tree = page.browser.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "textbox", "combobox", "slider", "checkbox", "spinbutton", "radio",
             "application"}  # fmt: skip
    controls = [n for n in tree if n.get("role", {}).get("value") in roles and not n["ignored"]]
    assert len(controls) > 35
    assert [n for n in controls if not n.get("name", {}).get("value")] == []


FOCUS = "(document.activeElement.id || document.activeElement.textContent.trim().slice(0, 20))"


def test_tab_reaches_every_control_in_order_and_leaves_each(page):
    wanted = page.browser.ask(
        "[...document.querySelectorAll('main button, main input, main select, main textarea,"
        " main canvas[tabindex], header button, main summary')]"
        ".filter(e => !e.disabled && e.offsetParent && e.tabIndex >= 0)"
        ".map(e => e.id || e.textContent.trim().slice(0, 20))"
    )
    reached = []
    for _ in range(2 * len(wanted)):
        page.browser.key("Tab")
        reached.append(page.browser.ask(FOCUS))
        if reached[-1] == wanted[-1]:
            break
    assert [name for name in reached if name in wanted] == wanted


def test_keys_alone_write_ask_and_look(page):
    """No mouse: a painted column, a text, its tokens, what a head looks at, another profile."""
    browser = page.browser

    def tab_to(name: str) -> None:
        for _ in range(120):
            if browser.ask(FOCUS) == name:
                return
            browser.key("Tab")
        raise AssertionError(f"Tab never reaches {name}")

    page.set("tokens", "5")
    tab_to("brush")
    browser.ask("document.activeElement.select()")
    browser.type("x 2")
    tab_to("matrix")
    browser.key("ArrowDown")
    browser.key("c")
    browser.key("Enter")
    assert [row[0] for row in page.rows()] == [2.0] * 8
    tab_to("write")
    browser.key("Enter")
    browser.wait(f"{STATUS} === 'written'")
    browser.ask("document.querySelector('.column:nth-child(2) .token').focus()")
    browser.key("ArrowRight")
    browser.key("Enter")
    browser.wait("document.querySelectorAll('#alternatives tbody tr').length > 10")
    assert browser.ask(f"(async () => {WRITING}.columns.columns[1].spans[1].className)()").endswith(
        "chosen"
    )
    browser.ask("document.getElementById('matrix').focus()")
    browser.key("l")
    browser.wait("document.querySelectorAll('#attended li').length > 0")
    tab_to("context")
    browser.ask("document.querySelector('[aria-checked=true]').focus()")
    tab_to("add-column")
    browser.key("Enter")
    assert page.on("page.active().name") == "B"
    browser.ask("document.querySelector('[aria-checked=true]').focus()")
    browser.key("ArrowLeft")
    assert page.on("page.active().name") == "A"
    assert browser.ask("document.activeElement.textContent") == "A"


def test_nothing_moves_for_those_who_ask_for_it(page):
    page.browser.call(
        "Emulation.setEmulatedMedia",
        features=[{"name": "prefers-reduced-motion", "value": "reduce"}],
    )
    # What a browser or a notebook's own styles might animate is stopped as well.
    page.browser.ask(
        "(() => { const s = new CSSStyleSheet(); s.replaceSync('button { transition: all 2s }"
        " @keyframes k { from { opacity: 0 } } p { animation: k 2s infinite }');"
        "document.adoptedStyleSheets = [s]; })()"
    )
    page.write()
    moving = page.browser.ask(
        "[...document.querySelectorAll('*')].filter(e => { const s = getComputedStyle(e);"
        "return s.animationName !== 'none' || parseFloat(s.transitionDuration) > 0"
        " || s.scrollBehavior !== 'auto'; }).length + document.getAnimations().length"
    )
    assert moving == 0
    page.browser.call("Emulation.setEmulatedMedia", features=[])


def test_a_forced_palette_keeps_the_matrix_s_colours(page):
    """In a forced palette (high contrast) colours that carry numbers stay."""
    page.browser.call(
        "Emulation.setEmulatedMedia", features=[{"name": "forced-colors", "value": "active"}]
    )
    kept = page.browser.ask("getComputedStyle(document.getElementById('matrix')).forcedColorAdjust")
    page.browser.call("Emulation.setEmulatedMedia", features=[])
    assert kept == "none"


def test_what_happens_is_announced(page):
    """Status and errors stand in live regions, which screen readers read out."""
    for name in ("status", "cell", "cost", "budget-facts", "answered", "stages-facts",
                 "save-facts", "changed-facts", "attention-facts", "profile-note"):  # fmt: skip
        assert page.browser.ask(f"document.getElementById({json.dumps(name)}).role") == "status"
    alerts = page.browser.ask("[...document.querySelectorAll('.error')].map(e => e.role)")
    assert set(alerts) == {"alert"}
