"""The matrix in a notebook: traits both ways, a notebook that runs, the module that it loads."""

from __future__ import annotations

import base64
import json
import os
import sys
import textwrap

import pytest
import torch

pytest.importorskip("anywidget", reason="no anywidget (pip install 'tempering[notebook]')")

from tempering import Profile
from tempering.attention.measuring.measure import measure
from tempering.console.notebook import module_text, widget
from tempering.data import sample_text
from tempering.engines.loading.hub import load_model
from tempering.errors import ProfileError
from tests.e2e.browser import Browser, needs_chromium
from tests.tiny import save_tiny_llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return load_model(save_tiny_llama(tmp_path_factory.mktemp("model") / "tiny"))


def test_what_is_painted_is_the_profile_and_back(tiny):
    found = widget(*tiny, profile="throb(12,3,1,12)|amplitude(1.5)")
    expected = Profile.from_schedule("throb(12,3,1,12)|amplitude(1.5)", tiny[0])
    assert torch.equal(found.profile.temperature, expected.temperature)
    assert found._rows == expected.temperature.tolist()
    seen = []
    found.observe(lambda change: seen.append(change["new"]), "profile")
    rows = [[1.0] * 4 for _ in range(8)]
    rows[2][3] = 1.25
    found.set_state({"_rows": rows})  # as the page's message does
    assert found.profile.temperature.tolist() == rows
    assert len(seen) == 1
    found.profile.check_model(tiny[0])
    found.profile = Profile.neutral(tiny[0])
    assert found._rows == [[1.0] * 4 for _ in range(8)]


def test_profiles_that_do_not_fit_are_refused_and_nothing_is_lost(tiny):
    found = widget(*tiny)
    before = found._rows
    for bad, said in (
        (Profile.from_matrix([[1.0] * 4] * 7), "7 layers"),
        (Profile.from_matrix([[1.0] * 5] * 8), "5 heads"),
    ):
        with pytest.raises(ProfileError, match=said):
            found.profile = bad
    assert found._rows == before


def test_measured_is_the_library_s_measurement(tiny):
    found = widget(*tiny, profile="linear(1.5,0.5)")
    assert found.measured is None
    found._asked(None, "measure", [])
    for when, profile in (("before", None), ("after", found.profile)):
        own = measure(*tiny, sample_text("demo"), profile=profile, chunk=128, limit=2)
        assert torch.equal(found.measured[when].support, own.support)
        assert found._tables[when]["peak"] == own.peak.tolist()
    assert found._said == "measured"


def test_a_notebook_runs_it(tmp_path):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    save_tiny_llama(tmp_path / "tiny")
    cells = [
        "from tempering.engines.loading.hub import load_model\n"
        "import tempering.console\n"
        "model, tokenizer = load_model('tiny')\n"
        "w = tempering.console.widget(model, tokenizer)\nw",
        "rows = [list(row) for row in w._rows]\nrows[0][0] = 2.0\nw.set_state({'_rows': rows})\n"
        "float(w.profile.temperature[0, 0])",
        "w.measure()\nround(float(w.measured['after'].support.sum()), 3) > 0",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    kernel = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
              "display_name": "here", "language": "python"}  # fmt: skip
    folder = tmp_path / "kernels" / "here"
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps(kernel))
    from jupyter_client.kernelspec import KernelSpecManager

    manager = KernelSpecManager(kernel_dirs=[str(tmp_path / "kernels")])
    client = nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="here", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.km = client.create_kernel_manager()
    client.km.kernel_spec_manager = manager
    done = client.execute()
    outputs = [cell["outputs"][-1]["data"] for cell in done.cells]
    assert "application/vnd.jupyter.widget-view+json" in outputs[0]
    assert outputs[1]["text/plain"] == "2.0" and outputs[2]["text/plain"] == "True"


PAGE = """
(async () => {{
  const module = await import('data:text/javascript;base64,{code}');
  const state = {{
    _known: {{rows: [0, 1].map(i => ({{layer: i, index: i, stack: 'decoder'}})), heads: [3, 3],
              coldest: 1e-3, hottest: 1e3}},
    _rows: [[1, 1, 1], [1, 1, 1]], _tables: {{}}, _said: ''}};
  const listeners = {{}}; window.sent = []; window.state = state;
  const tell = name => (listeners[name] || []).forEach(f => f());
  const model = {{
    get: name => state[name], send: m => window.sent.push(m), save_changes: () => {{}},
    set: (name, value) => {{ state[name] = value; tell('change:' + name); }},
    on: (name, f) => (listeners[name] = [...(listeners[name] || []), f])}};
  const el = document.createElement('div'); document.body.append(el);
  module.default.render({{model, el}});
  await new Promise(requestAnimationFrame);
  const canvas = el.querySelector('canvas'); canvas.focus();
  const key = key => canvas.dispatchEvent(new KeyboardEvent('keydown', {{key}}));
  key('ArrowDown'); key('Enter');
  const painted = JSON.stringify(state._rows);
  el.querySelectorAll('button')[0].click();
  el.querySelectorAll('button')[1].click();
  return [painted, JSON.stringify(state._rows), window.sent, canvas.width > 0];
}})()
"""


@needs_chromium
def test_the_module_that_the_notebook_loads(tmp_path):
    browser = Browser(tmp_path / "browser")
    try:
        browser.attach()
        code = base64.b64encode(module_text().encode()).decode()
        found = browser.ask(textwrap.dedent(PAGE.format(code=code)))
        assert browser.complaints() == []
    finally:
        browser.close()
    assert json.loads(found[0]) == [[1, 1, 1], [1.2, 1, 1]]
    assert json.loads(found[1]) == [[1, 1, 1], [1, 1, 1]]
    assert found[2] == ["measure"] and found[3] is True
