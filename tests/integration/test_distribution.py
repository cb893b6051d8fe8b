"""The wheel and the sdist: built, checked, and installed where nothing else of this clone is."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path) -> str:
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=cwd, env=bare
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    return out


def test_the_metadata_are_in_order(built: Path) -> None:
    files = sorted(built.iterdir())
    assert [path.suffix for path in files] == [".whl", ".gz"]
    assert "PASSED" in run(sys.executable, "-m", "twine", "check", "--strict", *files, cwd=built)


def test_nothing_is_missing_and_no_weights_are_in(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    kept = {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src").rglob("*") if p.is_file()}
    kept = {name for name in kept if "__pycache__" not in name}
    assert kept <= set(names)
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"} <= inside
    assert not [name for name in [*names, *inside] if name.endswith((".gguf", ".safetensors"))]


def test_an_installed_wheel_works(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    home = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=tmp_path)
    python = home / "bin" / "python"
    # What it depends on comes from this environment, as a folder: the editable install of this
    # clone, which a .pth file there names, does not come along.
    place = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path
    ).strip()
    (Path(place) / "others.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    run(*pip, "--force-reinstall", wheel, cwd=tmp_path)
    where = run(python, "-c", "import tempering; print(tempering.__file__)", cwd=tmp_path)
    assert where.startswith(place)
    version = run(home / "bin" / "tempering", "--version", cwd=tmp_path)
    assert version.strip() == f"tempering {wheel.name.split('-')[1]}"
    shown = run(home / "bin" / "tempering", "profile", "show", "smollm2/text", cwd=tmp_path)
    assert "30 layers" in shown
    code = "from tempering.reports import save_html, Record; from tempering import sample_text\n"
    code += "r = Record.new('x', settings={}, results={}, seed=0); save_html(r, 'x.html')\n"
    code += "print(len(sample_text('demo')) > 1000)"
    assert run(python, "-c", code, cwd=tmp_path).strip() == "True"
