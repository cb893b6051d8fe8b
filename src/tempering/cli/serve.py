"""tempering serve: an OpenAI-compatible server (vLLM, llama.cpp) with token policies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

EPILOG = """Examples:

  tempering serve Qwen/Qwen3-0.6B --profile tuned.json --port 8000

  tempering serve model-Q4_K_M.gguf --port 8000

  tempering serve smollm2 --profile tuned.json --named hot=hot.json --max-model-len 2048

Requests take a policy: extra_body={"vllm_xargs": {"tempering": "phases(thinking=1,answer=0.2)"}}
"""

# Options that are unknown here go to vLLM.
CONTEXT = {"ignore_unknown_options": True}


def serve(
    model: Annotated[
        str,
        typer.Argument(help="A name of `tempering models`, a directory, a hub id, or a GGUF file."),
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="vLLM's own, as `vllm serve` takes them.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Profile file; without one until a swap.")
    ] = None,
    named: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FILE: a profile for requests that name it; repeatable."),
    ] = None,
) -> None:
    """Serve a model with temperatures, by vLLM or llama.cpp.

    llama.cpp serves a file that ends in .gguf; vLLM, with temperature profiles, everything else.

    What isn't listed here goes to `vllm serve`; on a GGUF file the same names are read: --host,
    --port, --api-key, --max-model-len, --max-num-seqs, --served-model-name; and --threads.
    """
    from tempering.engines.vllm.serve import become_server, server_command
    from tempering.errors import InputError

    if model.startswith("-"):
        raise InputError(f"the model comes first: tempering serve MODEL {model} ...")
    if model.endswith(".gguf"):
        from tempering.cli.shared.llamacpp_runs import serve_llamacpp

        if named:
            raise InputError("llama.cpp has one profile for all requests: leave out --named")
        serve_llamacpp(model, profile, arguments or ())
        return
    profiles: dict[str, Path] = {}
    for item in named or ():
        name, equals, path = item.rpartition("=")  # a name may be a pattern, with "=" in it
        if not (name and equals and path):
            raise InputError(f"--named is NAME=FILE, got {item!r}")
        if name in profiles:
            raise InputError(f"--named gives {name} twice")
        profiles[name] = Path(path)
    command, environment = server_command(model, profile, profiles, arguments or (), os.environ)
    become_server(command, environment)
