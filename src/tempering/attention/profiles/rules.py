"""Temperatures that depend on the query: the text form of all rules.

A rule answers for every query with one more inverse temperature beta, by which the profile's is
multiplied; its softmax becomes softmax(beta * logits). Some read the logits of the query, as the
profile's temperature left them (`query_rules`):

    support(N)         the T with exp(S) = N: N keys stay alive for every query
    entropy(S)         the same in nats
    polynomial(c..)    beta = max(1, c_k S^k + .. + c_0) where the entropy S > 0.5, else 1

and some count the keys that the query sees (`length_rules`): power(b, n0), log_length(n0),
root_log_length(n0), ssmax(s), affine(a, b), log_steps(a, step, shift), x|instead_of(y).

A held level that no temperature reaches (three keys can't have a support of 12) is held at the
nearest that the rule's bounds allow: T goes to the bound, and such queries are counted.

A new rule is a class of one of these files: its `name`, its fields and what it answers are all that
the text form, profiles and attention need.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

from tempering.attention.profiles import length_rules, query_rules
from tempering.attention.profiles.rule_base import GRAMMAR, KNOWN, PerHead, Rule
from tempering.calls import CallNode
from tempering.errors import ProfileError

__all__ = ["GRAMMAR", "KNOWN", "PerHead", "Rule", "check_rules", "is_rule", "rule", "rule_of"]
_KINDS = (length_rules, query_rules)  # their classes fill KNOWN, in the order of their imports
for _name in sorted(KNOWN):
    KNOWN[_name] = KNOWN.pop(_name)


def rule(text: str) -> Rule:
    """Read one rule, e.g. "support(8)", "entropy(2,0.5,2)", "polynomial()", "power(-0.05,2048)".

    Raises ProfileError: names the column, with a caret under it, and says what was expected.
    """
    return rule_of(GRAMMAR.read(text))


def rule_of(call: CallNode) -> Rule:
    """The rule that a call of a text makes; `rule` is for whole texts."""
    kind = KNOWN.get(call.name)
    if kind is None:
        raise call.unknown(KNOWN, "rule")
    return kind.of(call)


def is_rule(text: str) -> bool:
    """Whether a text names a rule rather than a pattern of temperatures."""
    found = re.match(r"\s*(\w+)\s*\(", text)
    return found is not None and found[1] in KNOWN


def check_rules(rules: Sequence[Rule | None], rows: Sequence[Tensor]) -> None:
    """ProfileError unless there is a rule, or None, for each row, with numbers for its heads."""
    if len(rules) != len(rows):
        raise ProfileError(
            f"{len(rules)} rules were given for {len(rows)} layers; give one, or None, each"
        )
    for place, (item, row) in enumerate(zip(rules, rows, strict=True)):
        if not isinstance(item, Rule | None):
            raise ProfileError(
                f"a profile's rules are rules or None, not {item!r:.60}; "
                "adaptive_profile(text, model) reads their text"
            )
        if item is not None and item.heads is not None and len(row) not in (1, item.heads):
            raise ProfileError(
                f"layer {place} has {len(row)} heads, and {item.label} has numbers for {item.heads}"
            )
