"""The console in a real browser, over a tiny model: painted, written, asked, attacked."""

from __future__ import annotations

import json
import time

import pytest

from tempering import Profile
from tempering.engines.generating.side_by_side import prompt_ids, stream
from tempering.tokens import parse_policy
from tests.e2e.browser import needs_chromium
from tests.e2e.console_page import PAGE, STATUS, Page, painted
from tests.e2e.console_server import served

pytestmark = needs_chromium


# -- opening


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1000, 1600, 2560])
def test_it_opens_whole_and_asks_for_nothing_elsewhere(browser, server, width, dark):
    page = Page(browser, server)
    page.open(width=width, dark=dark)
    assert browser.complaints() == []
    assert all(url.startswith((server.base, "data:")) for url in browser.requests())
    assert browser.ask("document.documentElement.scrollWidth") <= width
    boxes = browser.ask(
        "[...document.querySelectorAll('main button, main input, main select, main textarea,"
        " main canvas')].filter(e => e.offsetParent).map(e => {"
        " const b = e.getBoundingClientRect();"
        " const s = e.closest('section').getBoundingClientRect();"
        " return [e.id, b.left >= s.left - 1 && b.right <= s.right + 1]; })"
    )
    assert [name for name, inside in boxes if not inside and name != "matrix"] == []


# -- painting


def test_a_drag_paints_and_is_one_step(page):
    page.browser.drag(page.cell(1, 0), page.cell(1, 3))  # quick: no events between
    assert page.rows() == painted((1, 0), (1, 1), (1, 2), (1, 3))
    page.browser.click("#undo")
    assert page.rows() == painted()
    page.browser.click("#redo")
    assert page.rows() == painted((1, 0), (1, 1), (1, 2), (1, 3))


def test_a_factor_multiplies_each_head_once_in_a_stroke(page):
    page.set("brush", "x 1.5")
    page.browser.drag(page.cell(2, 1), page.cell(2, 2), page.cell(2, 1), page.cell(2, 2))
    assert page.rows() == painted((2, 1), (2, 2), value=1.5)
    page.browser.drag(page.cell(2, 1))
    assert page.rows()[2] == [1, 2.25, 1.5, 1]


@pytest.mark.parametrize(
    ("tool", "cells"),
    [
        ("row", [(3, head) for head in range(4)] + [(4, head) for head in range(4)]),
        ("column", [(layer, head) for layer in range(8) for head in (1, 2)]),
        ("rectangle", [(3, 1), (3, 2), (4, 1), (4, 2)]),
        ("look", []),
    ],
)
def test_tools(page, tool, cells):
    page.set("tool", tool)
    page.browser.drag(page.cell(3, 1), page.cell(4, 2))
    assert page.rows() == painted(*cells)


def test_the_keyboard_alone_paints(page):
    page.browser.ask("document.getElementById('matrix').focus()")
    for key in ("ArrowDown", "ArrowRight"):
        page.browser.key(key)
    page.browser.key("Enter")
    assert page.rows() == painted((1, 1))
    page.browser.key("ArrowDown", modifiers=8)
    page.browser.key("ArrowRight", modifiers=8)
    page.browser.key("+")
    found = page.rows()
    assert found[1][1] == pytest.approx(1.26) and found[2][2] == pytest.approx(1.05)
    assert found[3] == [1] * 4
    page.browser.key("0")
    assert page.rows() == painted()
    page.browser.key("2")  # a digit begins a number; Enter sets it for the selection
    page.browser.type(".5")
    page.browser.key("Enter")
    assert page.rows() == painted((1, 1), (1, 2), (2, 1), (2, 2), value=2.5)
    page.browser.key("r")
    page.browser.key(" ")
    assert page.rows()[2] == [1.2] * 4
    assert "layer 2" in page.text("cell")
    for _ in range(5):
        page.browser.key("z", modifiers=2)
    assert page.rows() == painted()
    for _ in range(5):
        page.browser.key("z", modifiers=10)
    assert page.rows()[2] == [1.2] * 4


def test_a_bad_brush_paints_nothing_and_says_why(page):
    page.set("brush", "<img src=x onerror=window.hit=1>")
    page.browser.drag(page.cell(1, 1))
    assert "is no brush" in page.text("brush-error")
    page.set("brush", "5000")
    page.browser.drag(page.cell(1, 1))
    assert "outside of 0.001 to 1000" in page.text("brush-error")
    assert page.rows() == painted() and page.browser.ask("window.hit === undefined")
    page.set("brush", "1.2")
    page.browser.drag(page.cell(1, 1))
    assert page.browser.ask("document.getElementById('brush-error').hidden")


