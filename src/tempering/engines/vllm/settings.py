"""The settings in `--additional-config '{"tempering": {...}}'`, and the profiles that they name."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from tempering.attention.profiles.profile import Profile
from tempering.errors import InputError

_SETTINGS = ("profile", "profiles")
Value = TypeVar("Value")


@dataclass(frozen=True)
class EngineSettings:
    """The profiles of an engine.

    profile: of every request that names none; None leaves attention as it is until a swap.
    profiles: by name, for requests that name one in `vllm_xargs`.
    """

    profile: Profile | None = None
    profiles: Mapping[str, Profile] = field(default_factory=dict)

    @property
    def knows_length(self) -> bool:
        """Whether a temperature depends on how many keys a token sees."""
        return any(any(item.rules) for item in (self.profile, *self.profiles.values()) if item)

    @property
    def rows(self) -> dict[str, int]:
        """Row of each named profile in a layer's table; row 0 is every other request's."""
        return {name: index + 1 for index, name in enumerate(self.profiles)}


_READ = "_tempering_settings"  # an attribute of a configuration whose profiles have been read


def create_engine_config(original: Callable[..., Any], self: Any, *a: Any, **k: Any) -> Any:
    """vLLM's `EngineArgs.create_engine_config`, which reads the configured profiles as well.

    The files are read once, before any worker is started, and every process gets what was read.
    """
    config = original(self, *a, **k)
    settings_of(config)
    return config


def settings_of(config: Any) -> EngineSettings | None:
    """The settings in vLLM's configuration; None where tempering isn't configured at all.

    The files are read at the first call. What was read stays in the configuration, also when vLLM
    sends that to another process.

    Parameters
    ----------
    config: vLLM's `VllmConfig`; `additional_config["tempering"]` is {"profile": FILE or null,
        "profiles": {NAME: FILE}}, both optional.

    Raises
    ------
    InputError: another key or type, or a file that is no profile; names it.
    """
    if not configured(config):
        return None
    settings: EngineSettings | None = getattr(config, _READ, None)
    if settings is None:
        settings = _read(config)
        object.__setattr__(config, _READ, settings)
    return settings


def _read(config: Any) -> EngineSettings:
    given = config.additional_config["tempering"]
    where = 'additional_config["tempering"]'
    if not isinstance(given, Mapping):
        raise InputError(f'{where} is {{"profile": "FILE"}}, not {given!r:.60}')
    for key in given:
        if key not in _SETTINGS:
            raise InputError(f"{where} has no setting {key!r}; it has {', '.join(_SETTINGS)}")
    profile = given.get("profile")
    named = given.get("profiles", {})
    if not isinstance(named, Mapping) or not all(
        isinstance(name, str) and name and isinstance(path, str) for name, path in named.items()
    ):
        raise InputError(f'{where}["profiles"] is {{"NAME": "FILE"}}, not {named!r:.60}')
    if profile is not None and not isinstance(profile, str):
        raise InputError(f'{where}["profile"] is the path of a profile, not {profile!r:.60}')
    return EngineSettings(
        None if profile is None else Profile.load(Path(profile)),
        {name: Profile.load(Path(path)) for name, path in named.items()},
    )


def configured(config: Any) -> bool:
    """Whether vLLM's configuration mentions tempering at all."""
    given = getattr(config, "additional_config", None)
    return isinstance(given, Mapping) and "tempering" in given


def named_profiles(config: Any) -> tuple[str, ...]:
    """Names of the profiles that requests may ask for, without reading the files."""
    settings = config.additional_config["tempering"] if configured(config) else None
    named = settings.get("profiles") if isinstance(settings, Mapping) else None
    return tuple(named) if isinstance(named, Mapping) else ()


class PerEngine(Generic[Value]):
    """One value for each engine's configuration in this process, forgotten with it."""

    def __init__(self) -> None:
        self._values: dict[int, Value] = {}

    def get(self, config: Any) -> Value | None:
        return self._values.get(id(config))

    def set(self, config: Any, value: Value) -> Value:
        # vLLM's configuration has no hash, so its id is the key as long as the object lives.
        if id(config) not in self._values:
            weakref.finalize(config, self._values.pop, id(config), None)
        self._values[id(config)] = value
        return value
