"""tempering console: a page on which temperatures are painted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tempering.cli.shared import common

EPILOG = """Examples:

  tempering console

  tempering console --model Qwen/Qwen3-0.6B --profile tuned.json

  tempering console --engine vllm:http://localhost:8000 --profile tuned.json

  tempering console --no-open --port 8080
"""


def console(
    context: common.Context,
    model: common.Model = "smollm2",
    engine: Annotated[
        str | None,
        typer.Option(help="vllm:ADDRESS of a `tempering serve`, instead of a model here."),
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="Begin with this profile: file or name.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to bind to; beyond 127.0.0.1 other machines reach it.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port; the next free one when it is in use.", min=0, max=65535)
    ] = 7861,
    no_open: Annotated[bool, typer.Option("--no-open", help="Open no browser.")] = False,
    device: common.Device = None,
    dtype: common.Dtype = "float32",
    out: common.Out = common.RUNS,
) -> None:
    """Open a page on which to paint temperatures.

    Paint a head, and the next word changes. The page and what it asks for stay on this machine.
    Needs the extra tempering[console].
    """
    from tempering.attention.profiles.profile import Profile
    from tempering.errors import MissingExtraError

    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(error.name or "starlette", "console") from error
    from tempering.console.remote import Remote, shape_of
    from tempering.console.routes import Console
    from tempering.console.serving import serve
    from tempering.console.subject import Subject

    common.check_out(out)
    given = None if profile is None else Profile.load(profile)
    remote = None if engine is None else Remote.at(engine)
    if remote is not None and given is not None and "model" not in common.given(context):
        common.unread(context, ("device", "dtype"), "the model runs on the server")
        subject = shape_of(given, remote.model)
    else:
        # Of a server's model too: the matrix needs its layers, and policies its tokenizer.
        named = remote is not None and "model" not in common.given(context)
        chosen = remote.model if remote is not None and named else model
        subject = Subject.of(chosen, *common.open_model(chosen, device, dtype))
    if subject.refused is not None:
        common.note(f"note: {subject.refused}")
    start = None
    if given is not None and subject.refused is None:
        start = {**subject.read(given.to_json(), profile or ""), "name": Path(profile or "").name}
    serve(
        Console(subject, out, start, remote),
        host=host,
        port=port,
        open_browser=not no_open,
        note=common.note,
    )
