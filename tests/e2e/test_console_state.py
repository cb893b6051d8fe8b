"""What the page holds: over a reload, in a link, in a record, and of which profile it is."""

from __future__ import annotations

import itertools
import json
import time

from tempering.reports import Record
from tests.e2e.browser import needs_chromium
from tests.e2e.console_page import PAGE, STATUS, WRITING, other_tab, painted
from tests.e2e.console_server import TOKEN

pytestmark = needs_chromium
READY = "document.body.dataset.ready === 'yes'"
# Texts as the page shows them, and as it holds them.
SHOWN = "document.getElementById('texts').innerText"
HELD = (
    f"(async () => {{ const w = {WRITING}; return w.columns.columns.map(c => [c.name, c.tokens,"
    " c.marks, c.note.textContent, c.finish]); })()"
)
GRID = (
    "(async () => Array.from((await import('/static/painting.js')).grid.view.values,"
    " row => Array.from(row)))()"
)


def test_reload_and_a_link_come_back_to_the_same_state(page):
    page.browser.drag(page.cell(1, 1))
    page.set("prompt", "Hot </script> layers")
    page.set("policy", "support(3)")
    page.set("seed", "41")
    page.browser.wait("location.hash.startsWith('#s=')")
    time.sleep(0.4)
    state, fragment = page.on("page.state()"), page.browser.ask("location.hash")
    assert TOKEN not in fragment
    page.browser.reload()
    page.browser.wait("document.body.dataset.ready === 'yes'")
    assert page.on("page.state()") == state
    page.open()  # without the fragment it begins anew
    assert page.rows() == painted()
    page.browser.ask(f"location.hash = {json.dumps(fragment)}")
    page.browser.wait(f"(async () => {PAGE}.active().profile.rows[1][1] === 1.2)()")
    assert page.browser.ask("document.getElementById('prompt').value") == "Hot </script> layers"
    page.open("#s=torn")
    assert "is damaged" in page.browser.ask(STATUS)
    page.quiet()


def test_a_reload_keeps_the_texts_and_all_that_was_found(page):
    browser = page.browser
    page.set("tokens", "6")
    page.set("brush", "1.7")
    page.set("tool", "row")
    page.browser.drag(page.cell(2, 1))
    page.write()
    browser.click("#measure")
    page.says("status", "measured on")
    page.set("shown", "measured:peak:after")
    shown, held, grid = (browser.ask(each) for each in (SHOWN, HELD, GRID))
    assert len(held) == 2 and held[0][1] and any(map(any, grid))
    state = page.on("page.state()")  # the address may lag behind: the tab's own storage doesn't
    browser.reload()
    browser.wait(READY)
    assert page.on("page.state()") == state
    assert [browser.ask(each) for each in (SHOWN, HELD, GRID)] == [shown, held, grid]
    assert browser.ask("document.getElementById('tool').value") == "row"
    # They are still asked about as before: the prompt's tokens came back too.
    browser.click(".column:nth-child(2) .token:nth-of-type(3)")
    browser.wait("document.querySelectorAll('#alternatives tbody tr').length > 10")
    told = page.on("page.shared.written")
    assert told[0]["profile"]["rows"] == painted(*[(2, h) for h in range(4)], value=1.7)
    browser.click("#save-record")
    page.says("save-facts", "record console-")
    assert browser.complaints() == []
    # Opened anew, or by a link, there is no text of another time.
    page.open(browser.ask("location.hash"))
    assert browser.ask("document.querySelectorAll('.token').length") == 0
    assert page.rows() == told[0]["profile"]["rows"]


def test_a_text_that_is_cut_off_by_a_reload_says_so(page):
    browser = page.browser
    page.set("prompt", "Hot layers")
    page.set("tokens", "450")
    page.set("policy", "constant(2)")
    browser.click("#write")
    browser.wait("document.querySelectorAll('.token').length > 4")
    browser.reload()
    browser.wait(READY)
    assert page.server.idle()
    assert "cut off here, when the page was reloaded" in browser.ask(SHOWN)
    held = browser.ask(HELD)
    assert 1 < len(held[0][1]) < 450 and held[0][4] is None
    assert browser.ask("document.getElementById('stop').disabled")


