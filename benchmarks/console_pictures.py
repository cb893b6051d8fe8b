"""The pictures of docs/console.md, made from the page itself with the embedded model.

python benchmarks/console_pictures.py
"""

from __future__ import annotations

import io
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from PIL import Image

from tempering.console.subject import Subject
from tempering.engines.loading.hub import load_model
from tests.e2e.browser import Browser
from tests.e2e.console_server import served

IMAGES = Path(__file__).parents[1] / "docs" / "images"
MOST = 300_000  # bytes of a picture


def set_field(browser: Browser, name: str, value: str) -> None:
    browser.ask(
        f"(() => {{ const e = document.getElementById('{name}'); e.value = {value!r};"
        "e.dispatchEvent(new Event('input', {bubbles: true}));"
        "e.dispatchEvent(new Event('change', {bubbles: true})); })()"
    )


def main() -> None:
    subject = Subject.of("smollm2", *load_model("smollm2"))
    with tempfile.TemporaryDirectory() as folder, served(subject, Path(folder)) as server:
        browser = Browser(Path(folder) / "browser")
        try:
            browser.attach()
            browser.visit(server.url, width=1400)
            browser.call(
                "Emulation.setDeviceMetricsOverride",
                width=1400, height=900, deviceScaleFactor=1, mobile=False,
            )  # fmt: skip
            browser.wait("document.body.dataset.ready === 'yes'")
            browser.ask("document.getElementById('meter').click()")
            set_field(browser, "tokens", "40")
            set_field(browser, "schedule", "throb(12,3,1,12)")
            written = "document.getElementById('status').textContent === 'written'"
            browser.wait("document.getElementById('status').textContent === 'writing'", 300)
            browser.wait(written, 600)
            save(browser, "console-matrix.png")
            set_field(browser, "shown", "live:support:change")
            set_field(browser, "token-colour", "entropy")
            browser.click(".column:nth-child(2) .token:nth-of-type(9)")
            browser.wait("document.querySelectorAll('#alternatives tbody tr').length > 5", 300)
            set_field(browser, "tool", "look")
            browser.ask("document.getElementById('matrix').focus()")
            browser.key("l")
            browser.wait("document.querySelectorAll('#attended li').length > 0", 300)
            browser.ask("document.getElementById('token-detail').scrollIntoView({block: 'end'})")
            browser.ask("window.scrollTo(0, 0)")
            browser.call(
                "Emulation.setDeviceMetricsOverride",
                width=1400, height=1250, deviceScaleFactor=1, mobile=False,
            )  # fmt: skip
            save(browser, "console-heads.png")
            browser.ask("document.getElementById('meter').click()")
            facts = "document.getElementById('cost-facts').textContent"
            browser.wait(f"{facts}.includes('(8 of')", 900)
            browser.call(
                "Emulation.setDeviceMetricsOverride",
                width=420, height=900, deviceScaleFactor=1, mobile=True,
            )  # fmt: skip
            # The folder of records is one of this run alone.
            browser.ask("document.getElementById('records-facts').textContent = 'none yet'")
            browser.ask("document.getElementById('cost-part').scrollIntoView()")
            save(browser, "console-cost.png")
        finally:
            browser.close()


def save(browser: Browser, name: str) -> None:
    time.sleep(0.5)
    path = IMAGES / name
    shot = Image.open(io.BytesIO(browser.shot())).convert("RGB")
    shot.quantize(256).save(path, optimize=True)
    size = path.stat().st_size
    print(f"{path}: {size} bytes")
    if size > MOST:
        raise SystemExit(f"{path} has more than {MOST} bytes")


if __name__ == "__main__":
    main()
