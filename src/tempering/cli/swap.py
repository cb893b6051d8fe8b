"""tempering swap: another profile in a running server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

EPILOG = """Examples:

  tempering swap tuned.json --url http://localhost:8000

  tempering swap --none
"""


def swap(
    profile: Annotated[Path | None, typer.Argument(help="Profile file.")] = None,
    none: Annotated[
        bool, typer.Option("--none", help="The model's own attention instead.")
    ] = False,
    url: Annotated[str, typer.Option(help="Address of the server.")] = "http://localhost:8000",
    api_key: Annotated[
        str | None, typer.Option(help="The server's --api-key; $VLLM_API_KEY by default.")
    ] = None,
) -> None:
    """Give a running server another profile.

    The server runs under `tempering serve`. Without PROFILE and --none, print what it uses.

    Requests in flight finish under the old profile, later ones wait for the new one.
    """
    from tempering.attention.profiles.profile import Profile
    from tempering.engines.vllm.client import active_profile, swap_remote
    from tempering.errors import InputError

    key = api_key or os.environ.get("VLLM_API_KEY")
    if profile is not None and none:
        raise InputError("give a profile or --none, not both")
    if profile is None and not none:
        print(active_profile(url, key))
        return
    print(swap_remote(url, None if profile is None else Profile.load(profile), key))
