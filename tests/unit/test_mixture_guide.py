"""The guide to mixtures runs as it is written."""

from __future__ import annotations

import doctest
from pathlib import Path

GUIDE = Path(__file__).parents[2] / "docs" / "mixtures.md"


def test_the_guide_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = doctest.testfile(str(GUIDE), module_relative=False)
    assert outcome.failed == 0
    assert outcome.attempted > 20
