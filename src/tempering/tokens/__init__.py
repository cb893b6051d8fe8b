"""Scale 3, tokens: a policy says the temperature of the next token; engines apply it.

The core, `temper_logits(policy, logits, states)`, knows no engine; its states are made from token
ids by `policy.state(prompt, generated)`. Importing this package imports torch; transformers is
imported on first use of `TemperingLogitsProcessor`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tempering.tokens.applying import temper_logits
from tempering.tokens.engine_check import check_engine
from tempering.tokens.grammar import POLICIES, parse_policy
from tempering.tokens.policy import Policy
from tempering.tokens.processor_order import effective_order
from tempering.tokens.request import policy_from_request
from tempering.tokens.settings import RequestSettings
from tempering.tokens.token_state import TokenState
from tempering.tokens.trace import Trace, TraceRow

if TYPE_CHECKING:
    from tempering.tokens.processor import TemperingLogitsProcessor

__all__ = [
    "POLICIES",
    "Policy",
    "RequestSettings",
    "TemperingLogitsProcessor",
    "TokenState",
    "Trace",
    "TraceRow",
    "check_engine",
    "effective_order",
    "parse_policy",
    "policy_from_request",
    "temper_logits",
]


def __getattr__(name: str) -> object:
    if name == "TemperingLogitsProcessor":
        from tempering.tokens.processor import TemperingLogitsProcessor

        return TemperingLogitsProcessor
    raise AttributeError(f"module 'tempering.tokens' has no attribute {name!r}")
