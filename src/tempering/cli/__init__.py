"""The command line: one file a command; errors are one line on stderr.

Exit codes: 0 done; 1 it failed; 2 what was asked can't be; 130 interrupted.
Options are also read from TEMPERING_... variables and from a file, see `shared/settings.py`.
"""

from __future__ import annotations

import io
import os
import re
import sys
import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tempering import ranks

if TYPE_CHECKING:
    from tempering.cli.shared.settings import CommandOption, OptionValue

# command -> module in this package; the function has the command's name.
COMMANDS = (
    "generate",
    "measure",
    "compare",
    "depth",
    "tune",
    "repair",
    "bake",
    "architectures",
    "models",
    "patterns",
    "activation",
    "throb",
    "explore",
    "calibrate",
    "audit",
    "serve",
    "swap",
    "demo",
    "console",
)
GROUPS = ("profile",)
# Those that share their work where a launcher such as torchrun started several processes.
SHARING = ("tune", "measure", "compare", "calibrate")
# Commands whose packages stand above this one.
ABOVE = {"console": "tempering.console.command"}

EPILOG = """Examples:

  tempering generate "Why is the sky blue?" --pattern 'throb(12,3,1,12)' --amplitude 1.3

  tempering measure --text notes.txt

  tempering compare --text notes.txt --pattern 'throb(12,3,1,12)' --budget 0.01

Options come from the command line, from variables (TEMPERING_MODEL for every command,
TEMPERING_GENERATE_MODEL for one), and from config.toml where the platform keeps such files
(TEMPERING_CONFIG names another).
"""
# Options that count anywhere on the command line.
EVERYWHERE = ("--debug", "--quiet")


HELP = {"help_option_names": ["-h", "--help"]}


