"""Tables of logits that need not fit in memory, read in pieces from arrays, tensors or files."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from tempering.errors import DataError
from tempering.estimators.calibration.advice import advised
from tempering.ranks import here
from tempering.tensors import from_numpy, shareable

# Elements in a chunk. 2^17 float32 values and two work buffers of the same size fit in a core's
# cache; with a quarter of that the calls cost more than the sums. A GPU needs larger chunks to be
# busy: 2^23 values, 32 MB.
CHUNK = 1 << 17
CHUNK_CUDA = 1 << 23


# A row of probabilities sums to 1 within this: rounding in half precision, or in printing to
# three digits, stays inside it.
SUM_TOLERANCE = 1e-2

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch's threads set to `count` on the calling thread, and back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_threaded(method: Callable[P, R]) -> Callable[P, R]:
    """Run without gradients and on one thread.

    A chunk lies in the cache of one core. A second thread gains little there, and on a busy
    machine, where threads wait for each other, it made passes ten times slower.
    """

    @wraps(method)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.no_grad(), threads(1):
            return method(*args, **kwargs)

    return run


class Logits(ABC):
    """An [n_rows, n_columns] table of logits that can be read from the start again and again.

    n_rows, n_columns: the shape. name: how messages call it. column_names: those that the source
    states. device: where its chunks live.
    """

    n_rows: int
    n_columns: int
    name: str = "X"
    column_names: tuple[str, ...] | None = None
    device: torch.device = torch.device("cpu")

    @abstractmethod
    def pieces(self) -> Iterator[Shaped[Tensor, "rows columns"]]:
        """All rows in order, in pieces of any size and any real dtype."""

    def chunks(self) -> Iterator[tuple[int, Shaped[Tensor, "rows columns"]]]:
        """(index of the first row, rows) in order, in cache-sized chunks of float32 or float64."""
        first = 0
        for piece in self.pieces():
            yield from self._cut(first, piece)
            first += len(piece)
        if first != self.n_rows:
            raise DataError(
                f"{self.name} gave {first} rows where {self.n_rows} were announced; "
                "the file was cut short or is being written: make it anew"
            )

    def _cut(
        self, first: int, piece: Shaped[Tensor, "rows columns"]
    ) -> Iterator[tuple[int, Shaped[Tensor, "rows columns"]]]:
        """The chunks of a piece whose first row has this index."""
        size = CHUNK_CUDA if self.device.type == "cuda" else CHUNK
        for part in piece.split(max(1, size // self.n_columns)):
            yield first, floats(part)
            first += len(part)

    def own_chunks(self) -> Iterator[tuple[int, Shaped[Tensor, "rows columns"]]]:
        """Of `chunks`, those of this rank, where a run has several (see `tempering.ranks`)."""
        ranks = here()
        for place, chunk in enumerate(self.chunks()):
            if place % ranks.size == ranks.rank:
                yield chunk

    def sample(self, size: int, seed: int) -> tuple[np.ndarray, Shaped[Tensor, "rows columns"]]:
        """About `size` rows spread over the whole table: (their indices, the rows)."""
        wanted = strata(self.n_rows, size, seed)
        found, first = [], 0
        for piece in self.pieces():
            low, high = np.searchsorted(wanted, [first, first + len(piece)])
            if high > low:
                found.append(floats(piece[torch.as_tensor(wanted[low:high] - first)]))
            first += len(piece)
        return wanted, torch.cat(found)

    def digest(self) -> str:
        """Of every number, as it was given."""
        found = hashlib.sha256()
        for piece in self.pieces():
            found.update(piece.cpu().contiguous().view(torch.uint8).numpy().data)
        return found.hexdigest()

    def places(self, rows: range | np.ndarray) -> range | np.ndarray:
        """Where these rows stand in what the user gave, for messages."""
        return rows

    def resolution(self) -> float:
        """The relative spacing of the numbers as they were given, that of the first piece."""
        dtype = next(iter(self.pieces())).dtype
        return torch.finfo(dtype if dtype.is_floating_point else torch.float64).eps

    def are_probabilities(self, z: Float[Tensor, "rows columns"]) -> bool:
        """Whether every row is nonnegative and sums to 1, which rows of logits hardly ever do."""
        return bool((z.amin(1) >= 0).all() and ((z.sum(1) - 1).abs() <= SUM_TOLERANCE).all())

    def refuse_probabilities(self) -> DataError:
        """The error for probabilities given as logits."""
        return DataError(
            f"every row of {self.name} is nonnegative and sums to 1: these are probabilities, not "
            f"logits, and a softmax over them would be wrong; {advised().for_probabilities}"
        )


class ArrayLogits(Logits):
    """A numpy array, in memory or memory-mapped, of any real dtype, byte order and strides."""

    def __init__(self, array: np.ndarray, name: str = "X") -> None:
        self.array = array if array.ndim == 2 else array[:, None]
        self.name = name
        self.n_rows, self.n_columns = self.array.shape
        # Arrays whose memory torch can't read are converted a piece at a time.
        self.shared = shareable(self.array)

    def pieces(self) -> Iterator[Shaped[Tensor, "rows columns"]]:
        rows = self.n_rows if self.shared else max(1, CHUNK // self.n_columns)
        for first in range(0, self.n_rows, max(1, rows)):
            yield from_numpy(self.array[first : first + rows])

    def sample(self, size: int, seed: int) -> tuple[np.ndarray, Shaped[Tensor, "rows columns"]]:
        wanted = strata(self.n_rows, size, seed)
        return wanted, floats(from_numpy(self.array[wanted]))


class TensorLogits(Logits):
    """A torch tensor on any device; its chunks stay there."""

    def __init__(self, tensor: Tensor, name: str = "X") -> None:
        self.tensor = tensor.detach() if tensor.ndim == 2 else tensor.detach()[:, None]
        self.name = name
        self.device = tensor.device
        self.n_rows, self.n_columns = self.tensor.shape

    def pieces(self) -> Iterator[Shaped[Tensor, "rows columns"]]:
        yield self.tensor

    def sample(self, size: int, seed: int) -> tuple[np.ndarray, Shaped[Tensor, "rows columns"]]:
        wanted = strata(self.n_rows, size, seed)
        return wanted, floats(self.tensor[torch.as_tensor(wanted, device=self.device)])


class Part(Logits):
    """Some rows of another table: those where `keep` is true."""

    def __init__(self, whole: Logits, keep: np.ndarray) -> None:
        self.whole, self.keep = whole, keep
        self.name, self.device = whole.name, whole.device
        self.column_names = whole.column_names
        self.n_rows, self.n_columns = int(keep.sum()), whole.n_columns

    def pieces(self) -> Iterator[Shaped[Tensor, "rows columns"]]:
        for first, rows in self.whole.chunks():
            keep = torch.from_numpy(self.keep[first : first + len(rows)]).to(rows.device)
            yield rows[keep]

    def places(self, rows: range | np.ndarray) -> range | np.ndarray:
        return self.whole.places(np.flatnonzero(self.keep)[np.asarray(rows)])

    def resolution(self) -> float:
        return self.whole.resolution()


class Binary(Logits):
    """One score a row as the logits, or the probabilities, of two classes, 0 and 1.

    The log odds s of class 1 become the logits (0, s), so that softmax gives sigmoid(s/T); its
    probability p becomes (1 - p, p).
    """

    def __init__(self, scores: Logits, inputs: str) -> None:
        self.scores, self.inputs = scores, inputs
        self.name, self.device = scores.name, scores.device
        self.n_rows, self.n_columns = scores.n_rows, 2

    def pieces(self) -> Iterator[Shaped[Tensor, "rows columns"]]:
        for _, scores in self.scores.chunks():
            yield self._pairs(scores)

    def sample(self, size: int, seed: int) -> tuple[np.ndarray, Shaped[Tensor, "rows columns"]]:
        rows, scores = self.scores.sample(size, seed)
        return rows, self._pairs(scores)

    def places(self, rows: range | np.ndarray) -> range | np.ndarray:
        return self.scores.places(rows)

    def resolution(self) -> float:
        return self.scores.resolution()

    def are_probabilities(self, z: Float[Tensor, "rows columns"]) -> bool:
        p = z[:, 1]
        inside = bool(((p >= 0) & (p <= 1)).all())
        return inside and bool((p < 0.5).any()) and bool((p > 0.5).any())

    def refuse_probabilities(self) -> DataError:
        return DataError(
            f"every score of {self.name} lies between 0 and 1: these look like probabilities of "
            f"class 1, not like its log odds; {advised().for_probabilities}, or give log odds s "
            "as two columns, 0 and s"
        )

    def _pairs(self, scores: Float[Tensor, "rows 1"]) -> Float[Tensor, "rows 2"]:
        if self.inputs == "logits":
            return torch.cat([torch.zeros_like(scores), scores], 1)
        p = scores.double()  # 1 - p keeps the digits of p
        return torch.cat([1 - p, p], 1)


def agree_on_rows(logits: Logits, **columns: Any) -> None:
    """RankError where ranks that share a pass were given other logits, labels, weights, ..."""
    if here().size == 1:
        return
    here().agree({"shape of the logits": (logits.n_rows, logits.n_columns)})
    given = {"logits": logits.digest()}
    for name, values in columns.items():
        table = None if values is None else np.asarray(values)
        if table is not None and table.dtype.kind in "biuf":
            content = np.ascontiguousarray(table).tobytes()
        else:
            content = repr(None if table is None else table.tolist()).encode()
        given[name] = hashlib.sha256(content).hexdigest()
    here().agree({name: value[:16] for name, value in given.items()})


def strata(n_rows: int, size: int, seed: int) -> np.ndarray:
    """One row drawn from each of `size` equal strata, in order.

    Where rows are sorted by label, every label gets its share. A plain stride would do that too,
    but could coincide with a period in the rows.
    """
    if size >= n_rows:
        return np.arange(n_rows)
    edges = np.linspace(0, n_rows, size + 1).astype(np.int64)
    jitter = np.random.default_rng(seed).random(size)
    return edges[:-1] + (jitter * np.diff(edges)).astype(np.int64)


def floats(rows: Tensor) -> Tensor:
    """Rows as float32 (from half precision) or float64 (from integers); others as they are."""
    if rows.dtype in (torch.float32, torch.float64):
        return rows
    return rows.to(torch.float32 if rows.is_floating_point() else torch.float64)
