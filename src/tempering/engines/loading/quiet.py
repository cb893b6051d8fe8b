"""Silence for transformers' log lines and progress bars, for the length of a with block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(*, bars: bool = False) -> Iterator[None]:
    """Keep transformers to errors, and without progress bars unless `bars`; restored on exit."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    had_bars, hub_had_bars = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()  # the hub's bars too
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if not bars:
            if had_bars:
                logging.enable_progress_bar()
            if hub_had_bars:
                enable_progress_bars()
