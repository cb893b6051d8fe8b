"""The page's main states at three widths, compared with pictures of them.

Compared in blocks of 16 x 16 pixels, so that another version of a font passes and a part of the
page that moved, vanished or lost its colour does not. `TEMPERING_PICTURES=new pytest ...` takes
them anew; look at them before they are committed.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tempering.console.subject import Subject
from tempering.engines.loading.hub import load_model
from tests.e2e.browser import Browser, needs_chromium
from tests.e2e.console_server import served
from tests.tiny import save_tiny_llama

pytestmark = needs_chromium
KEPT = Path(__file__).parent / "console_pictures"
BLOCK = 16
WIDTHS = (400, 1000, 1600)
# Greys of a block, 0 to 255: letters of another font move a block by some, a missing part by more.
MOST_BLOCK, MOST_SHARE = 48, 0.06


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> dict[str, Image.Image]:
    """Every state at every width, in one go."""
    folder = tmp_path_factory.mktemp("console")
    subject = Subject.of("tiny", *load_model(save_tiny_llama(folder / "tiny")))
    found = {}
    browser = Browser(folder / "browser")
    try:
        browser.attach()
        with served(subject, folder / "runs") as server:
            for width in WIDTHS:
                for dark in (False, True):
                    browser.visit("about:blank", width=width)
                    browser.visit(server.url, width=width, dark=dark)
                    browser.wait("document.body.dataset.ready === 'yes'")
                    # The folder's name differs from run to run.
                    browser.ask(
                        "document.getElementById('records-facts').textContent = 'none yet';"
                        "for (const id of ['auto', 'meter']) document.getElementById(id).click()"
                    )
                    name = f"{'dark' if dark else 'light'}-{width}"
                    if not dark:
                        found[f"opened-{width}"] = taken(browser)
                    browser.ask(
                        "(() => { const e = document.getElementById('schedule');"
                        "e.value = 'throb(12,3,1,12)'; e.dispatchEvent(new Event('input')); })()"
                    )
                    browser.wait("!document.getElementById('curve').hidden")
                    found[f"painted-{name}"] = taken(browser)
    finally:
        browser.close()
    return found


def taken(browser: Browser) -> Image.Image:
    browser.ask("new Promise(f => requestAnimationFrame(() => requestAnimationFrame(f)))")
    return Image.open(io.BytesIO(browser.shot())).convert("L")


def blocks(picture: Image.Image) -> np.ndarray:
    """The mean grey of every block."""
    size = (picture.width // BLOCK, picture.height // BLOCK)
    return np.asarray(picture.resize(size, Image.Resampling.BOX), dtype=float)


NAMES = [f"opened-{width}" for width in WIDTHS] + [
    f"painted-{scheme}-{width}" for width in WIDTHS for scheme in ("light", "dark")
]


@pytest.mark.parametrize("name", NAMES)
def test_the_page_looks_as_it_did(pictures, name):
    now, path = blocks(pictures[name]), KEPT / f"{name}.png"
    if os.environ.get("TEMPERING_PICTURES") == "new":
        KEPT.mkdir(exist_ok=True)
        Image.fromarray(now.round().astype("uint8")).save(path, optimize=True)
    kept = np.asarray(Image.open(path), dtype=float)
    assert now.shape == kept.shape
    differs = np.abs(now - kept) > MOST_BLOCK
    assert differs.mean() < MOST_SHARE, f"{int(differs.sum())} of {differs.size} blocks differ"


def test_states_differ_from_each_other(pictures):
    """The comparison can fail: an unpainted page and a light one are no painted dark one."""
    for width in WIDTHS:
        light, dark = (blocks(pictures[f"painted-{name}-{width}"]) for name in ("light", "dark"))
        assert (np.abs(light - dark) > MOST_BLOCK).mean() > 0.5
        opened = blocks(pictures[f"opened-{width}"])
        assert np.abs(light - opened).max() > 10
