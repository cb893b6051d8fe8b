"""Image files, and texts beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tempering.errors import DataError
from tempering.files import read_text

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def files_in(folder: Path, suffixes: Sequence[str], what: str) -> list[Path]:
    """The files of a folder and of folders in it, in the order of their names.

    what: "images" or "sound", in the DataError for a folder without any.
    """
    if not folder.exists():
        raise DataError(f"there is no folder {folder}; give one with {what} in it")
    if not folder.is_dir():
        raise DataError(f"{folder} is a file; give the folder that holds the {what}")
    try:
        found = sorted(
            path
            for path in folder.rglob("*")
            if path.suffix.lower() in suffixes and path.is_file() and not _hidden(path, folder)
        )
    except OSError as error:
        raise DataError(f"can't read the folder {folder}: {error.strerror}") from error
    if not found:
        raise DataError(
            f"the folder {folder} has no {what} in it: no file ends in {', '.join(suffixes)}"
        )
    return found


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def read_image(path: Path) -> Any:
    """An image in RGB, upright; DataError for a file that is none."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            if image.mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"):
                return ImageOps.exif_transpose(image).convert("RGB")
            # Pillow would cut what is above 255.
            raise ValueError(f"its colours are of the kind {image.mode!r}, not of 8 bits")
    except Exception as error:  # decoders raise what they please
        reason = str(error).replace(str(path), "it") or type(error).__name__
        raise DataError(
            f"{path} can't be read as an image ({' '.join(reason.split())[:120]}); leave it out, "
            "or save it anew as PNG or JPEG"
        ) from error


def text_beside(path: Path) -> str | None:
    """The text of NAME.txt beside NAME.png: a caption or a transcript; None without the file."""
    beside = path.with_suffix(".txt")
    if not beside.is_file():
        return None
    text = read_text(beside).strip()
    if not text:
        raise DataError(f"{beside} is empty; write what {path.name} says into it, or remove it")
    return text