def test_a_reload_keeps_what_can_be_undone_and_redone(page):
    browser = page.browser
    for cell in ((0, 0), (1, 1), (2, 2)):
        browser.drag(page.cell(*cell))
    browser.click("#add-column")
    browser.click("#undo")
    browser.click("#undo")
    for _ in range(2):  # twice: what came back is kept again
        browser.reload()
        browser.wait(READY)
    assert page.rows() == painted((0, 0), (1, 1))
    browser.click("#redo")
    assert page.rows() == painted((0, 0), (1, 1), (2, 2))
    browser.click("#redo")
    assert page.on("page.history.value.columns.map(c => c.name)") == ["A", "B"]
    assert browser.ask("document.getElementById('redo').disabled")
    for _ in range(4):
        browser.click("#undo")
    assert page.rows() == painted()
    assert browser.ask("document.getElementById('undo').disabled")
    assert browser.complaints() == []


def test_an_edit_just_before_a_text_is_no_edit_of_the_text(page):
    browser = page.browser
    page.set("prompt", "Hot layers")
    page.set("tokens", "40")
    page.set("policy", "constant(2)")
    # Both in one task: what waits for the end of a stroke comes after the text has begun.
    page.on(
        "(page.change({profile: {...page.active().profile,"
        f" rows: {json.dumps(painted((5, 2)))}}}}}), document.getElementById('write').click())"
    )
    browser.wait(f"['written', 'not written'].includes({STATUS})")
    (_, _, marks, _, finish) = browser.ask(HELD)[1]
    assert (marks, finish) == ([], "length")
    assert not browser.ask("document.getElementById('changed-facts').offsetHeight")


def test_an_edit_s_mark_and_its_two_profiles_survive_a_reload_and_stand_in_the_record(page):
    browser = page.browser
    page.set("prompt", "Hot layers")
    page.set("tokens", "480")
    page.set("policy", "constant(2)")
    browser.drag(page.cell(5, 2))
    browser.click("#write")
    browser.wait("document.querySelectorAll('.token').length > 4")
    page.set("brush", "1.5")
    browser.drag(page.cell(1, 1))
    browser.wait("document.querySelectorAll('.changed').length > 1")
    assert browser.ask("document.getElementById('changed-facts').offsetHeight") > 0
    browser.click("#stop")
    browser.wait(f"{STATUS} === 'stopped'")
    browser.drag(page.cell(0, 0))  # and once more, after the text
    held = browser.ask(HELD)
    browser.reload()
    browser.wait(READY)
    assert browser.ask(HELD) == held
    assert browser.ask("document.getElementById('changed-facts').offsetHeight") > 0
    assert "written before the last edit" in browser.ask(SHOWN)
    browser.click("#save-record")
    page.says("save-facts", "record console-")
    name = page.text("save-facts").removeprefix("record ").split(",")[0]
    record = Record.load(page.server.console.out / f"{name}.json")
    rows = {row["label"]: row["temperature"] for row in record.results["pattern"]}
    first = painted((5, 2))
    then = [[1.5 if (layer, head) == (1, 1) else t for head, t in enumerate(row)]
            for layer, row in enumerate(first)]  # fmt: skip
    now = [[1.5 if (layer, head) == (0, 0) else t for head, t in enumerate(row)]
           for layer, row in enumerate(then)]  # fmt: skip
    assert rows["A"] == now and rows["A, as written"] == then
    assert rows["A, until edit 1"] == first
    (mark,) = held[1][2]
    sample = record.results["generations"]["samples"][1]
    assert sample["label"] == "A, as written" and sample["finish"] is None
    named = [token["profile"] for token in sample["trace"]]
    assert named == ["A, until edit 1"] * mark + ["A, as written"] * (len(named) - mark)


def test_a_budget_and_a_cost_stand_in_the_record_of_their_own_profile_alone(page):
    browser = page.browser
    page.set("tokens", "2")
    page.on("page.shared.text = 'Temperature decides how many stay alive. '.repeat(12)")
    page.set("schedule", "throb(12,3,1,12)")
    browser.wait("!document.getElementById('curve').hidden")
    browser.ask("document.activeElement.blur()")
    browser.click("#find")
    page.says("budget-facts", "largest amplitude")
    amplitude = page.on("page.active().amplitude")
    assert page.on("page.active().profile.pattern") == (
        f"throb(12,3,1,12)|amplitude({amplitude!r})"
    )
    page.set("meter", True)
    browser.wait("document.getElementById('cost').textContent.includes('nats')")
    page.set("meter", False)

    def recorded() -> dict:
        page.write()
        browser.ask("document.getElementById('save-facts').textContent = ''")
        browser.click("#save-record")
        page.says("save-facts", "record console-")
        name = page.text("save-facts").removeprefix("record ").split(",")[0]
        return Record.load(page.server.console.out / f"{name}.json").results

    found = recorded()
    (budget,) = found["budget"]
    assert budget["amplitude"] == amplitude and budget["nats"] == 0.01
    assert budget["pattern"] == "throb(12,3,1,12)" and budget["cost"] <= 0.01
    assert found["cost"][0]["label"] == budget["label"] == "A"
    browser.drag(page.cell(1, 1))
    found = recorded()
    assert "budget" not in found and "cost" not in found


