"""Sound files: one channel, at the rate that a model hears."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tempering.errors import DataError, MissingExtraError

# WAV is read by SciPy, which the package needs anyway; the others need soundfile (libsndfile).
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")


def read_sound(path: Path, rate: int, say: Callable[[str], None]) -> Any:
    """Float32[samples] at `rate` samples a second, -1 to 1, the mean of all channels.

    say: told once in a line where a file has another rate, or more channels than one.
    Raises DataError for a file that is no sound, MissingExtraError for one that needs soundfile.
    """
    changes: list[str] = []
    samples, own = _read(path, changes)
    if samples.ndim > 1:
        changes.append(f"{samples.shape[1]} channels, their mean is taken")
        samples = samples.mean(axis=1)
    if len(samples) == 0 or not np.isfinite(samples).all():
        what = "no samples" if len(samples) == 0 else "samples that are no numbers"
        raise DataError(f"{path} holds {what}; leave it out, or record it anew")
    if own != rate:
        from scipy.signal import resample_poly

        common = math.gcd(own, rate)
        samples = resample_poly(samples, rate // common, own // common)
        changes.append(f"{own} samples a second, resampled to {rate}")
    if changes:
        say(f"note: {path.name}: {'; '.join(changes)}")
    return np.ascontiguousarray(samples, dtype=np.float32)


def _read(path: Path, changes: list[str]) -> tuple[Any, int]:
    """Samples in float64, -1 to 1, as they are in the file, and their rate."""
    if path.suffix.lower() == ".wav":
        return _read_wav(path, changes)
    try:
        import soundfile
    except ImportError as error:
        raise MissingExtraError("soundfile", "audio") from error
    try:
        samples, rate = soundfile.read(path, dtype="float64")
    except Exception as error:
        raise _no_sound(path, error) from error
    return samples, int(rate)


def _read_wav(path: Path, changes: list[str]) -> tuple[Any, int]:
    from scipy.io import wavfile

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rate, samples = wavfile.read(path)
    except Exception as error:  # SciPy raises what it stumbles over
        raise _no_sound(path, error) from error
    # Its other warnings are about chunks beside the samples: titles, cue points.
    if any("EOF" in str(item.message) for item in caught):
        changes.append("it ends before its header says, and is read as far as it goes")
    if samples.dtype.kind == "f":
        return samples.astype(np.float64), int(rate)
    if samples.dtype == np.uint8:  # WAV's 8 bits are the only ones without a sign
        return (samples.astype(np.float64) - 128) / 128, int(rate)
    # SciPy puts 24 bits into the upper ones of 32.
    return samples / float(np.iinfo(samples.dtype).max + 1), int(rate)


def _no_sound(path: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).replace(str(path), "it").split()) or type(error).__name__
    return DataError(
        f"{path} can't be read as sound ({reason[:120]}); leave it out, or save it anew as WAV"
    )
