"""A fit that fails changes nothing of an estimator that was fitted before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def keeping(estimator: object) -> Iterator[None]:
    """Where this is left by an exception, the estimator's attributes are as they were.

    scikit-learn notes the columns of new data before it looks at them, so a later prediction would
    pair them with what was fitted to others.
    """
    before = dict(vars(estimator))
    try:
        yield
    except BaseException:
        estimator.__dict__.clear()
        estimator.__dict__.update(before)
        raise
