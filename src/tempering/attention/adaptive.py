"""Profiles with rules: one more temperature for every query, at every layer that has a rule."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tempering.attention.layout import AttentionLayer, Layout, layout
from tempering.attention.logits import Call, sliced_logits
from tempering.attention.profile import Profile
from tempering.attention.rules import LogLength, Rule, rule, split
from tempering.errors import ArchitectureError, ProfileError, RefusedError, ScheduleError
from tempering.schedules import schedule


def adaptive_profile(
    text: str,
    model: nn.Module | Layout,
    *,
    layers: Iterable[int] | None = None,
    stack: str | None = None,
    base: Profile | None = None,
) -> Profile:
    """A profile whose temperatures depend on the query, by a rule (see `attention.rules`).

    Parameters
    ----------
    text: "support(8)", "entropy(2)", "polynomial()", "log_length(2048)", ...; a held level may
        be a pattern over depth, "support(throb(12,3,2,12))". Bounds of T may follow it.
    model: the model, or its layout.
    layers, stack: restrict the rule to these; the others keep the temperature of `base`.
    base: temperatures that the logits are divided by first; T = 1 by default.

    Raises ProfileError for a text that is no rule, a level out of range, or layers that the
    model doesn't have; ArchitectureError where a rule can't be exact.
    """
    plan = model if isinstance(model, Layout) else layout(model)
    start = base if base is not None else Profile.neutral(model)
    if any(start.rules):
        raise RefusedError(
            f"{text} can't stand on a profile that has rules itself "
            f"({', '.join(sorted({item for item in start.rules if item}))})"
        )
    rows = start.resolve(plan)
    chosen = None if layers is None else set(layers)
    known = {layer.index for layer in plan.layers}
    if chosen is not None and (not chosen or chosen - known):
        wrong = ", ".join(str(item) for item in sorted(chosen - known)) or "(none)"
        raise ProfileError(f"layer {wrong}: the model has layers 0 to {max(known)} with a softmax")
    if stack is not None and stack not in plan.depths:
        raise ProfileError(f"this model has no stack '{stack}'; it has {', '.join(plan.depths)}")
    of_layer = _over_depth(text, plan)
    rules = [
        str(of_layer(layer))
        if (chosen is None or layer.index in chosen) and stack in (None, layer.stack)
        else None
        for layer in plan.layers
    ]
    for layer, item in zip(plan.layers, rules, strict=True):
        if item is not None:
            check_layer(layer)
    made = Profile._for(plan, rows, model, pattern=text if base is None else None)
    return replace(made, rules=tuple(rules))


def _over_depth(text: str, plan: Layout) -> Any:
    """layer -> Rule, for a text whose level may be a pattern over depth."""
    name, arguments = split(text)
    if not (arguments and "(" in arguments[0]):
        same = rule(text)
        return lambda layer: same
    try:
        pattern = schedule(arguments[0])
    except ScheduleError as error:
        raise ProfileError(
            f"'{text}': its level is neither a number nor a pattern: {error}"
        ) from None
    levels = {stack: pattern.sample(depth).tolist() for stack, depth in plan.depths.items()}

    def of_layer(layer: AttentionLayer) -> Rule:
        level = levels[layer.stack][layer.index]
        return rule(f"{name}({','.join([repr(level), *arguments[1:]])})")

    return of_layer


def check_layer(layer: AttentionLayer) -> None:
    """ArchitectureError where a temperature per query can't be exact."""
    if layer.route != "interface":
        raise ArchitectureError(
            f"{layer.name} has attention code of its own; rules need transformers' attention "
            "interface, which hands out queries and keys"
        )
    if "sinks" in layer.features:
        raise ArchitectureError(
            f"{layer.name} has sink logits shared by all queries, which a temperature per query "
            "can't reach"
        )


@dataclass
class RuleCount:
    """How often a rule acted, and how often T stood at one of its bounds."""

    rule: str
    queries: int = 0
    coldest: int = 0
    hottest: int = 0


