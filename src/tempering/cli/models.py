"""tempering models: the models known by name."""

from __future__ import annotations

import json

from tempering.cli.shared import common

EPILOG = """Examples:

  tempering models

  tempering models --json
"""


def models(as_json: common.Json = False) -> None:
    """List the models known by name.

    Directories and hub ids work in their place.
    """
    from tempering.engines.loading.embedded import MODELS

    rows = [
        {"name": m.name, "description": m.description, "source": m.source, "licence": m.licence}
        for m in MODELS.values()
    ]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(f"{row['name']}: {row['description']} ({row['source']}, {row['licence']})")
    print("Any directory in transformers' format, or hub id, works as well.")