def test_what_is_too_long_to_keep_is_named_and_the_rest_comes_back(page):
    browser = page.browser
    browser.drag(page.cell(1, 1))
    page.set("tokens", "3")
    page.write()
    held = browser.ask(HELD)
    browser.ask(f"(async () => {{ {PAGE}.shared.text = 'x '.repeat(3e6); }})()")
    browser.reload()
    browser.wait(READY)
    assert "too long for the browser?): your own text" in browser.ask(STATUS)
    assert page.rows() == painted((1, 1)) and browser.ask(HELD) == held
    assert page.on("page.shared.text") is None


def test_a_state_too_long_for_an_address_is_said_and_kept_over_a_reload(page):
    browser = page.browser
    # A text that hardly gets shorter, beyond what an address takes.
    browser.ask(
        "(() => { let x = 1; const words = [];"
        "for (let i = 0; i < 320000; i++) {"
        " x = (x * 48271) % 2147483647; words.push(x.toString(36)); }"
        "const e = document.getElementById('prompt'); e.value = words.join(' ');"
        "e.dispatchEvent(new Event('input', {bubbles: true})); })()"
    )
    page.says("status", "too long for an address")
    length = browser.ask("document.getElementById('prompt').value.length")
    browser.drag(page.cell(1, 1))
    browser.reload()
    browser.wait(READY)
    assert browser.ask("document.getElementById('prompt').value.length") == length
    assert page.rows() == painted((1, 1))
    browser.click("#copy-link")
    page.says("save-error", "a link can't carry it")


def test_what_was_found_of_one_profile_is_not_shown_as_another_s(page):
    browser = page.browser
    page.set("brush", "2")
    browser.drag(page.cell(1, 1))
    browser.click("#measure")
    page.says("status", "measured on")
    page.set("shown", "measured:support:after")
    assert "not measured" not in page.text("cell")
    first = browser.ask(GRID)
    browser.drag(page.cell(2, 2))
    assert "not measured for this profile; press Measure" in page.text("cell")
    page.set("shown", "measured:support:before")  # the untempered model is still measured
    assert "not measured" not in page.text("cell")
    page.set("shown", "measured:support:after")
    browser.click("#undo")  # and so is the profile that comes back
    assert browser.ask(GRID) == first
    browser.click("#add-column")  # a copy acts alike
    assert browser.ask(GRID) == first
    browser.drag(page.cell(3, 3))
    assert "not measured" in page.text("cell")


def test_the_meter_s_number_goes_when_its_profile_does(page):
    browser = page.browser
    page.set("meter", True)
    page.set("brush", "3")
    browser.drag(page.cell(1, 1))
    browser.wait("document.getElementById('cost').textContent.includes('nats')")
    page.set("meter", False)
    browser.drag(page.cell(2, 2))
    assert page.text("cost") == "not measured" and page.text("cost-facts") == ""


def test_a_removed_column_s_heads_are_not_shown_as_its_successor_s(page):
    browser = page.browser
    page.set("tokens", "2")
    page.set("brush", "3")
    browser.drag(page.cell(0, 0))
    browser.click("#add-column")
    page.set("brush", "0.3")
    browser.drag(page.cell(0, 0))
    page.write()
    page.set("shown", "live:support:after")
    second = browser.ask(GRID)
    page.on("page.repaint({columns: page.history.value.columns, active: 0}, false)")
    first = browser.ask(GRID)
    assert first[1] != second[1]
    browser.click("#remove-column")  # A goes, B is what is painted
    assert browser.ask(GRID) == second
    browser.click("#add-column")
    assert page.on("page.active().name") == "C"  # not A again
    assert "nothing written with heads live yet" in page.text("cell")