def test_a_schedule_is_read_while_one_types(page, subject):
    page.browser.click("#schedule")
    page.browser.type("throb(12,3,1")
    page.browser.wait("!document.getElementById('schedule-error').hidden")
    first, text, caret = page.text("schedule-error").split("\n")
    assert first.startswith("column 13:") and caret.index("^") == len(text)
    assert page.rows() == painted()  # nothing is lost of what was painted
    page.browser.type(",12)")
    page.browser.wait("!document.getElementById('curve').hidden")
    expected = Profile.from_schedule("throb(12,3,1,12)|amplitude(1.3)", subject.model)
    assert page.rows() == expected.temperature.tolist()
    page.set("amplitude", "1.6")
    page.browser.wait(f"(async () => {PAGE}.active().amplitude === 1.6)()")
    assert page.rows()[0] == pytest.approx([1.6] * 4)
    page.set("room", "0.5")
    acting = page.on("page.acting(page.active())")
    assert acting["rows"][0] == pytest.approx([1.6**0.5] * 4) and acting["pattern"] is None
    page.browser.drag(page.cell(7, 0))  # the room is folded into what is painted
    assert page.rows()[0] == pytest.approx([1.6**0.5] * 4) and page.on("page.active().room") == 1


def test_two_profiles_and_their_difference(page):
    page.browser.drag(page.cell(1, 1))
    page.browser.click("#add-column")
    assert page.on("page.active().name") == "B"
    page.set("brush", "2.4")
    page.browser.drag(page.cell(1, 1))
    page.set("shown", "difference:0")
    page.browser.drag(page.cell(1, 1))
    assert page.text("cell").endswith("difference from A: ×2")
    page.browser.click("#remove-column")
    assert page.rows() == painted((1, 1))


def test_a_profile_file_comes_back_and_a_hostile_one_is_text(page, subject, tmp_path):
    hostile = "<img src=x onerror=window.hit=1>"
    profile = Profile.from_schedule("linear(1.5,0.5)", subject.model)
    good = profile.save(tmp_path / "good.json")
    data = {**profile.to_json(), "layers": [{"name": hostile, "temperature": [1] * 4}] * 8}
    bad = tmp_path / f"{'x' * 20}.json"
    bad.write_text(json.dumps(data))
    root = page.browser.call("DOM.getDocument")["root"]["nodeId"]

    def upload(path):
        node = page.browser.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
        page.browser.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    upload(good)
    page.browser.wait(f"(async () => {PAGE}.active().profile.pattern === 'linear(1.5,0.5)')()")
    assert page.rows() == profile.temperature.tolist()
    for path, said in ((bad, "names"), (tmp_path / "torn.json", "no JSON")):
        if not path.exists():
            path.write_text("{")
        upload(path)
        page.says("profile-note", said)
    assert page.rows() == profile.temperature.tolist()
    assert page.browser.ask("window.hit === undefined")


# -- text


def test_the_columns_are_the_library_s_and_can_be_asked(page, subject):
    page.set("prompt", "Hot layers")
    page.set("tokens", "8")
    page.set("seed", "3")
    page.set("tool", "row")
    page.set("brush", "2")
    page.browser.drag(page.cell(2, 0))
    page.write()
    profile = Profile.from_matrix(painted(*[(2, h) for h in range(4)], value=2), subject.model)
    ids = prompt_ids(subject.tokenizer, "Hot layers")
    rows = [Profile.neutral(subject.model), profile]
    expected = list(
        stream(
            subject.model, subject.tokenizer, ids, rows,
            tokens=8, policy=parse_policy("constant(0.7)"), seed=3,
        )
    )  # fmt: skip
    told = page.browser.ask(
        "(async () => (await import('/static/writing.js')).columns.columns"
        ".map(c => c.tokens.map(t => [t.id, t.text])))()"
    )
    for row in (0, 1):
        assert told[row] == [[t.token, t.text] for t in expected if t.row == row]
    count = len(told[1])
    assert count > 1
    page.browser.click(f".column:nth-child(2) .token:nth-of-type({count})")
    page.browser.wait("document.querySelectorAll('#alternatives tbody tr').length > 10")
    assert "T 0.7" in page.text("token-facts")
    page.set("token-colour", "kl")
    page.browser.wait(
        "(async () => (await import('/static/writing.js')).columns.columns[1].tokens"
        ".every(t => Number.isFinite(t.kl)))()"
    )
    assert page.browser.ask("document.querySelectorAll('.token')[0].style.background") != ""
    page.set("tool", "look")
    page.browser.drag(page.cell(5, 2))
    page.browser.wait("document.querySelectorAll('#attended li').length > 0")
    shares = page.browser.ask(
        "[...document.querySelectorAll('#context .line span')].map(s => s.title)"
    )
    assert len(shares) == len(ids) + count - 1 and all("before" in text for text in shares)
    page.set("shown", "live:support:after")
    assert "not measured" not in page.text("cell")


