"""What leaves the page: records, reports, baked checkpoints, all in the folder of results."""

from __future__ import annotations

import asyncio
import math
import re
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from tempering.attention.profiles.profile import UNTEMPERED, Profile
from tempering.cli.shared.common import reserve
from tempering.cli.shared.sections import pattern_section
from tempering.console.costs import QUANTITIES
from tempering.console.fields import MOST_COLUMNS, Fields
from tempering.console.subject import Subject
from tempering.console.turns import Event
from tempering.errors import DataError, InputError, OutputError, TemperingError
from tempering.reports import Record, save_html, schema
from tempering.reports.sections import check_results

# A name in the folder of results: no separators, no dot in front, so that nothing else is named.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}")
_MOST_LISTED = 500
_LIMITS = {"Infinity": math.inf, "-Infinity": -math.inf}
_MOST_PROFILES = 4 * MOST_COLUMNS  # a column that was edited while it was written has several
# Sections that the record itself doesn't know.
_OTHERS = {
    "answers": schema.listed(
        schema.an_object(
            {"question": schema.a_text, "stated": schema.a_text}, extra=schema.a_scalar
        )
    ),
    "answered": schema.mapped(schema.a_scalar),
    "budget": schema.listed(
        schema.an_object(
            {"label": schema.a_text, "nats": schema.a_number, "amplitude": schema.a_number},
            extra=schema.a_scalar,
        )
    ),
}


def safe_name(name: str) -> str:
    """The name itself; InputError for one that could mean a place outside of the folder."""
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name!r:.60} is no name for a result: letters, digits, '.', '_' and '-', beginning "
            "with a letter or a digit"
        )
    return name


def listed(out: Path) -> list[dict[str, Any]]:
    """The records of the folder, the newest first; what is no record is left out."""
    found = []
    for path in sorted(out.glob("*.json"), key=_changed, reverse=True)[:_MOST_LISTED]:
        if path.is_symlink() or not _NAME.fullmatch(path.name):
            continue
        try:
            record = Record.load(path)
        except TemperingError:
            continue
        found.append(
            {
                "name": path.stem,
                "kind": record.kind,
                "created": record.created,
                "model": (record.model or {}).get("name"),
            }
        )
    return found


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def recorded(out: Path, name: str) -> Record:
    """A record of the folder; DataError where it has none of this name."""
    path = out / f"{safe_name(name)}.json"
    # A link could lead out of the folder.
    if path.is_symlink() or not path.is_file():
        raise DataError(f"the folder {out} has no record {name}")
    return Record.load(path)


def keep(record: Record, out: Path) -> str:
    """Write a record and its report under a free name; the name."""
    path = reserve(record, out)
    record.save(path)
    save_html(record, path.with_suffix(".html"))
    return path.stem


def save_record(subject: Subject, given: Fields, out: Path) -> str:
    """A record with everything on the page, and its report; its name."""
    subject.require()
    profiles: dict[str, Profile] = {}
    for item in given.items("columns", _MOST_PROFILES):
        label = Fields(item if isinstance(item, dict) else {}).text("label")
        if label in profiles:
            raise InputError(f"two columns are called {label}; give each a name of its own")
        profiles[label] = subject.profile(item)
    results: dict[str, Any] = {
        "pattern": pattern_section(profiles, Profile.neutral(subject.plan)),
        "generations": {
            "prompt": given.text("prompt"),
            "samples": _with_limits(given.items("samples", MOST_COLUMNS + 1)),
        },
    }
    for name in ("cost", "budget", "answers", "answered"):
        if given.data.get(name) is not None:
            _OTHERS.get(name, schema.anything)(given.data[name], name)
            results[name] = given.data[name]
    if given.data.get("measured") is not None:
        results["support"] = _support(subject, given.data["measured"])
    check_results(results, "what the page sent")
    _check_labels(results, profiles)
    record = Record.new(
        "console",
        settings={
            "prompt": given.text("prompt"),
            "token policy": given.text("policy"),
            "tokens": given.whole("tokens", 1, 100_000),
            "chat": given.flag("chat", True),
            "profiles": {label: profile.to_json() for label, profile in profiles.items()},
        },
        results=results,
        model={
            **subject.stated,
            "name": Path(subject.name).name,
            "layers": len(subject.plan.layers),
            "heads": max(subject.plan.heads),
            "dtype": str(subject.model.dtype).removeprefix("torch."),
            "attn_implementation": str(subject.model.config._attn_implementation),
        },
        seed=given.whole("seed", 0, 2**63 - 1),
    )
    return keep(record, out)


def _with_limits(item: Any) -> Any:
    """The same with the limits that JSON has no numbers for, such as T = inf."""
    if isinstance(item, dict):
        # A token's own text may be such a word.
        return {k: v if k in ("token", "text") else _with_limits(v) for k, v in item.items()}
    if isinstance(item, list):
        return [_with_limits(each) for each in item]
    return _LIMITS.get(item, item) if isinstance(item, str) else item


def _support(subject: Subject, given: Any) -> dict[str, Any]:
    """The section `support` from what `costs.measured` told the page.

    given: {before: tables, after: {label: tables}}, a table for each quantity.
    """
    tables = schema.an_object(dict.fromkeys(QUANTITIES, schema.anything), extra=schema.anything)
    schema.an_object({"before": tables, "after": schema.mapped(tables)})(given, "measured")
    before, after = given["before"], given["after"]
    heads = [len(row) for row in before["support"]] if _is_table(before["support"]) else None
    if heads is not None and heads != list(subject.plan.heads):
        raise InputError(f"what was measured has other heads than {subject.plan.describe()}")

    def of(name: str) -> dict[str, Any]:
        own = {label: table[name] for label, table in after.items()}
        return {"before": before[name], "after": own}

    return {
        "layers": list(subject.plan.names),
        **of("support"),
        "quantities": {name: of(name) for name in QUANTITIES if name != "support"},
    }


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, list) for row in value)


def _check_labels(results: dict[str, Any], profiles: dict[str, Profile]) -> None:
    """InputError where a text or a number is said to be of a column that isn't there."""
    samples = results["generations"]["samples"]
    rows = (*samples, *results.get("cost", ()), *results.get("budget", ()))
    labels = (row["label"] for row in rows)
    for label in (*labels, *results.get("support", {"after": ()})["after"]):
        if label not in (UNTEMPERED, *profiles):
            raise InputError(
                f"the page sent results of a column {label!r:.40}; it sent the columns "
                f"{', '.join(profiles) or 'none'}"
            )


async def bake(subject: Subject, profile: Profile, out: Path, name: str) -> AsyncIterator[Event]:
    """`tempering bake` in a process of its own; what it says, line by line."""
    target = out / safe_name(name)
    try:
        taken = target.exists()
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"can't write {target}: {error.strerror or error}") from error
    if taken:
        raise OutputError(f"{target} exists already; give another name")
    with tempfile.TemporaryDirectory() as folder:
        path = profile.save(Path(folder) / "profile.json")
        arguments = ["bake", subject.name, "--profile", str(path), "--out", str(target)]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "tempering", *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            assert process.stdout is not None
            while line := await process.stdout.readline():
                yield {"type": "line", "text": line.decode(errors="replace").rstrip()}
            code = await process.wait()
        finally:
            # The page has gone: a half-written checkpoint is cleared away by the command itself.
            if process.returncode is None:
                process.terminate()
                await process.wait()
    if code:
        yield {"type": "error", "message": f"tempering bake ended with code {code}; see above"}
    else:
        yield {"type": "baked", "path": str(target)}