def test_a_schedule_s_curve_comes_back_with_undo_a_tab_and_a_reload(page):
    browser = page.browser
    hidden = "document.getElementById('curve').hidden"
    page.set("schedule", "throb(12,3,1,12)")
    browser.wait(f"!{hidden}")
    browser.ask("document.activeElement.blur()")
    browser.click("#add-column")
    page.set("schedule", "thro")
    page.says("schedule-error", "column 5")
    browser.click("#undo")  # column A alone
    assert browser.ask(hidden) is False
    browser.wait("location.hash.startsWith('#s=')")
    browser.reload()
    browser.wait(READY)
    browser.wait(f"!{hidden}")
    assert browser.ask("document.getElementById('schedule').value") == "throb(12,3,1,12)"


def test_more_columns_than_letters(page):
    browser = page.browser
    for _ in range(28):
        browser.click("#add-column")
    names = page.on("page.history.value.columns.map(c => c.name)")
    assert names[25:] == ["Z", "A2", "B2", "C2"] and len(set(names)) == 29
    page.set("tokens", "2")
    page.write()
    texts = browser.ask(HELD)
    assert len(texts) == 30
    assert len({json.dumps([t["id"] for t in own[1]]) for own in texts}) == 1  # all are untempered


def test_whose_turn_it_is_is_said_wherever_one_waits(browser, server, page):
    """A second tab writes; this one measures and writes, and sees who has the model."""
    page.set("tokens", "4")
    with other_tab(server, tokens=480) as first:
        for button, place in (("#measure", "status"), ("#write", "status")):
            browser.click(button)
            page.says(place, "ahead: another tab has the model (write)")
        first.close()
    # The text comes first, the measurement lets it pass.
    browser.wait("document.getElementById('texts').innerText.includes(' tokens')")
    page.says("status", "measured on")
    page.set("prompt", "Hot layers")
    page.set("tokens", "450")
    page.set("policy", "constant(2)")
    browser.click("#write")
    browser.wait("document.querySelectorAll('.token').length > 4")
    browser.click("#measure")
    page.says("status", "ahead: this page has the model (write)")
    browser.click("#stop")
    page.says("status", "measured on")


def test_a_worker_s_text_grows_as_it_is_written(page):
    browser = page.browser
    page.set("widths", "throb(2,1,1,2)")
    page.set("stage-tokens", "12")
    browser.ask(
        "window.seen = new Set(); new MutationObserver(() => seen.add("
        "document.querySelector('#tree .output')?.textContent)).observe("
        "document.getElementById('tree'), {subtree: true, childList: true, characterData: true})"
    )
    page.set("task", " ")
    browser.click("#run-stages")
    page.says("stages-error", "the task is empty")
    assert page.text("stages-facts") == ""  # nothing is waited for
    page.set("task", "Name it.")
    browser.click("#run-stages")
    page.says("stages-facts", "record throb-")
    seen = [text for text in browser.ask("[...seen]") if text]
    assert len(seen) > 3
    # The last one is the whole reply, which the record has without the spaces about it.
    assert all(b.startswith(a) for a, b in itertools.pairwise(seen[:-1]))
    tree = browser.ask("document.getElementById('tree').innerText")
    browser.reload()
    browser.wait(READY)
    assert browser.ask("document.getElementById('tree').innerText") == tree


def test_what_another_model_or_a_broken_storage_left_is_not_taken(page):
    browser = page.browser
    page.set("tokens", "2")
    page.write()
    for spoiled in (
        "sessionStorage.setItem('tempering console', JSON.stringify({whose: 'other', dropped: [],"
        " address: location.hash}))",
        "sessionStorage.setItem('tempering console', '{')",
        "sessionStorage.setItem('tempering console: the texts', '{')",
        "sessionStorage.setItem('tempering console: the texts', '{\"columns\": 3}')",
    ):
        browser.ask(f"addEventListener('pagehide', () => {{ {spoiled}; }})")
        browser.reload()
        browser.wait(READY)
        assert browser.ask("document.querySelectorAll('.token').length") == 0
        page.set("tokens", "2")
        page.write()
    assert browser.complaints() == []


def test_the_storage_holds_neither_token_nor_anything_after_a_new_start(page):
    browser = page.browser
    page.set("tokens", "2")
    page.write()
    browser.reload()
    browser.wait(READY)
    kept = browser.ask("JSON.stringify({...sessionStorage}) + JSON.stringify({...localStorage})")
    assert "the texts" in kept and TOKEN not in kept
    assert browser.ask("document.cookie") == ""
