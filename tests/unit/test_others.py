"""The fence around other libraries' insides: the places exist, and an untried release is told."""

from __future__ import annotations

import importlib.util
import re
import tomllib
import warnings
from pathlib import Path

import pytest

from tempering import others
from tempering.errors import TemperingWarning

ROOT = Path(__file__).parents[2]


def places() -> list[str]:
    return [place.module for library in others.LIBRARIES.values() for place in library.places]


@pytest.mark.parametrize("module", places())
def test_a_listed_place_exists(module: str) -> None:
    assert importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("library", list(others.LIBRARIES))
def test_the_package_asks_for_what_was_tried(library: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["vllm"], *extras["diffusers"]]
    known = others.LIBRARIES[library]
    major, minor = known.newest.split(".")
    assert f"{library}>={known.oldest},<{major}.{int(minor) + 1}" in asked


def test_frames_of_generate_are_read_in_one_listed_place() -> None:
    listed = {name.replace(".", "/") + ".py" for name in places()}
    for path in (ROOT / "src").rglob("*.py"):
        if re.search(r"_getframe|currentframe", path.read_text(encoding="utf-8")):
            assert str(path.relative_to(ROOT / "src")) in listed


@pytest.mark.parametrize(
    ("release", "tried"),
    [
        ("5.17.0", True),
        ("5.23.9", True),
        ("5.24.0", False),
        ("5.16.4", False),
        ("6.0.0.dev0", False),
        ("5.20.0.dev0", True),
        ("main", False),
    ],
)
def test_which_releases_were_tried(release: str, tried: bool) -> None:
    assert others.LIBRARIES["transformers"].tried(release) is tried


def test_an_untried_release_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(others, "_CHECKED", set())
    monkeypatch.setattr(others, "version", lambda name: "9.1.0")
    with pytest.warns(TemperingWarning, match=r"transformers 9\.1\.0 was never tried.*<5\.24"):
        others.check_release("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        others.check_release("transformers")


def test_the_installed_release_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(others, "_CHECKED", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        others.check_release("transformers")
        others.check_release("scikit-learn")
