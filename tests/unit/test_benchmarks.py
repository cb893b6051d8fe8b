"""The list of benchmarks, what code each measures, and the page of speeds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
run = pytest.importorskip("run")


def test_page_of_speeds_is_what_the_results_say():
    import _performance

    written = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert written == _performance.page(run.benchmarks()), "run: benchmarks/run.py --write"


def test_every_script_is_listed_or_helps_another():
    listed = {one.script.name for one in run.benchmarks()}
    missing = {path.name for path in (ROOT / "benchmarks").glob("[a-z]*.py")} - listed
    # mixture_sets is read by the others of mixtures.
    assert missing == {"run.py", "mixture_sets.py"}
    assert all(one.purpose.endswith((".", "?")) for one in run.benchmarks())


def test_code_follows_imports_and_no_further():
    names = {
        str(path.relative_to(ROOT)) for path in run.code(ROOT / "benchmarks" / "temperature_for.py")
    }
    assert {"benchmarks/_bench.py", "src/tempering/posterior/solve.py"} <= names
    assert not any(name.startswith("src/tempering/console") for name in names)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A repository with one benchmark of one module, handed on by the package, and its result."""
    for folder in ("benchmarks/results", "src/tempering/inner", "docs"):
        (tmp_path / folder).mkdir(parents=True)
    package = tmp_path / "src" / "tempering"
    (package / "__init__.py").write_text("")
    (package / "__init__.pyi").write_text("from tempering.inner import used as used\n")
    (package / "inner" / "__init__.py").write_text("from tempering.inner.deep import used\n")
    (package / "inner" / "deep.py").write_text("from tempering import other\nused = 1\n")
    (package / "other.py").write_text("")
    (package / "unused.py").write_text("")
    script = tmp_path / "benchmarks" / "speed.py"
    script.write_text(
        '"""What it costs.\n\n    python benchmarks/speed.py\n"""\n'
        'from tempering import used\nwrite("speed", {"a": used})\n'
    )
    (tmp_path / "benchmarks" / "results" / "speed.json").write_text(
        '{"created": "2026-01-01T00:00:00Z", "arguments": ["--rows", "3"], "run_seconds": 6}'
    )
    for name, value in {
        "HERE": tmp_path / "benchmarks",
        "ROOT": tmp_path,
        "SOURCE": tmp_path / "src",
        "RESULTS": tmp_path / "benchmarks" / "results",
    }.items():
        monkeypatch.setattr(run, name, value)
    run.imported.cache_clear()
    commit(tmp_path, "begin")
    yield tmp_path
    run.imported.cache_clear()


def commit(place: Path, message: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "-A"], [*who, "commit", "-q", "-m", message]):
        subprocess.run(["git", *command], cwd=place, check=True)


def the_one() -> run.Benchmark:
    (one,) = [b for b in run.benchmarks() if b.script.name == "speed.py"]
    return one


def test_result_is_current_until_code_that_it_measures_changes(project):
    one = the_one()
    assert one.state == "current"
    assert one.command[1:] == [str(project / "benchmarks" / "speed.py"), "--rows", "3"]
    assert one.seconds == 6
    (project / "src" / "tempering" / "unused.py").write_text("x = 1\n")
    assert the_one().state == "current"
    (project / "src" / "tempering" / "other.py").write_text("x = 1\n")
    assert the_one().changed == ["src/tempering/other.py"]
    commit(project, "changed")
    assert the_one().changed == ["src/tempering/other.py"]
    result = project / "benchmarks" / "results" / "speed.json"
    result.write_text(result.read_text().replace("2026-01-01", "2026-01-02"))
    commit(project, "measured again")
    assert the_one().state == "current"


def test_benchmark_without_a_result_says_so(project):
    (project / "benchmarks" / "results" / "speed.json").unlink()
    assert the_one().state == "no result"