def test_an_edit_while_it_writes_goes_on_from_that_token(page):
    page.set("prompt", "Hot layers")
    page.set("tokens", "450")
    page.set("policy", "constant(2)")
    page.browser.click("#write")
    page.browser.wait("document.querySelectorAll('.token').length > 4")
    page.browser.drag(page.cell(1, 1))
    page.browser.wait(
        "document.querySelectorAll('.changed').length > 0 || " + STATUS + " === 'written'"
    )
    assert page.browser.ask("document.querySelectorAll('.changed').length") == 1
    page.browser.click("#stop")
    page.browser.wait(f"{STATUS} === 'stopped'")
    assert page.server.idle()


def test_hostile_prompts_and_tokens_stay_text(page):
    page.set("prompt", "<script>window.hit=1</script><img src=x onerror=window.hit=1>")
    page.set("tokens", "4")
    page.write()
    page.browser.ask(
        "(async () => { const { columns } = await import('/static/writing.js');"
        "columns.add({...columns.columns[1].tokens[0], row: 1,"
        " text: '<img src=x onerror=window.hit=1><script>window.hit=1</script>'}); })()"
    )
    time.sleep(0.2)
    assert page.browser.ask("window.hit === undefined && !document.querySelector('#texts img')")
    assert "<script>" in page.text("texts")


def test_a_policy_and_a_prompt_that_can_not_be_are_said(page):
    page.set("policy", "suport(3)")
    page.browser.wait("!document.getElementById('policy-error').hidden")
    assert "did you mean support?" in page.text("policy-error")
    page.write()
    assert "did you mean support?" in page.text("write-error")
    page.set("policy", "support(3)")
    # When it goes, what stands below moves up.
    page.browser.wait("document.getElementById('policy-error').hidden")
    page.set("tokens", "5000")
    page.write()
    assert "more than the 512" in page.text("write-error")


def test_a_closed_tab_stops_its_text(browser, server):
    page = Page(browser, server)
    page.open()
    page.quiet()
    page.set("prompt", "Hot layers")
    page.set("tokens", "450")
    page.set("policy", "constant(2)")
    browser.click("#write")
    browser.wait("document.querySelectorAll('.token').length > 4")
    browser.visit("about:blank", width=800)
    assert server.idle()


# -- cost, stages, records


# How many chunks the meter has read, of those that it will.
CHUNKS = (
    "Number((/\\((\\d+) of/.exec(document.getElementById('cost-facts').textContent) || [0, 0])[1])"
)


def test_the_meter_refines_itself_and_begins_anew(page):
    page.set("meter", True)
    page.set("brush", "3")
    page.browser.drag(page.cell(1, 1))
    page.browser.wait(f"{CHUNKS} >= 3")
    before = page.text("cost")
    assert "95%" in before
    page.browser.drag(page.cell(2, 2))
    page.browser.wait(
        f"{CHUNKS} >= 1 && document.getElementById('cost').textContent !== {json.dumps(before)}"
    )
    page.browser.click("#undo")
    page.browser.click("#undo")
    page.browser.wait("document.getElementById('cost').textContent === '0 nats/token'")


