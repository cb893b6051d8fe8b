"""The command line: one file a command; errors are one line on stderr.

Exit codes: 0 done; 1 it failed; 2 what was asked can't be; 130 interrupted.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from importlib import import_module

import typer

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
    "serve",
    "swap",
    "demo",
)
GROUPS = ("profile",)

EPILOG = """Examples:

  tempering generate "Why is the sky blue?" --pattern 'throb(12,3,1,12)' --amplitude 1.3

  tempering measure --text notes.txt

  tempering compare --text notes.txt --pattern 'throb(12,3,1,12)' --budget 0.01
"""


def application() -> typer.Typer:
    """The typer application with every command."""
    app = typer.Typer(
        name="tempering",
        help="Temperature as an inference parameter: how many hypotheses stay alive.",
        epilog=EPILOG,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        add_completion=False,
    )

    @app.callback()
    def common(
        version: bool = typer.Option(False, "--version", help="Print the version and leave."),
        debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    ) -> None:
        pass

    for name in COMMANDS:
        module = import_module(f"tempering.cli.{name}")
        app.command(
            name,
            epilog=getattr(module, "EPILOG", None),
            context_settings=getattr(module, "CONTEXT", None),
        )(getattr(module, name))
    for name in GROUPS:
        app.add_typer(import_module(f"tempering.cli.{name}").app, name=name)
    return app


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command `tempering`."""
    given = sys.argv[1:] if arguments is None else arguments
    # --debug and --version are understood wherever they stand.
    debug = "--debug" in given
    given = [item for item in given if item != "--debug"]
    if given and given[0] == "--version":
        from tempering.version import __version__

        print(f"tempering {__version__}")
        sys.exit(0)
    warnings.showwarning = _warn
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # bars and minus signs on a terminal without them
    sys.exit(_run(given, debug))


def _warn(message: object, category: type[Warning], *place: object, **more: object) -> None:
    """A warning is one line on stderr, without the place in the code."""
    print(f"tempering: warning: {message}", file=sys.stderr)


def _run(arguments: list[str], debug: bool) -> int:
    from tempering.errors import TemperingError

    try:
        result = application()(arguments, prog_name="tempering", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # the last lines' errors are met here, not at the interpreter's end
        # Some releases of typer return an exit code, also Ctrl-C's, without a word.
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
        # Usage errors are click's, which some releases of typer carry inside themselves.
        if hasattr(error, "format_message"):
            if type(error).__name__ == "NoArgsIsHelpError":
                print(error.format_message())
                return 2
            command = getattr(getattr(error, "ctx", None), "command_path", "tempering")
            return _say(f"{error.format_message()} (see {command} --help)", 2, debug)
        return _say(
            f"{type(error).__name__}: {error} (this is a defect of tempering, or of a library; "
            "--debug shows where)",
            1,
            debug,
        )


def _unread() -> int:
    """Whoever read stdout has gone (`| head`): leave in silence, as other commands do."""
    # What is still buffered would raise again when the interpreter ends.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _say(message: str, code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    first, *rest = [line.strip() for line in message.strip().splitlines()] or [""]
    # A caret under a column means nothing on one line; the message names the column.
    more = [line for line in rest if line and set(line) != {"^"}]
    print("tempering: " + ": ".join([first, *more]), file=sys.stderr)
    return code
