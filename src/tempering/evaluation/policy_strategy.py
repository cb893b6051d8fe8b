"""A policy by token as a way to spend k samples of one question."""

from __future__ import annotations

from tempering.agents.ladder import Rung, Strategy
from tempering.calls import CallNode
from tempering.tokens.grammar import GRAMMAR, parse_policy
from tempering.tokens.policy import ConstantPolicy


def policy_strategy(text: str, k: int) -> Strategy:
    """k samples under one policy; `constant(T)` is the sampling temperature T of every engine.

    Raises ScheduleError for a text that is no call at all; what only a tokenizer can tell is told
    by the engine's `check`.
    """
    return Strategy(text, (_rung(GRAMMAR.read(text), text),) * k)


def _rung(call: CallNode, text: str) -> Rung:
    if call.name == ConstantPolicy.name:
        made = parse_policy(text)
        if isinstance(made, ConstantPolicy):
            return Rung(float(made.T))
    return Rung(1.0, token_policy=text)
