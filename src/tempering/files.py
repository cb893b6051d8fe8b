"""Files are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tempering.errors import DataError, InputError, OutputError


def write_atomic(path: str | Path, content: bytes | str) -> Path:
    """Write `content` to `path` whole or not at all.

    The bytes go to a temporary file in the same directory, are synced, and then take the
    name in one step, so a reader sees the old file or the new one and never a part.

    Raises OutputError when the directory is missing or unwritable, or the disk is full.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content

    def fill(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    return replace_atomic(path, fill)


def write_new(path: str | Path, content: str) -> Path:
    """Write a file that isn't there yet, whole or not at all; one with this very text stays.

    For what users edit or serve. Raises InputError where another text is there: it is theirs, and
    a second run of a command must not undo it. OutputError as `write_atomic` does.
    """
    path = Path(path)
    data = content.encode("utf-8")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("xb")
        except FileExistsError:
            if path.is_file() and path.read_bytes() == data:
                return path
            raise InputError(
                f"{path} is there already, with other contents, and is not overwritten; name "
                "another file, or move that one away"
            ) from None
        try:
            with file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            path.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(
            f"can't write {path}: {error.strerror or error}; free some space or name another place"
        ) from error
    return path


def replace_atomic(path: str | Path, fill: Callable[[Path], None]) -> Path:
    """Let `fill(temporary_path)` write a file, then give it the name `path` in one step.

    For libraries that insist on writing to a path themselves (figures, Parquet, safetensors).
    The temporary file keeps the suffix of `path`. Raises OutputError as `write_atomic` does.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix or ".tmp"
        )
        os.close(handle)
        temporary = Path(name)
        fill(temporary)
        # mkstemp makes private files; give the result the permissions a plain open() would.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"can't write {path}: {reason}; nothing was written. "
            "Free some space or name another place."
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    return path


def check_utf8(text: str, what: str) -> None:
    """DataError for a text with half a character, as bytes that are not UTF-8 leave behind."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{what} is not UTF-8 text; write it in UTF-8") from None


def read_text(path: str | Path) -> str:
    """The UTF-8 text of a file; DataError when it is missing, empty, binary or not UTF-8."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"can't read {path}: {error.strerror}; name a readable text file"
        ) from error
    return decoded(data, str(path))


def decoded(data: bytes, what: str) -> str:
    """The UTF-8 text in `data`, its lines ended by a newline alone, as Python reads text files.

    what: names the source in errors. Raises DataError as `read_text` does.
    """
    if b"\x00" in data:
        raise DataError(f"{what} is binary (it holds NUL bytes); give plain UTF-8 text")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{what} is not UTF-8: {_where_not_utf8(data, error)}") from error
    if not text.strip():
        raise DataError(f"{what} is empty; give a file with some text")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _where_not_utf8(data: bytes, error: UnicodeDecodeError) -> str:
    """Where a text stops to be UTF-8, and how to mend it without making worse of it."""
    line = data[: error.start].count(b"\n") + 1
    place = f"byte {data[error.start]:#04x} at offset {error.start} (line {line})"
    if error.reason == "unexpected end of data":
        return (
            f"it ends in the middle of a character ({place}), so it was cut, or written in another "
            "encoding; fetch or write it again, or convert it, e.g. with: iconv -f latin1 -t utf-8"
            if data[: error.start].isascii()
            else f"it ends in the middle of a character ({place}), so it was cut; fetch or write "
            "it again, or drop the last bytes"
        )
    # Bytes of ISO 8859-1 hardly ever form a character of several bytes: such a text is UTF-8
    # that was damaged, and converting it would garble every other character.
    if any(len(letter.encode()) > 1 for letter in data.decode("utf-8", "ignore")):
        return (
            f"{place}, though other characters are; it was damaged there. Mend the place, or drop "
            "it with: iconv -c -f utf-8 -t utf-8"
        )
    return f"{place}; convert it, e.g. with: iconv -f latin1 -t utf-8"


def read_json(text: str | bytes, what: str, advice: str = "") -> Any:
    """Parse JSON of a user's; DataError says what is wrong and where, whatever the parser raises.

    what: names the source. advice: how to mend it.
    """
    end = f"; {advice}" if advice else ""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{what} is not JSON (line {error.lineno}, column {error.colno}: {error.msg}){end}"
        ) from error
    except RecursionError as error:
        raise DataError(f"{what} is nested too deeply{end}") from error
    except ValueError as error:  # bytes that are no text, or a number of thousands of digits
        if isinstance(error, UnicodeError):
            raise DataError(f"{what} is not JSON: it is not UTF-8 text{end}") from error
        reason = "it holds a number of too many digits"
        raise DataError(f"{what} is not JSON that can be read: {reason}{end}") from error


def whole_characters(text: str) -> str:
    """`text` with halves of characters (lone surrogates) as U+FFFD; two that match become one.

    JSON may hold them, files in UTF-8 can't.
    """
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
