"""What the heads of a model kept of their keys: entropies, supports, distances."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tempering.attention.control.layer_rule import RuleCount
from tempering.attention.layout import AttentionLayer
from tempering.intervals import t_quantile

QUANTITIES = (
    "entropy",
    "support",
    "support_without_sink",
    "support_simpson",
    "peak",
    "sink_share",
    "mean_energy",
    "heat_capacity",
    "saturation",
    "distance",
    "distance_without_sink",
)


class PartSupport(NamedTuple):
    """The mean support of a part of a model: exp of its mean entropy, and the interval of that.

    unit: of distances, which are NaN in cross attention. layers: how many it has.
    """

    layers: int
    unit: str
    support: float
    low: float
    high: float
    distance: float
    distance_without_sink: float


@dataclass(frozen=True, eq=False)
class Measurement:
    """What the heads of a model kept of their keys on a text, images or sound; means over queries.

    All tensors are Float[Tensor, "layers heads"] (float64, NaN where a layer has fewer heads).

    entropy: mean of S, nats. support: exp(mean S), keys.
    support_without_sink: the same for the posterior renormalised over all keys but the sink
        (the first key, or the learned sink logit where the architecture has one).
    support_simpson: exp(mean of -log sum r^2), keys; at most `support` for each query.
    peak: mean of max r. sink_share: mean r of the sink.
    mean_energy: mean U/T = -mean sum r x for logits x, nats. heat_capacity: mean Var_r(d)/T^2.
    saturation: mean of 1 - sum r^2, the trace of the softmax's Jacobian: near 0 it is saturated.
    distance: mean of sum r |i - j|, tokens between a query and the keys it attends to;
        distance_without_sink: the same with the sink left out. units: for each layer what is
        counted: "tokens", "frames" of sound, or "patches" of an image, whose distance is that of
        their rows and columns, over patches alone (see `places.py`).
    entropy_by_chunk: Float[Tensor, "chunks layers heads"], for intervals.
    by_position: each quantity as Float[Tensor, "layers heads buckets"] over equal parts of the
        queries' positions; positions: the first and last of each part, where there are the most
        queries.
    rules: for each layer with rules of the profile, how often they acted and T met its bounds.

    Where keys are not the tokens of the queries, in their order (cross attention; windows, blocks
    and compressed keys), distances are NaN; but for cross attention, so is what the first key
    would be the sink of.
    """

    layers: tuple[AttentionLayer, ...]
    entropy: Tensor
    support: Tensor
    support_without_sink: Tensor
    support_simpson: Tensor
    peak: Tensor
    sink_share: Tensor
    mean_energy: Tensor
    heat_capacity: Tensor
    saturation: Tensor
    distance: Tensor
    distance_without_sink: Tensor
    entropy_by_chunk: Tensor
    chunk_length: int
    by_position: dict[str, Tensor]
    positions: tuple[tuple[int, int], ...]
    units: tuple[str, ...] = ()
    rules: dict[str, list[RuleCount]] = field(default_factory=dict)

    @property
    def layer_support(self) -> Float[Tensor, "layers"]:
        """exp of the mean entropy over heads and queries: the support of each layer, keys."""
        return self.entropy.nanmean(dim=1).exp()

    @property
    def layer_support_without_sink(self) -> Float[Tensor, "layers"]:
        """The same with the sink left out."""
        return self.support_without_sink.log().nanmean(dim=1).exp()

    @property
    def layer_interval(self) -> Float[Tensor, "layers 2"]:
        """95% interval of `layer_support` over chunks (Student t); NaN with a single chunk."""
        means = self.entropy_by_chunk.nanmean(dim=2)
        half = torch.tensor([_half_interval(layer) for layer in means.T], dtype=torch.float64)
        middle = means.mean(dim=0)
        return torch.stack([middle - half, middle + half], dim=1).exp()

    def parts(self) -> dict[str, PartSupport]:
        """The support of each part of the model: encoder, decoder and cross, tower by tower.

        exp of the mean entropy over the heads and queries of its layers, with a 95% interval over
        chunks (Student t; NaN with a single one).
        """
        found = {}
        for part in dict.fromkeys(layer.part for layer in self.layers):
            of_part = [i for i, layer in enumerate(self.layers) if layer.part == part]
            entropy = self.entropy_by_chunk[:, of_part].flatten(1).nanmean(dim=1)
            middle, half = float(entropy.mean()), _half_interval(entropy)
            found[part] = PartSupport(
                layers=len(of_part),
                unit=self.units[of_part[0]] if self.units else "tokens",
                support=math.exp(middle),
                low=math.exp(middle - half),
                high=math.exp(middle + half),
                distance=float(self.distance[of_part].nanmean()),
                distance_without_sink=float(self.distance_without_sink[of_part].nanmean()),
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """Names, matrices and layer means, for a record."""
        return {
            "layers": [layer.name for layer in self.layers],
            "chunks": len(self.entropy_by_chunk),
            "chunk_length": self.chunk_length,
            "parts": {name: found._asdict() for name, found in self.parts().items()},
            "layer_support": self.layer_support.tolist(),
            "layer_support_without_sink": self.layer_support_without_sink.tolist(),
            **{name: getattr(self, name).tolist() for name in QUANTITIES},
        }


def _half_interval(values: Float[Tensor, "chunks"]) -> float:
    """Half of a 95% interval of the mean (Student t); NaN with a single value."""
    if len(values) < 2:
        return math.nan
    return t_quantile(len(values) - 1) * float(values.std()) / math.sqrt(len(values))
