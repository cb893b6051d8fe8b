"""What a softmax kept: entropy, support, peak and sink share, summed over queries per head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass
class Sums:
    """Sums over queries of the statistics of one layer's posteriors, per head, in float64.

    Logits x = -d/T are the finished logits of a softmax, masking as -inf. Per query:

        S = log Z - sum r (x - max x)             entropy, nats
        peak = max r                              1/keys..1
        sink = r of the first key (or of the learned sink logit, where the model has one)
        S without sink                            entropy of r renormalised over the other keys
        C = Var_r(x)                              heat capacity, nats

    queries: how many queries were summed; `others`: those that see more than the sink.
    """

    queries: Tensor
    others: Tensor
    entropy: Tensor
    peak: Tensor
    sink: Tensor
    entropy_without_sink: Tensor
    heat_capacity: Tensor

    @classmethod
    def zeros(cls, heads: int) -> Sums:
        """Nothing summed yet."""
        return cls(*(torch.zeros(heads, dtype=torch.float64) for _ in range(7)))

    def merge(self, other: Sums) -> None:
        """Add another sum over the same heads."""
        for name in self.__dataclass_fields__:
            getattr(self, name).add_(getattr(other, name))

    def add(self, logits: Float[Tensor, "batch heads queries keys"], sink: int = 0) -> None:
        """Add the posteriors of finished logits (float32 or wider; masked entries -inf)."""
        entropy, capacity, peak, share = posterior_statistics(logits, sink)
        rest = logits[..., 1:] if sink == 0 else logits[..., :-1]
        seen = torch.isfinite(rest).any(-1)
        without = posterior_statistics(rest, 0)[0] if rest.shape[-1] else torch.zeros_like(entropy)
        without = torch.where(seen, without, torch.zeros((), dtype=without.dtype))

        def total(values: Tensor) -> Tensor:
            return values.sum(dim=(0, 2), dtype=torch.float64).cpu()

        self.queries += logits.shape[0] * logits.shape[2]
        self.others += total(seen)
        self.entropy += total(entropy)
        self.heat_capacity += total(capacity)
        self.peak += total(peak)
        self.sink += total(share)
        self.entropy_without_sink += total(without)


def posterior_statistics(
    logits: Float[Tensor, "*batch keys"], sink: int = 0
) -> tuple[
    Float[Tensor, "*batch"],
    Float[Tensor, "*batch"],
    Float[Tensor, "*batch"],
    Float[Tensor, "*batch"],
]:
    """Entropy, heat capacity, peak and the share of key `sink` of softmax(logits).

    A row without a finite logit gives zeros.
    """
    top = logits.amax(-1, keepdim=True)
    top = torch.where(torch.isfinite(top), top, torch.zeros((), dtype=top.dtype, device=top.device))
    x = logits - top
    weights = x.exp()
    norm = weights.sum(-1, keepdim=True)
    weights = weights / norm.clamp(min=torch.finfo(norm.dtype).tiny)
    x = x.masked_fill(x == float("-inf"), 0.0)
    weighted = weights * x
    mean = weighted.sum(-1)
    entropy = torch.where(norm[..., 0] > 0, norm[..., 0].log() - mean, torch.zeros_like(mean))
    capacity = (weighted * x).sum(-1) - mean.square()
    return entropy.clamp(min=0), capacity.clamp(min=0), weights.amax(-1), weights[..., sink]
