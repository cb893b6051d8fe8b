"""Profiles that come with the package, by name: "smollm2/text" is `gallery/smollm2/text.json`.

Each was tuned for the model before the slash, and its file holds how, and what was measured.
"""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path

from tempering.errors import DataError


def gallery() -> tuple[str, ...]:
    """The names of the profiles in the package, as MODEL/PROFILE."""
    names = []
    for model in resources.files(__package__).joinpath("gallery").iterdir():
        if model.is_dir():
            names += [
                f"{model.name}/{item.name.removesuffix('.json')}"
                for item in model.iterdir()
                if item.name.endswith(".json")
            ]
    return tuple(sorted(names))


def gallery_text(name: str) -> str:
    """The file of the gallery's profile `name`; DataError for an unknown name."""
    known = gallery()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise DataError(
            f"no file {name!r}, and no profile of that name in the package; {hint}"
            f"there are: {', '.join(known)}"
        )
    model, _, profile = name.partition("/")
    path = resources.files(__package__).joinpath("gallery", model, f"{profile}.json")
    return path.read_text(encoding="utf-8")


def names_gallery(path: str | Path) -> bool:
    """Whether a path means a profile of the package: MODEL/PROFILE, where there is no such file.

    A file comes first, so that it is never hidden by a profile of the package.
    """
    parts = Path(path).parts
    models = {name.split("/")[0] for name in gallery()}
    return len(parts) == 2 and parts[0] in models and not Path(path).exists()
