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
path, name = sys.argv[1:]
result = build.build([BuildSource(path, name)], settings)
table = result.files[name].names
# Names that a typed package's user may rely on: bound here, or imported under `as` or __all__.
print(*sorted(n for n, s in table.items() if s.module_public and not n.startswith("_")))
"""
# Names of a module's own making, which every module has.
ORDINARY = {"annotations", "import_module", "TYPE_CHECKING"}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_type_checker_sees_what_exists(package: str) -> None:
    module = importlib.import_module(package)
    source = Path(str(module.__file__))
    stub = source.with_suffix(".pyi")
    done = subprocess.run(
        [sys.executable, "-c", SEEN, str(stub if stub.exists() else source), package],
        capture_output=True,
        text=True,
        check=True,
    )
    seen = set(done.stdout.split()) - ORDINARY
    public = {name for name in module.__all__ if not name.startswith("_")}
    assert public - seen == set(), "public names that a type checker does not know"
    for name in seen:
        assert hasattr(module, name), f"{package}.{name} type-checks and does not exist"


def test_the_package_says_that_it_is_typed() -> None:
    from importlib import resources

    assert resources.files("tempering").joinpath("py.typed").is_file()
