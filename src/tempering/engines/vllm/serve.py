"""The command that starts a server: vLLM's own, with tempering's plugin configured."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tempering.attention.profiles.profile import Profile
from tempering.engines.loading.catalogue import MODELS, check_writes_text
from tempering.engines.loading.embedded import embedded_directory
from tempering.errors import InputError, MissingExtraError

EXTENSION = "tempering.engines.vllm.worker.Worker"
_CONFIG, _EXTENSION = "--additional-config", "--worker-extension-cls"


def server_command(
    model: str,
    profile: Path | None,
    profiles: Mapping[str, Path],
    arguments: Sequence[str],
    environment: Mapping[str, str],
) -> tuple[list[str], dict[str, str]]:
    """The command line and the environment of a server.

    Parameters
    ----------
    model: a name of `tempering models`, a directory, or a hub id.
    profile: of requests that name none. profiles: by name, for requests that name one.
    arguments: vLLM's own; tempering's settings are added to an --additional-config among them.
    environment: of this process.

    Raises
    ------
    InputError: a file that is no profile, or arguments that tempering sets itself.
    MissingExtraError: vllm is not installed.
    """
    settings: dict[str, Any] = {"profile": None if profile is None else _checked(profile)}
    if profiles:
        settings["profiles"] = {name: _checked(path) for name, path in profiles.items()}
    if any(_means(argument, _EXTENSION) for argument in arguments):
        raise InputError(
            f"leave out {_EXTENSION}: tempering sets its own, and vLLM takes one worker extension"
        )
    rest, config = _without_config(arguments)
    if "tempering" in config:
        raise InputError(f"{_CONFIG} already has 'tempering'; give --profile instead")
    if importlib.util.find_spec("vllm") is None:
        raise MissingExtraError("vllm", "vllm")
    check_writes_text(model)
    directory = str(embedded_directory(MODELS[model])) if model in MODELS else model
    if model in MODELS and not any(item.startswith("--served-model-name") for item in rest):
        rest = ["--served-model-name", model, *rest]
    command = [
        sys.executable,
        "-m",
        *_entry(directory),
        _EXTENSION,
        EXTENSION,
        _CONFIG,
        json.dumps({**config, "tempering": settings}),
        *rest,
    ]
    return command, {**environment, "VLLM_PLUGINS": _plugins(environment)}


def _checked(path: Path) -> str:
    Profile.load(path)
    return str(path.resolve())


def _without_config(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The arguments without --additional-config, and what it held."""
    rest: list[str] = []
    config: dict[str, Any] = {}
    waiting = iter(arguments)
    for argument in waiting:
        if not _means(argument, _CONFIG):
            rest.append(argument)
            continue
        name, _, value = argument.partition("=")
        if "." in name:
            raise InputError(f"give {_CONFIG} as one JSON text, not {argument}")
        text = value or next(waiting, "")
        try:
            given = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{_CONFIG} is a JSON object, got {text!r:.60}") from error
        if not isinstance(given, dict):
            raise InputError(f"{_CONFIG} is a JSON object, got {text!r:.60}")
        config.update(given)
    return rest, config


def _means(argument: str, option: str) -> bool:
    """Whether vLLM reads an argument as this option.

    vLLM reads "_" as "-", an abbreviation as the whole name, and ".key" as a part of a JSON option.
    Of one option given twice it takes the later, so tempering's own would be replaced.
    """
    name = argument.partition("=")[0].partition(".")[0].replace("_", "-")
    return len(name) > len("--a") and option.startswith(name)


def _entry(model: str) -> list[str]:
    """vLLM's module that serves, and the model; `vllm serve` needs a distribution called vllm."""
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return ["vllm.entrypoints.openai.api_server", "--model", model]
    return ["vllm.entrypoints.cli.main", "serve", model]


def _plugins(environment: Mapping[str, str]) -> str:
    """VLLM_PLUGINS with tempering named. Unset, it means all plugins, but no endpoint plugin."""
    given = environment.get("VLLM_PLUGINS")
    if given is not None:
        names = [name for name in given.split(",") if name]
    else:
        points = metadata.entry_points()
        groups = [group for group in points.groups if group.startswith("vllm.")]
        names = [
            point.name
            for group in groups
            if group != "vllm.endpoint_plugins"
            for point in points.select(group=group)
        ]
    return ",".join(dict.fromkeys([*names, "tempering"]))


def become_server(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Replace this process by the server, so that signals reach vLLM itself."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], list(command), dict(environment))
