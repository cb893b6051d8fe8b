"""Temperatures that depend on how many keys a token sees, in vLLM's attention layers.

Before each step, beta of every token, layer and head is computed from the token's position (prefix
caches and chunked prefill change which tokens a step has, not where they stand) and written into
one table. In the pass, every layer multiplies its queries by its part of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from tempering.attention.profiles.law_tables import cut_rule, stacked
from tempering.attention.profiles.length_base import LengthRule
from tempering.attention.profiles.length_limits import check_lengths
from tempering.attention.profiles.length_rules import InsteadOf
from tempering.attention.profiles.profile import Profile
from tempering.attention.profiles.rule_base import Rule
from tempering.engines.vllm.layer_betas import RankLayer, layer_betas, layer_rules
from tempering.engines.vllm.profile_rows import RequestProfiles
from tempering.errors import ArchitectureError, RefusedError

_UNBOUNDED = 2**31  # keys that a layer without a window sees at most


class Laws(NamedTuple):
    """One profile, ready for use.

    constants: Float[Tensor, "layers heads"] (float64), 1/T of the profile. betas: n -> the rules'
    beta, [tokens, layers, heads]; None without rules.
    """

    constants: Tensor
    betas: Callable[[Tensor], Tensor] | None


class LengthTable:
    """beta of every token of a step in every layer, and the profiles that it is computed from.

    Parameters
    ----------
    layers: vLLM's attention layers in this worker, of equally many heads.
    buffer: the name under which a layer holds its part of the table.
    most: tokens of a step at most.
    """

    def __init__(self, layers: Sequence[Any], buffer: str, most: int) -> None:
        counts = {layer.num_heads for layer in layers}
        if len(counts) != 1:
            raise ArchitectureError(
                f"layers with {', '.join(map(str, sorted(counts)))} heads can't share a table of "
                "temperatures by length; give a profile without rules"
            )
        self.layers, (self.heads,) = list(layers), counts
        self.device = getattr(layers[0], buffer).device
        self.table = torch.ones(len(layers), most, self.heads, device=self.device)
        for layer, part in zip(layers, self.table, strict=True):
            setattr(layer, buffer, part)
        windows = [getattr(layer, "sliding_window", None) for layer in layers]
        self._windows = torch.tensor(
            [window or _UNBOUNDED for window in windows], device=self.device
        )
        self._rows: dict[int, Laws] = {}

    def prepared(
        self, profile: Profile | None, slots: Sequence[RankLayer], longest: int, depth: int | None
    ) -> Laws:
        """A profile for these layers, checked against their shape; nothing is written yet.

        longest: tokens that a request may have. Raises ProfileError where a rule's T leaves
        attention's limits within them.
        """
        if profile is None:
            return Laws(torch.ones(1, 1, dtype=torch.float64, device=self.device), None)
        betas = layer_betas(profile, slots, depth=depth)
        constants = torch.stack(betas).double().to(self.device)
        given = layer_rules(profile, slots, depth=depth)
        rules = [
            None if item is None else _checked(item, layer, slot, longest, own)
            for item, layer, slot, own in zip(given, self.layers, slots, betas, strict=True)
        ]
        law = stacked(rules, self.heads, self.device) if any(rules) else None
        return Laws(constants, law)

    def set(self, row: int, laws: Laws) -> None:
        """Use a prepared profile for the requests of a row."""
        self._rows[row] = laws

    def write(
        self, tokens: Tensor | slice, positions: Int[Tensor, "tokens"], row: int, room: float
    ) -> None:
        """Compute beta ** room for some tokens of a step, under the profile of a row."""
        laws = self._rows[row]
        beta = laws.constants[None].expand(len(positions), len(self.layers), self.heads)
        if laws.betas is not None:
            # A query sees itself and what stands before it, as far as its layer's window reaches.
            beta = beta * laws.betas(torch.minimum(positions[:, None] + 1, self._windows[None]))
        if room != 1:
            beta = beta**room
        self.table[:, tokens] = beta.transpose(0, 1).float()


def _checked(item: Rule, layer: Any, slot: RankLayer, longest: int, beta: Tensor) -> LengthRule:
    """The rule for this rank's heads; an error that names the layer where it can't be exact.

    beta: 1/T of these heads in the profile.
    """
    if not isinstance(item, LengthRule):
        raise RefusedError(
            f"this profile has the rule {item.label}: vLLM takes temperatures that are numbers, "
            "and rules of length; use the transformers engine"
        )
    if isinstance(item, InsteadOf):
        raise RefusedError(
            f"{item.label}: vLLM's model files apply the law of the model in their own code, so it "
            "can't be replaced there; use the transformers engine"
        )
    if type(layer).__name__ != "Attention":
        raise ArchitectureError(
            f"{slot.name} is a {type(layer).__name__}, of which it isn't known how many keys a "
            f"query sees, so {item.label} can't be exact; use the transformers engine"
        )
    check_lengths(item, longest, slot.name, slot.heads * slot.ranks)
    own = cut_rule(item, slot.rank * slot.heads, (slot.rank + 1) * slot.heads)
    check_lengths(own, longest, slot.name, slot.heads, beta[None])
    return own


class LengthProfiles(RequestProfiles):
    """`RequestProfiles` for an engine with a table: computed when positions are known."""

    def __init__(self, rows: Mapping[str, int], table: LengthTable) -> None:
        super().__init__(rows)
        self._table = table
        self._batch: tuple[Sequence[str], Sequence[int]] = ([], [])

    def fill(self, request_ids: Sequence[str], counts: Sequence[int]) -> None:
        self._batch = request_ids, counts

    def at(self, positions: Int[Tensor, "tokens_and_padding"]) -> None:
        request_ids, counts = self._batch
        total = int(sum(int(count) for count in counts))
        positions = positions[:total]
        places = [self._place_of[request_id] for request_id in request_ids]
        wanted = set(places)
        if len(wanted) == 1:
            self._table.write(slice(0, total), positions, *wanted.pop())
            return
        names = list(wanted)
        lengths = torch.tensor([int(count) for count in counts])
        which = torch.tensor([names.index(place) for place in places]).repeat_interleave(lengths)
        for number, place in enumerate(names):
            tokens = (which == number).nonzero()[:, 0].to(positions.device)
            self._table.write(tokens, positions[tokens], *place)