class LayerRule:
    """What a tempered module asks for its inverse temperatures, query by query.

    texts: the rule of each row of the batch (or one for all); None where a row has none.
    """

    def __init__(self, module: nn.Module, state: Any, texts: Sequence[str | None]) -> None:
        self.module, self.state, self.texts = module, state, list(texts)
        self.rules = {text: rule(text) for text in texts if text is not None}
        self.counts = {text: RuleCount(text) for text in self.rules}

    @torch.compiler.disable
    def __call__(
        self, query: Tensor, key: Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> Float[Tensor, "batch heads q_seq 1"]:
        """beta of every query: the profile's times the rule's."""
        batch, heads, q_seq, _ = query.shape
        if len(self.texts) not in (1, batch):
            raise ProfileError(
                f"{len(self.texts)} profiles with rules were given for a batch of {batch} rows "
                f"(at {self.state.layer.name}); give one profile, or one for each row"
            )
        texts = self.texts * batch if len(self.texts) == 1 else self.texts
        own = self.state.beta.to(query.device)
        beta = own.new_ones(batch, heads, q_seq)
        for text, item in self.rules.items():
            rows = [index for index, other in enumerate(texts) if other == text]
            found = self._beta(item, self.counts[text], rows, query, key, mask, kwargs, own)
            place = torch.tensor(rows, device=query.device)
            beta = beta.index_copy(0, place, found.to(beta))
        return own * beta[..., None]

    def _beta(
        self,
        item: Rule,
        count: RuleCount,
        rows: list[int],
        query: Tensor,
        key: Tensor,
        mask: Any,
        kwargs: dict[str, Any],
        own: Tensor,
    ) -> Tensor:
        """[rows, heads, q_seq]"""
        heads, q_seq = query.shape[1:3]
        count.queries += len(rows) * heads * q_seq
        if isinstance(item, LogLength):
            call = Call.of(self.module, query, key, mask, kwargs)
            return item.of_counts(seen_keys(call)[rows]).expand(len(rows), heads, q_seq)
        parts = []
        for logits in sliced_logits(self.module, query, key, mask, kwargs):
            tempered = (logits * own.to(logits.dtype))[rows]
            beta, cold, hot = item.beta(tempered.flatten(0, 2))
            count.coldest += int(cold.sum())
            count.hottest += int(hot.sum())
            parts.append(beta.view(tempered.shape[:3]))
        return torch.cat(parts, dim=2)


def seen_keys(call: Call) -> Int[Tensor, "batch heads_or_1 q_seq"]:
    """How many keys each query sees."""
    batch, _, q_seq, _ = call.query.shape
    kv_seq, device = call.key.shape[2], call.query.device
    place = torch.arange(kv_seq, device=device)
    at = torch.arange(q_seq, device=device)[:, None]
    seen = torch.ones(1, 1, 1, kv_seq, dtype=torch.bool, device=device)
    if call.mask is not None:
        mask = call.mask[..., :kv_seq]
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    if not call.causal:
        return seen.sum(-1).expand(batch, -1, q_seq)
    if call.mask is None:
        within = (
            (at + 1).clamp(max=kv_seq)
            if call.window is None
            else (at + 1).clamp(max=min(call.window, kv_seq))
        )
        return within.view(1, 1, q_seq).expand(batch, 1, q_seq)
    shown = place <= at
    if call.window is not None:
        shown &= place > at - call.window
    return (seen & shown).sum(-1).expand(batch, -1, q_seq)


def check_attach(handle: Any, state: Any, texts: Sequence[str | None]) -> None:
    """Raise what `attach` would, and change nothing."""
    if all(text is None for text in texts):
        return
    check_layer(state.layer)
    if state.rule is not None and state.rule_owner is not handle:
        raise RefusedError(
            f"{state.layer.name} has a rule already ({', '.join(state.rule.counts)}); rules don't "
            "nest: remove the other handle first"
        )


def attach(handle: Any, module: nn.Module, state: Any, texts: Sequence[str | None]) -> None:
    """Give a tempered module its rules; RefusedError where another handle gave it some."""
    check_attach(handle, state, texts)
    if all(text is None for text in texts):
        detach(handle, state)
    else:
        state.rule, state.rule_owner = LayerRule(module, state, texts), handle


def detach(handle: Any, state: Any) -> None:
    """Take away the rules that a handle gave."""
    if state.rule_owner is handle:
        state.rule, state.rule_owner = None, None