def test_stages_grow_and_their_record_opens(page):
    page.set("task", "Name <b>it</b>.")
    page.set("widths", "throb(2,1,1,2)")
    page.set("stage-tokens", "16")
    page.browser.click("#run-stages")
    page.says("stages-facts", "record throb-")
    assert page.browser.ask("document.querySelectorAll('#tree .worker').length") == 4
    assert page.browser.ask("document.querySelectorAll('#tree .done, #tree .failed').length") == 4
    page.browser.wait("document.querySelectorAll('#records a').length > 0")
    address = page.browser.ask("document.querySelector('#records a').getAttribute('href')")
    page.browser.visit(page.server.base + address, width=900)
    assert "Name <b>it</b>." in page.browser.ask("document.body.innerText")
    page.browser.events.clear()


def test_a_record_of_the_page(page):
    page.set("tokens", "4")
    page.browser.drag(page.cell(1, 1))
    page.write()
    page.browser.click("#save-record")
    page.says("save-facts", "record console-")
    page.browser.wait("document.querySelectorAll('#records a').length > 0")


# -- size


def test_a_long_context_keeps_few_nodes(page):
    found = page.browser.ask(
        "(async () => { const { Context } = await import('/static/context.js');"
        "const box = document.getElementById('context');"
        "document.getElementById('attention-part').hidden = false;"
        "const n = 32768, shares = new Float32Array(n).fill(1 / n); shares[n - 5] = 0.5;"
        "const context = new Context(box, document.getElementById('attended'));"
        "context.show(Array.from({length: n}, (_, i) => ' t' + i), shares, shares);"
        "let most = 0, frames = 0;"
        "for (let y = 0; y < box.scrollHeight; y += 4001) { box.scrollTop = y;"
        " await new Promise(requestAnimationFrame); context.draw(); frames++;"
        " most = Math.max(most, box.querySelectorAll('span').length); }"
        "context.jump(n - 5);"
        "return [most, frames, box.textContent.includes('t32763'),"
        " document.querySelector('#attended button').textContent]; })()"
    )
    assert found[0] < 400 and found[1] > 10
    assert found[2] and found[3] == "32763: ␣t32763"


def test_a_wide_matrix_paints_every_cell(page):
    found = page.browser.ask(
        "(async () => { const { Grid } = await import('/static/grid.js');"
        "const canvas = document.createElement('canvas');"
        "const box = document.createElement('div');"
        "document.body.append(box); box.append(canvas);"
        "const heads = new Array(80).fill(128);"
        "const rows = heads.map((_, i) => ({layer: i, index: i, stack: 'decoder'}));"
        "const no = () => {}; const g = new Grid(canvas, rows, heads,"
        " {begin: no, paint: no, end: no, moved: no, chosen: no, key: () => false});"
        "g.view = {values: heads.map(n => new Array(n).fill(1)), kind: 'diverging', low: -1,"
        " high: 1, label: String}; g.paintNow();"
        # Read once: the browser warns of repeated readings.
        "const all = g.context.getImageData(0, 0, canvas.width, canvas.height);"
        "const at = (l, h) => { const start = 4 * (Math.floor(34 + h * g.cellWidth + 1) +"
        " all.width * Math.floor(16 + l * g.cellHeight + 1));"
        " return [...all.data.slice(start, start + 4)]; };"
        "const found = [at(40, 64), at(79, 126), at(1, 0)]; box.remove(); return found; })()"
    )
    assert found == [[178, 62, 8, 255]] * 3


# -- what goes wrong


def test_a_server_that_goes_away_loses_nothing(browser, subject, tmp_path):
    with served(subject, tmp_path) as server:
        page = Page(browser, server)
        page.open()
        page.quiet()
        browser.drag(page.cell(1, 1))
    browser.click("#write")
    browser.wait("!document.getElementById('write-error').hidden")
    assert "still running?" in page.text("write-error")
    assert page.rows() == painted((1, 1))


def test_a_refused_model_is_told_on_the_page(browser, subject, tmp_path):
    from dataclasses import replace

    why = "layer 3: <b>disagrees</b> with softmax(l/T)"
    with served(replace(subject, refused=why), tmp_path) as server:
        browser.visit(server.url, width=1000)
        browser.wait(f"{STATUS} === 'refused'")
        assert why in browser.ask("document.getElementById('refused').textContent")
        assert browser.ask("document.querySelectorAll('main button:enabled').length") == 0


def test_without_its_token_there_is_no_page(browser, server):
    browser.visit(server.base, width=800)
    assert "needs its token" in browser.ask("document.body.innerText")
    browser.visit(f"{server.base}/?token=wrong", width=800)
    assert "needs its token" in browser.ask("document.body.innerText")
