"""tempering models: the models known by name."""

from __future__ import annotations

import json
import shlex

from tempering.cli.shared import common

EPILOG = """Examples:

  tempering models

  tempering models --json
"""


def models(as_json: common.Json = False) -> None:
    """List the models known by name.

    With size and licence, and whether they are here. Directories and hub ids work in their place.
    """
    from tempering.engines.loading.catalogue import MODELS
    from tempering.engines.loading.packages import find_source, install_command
    from tempering.errors import MissingExtraError, ModelError

    rows = []
    for model in MODELS.values():
        try:
            licence = str(find_source(model).licence.path)
            lacks = None
        except (MissingExtraError, ModelError) as error:
            licence, lacks = None, str(error)
        rows.append(
            {
                "name": model.name,
                "description": model.description,
                "source": model.source,
                "licence": model.licence,
                "licence_file": licence,
                "megabytes": model.megabytes,
                "here": lacks is None,
                "lacks": lacks,
                "fetch": shlex.join(install_command(model)),
            }
        )
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(f"{row['name']}: {row['description']}")
        print(f"  {row['source']}, {row['megabytes']} MB; licence: {row['licence']}")
        if row["here"]:
            print(f"  here; the licence is in {row['licence_file']}")
        else:
            print(f"  not here: {row['lacks']}")
    print("Any directory in transformers' format, or hub id, works as well.")
