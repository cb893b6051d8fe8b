"""The command line's reference, made from its own --help."""

from __future__ import annotations

import contextlib
import io
import os

from tempering.cli import COMMANDS, GROUPS

HEADER = """# Command line

Made from `--help` by `make docs`; a test checks that it is up to date. Results go to stdout,
progress to stderr. Exit codes: 0 done, 1 it failed, 2 what was asked can't be, 130 interrupted.
"""


def reference() -> str:
    """The help of every command as Markdown."""
    parts = [HEADER]
    for arguments in ([], *([name] for name in COMMANDS), *_group_commands()):
        title = " ".join(["tempering", *arguments])
        parts.append(f"## {title}\n\n```\n{_help(arguments)}\n```\n")
    return "\n".join(parts)


def _group_commands() -> list[list[str]]:
    from importlib import import_module

    found = []
    for group in GROUPS:
        app = import_module(f"tempering.cli.{group}").app
        found += [[group, item.name or item.callback.__name__] for item in app.registered_commands]
    return found


def _help(arguments: list[str]) -> str:
    from tempering.cli import application

    os.environ["COLUMNS"] = "88"
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        application()([*arguments, "--help"], prog_name="tempering", standalone_mode=False)
    return "\n".join(line.rstrip() for line in out.getvalue().strip().splitlines())


if __name__ == "__main__":
    print(reference(), end="")