def application() -> typer.Typer:
    """The typer application with every command."""
    app = typer.Typer(
        name="tempering",
        help="Temperature as an inference parameter: how many hypotheses stay alive.",
        epilog=EPILOG,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings=HELP,
    )

    @app.callback()
    def common(
        version: bool = typer.Option(False, "--version", help="Print the version and leave."),
        debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
        quiet: bool = typer.Option(False, "--quiet", help="No progress or notes on stderr."),
    ) -> None:
        pass

    for name in COMMANDS:
        module = import_module(ABOVE.get(name, f"tempering.cli.{name}"))
        app.command(
            name,
            epilog=getattr(module, "EPILOG", None),
            context_settings={**getattr(module, "CONTEXT", {}), **HELP},
        )(getattr(module, name))
    for name in GROUPS:
        app.add_typer(import_module(f"tempering.cli.{name}").app, name=name)
    return app


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command `tempering`."""
    _open_streams()
    given = sys.argv[1:] if arguments is None else arguments
    debug, quiet = (option in _options(given) for option in EVERYWHERE)
    given = _without(given, EVERYWHERE)
    if quiet:
        from tempering.cli.shared import common

        common.silence()
    if given and given[0] == "--version":
        from tempering.version import __version__

        print(f"tempering {__version__}")
        sys.exit(0)
    warnings.showwarning = _warn
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # bars and minus signs on a terminal without them
    sys.exit(_run_on_ranks(given, debug) if ranks.started() else _run(given, debug))


def _run_on_ranks(given: list[str], debug: bool) -> int:
    """Run a command as one of several processes."""
    from tempering.errors import RankError

    try:
        with ranks.joined() as group:
            if given and given[0] in SHARING:
                return _run(given, debug)
            return _say(
                f"{given[0] if given else 'tempering'} runs in one process, and {group.size} were "
                f"started; run it without torchrun (only {', '.join(SHARING)} share their work)",
                2,
                False,
            )
    except RankError as error:
        return _say(str(error), error.exit_code, debug)


def _open_streams() -> None:
    """Give standard streams that were closed (`2>&-`) a place to go.

    Otherwise the next file that is opened takes the number of such a stream, and messages go into
    that file; and print() to a stderr that is None prints on stdout.
    """
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            if getattr(sys, name) is None and number:
                setattr(sys, name, os.fdopen(os.dup(number), "w", encoding="utf-8"))


def _options(given: list[str]) -> list[str]:
    """The arguments before a `--`; those after it are texts."""
    return given[: given.index("--")] if "--" in given else given


def _without(given: list[str], names: tuple[str, ...]) -> list[str]:
    count = len(_options(given))
    return [item for item in given[:count] if item not in names] + given[count:]


def _warn(message: object, category: type[Warning], *place: object, **more: object) -> None:
    """A warning is one line on stderr, without the place in the code; all ranks have the same."""
    if ranks.here().first:
        print(f"tempering: warning: {message}", file=sys.stderr)


def _run(arguments: list[str], debug: bool) -> int:
    from tempering.cli.shared.settings import settings
    from tempering.errors import TemperingError

    found: Mapping[tuple[str, str], OptionValue] = {}
    try:
        command = _command()
        found = settings(_options_of(command))
        result = _call(command, arguments, found)
        if sys.stdout is not None:
            sys.stdout.flush()  # an error in writing the last lines is met here
        # Some releases of typer return an exit code, also after Ctrl-C, instead of raising.
        if result == 130:
            return _say("interrupted", 130, debug)
        return result if isinstance(result, int) else 0
    except typer.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _say("interrupted", 130, debug)
    except BrokenPipeError:
        return _unread()
    except TemperingError as error:
        return _say(str(error), error.exit_code, debug)
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        return _say(
            f"{error.strerror or error}{place}; free some space or name another place", 1, debug
        )
    except MemoryError:
        return _say("there is not enough memory for this; ask for less", 1, debug)
    except Exception as error:
        # Usage errors are click's; some releases of typer have a click of their own inside.
        if hasattr(error, "format_message"):
            if type(error).__name__ == "NoArgsIsHelpError":
                print(error.format_message())
                return 2
            called = getattr(getattr(error, "ctx", None), "command_path", "tempering")
            message = error.format_message() + _about_origin(found, error)
            message += _about_minus(arguments, error)
            return _say(f"{message} (see {called} --help)", 2, debug)
        return _say(
            f"{type(error).__name__}: {error} (this is a defect of tempering, or of a library; "
            "--debug shows where)",
            1,
            debug,
        )


def _command() -> Any:
    """The click command that typer makes of the application."""
    from typer.main import get_command

    command: Any = get_command(application())
    if ranks.here().size > 1:
        for name in SHARING:
            _agree_first(command.commands[name])
    return command


def _agree_first(command: Any) -> None:
    """Compare the options of ranks, wherever they come from, before the command runs.

    Files count by name, as folders may differ from one machine to another; what they hold is
    compared where it is read, and so are the model's weights.
    """
    invoke = command.invoke

    def agreed(context: Any) -> Any:
        own = {p.opts[0]: _name(context.params.get(p.name)) for p in command.params}
        free = ("--model", "--device", "--out", "--json")
        ranks.here().agree({name: value for name, value in own.items() if name not in free})
        return invoke(context)

    command.invoke = agreed


def _name(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_name(item) for item in value]
    return value.name if isinstance(value, Path) else value


def _call(command: Any, arguments: list[str], found: Mapping[tuple[str, str], OptionValue]) -> Any:
    from tempering.cli.shared.settings import as_defaults

    return command.main(
        arguments, prog_name="tempering", standalone_mode=False, default_map=as_defaults(found)
    )


def _options_of(group: Any, above: str = "") -> dict[str, dict[str, CommandOption]]:
    """Every command's options by parameter; a command of a group is called "profile show"."""
    from tempering.cli.shared.settings import CommandOption

    known: dict[str, dict[str, CommandOption]] = {}
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            known |= _options_of(command, f"{above}{name} ")
            continue
        own = {}
        for parameter in command.params:
            long = [text for text in parameter.opts if text.startswith("--")]
            if long and parameter.name != "help":
                own[parameter.name] = CommandOption(long[0].removeprefix("--"), parameter.multiple)
        known[above + name] = own
    return known


def _about_origin(found: Mapping[tuple[str, str], OptionValue], error: Any) -> str:
    """Where a bad value comes from, if not from the command line."""
    context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
    if context is None or parameter is None:
        return ""
    command = context.command_path.removeprefix("tempering ")
    item = found.get((command, parameter.name))
    source = getattr(context.get_parameter_source(parameter.name), "name", "DEFAULT_MAP")
    return f" (from {item.origin})" if item is not None and source == "DEFAULT_MAP" else ""


def _about_minus(arguments: list[str], error: Any) -> str:
    """How to write a text that begins with a minus, where the error may be about one."""
    if type(error).__name__ != "NoSuchOption":
        return ""
    name = str(getattr(error, "option_name", ""))
    texts = [item for item in _options(arguments) if item.startswith("-") and " " in item]
    if texts or re.fullmatch(r"-[0-9.]+", name):
        return ". A text that begins with a minus goes behind two of them: -- '-5 degrees'"
    return ""


def _unread() -> int:
    """The reader of stdout has gone (`| head`): exit without a message, as other commands do."""
    # Output that is still buffered would raise again when the interpreter ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _say(message: str, code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    first, *rest = [line.strip() for line in message.strip().splitlines()] or [""]
    # A caret under a column means nothing on one line; the message names the column.
    more = [line for line in rest if line and set(line) != {"^"}]
    said = ": ".join([first, *more])
    if not ranks.here().said_by_first(said):
        print(f"tempering: {said}", file=sys.stderr, flush=True)
    return code
