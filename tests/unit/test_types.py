"""What a type checker sees of a package is what exists at run time."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ("tempering", "tempering.reports", "tempering.tokens")
SEEN = """
import sys
from mypy import build, options
from mypy.modulefinder import BuildSource

settings = options.Options()
settings.follow_imports = "skip"
settings.ignore_missing_imports = True
settings.cache_dir = "/dev/null"
settings.incremental = False
names = dict(pair.split("=") for pair in sys.argv[1:])
result = build.build([BuildSource(path, name) for name, path in names.items()], settings)
# Names that a typed package's user may rely on: bound here, or imported under `as` or __all__.
for name in names:
    table = result.files[name].names
    print(*sorted(n for n, s in table.items() if s.module_public and not n.startswith("_")))
"""
# Names of a module's own making, which every module has.
ORDINARY = {"annotations", "import_module", "TYPE_CHECKING"}


@pytest.fixture(scope="module")
def seen_by_mypy() -> dict[str, set[str]]:
    """Names by package."""
    places = {}
    for package in PACKAGES:
        source = Path(str(importlib.import_module(package).__file__))
        stub = source.with_suffix(".pyi")
        places[package] = stub if stub.exists() else source
    named = [f"{package}={place}" for package, place in places.items()]
    code = [sys.executable, "-c", SEEN, *named]
    done = subprocess.run(code, capture_output=True, text=True, check=True)
    return {
        package: set(line.split()) - ORDINARY
        for package, line in zip(PACKAGES, done.stdout.splitlines(), strict=True)
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_a_type_checker_sees_what_exists(package: str, seen_by_mypy: dict[str, set[str]]) -> None:
    module = importlib.import_module(package)
    public = {name for name in module.__all__ if not name.startswith("_")}
    assert public - seen_by_mypy[package] == set(), "names that a type checker does not know"
    for name in seen_by_mypy[package]:
        assert hasattr(module, name), f"{package}.{name} type-checks and does not exist"


def test_the_package_says_that_it_is_typed() -> None:
    from importlib import resources

    assert resources.files("tempering").joinpath("py.typed").is_file()
