"""Profiles with rules: one more temperature for every query, at every layer that has a rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tempering.attention.examining.masking import MASKED
from tempering.attention.hooks.temperature_state import TemperatureState
from tempering.attention.layout import AttentionLayer
from tempering.attention.logits import AttentionCall, sliced_logits
from tempering.attention.profiles.adaptive import check_layer
from tempering.attention.profiles.length_base import LengthRule
from tempering.attention.profiles.length_limits import check_lengths
from tempering.attention.profiles.length_rules import InsteadOf, LogSteps
from tempering.attention.profiles.query_rules import QueryRule
from tempering.attention.profiles.rules import Rule
from tempering.attention.visibility import visible
from tempering.errors import ArchitectureError, ProfileError, RefusedError


@dataclass
class RuleCount:
    """How often a rule acted, and how often T stood at one of its bounds."""

    rule: str
    queries: int = 0
    coldest: int = 0
    hottest: int = 0


def context_of(module: nn.Module) -> int:
    """Tokens that a model's configuration allows for; 1 where it says nothing."""
    config = getattr(module, "config", None)
    longest = getattr(config, "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else 1


class LayerRule:
    """What a tempered module asks for its inverse temperatures, query by query.

    rules: the rule of each row of the batch (or one for all); None where a row has none.
    """

    def __init__(
        self, module: nn.Module, layer: AttentionLayer, rules: Sequence[Rule | None]
    ) -> None:
        self.module, self.name, self.rules = module, layer.name, list(rules)
        self.counts = {item: RuleCount(item.label) for item in rules if item is not None}
        self._checked: dict[LengthRule, tuple[int, Tensor, int]] = {}  # keys, and the beta seen
        for item in self.counts:
            if isinstance(item, LengthRule):
                check_lengths(item, context_of(module), self.name, layer.heads)

    def join(self, state: TemperatureState, owner: int) -> None:
        """Become the rule of a state; RefusedError where another handle's is."""
        check_attach(owner, state, self.rules)
        state.rule, state.rule_owner = self, owner

    @torch.compiler.disable
    def __call__(
        self, state: TemperatureState, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> Float[Tensor, "batch heads q_seq 1"]:
        """beta of every query: the profile's times the rule's."""
        call: AttentionCall | None = None

        def of_rule(
            rule: Rule, count: RuleCount, rows: list[int], of_profile: Tensor
        ) -> Float[Tensor, "rows heads_or_1 q_seq"]:
            nonlocal call
            if isinstance(rule, LengthRule):
                call = call or AttentionCall.of(self.module, query, key, mask, kwargs)
                self._check_length(rule, key.shape[2], state.beta)
                places = None
                if isinstance(rule, InsteadOf):
                    places = self._places(rule.own, call, kwargs)[rows]
                seen = seen_keys(call)[rows]
                return self._of_length(rule, count, query.shape, seen, places)
            assert isinstance(rule, QueryRule)
            parts = []
            for logits in sliced_logits(self.module, query, key, mask, kwargs):
                tempered = (logits * of_profile.to(logits.dtype))[rows]
                beta, cold, hot = rule.beta(tempered.flatten(0, 2))
                count.coldest += int(cold.sum())
                count.hottest += int(hot.sum())
                parts.append(beta.view(tempered.shape[:3]))
            return torch.cat(parts, dim=2)

        return self._beta(state, query.shape[:3], query.device, of_rule)

    @torch.compiler.disable
    def of_seen(
        self, state: TemperatureState, seen: Int[Tensor, "batch heads q_seq"]
    ) -> Float[Tensor, "batch heads q_seq 1"]:
        """beta of every query that sees so many keys, for rules that count them."""

        def of_rule(rule: Rule, count: RuleCount, rows: list[int], of_profile: Tensor) -> Tensor:
            assert isinstance(rule, LengthRule), "check_layer lets no other here"
            self._check_length(rule, int(seen.max()), state.beta)
            return self._of_length(rule, count, seen.shape, seen[rows])

        return self._beta(state, seen.shape, seen.device, of_rule)

    def _beta(
        self,
        state: TemperatureState,
        shape: torch.Size,
        device: torch.device,
        of_rule: Callable[[Rule, RuleCount, list[int], Tensor], Tensor],
    ) -> Float[Tensor, "batch heads q_seq 1"]:
        """beta of the profile times that of the rule of each row."""
        batch, heads, q_seq = shape
        if len(self.rules) not in (1, batch):
            raise ProfileError(
                f"{len(self.rules)} profiles with rules were given for a batch of {batch} rows "
                f"(at {state.layer.name}); give one profile, or one for each row"
            )
        rules = self.rules * batch if len(self.rules) == 1 else self.rules
        of_profile = state.beta.to(device)
        beta = of_profile.new_ones(shape)
        for rule, count in self.counts.items():
            rows = [index for index, other in enumerate(rules) if other == rule]
            count.queries += len(rows) * heads * q_seq
            found = of_rule(rule, count, rows, of_profile).expand(len(rows), heads, q_seq)
            index = torch.tensor(rows, device=device)
            beta = beta.index_copy(0, index, found.to(beta))
        return of_profile * beta[..., None]

    def _places(
        self, own: LengthRule, call: AttentionCall, kwargs: dict[str, Any]
    ) -> Int[Tensor, "batch heads_or_1 q_seq"]:
        """The places of the queries, counted from 1, as the layer's own law reads them."""
        if not (isinstance(own, LogSteps) and own.shift):
            return last_keys(call)
        positions = kwargs.get("position_ids")
        batch, _, q_seq, _ = call.query.shape
        if not isinstance(positions, Tensor) or positions.shape[-1] != q_seq:
            raise ArchitectureError(
                f"{self.name} does not pass on the position ids that its own law {own} reads, so "
                "the law can't be replaced"
            )
        return (positions[:, None] + 1).expand(batch, 1, q_seq)

    def _check_length(
        self, rule: LengthRule, keys: int, beta: Float[Tensor, "rows heads 1 1"]
    ) -> None:
        """ProfileError where the profile's T times the rule's leaves attention's limits.

        beta: the profile's, changed in place by other handles. It is looked at where keys are more
        than ever before, and where it has changed.
        """
        if not rule.numbers:  # a law that is being learned, and keeps bounds of its own
            return
        most, known, version = self._checked.get(rule, (0, None, 0))
        if keys > most or known is not beta or version != beta._version:
            keys = max(keys, most, context_of(self.module))
            check_lengths(rule, keys, self.name, beta.shape[1], beta[..., 0, 0])
            self._checked[rule] = keys, beta, beta._version

    def _of_length(
        self,
        rule: LengthRule,
        count: RuleCount,
        shape: torch.Size,
        seen: Int[Tensor, "rows heads_or_1 q_seq"],
        places: Tensor | None = None,
    ) -> Float[Tensor, "rows heads q_seq"]:
        """A law's beta for some rows, whose queries at its bounds are counted."""
        beta = rule.of_counts(seen, places)
        coldest, hottest = rule.at_bounds(beta)
        share = len(seen) * shape[1] * shape[2] // beta.numel()
        count.coldest += coldest * share
        count.hottest += hottest * share
        return beta


def seen_keys(call: AttentionCall) -> Int[Tensor, "batch heads_or_1 q_seq"]:
    """How many keys each query sees."""
    batch, _, q_seq, _ = call.query.shape
    kv_seq, device = call.key.shape[2], call.query.device
    seen = torch.ones(1, 1, 1, kv_seq, dtype=torch.bool, device=device)
    if call.mask is not None:
        mask = call.mask[..., :kv_seq]
        seen = _shown(mask)
    if not call.causal:
        return seen.sum(-1).expand(batch, -1, q_seq)
    if call.mask is None:  # counted without a table of queries and keys
        most = kv_seq if call.window is None else min(call.window, kv_seq)
        count = torch.arange(1, q_seq + 1, device=device).clamp(max=most)
        return count.expand(batch, 1, q_seq)
    near = visible(range(q_seq), range(kv_seq), causal=True, window=call.window, device=device)
    return (seen & near).sum(-1).expand(batch, -1, q_seq)


def last_keys(call: AttentionCall) -> Int[Tensor, "batch heads_or_1 q_seq"]:
    """The place of the last key that each query sees, counted from 1; padding counts too."""
    batch, _, q_seq, _ = call.query.shape
    kv_seq, device = call.key.shape[2], call.query.device
    if call.mask is None:
        at = torch.arange(1, q_seq + 1, device=device) + (0 if call.causal else kv_seq - q_seq)
        return at.expand(batch, 1, q_seq)
    mask = call.mask[..., :kv_seq]
    seen = _shown(mask)
    if call.causal:
        seen = seen & visible(range(q_seq), range(kv_seq), causal=True, device=device)
    key = torch.arange(1, kv_seq + 1, device=device)
    return (seen * key).amax(-1).expand(batch, -1, q_seq)


def _shown(mask: Tensor) -> Bool[Tensor, "..."]:
    """Where a mask hides nothing; some models hide by -1e4 or -1e9."""
    return mask if mask.dtype == torch.bool else mask > MASKED


def check_attach(owner: int, state: TemperatureState, rules: Sequence[Rule | None]) -> None:
    """Raise what `LayerRule.join` would, and change nothing. owner: the number of a hold."""
    kinds = [item for item in rules if item is not None]
    if not kinds:
        return
    for item in kinds:
        check_layer(state.layer, item)
    if state.rule is not None and state.rule_owner != owner:
        known = ", ".join(map(str, getattr(state.rule, "counts", ())))
        raise RefusedError(
            f"{state.layer.name} has a rule already ({known}); rules don't nest: remove the other "
            "handle first"
        )


def layer_rule(
    module: nn.Module, layer: AttentionLayer, rules: Sequence[Rule | None]
) -> LayerRule | None:
    """The rule of a module, if a row of the batch has one."""
    return None if all(item is None for item in rules) else LayerRule(module, layer, rules)
