"""The rows of a fit: chunked, centred, weighted, and added up over the ranks that hold them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import cached_property

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from tempering.errors import DataError

# A centred copy of at most this size is kept, because small fits pass over it hundreds of times.
_KEPT_BYTES = 32 * 2**20
# Work is in float64 where float32's rounding could move a log density by this much, in nats.
_ROUNDING = 1e-3
# Beyond these powers of two a unit, or its inverse, is no normal float32.
_SINGLE = (2.0**-120, 2.0**120)


class Rows:
    """Rows x [N, D] with weights, measured from a pivot in a unit; this rank's part of them.

    total: sum of the weights over all ranks; given: that of the weights as they were given, which
    may have been scaled since. count: rows over all ranks. pivot: [D] float64 in
    the data's units, numbers of the rows' own dtype; the weighted mean unless given. unit: a
    power of two, so that (x - pivot) / unit has the digits of x - pivot. group: True where
    torch.distributed holds the other parts, or None.
    """

    def __init__(
        self,
        values: Float[Tensor, "rows features"],
        weights: Float64[Tensor, " rows"] | None = None,
        group: bool | None = None,
        pivot: Float64[Tensor, " features"] | None = None,
        unit: float = 1.0,
    ) -> None:
        self.values = values
        self.group = group
        ones = torch.ones(len(values), dtype=torch.float64, device=values.device)
        self.weights = ones if weights is None else weights
        count = torch.tensor([float(len(values))], dtype=torch.float64, device=values.device)
        total, count = self.reduce([self.weights.sum().view(1), count])
        self.total, self.count = float(total), int(count)
        self.given = self.total
        self.pivot = self._mean() if pivot is None else pivot
        self.unit = unit
        self._kept: dict[torch.dtype, Tensor] = {}

    @cached_property
    def reach(self) -> float:
        """The largest |x - pivot|, in the unit, over all ranks."""
        reach = torch.zeros(1, dtype=torch.float64, device=self.device)
        for part, _ in self._parts():
            distance = torch.linalg.vector_norm(self.measured(part, torch.float64), dim=1)
            reach = torch.cat([reach, distance]).amax().view(1)  # a rank may have no row left
        return float(self.greatest(reach))

    def measured(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(x - pivot) / unit, rounded once."""
        origin = (-self.pivot / self.unit).to(dtype)
        return torch.add(origin, x.to(dtype), alpha=1 / self.unit)

    @property
    def features(self) -> int:
        """Columns."""
        return self.values.shape[1]

    @property
    def log_volume(self) -> float:
        """log of unit^D: what densities in the data's units are smaller by."""
        return self.features * math.log(self.unit)

    @property
    def device(self) -> torch.device:
        """Where the rows are, and where all work on them is done."""
        return self.values.device

    def working_dtype(self, whitener: Tensor, pull: float = 1.0) -> torch.dtype:
        """The rows' own dtype, or float64 where float32 would lose the distances.

        Distances are sums of terms as large as (reach / sigma)^2, with sigma the least standard
        deviation of a component; pull is the largest weight of one of them in the moments.
        """
        if self.values.dtype == torch.float64 or not _SINGLE[0] <= self.unit <= _SINGLE[1]:
            return torch.float64
        largest = float(whitener.abs().amax()) * self.reach
        rounding = torch.finfo(self.values.dtype).eps * largest * largest * max(pull, 1.0)
        return self.values.dtype if rounding < _ROUNDING else torch.float64

    def chunks(
        self, size: int, dtype: torch.dtype
    ) -> Iterator[tuple[Float[Tensor, "rows features"], Float64[Tensor, " rows"]]]:
        """((x - pivot) / unit, weights) of `size` rows at a time."""
        if self.values.numel() * dtype.itemsize <= _KEPT_BYTES:
            if dtype not in self._kept:
                self._kept[dtype] = self.measured(self.values, torch.float64).to(dtype)
            yield from zip(self._kept[dtype].split(size), self.weights.split(size))
            return
        for part, weight in zip(self.values.split(size), self.weights.split(size)):
            yield self.measured(part, dtype), weight

    def reduce(self, parts: list[Tensor]) -> list[Tensor]:
        """float64 tensors summed over the ranks, in one message."""
        if self.group is None:
            return parts
        flat = torch.cat([part.reshape(-1) for part in parts])
        torch.distributed.all_reduce(flat)
        pieces = flat.split([part.numel() for part in parts])
        return [piece.view(part.shape) for piece, part in zip(pieces, parts)]

    def sample(self, size: int) -> Rows:
        """At most `size` rows, evenly spread over the ranks' rows in rank order; the same on all.

        Their weights are enlarged to keep the total.
        """
        if self.count <= size and self.group is None:
            return self
        start = self._start()
        step = max(1.0, self.count / size)
        wanted = (torch.arange(min(size, self.count), dtype=torch.float64) * step).floor().long()
        mine = (wanted >= start) & (wanted < start + len(self.values))
        index = (wanted[mine] - start).to(self.device)
        values = torch.zeros(
            len(wanted), self.features + 1, dtype=torch.float64, device=self.device
        )
        values[mine.to(self.device), :-1] = self.values[index].double()
        values[mine.to(self.device), -1] = self.weights[index]
        (values,) = self.reduce([values])
        weights = values[:, -1] * (self.total / values[:, -1].sum())
        kept = values[:, :-1].to(self.values.dtype)
        return Rows(kept, weights, pivot=self.pivot, unit=self.unit)

    def alone(self) -> Rows:
        """This rank's rows by themselves."""
        mine = copy.copy(self)
        mine.group = None
        return mine

    def divide(self, share: float, generator: torch.Generator) -> tuple[Rows, Rows]:
        """(the rest, that share of the distinct rows), drawn by what is in a row.

        So equal rows stay together, and the draw is the same in any order and on any ranks.
        """
        keys = self._keys(generator)
        if self.group is None:
            everywhere = keys
        else:
            everywhere = torch.zeros(self.count, dtype=torch.int64, device=self.device)
            start = self._start()
            everywhere[start : start + len(keys)] = keys
            torch.distributed.all_reduce(everywhere)
        distinct = torch.unique(everywhere)
        few = round(share * len(distinct))
        if few == 0:
            raise DataError(
                f"X has {len(distinct)} distinct row(s), too few to hold out {share:.0%} of them; "
                "use criterion='bic', or none"
            )
        held = keys < distinct[few]
        return (
            Rows(self.values[~held], self.weights[~held], self.group, self.pivot, self.unit),
            Rows(self.values[held], self.weights[held], self.group, self.pivot, self.unit),
        )

    def _keys(self, generator: torch.Generator) -> Tensor:
        """A pseudo-random whole number for each row, from the bits of its numbers."""
        odd = 2 * torch.randint(2**62, (self.features,), generator=generator) + 1
        keys = torch.zeros(len(self.values), dtype=torch.int64, device=self.device)
        for column, factor in zip(self.values.T, odd.tolist()):
            bits = (column.double() + 0.0).view(torch.int64)  # + 0.0: -0.0 is 0.0
            # Both halves of a product are mixed: the low bits of round numbers are all 0.
            keys = (keys ^ bits) * factor
            keys = keys ^ (keys >> 32)
        return keys

    def _start(self) -> int:
        """The number of rows on the ranks before this one."""
        sizes = torch.zeros(self.ranks, dtype=torch.float64, device=self.device)
        sizes[self.rank] = len(self.values)
        return int(self.reduce([sizes])[0][: self.rank].sum())

    @property
    def rank(self) -> int:
        """Which part of the rows this is."""
        return 0 if self.group is None else torch.distributed.get_rank()

    @property
    def ranks(self) -> int:
        return 1 if self.group is None else torch.distributed.get_world_size()

    def _mean(self) -> Tensor:
        """The weighted mean, as numbers of the rows' own dtype."""
        first = torch.zeros(self.features, dtype=torch.float64, device=self.device)
        for part, weight in self._parts():
            first += weight @ part.double()
        (first,) = self.reduce([first])
        return (first / self.total).to(self.values.dtype).double()

    def greatest(self, value: Tensor) -> Tensor:
        """The largest of the ranks' values."""
        if self.group is not None:
            torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
        return value

    def _parts(self, size: int = 2**16) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.values.split(size), self.weights.split(size))
