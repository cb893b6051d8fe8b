"""Options that say which engine runs a command, and the engine that they stand for."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tempering.cli.shared import common

if TYPE_CHECKING:
    from tempering.agents.contract import Engine

# Defaults of the options below.
CONCURRENCY, TIMEOUT, RETRIES, POLICY = 8, 120.0, 5, "strict"

SaveProfiles = Annotated[
    Path | None,
    typer.Option(
        help="Write the attention profiles for --model here, print options of `tempering serve` "
        "that offer them, and leave."
    ),
]
EngineName = Annotated[
    str,
    typer.Option(
        "--engine",
        help="local, openai, anthropic, gemini, the address of an OpenAI-compatible server, or "
        "vllm:ADDRESS; for replicas ADDRESS,ADDRESS or a file of them. Keys come from the "
        "environment.",
    ),
]
Policy = Annotated[
    str,
    typer.Option(help="For temperatures that a model doesn't take: strict, clamp or omit."),
]
Models = Annotated[
    Path | None, typer.Option("--models", help="YAML with more rows of temperature rules.")
]
Concurrency = Annotated[int, typer.Option(help="Requests at once.", min=1)]
Timeout = Annotated[float, typer.Option(help="Seconds for one request.", min=0.1)]
Retries = Annotated[int, typer.Option(help="Tries of a request after the first.", min=0)]
Batch = Annotated[int, typer.Option(help="Rows at once of the engine local.", min=1)]

# What says which engine runs, and how; parameters of each command that runs one.
ENGINE = ("engine", "model", "policy", "models", "device", "dtype", "batch", "concurrency",
          "timeout", "retries")  # fmt: skip


def engine_options(context: common.Context) -> dict[str, Any]:
    """The values of `ENGINE` on the command line, as a record keeps them."""
    values = {name: context.params[name] for name in ENGINE}
    return {**values, "models": None if values["models"] is None else str(values["models"])}


def build_engine(chosen: dict[str, Any], score: bool = False) -> tuple[Engine, dict[str, Any]]:
    """An engine from the options of a command, and the model's section of the record."""
    if chosen["engine"] != "local":
        from tempering.engines.providers import provider

        options = {name: chosen[name] for name in ("policy", "models", "concurrency", "timeout")}
        found = provider(chosen["engine"], chosen["model"], retries=chosen["retries"], **options)
        return found, {"name": chosen["model"]}
    from tempering.agents.temperatures import rule_for, user_rules
    from tempering.engines.generating.local import LocalEngine

    extra = () if chosen["models"] is None else user_rules(chosen["models"])
    rule = rule_for("local", chosen["model"], chosen["policy"], extra)
    network, tokenizer = common.open_model(chosen["model"], chosen["device"], chosen["dtype"])
    section = common.model_section(network, chosen["model"])
    local = LocalEngine(
        network,
        tokenizer,
        name=section["name"],
        batch=chosen["batch"],
        score=score,
        rule=rule,
        policy=chosen["policy"],
    )
    return local, section


def unread_by_engine(context: common.Context, engine: str) -> None:
    """InputError for an option that only another kind of engine reads."""
    if engine == "local":
        names = ("concurrency", "timeout", "retries")
        common.unread(context, names, "the engine local sends no requests")
    else:
        names = ("batch", "device", "dtype")
        common.unread(context, names, f"the engine {engine} runs elsewhere")


def write_profiles(patterns: Iterable[str | None], chosen: dict[str, Any], out: Path) -> None:
    """A profile for each pattern, under whose name `tempering serve` gives it to requests."""
    from tempering.attention.profiles.profile import Profile
    from tempering.errors import InputError
    from tempering.files import write_new

    names = list(dict.fromkeys(pattern for pattern in patterns if pattern is not None))
    if not names:
        raise InputError("no worker tempers attention; give an --amplitude above 1")
    network, _ = common.open_model(chosen["model"], chosen["device"], chosen["dtype"])
    written = {}
    for i, name in enumerate(names, 1):
        text = Profile.from_schedule(name, network).to_text()
        written[name] = write_new(out / f"{i:03d}.json", text)
    for name, path in written.items():
        print(f"--named {shlex.quote(f'{name}={path}')}")
