"""All benchmarks: purpose, time, and whether the code that they measure has changed since.

    python benchmarks/run.py                  the list
    python benchmarks/run.py --changed        run those whose code has changed, one after the other
    python benchmarks/run.py --write          docs/performance.md from benchmarks/results

The code of a benchmark is its script and all modules of tempering that it imports, directly and
through others. It has changed if any of these files differs from the commit that last wrote one of
the benchmark's results. A run has the arguments and, for vLLM, the environment of the last one.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _performance
from _bench import RESULTS

HERE = Path(__file__).parent
ROOT = HERE.parent
SOURCE = ROOT / "src"


@dataclass(frozen=True)
class Benchmark:
    """A script with its results."""

    script: Path
    purpose: str  # the first line of its docstring
    command: list[str]  # interpreter and arguments
    results: dict[str, dict[str, Any]]  # by name of the file, or "file, model"

    @property
    def seconds(self) -> float | None:
        """What its last run took, where it said so."""
        return max((r["run_seconds"] for r in self.results.values() if "run_seconds" in r),
                   default=None)  # fmt: skip

    @functools.cached_property
    def changed(self) -> list[str]:
        """Files of its code that differ from those of its oldest result, relative to the root."""
        commits = [
            commit
            for name in self.results
            if (commit := git("log", "-1", "--format=%ct %H", "--", _file(name)).strip())
        ]
        if not commits:
            return []
        oldest = min(commits, key=lambda line: int(line.split()[0])).split()[1]
        files = [str(path.relative_to(ROOT)) for path in sorted(code(self.script))]
        return git("diff", "--name-only", oldest, "--", *files).split()

    @property
    def state(self) -> str:
        if not self.results:
            return "no result"
        return f"{len(self.changed)} files changed" if self.changed else "current"


def _file(name: str) -> str:
    return str(RESULTS / name.partition(",")[0])


def records() -> dict[str, dict[str, Any]]:
    """All results; a file that holds one for each model gives as many."""
    found = {}
    for path in sorted(RESULTS.glob("*.json")):
        written = json.loads(path.read_text())
        models = {f"{path.name}, {name}": own for name, own in written.get("models", {}).items()}
        found |= models or {path.name: written}
    return found


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True
    ).stdout


def benchmarks() -> list[Benchmark]:
    """All scripts of this folder that are no helpers of others."""
    found = []
    written = records()
    for script in sorted(HERE.glob("[a-z]*.py")):
        text = script.read_text(encoding="utf-8")
        purpose = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
        run = re.search(rf"^ *(\S*python) benchmarks/{script.name}", text, re.M)
        if script.samefile(__file__) or run is None:
            continue
        names = {script.stem, *re.findall(r"\bwrite\(\s*['\"](\w+)['\"]", text)}
        own = {key: r for key, r in written.items() if Path(_file(key)).stem in names}
        given = next((r["arguments"] for r in own.values() if "arguments" in r), [])
        python = sys.executable if run[1] == "python" else str(ROOT / run[1])
        found.append(Benchmark(script, purpose, [python, str(script), *given], own))
    return found


def code(script: Path) -> set[Path]:
    """The script and every file of the project that it imports, directly and through others."""
    seen: set[Path] = set()
    waiting = [script]
    while waiting:
        path = waiting.pop()
        if path not in seen:
            seen.add(path)
            waiting += imported(path)
    return seen


@functools.cache
def imported(path: Path) -> tuple[Path, ...]:
    """Files that a file's import statements name, wherever they stand in it."""
    found: list[Path] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [p for alias in node.names for p in named(alias.name)]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [p for alias in node.names for p in named(node.module, alias.name)]
    return tuple(found)


def named(module: str, name: str = "") -> Iterator[Path]:
    """The file in which a name of a module is defined; nothing for other people's modules.

    A package that only hands a name on is passed through, so that `from tempering import x` means
    the file of x, not all of tempering.
    """
    base = SOURCE / module.replace(".", "/")
    if not module.startswith("tempering"):
        helper = HERE / f"{module}.py"
        yield from [helper] if helper.exists() else []
    elif base.with_suffix(".py").exists():
        yield base.with_suffix(".py")
    elif (base / f"{name}.py").exists():
        yield base / f"{name}.py"
    elif (base / name / "__init__.py").exists() and name:
        yield base / name / "__init__.py"
    else:
        contents = base / "__init__.pyi"
        contents = contents if contents.exists() else base / "__init__.py"
        for node in ast.walk(ast.parse(contents.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and name in {
                a.asname or a.name for a in node.names
            }:
                source = f"{module}.{node.module}" if node.level else str(node.module)
                yield from named(source, name)
                return
        yield base / "__init__.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--changed", action="store_true", help="run those whose code has changed")
    parser.add_argument("--write", action="store_true", help="write docs/performance.md")
    options = parser.parse_args()
    known = benchmarks()
    if options.write:
        page = ROOT / "docs" / "performance.md"
        page.write_text(_performance.page(known), encoding="utf-8")
        print(f"written: {page.relative_to(ROOT)}")
        return
    for one in known:
        time = "" if one.seconds is None else f"{one.seconds / 60:.1f} min"
        dates = ", ".join(sorted({result["created"][:10] for result in one.results.values()}))
        print(f"{one.script.stem:22}{time:>10}  {dates:12}{one.state:18}{one.purpose}")
    failed = []
    for one in known if options.changed else []:
        if not one.results or one.changed:
            print(f"\n== {shlex.join(one.command[1:])}", flush=True)
            if subprocess.run(one.command, cwd=ROOT).returncode:
                failed.append(one.script.name)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
