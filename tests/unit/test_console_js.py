"""The page's pure parts by node's own runner, and its types by tsc, where these are."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
STATIC = HERE.parents[1] / "src" / "tempering" / "console" / "static"


def run(*command: str) -> str:
    found = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=STATIC)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
    return found.stdout


@pytest.mark.skipif(shutil.which("node") is None, reason="no node on PATH (apt install nodejs)")
def test_pure_parts():
    files = sorted(str(path) for path in (HERE / "console").glob("*.test.mjs"))
    told = run("node", "--test", "--test-reporter=tap", *files)
    assert "# fail 0" in told and "# tests 0" not in told


@pytest.mark.skipif(
    shutil.which("tsc") is None, reason="no tsc on PATH (npm install -g typescript)"
)
def test_types():
    names = sorted(path.name for path in STATIC.glob("*.js"))
    run(
        "tsc", "--noEmit", "--allowJs", "--checkJs", "--strict", "--target", "es2022",
        "--module", "esnext", "--moduleResolution", "bundler", "--lib",
        "es2023,dom,dom.iterable,dom.asynciterable",
        *names,
    )  # fmt: skip


def test_nothing_is_loaded_from_elsewhere_and_no_html_is_interpreted():
    """What the policy of the page enforces, said of the sources too."""
    for path in STATIC.iterdir():
        text = path.read_text()
        for bad in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(",
                    "new Function", "DOMParser", "https://", "//cdn", "@import"):  # fmt: skip
            assert bad not in text, f"{path.name}: {bad}"
        if path.suffix == ".html":
            assert "style=" not in text and "onclick" not in text and "<script>" not in text
