"""Models that come inside a Python package: found, converted once, kept in the user's cache.

A conversion is written into a temporary directory beside its final place, synced, and renamed,
so a reader sees the whole model or none. A lock lets one process convert while others wait; the
temporary directories that a dead process left are removed under it. `manifest.json` holds the
SHA-256 of every file, and every load checks them all: a damaged file is found and the model is
converted again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tempering.engines.loading.catalogue import MODELS, EmbeddedModel
from tempering.engines.loading.dinov2_model import convert_dinov2
from tempering.engines.loading.gguf_model import convert_gguf
from tempering.engines.loading.packages import (
    Source,
    cache_directory,
    check_source,
    find_source,
    hash_file,
)
from tempering.engines.loading.whisper_model import convert_whisper
from tempering.errors import OutputError

_MANIFEST = "manifest.json"
_STALE = ".partial-"
JOINED = "model.gguf"


def embedded_directory(model: EmbeddedModel) -> Path:
    """Directory with the model in transformers' format, converted now if need be.

    The name carries the first digits of the source's hash, so another version of the package
    gets another directory. Raises MissingExtraError without the package, ModelError when its
    file is damaged, OutputError when the cache can't be written.
    """
    source = find_source(model)
    home = cache_directory() / "models"
    # A rounded model is rounded in memory: it shares the files of the one that it is made from.
    shared = next((m.name for m in MODELS.values() if m.source == model.source), model.name)
    target = home / f"{shared}-{source.sha256[:12]}-{model.conversion}"
    with ThreadPoolExecutor(1) as pool:
        damage = pool.submit(_damage, target, source)
        # Loading needs this import anyway, and it takes as long as the hashing meanwhile.
        import transformers.modeling_utils  # noqa: F401
    if damage.result() is None:
        return target
    try:
        home.mkdir(parents=True, exist_ok=True)
        with _lock(home / f"{target.name}.lock"):
            # Another process may have converted it while this one waited.
            reason = _damage(target, source)
            if reason is not None:
                if target.exists():
                    _say(f"{model.name}: the cached copy is damaged ({reason}); converting again")
                _convert(model, source, target)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"can't keep the converted model {model.name} in {home}: "
            f"{error.strerror or error}; it needs about {model.kept} MB. "
            "Free some space, or name another place in TEMPERING_CACHE"
        ) from error
    return target


def _damage(target: Path, source: Source) -> str | None:
    """What is wrong with a converted model; None when every file is as it was written."""
    try:
        manifest = json.loads((target / _MANIFEST).read_bytes())
        if manifest["source"] != {"size": source.size, "sha256": source.sha256}:
            return "it was converted from another file"
        for name, sha256 in manifest["files"].items():
            if hash_file(target / name) != sha256:
                return f"{name} has changed"
    except OSError as error:
        return f"{Path(error.filename or target).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{_MANIFEST} can't be read"
    return None


def _convert(model: EmbeddedModel, source: Source, target: Path) -> None:
    """Convert into a temporary directory and give it the name `target` in one step."""
    for stale in target.parent.glob(f"{_STALE}{target.name}-*"):
        shutil.rmtree(stale)
    check_source(model, source)
    _say(f"{model.name}: converting {model.source} into {target}; once")
    prefix = f"{_STALE}{target.name}-"
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        _write(model, source, partial, lambda step: _say(f"{model.name}: {step}"))
        licence = partial / source.licence.path.name
        if not licence.exists():
            shutil.copyfile(source.licence.path, licence)
        written = sorted(path for path in partial.rglob("*") if path.is_file())
        manifest = {
            "source": {"size": source.size, "sha256": source.sha256},
            "files": {str(path.relative_to(partial)): hash_file(path) for path in written},
        }
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        folders = sorted({partial, *(path.parent for path in written)})
        for path in (*written, partial / _MANIFEST, *folders):
            _sync(path)
        # mkdtemp and safetensors make private files; give them the permissions of a plain open().
        umask = os.umask(0)
        os.umask(umask)
        for path in folders:
            path.chmod(0o777 & ~umask)
        for path in written:
            path.chmod(0o666 & ~umask)
        if target.exists():
            target.rename(Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent)) / "damaged")
        partial.rename(target)
        _sync(target.parent)
    finally:
        for stale in target.parent.glob(f"{prefix}*"):
            shutil.rmtree(stale, ignore_errors=True)
    _say(f"{model.name}: converted; its licence: {model.licence}, {target / licence.name}")


def _write(model: EmbeddedModel, source: Source, target: Path, say: Callable[[str], None]) -> None:
    """Fill `target`, by the format that the weights are in."""
    weights = [file.path for file in source.weights]
    if model.format == "gguf":
        convert_gguf(weights[0] if len(weights) == 1 else _join(weights, target), target, say)
    elif model.format == "ctranslate2":
        convert_whisper(weights[0], target)
    elif model.format == "onnx":
        convert_dinov2(weights[0], target)
    else:
        for file in (*source.weights, *source.beside):
            copy = target / file.path.relative_to(weights[0].parent)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file.path, copy)


def _join(pieces: list[Path], target: Path) -> Path:
    """The file that came in pieces; it stays beside the converted model, for llama.cpp."""
    joined = target / JOINED
    with joined.open("wb") as out:
        for piece in pieces:
            with piece.open("rb") as file:
                shutil.copyfileobj(file, out, 1 << 24)
    return joined


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the lock file, saying so once if another process has it; freed when a holder dies."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0.2)
    except Timeout:
        _say("another process is converting the model; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _sync(path: Path) -> None:
    """Push a file, or a directory's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _say(line: str) -> None:
    print(f"tempering: {line}", file=sys.stderr, flush=True)
