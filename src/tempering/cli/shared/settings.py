"""Options from a user's file and from the environment, beside those of the command line.

    command line  >  TEMPERING_GENERATE_MODEL  >  TEMPERING_MODEL  >  [generate] model = ...  >
    [defaults] model = ...  >  the command's own default

The file is `config.toml` in the user's configuration directory, or the file that TEMPERING_CONFIG
names.
"""

from __future__ import annotations

import difflib
import os
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tempering.errors import InputError

PREFIX = "TEMPERING"
GENERAL = "defaults"


class CommandOption(NamedTuple):
    """An option of a command: its long name without dashes, and whether it may be repeated."""

    name: str
    repeated: bool


class OptionValue(NamedTuple):
    """A value that was found for an option, and where."""

    value: Any
    origin: str


Commands = Mapping[str, Mapping[str, CommandOption]]


def config_path() -> Path:
    """The file that options are read from, whether it is there or not."""
    if named := os.environ.get(f"{PREFIX}_CONFIG"):
        return Path(named).expanduser()
    from platformdirs import user_config_path

    return user_config_path("tempering", appauthor=False) / "config.toml"


def settings(known: Commands) -> dict[tuple[str, str], OptionValue]:
    """Options of every command from the file and the environment.

    Parameters
    ----------
    known: command (with its group, "profile show") -> {parameter: option}.

    Returns
    -------
    {(command, parameter): what was found}.

    Raises InputError for a file that is not TOML, or names an unknown command or option.
    """
    path = config_path()
    content = _read(path)
    _check(content, known, path)
    found = {}
    for command, own in known.items():
        for parameter, option in own.items():
            value = _of_environment(command, option) or _of_file(content, command, option, path)
            if value is not None:
                found[command, parameter] = value
    return found


def as_defaults(found: Mapping[tuple[str, str], OptionValue]) -> dict[str, Any]:
    """The values in click's form of defaults: {command: {parameter: value}}, groups nested."""
    table: dict[str, Any] = {}
    for (command, parameter), item in found.items():
        place = table
        for part in command.split():
            place = place.setdefault(part, {})
        place[parameter] = item.value
    return table


def _of_environment(command: str, option: CommandOption) -> OptionValue | None:
    own = option.name.replace("-", "_").upper()
    for name in (f"{PREFIX}_{command.replace(' ', '_').upper()}_{own}", f"{PREFIX}_{own}"):
        value = os.environ.get(name)
        if value is not None:
            return OptionValue(
                shlex.split(value) if option.repeated else value, f"the variable {name}"
            )
    return None


def _of_file(content: Any, command: str, option: CommandOption, path: Path) -> OptionValue | None:
    own = content
    for part in command.split():
        own = own.get(part, {})
    for title, section in ((command, own), (GENERAL, content.get(GENERAL, {}))):
        if option.name in section:
            value = section[option.name]
            listed = option.repeated and not isinstance(value, list)
            return OptionValue([value] if listed else value, f"[{title}] in {path}")
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"can't read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(
            f"{path} is not TOML ({error}); write a line [{GENERAL}], and under it lines such as "
            'model = "smollm2"'
        ) from error


def _check(content: Mapping[str, Any], known: Commands, path: Path) -> None:
    """InputError for a part of the file that no command would read."""
    groups = {command.split()[0] for command in known if " " in command}
    for title, section in content.items():
        if not isinstance(section, dict):
            raise InputError(
                f"{path}: '{title}' stands outside of a section; put it under [{GENERAL}], or "
                "under the command that it is for, e.g. [generate]"
            )
        if title in groups:
            for command, own in section.items():
                _check_section(path, f"{title} {command}", own, known)
        else:
            _check_section(path, title, section, known)


def _check_section(path: Path, title: str, section: Any, known: Commands) -> None:
    if title != GENERAL and title not in known:
        raise InputError(
            f"{path}: there is no command '{title}'; {_close(title, [GENERAL, *known])}"
        )
    own = known.values() if title == GENERAL else [known[title]]
    names = sorted({option.name for options in own for option in options.values()})
    if not isinstance(section, dict):
        raise InputError(f"{path}: [{title}] holds options, not {section!r:.40}")
    for name in section:
        if name not in names:
            raise InputError(f"{path}: [{title}] has no option '{name}'; {_close(name, names)}")


def _close(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name.replace("_", "-"), known, 1)
    return f"did you mean '{close[0]}'?" if close else f"there are: {', '.join(known)}"
