"""The order of a policy among transformers' own processors, and what may not be used with it."""

from __future__ import annotations

from typing import Any

from tempering.calls import number_text
from tempering.errors import InputError, RefusedError
from tempering.tokens.policy import Policy
from tempering.tokens.sampler import check_given, orders_of, stated_settings
from tempering.tokens.settings import SETTINGS, TRUNCATIONS, RequestSettings, settings_of
from tempering.tokens.token_state import NOTHING_GIVEN

# generate()'s order; a field that is None or has the value given here is off.
# Source: transformers 5.23, GenerationMixin._get_logits_processor.
_BEFORE: dict[str, Any] = {
    "guidance_scale": 1,
    "sequence_bias": None,
    "encoder_repetition_penalty": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "remove_invalid_values": False,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
_AFTER: dict[str, Any] = {
    "top_h": None,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
_LAST: dict[str, Any] = {"watermarking_config": None, "renormalize_logits": False}


def effective_order(generation_config: Any, policy: Policy) -> tuple[str, ...]:
    """What generate() does to the logits, in order, with a policy among its processors.

    transformers runs its penalties and constraints, then custom processors (the policy), then
    top-k, top-p, min-p and the like, which therefore see the tempered posterior.

    A policy that truncates takes temperature, top_p, top_k and min_p over, in its own order; a
    setting that it states nowhere is the config's.

    Parameters
    ----------
    generation_config: a `GenerationConfig`; fields left None get generate()'s own defaults,
        among them top_k = 50.
    policy: the one given to generate() as `TemperingLogitsProcessor(policy, tokenizer)`.

    Returns
    -------
    E.g. ("repetition_penalty=1.1", "support(12)", "top_k=50", "sample").

    Raises
    ------
    RefusedError: a second temperature; greedy decoding, where no temperature changes anything;
    a ladder in beams. InputError: a ladder without its n samples of each prompt; a setting that
    both the policy and the config give.
    """
    values = _Values(generation_config)
    sampling, beams = bool(values("do_sample")), int(values("num_beams") or 1)
    _check(policy, values, sampling, beams)
    given = taken_settings(generation_config, policy)
    after = dict(_AFTER)
    steps = [str(policy)]
    if policy.truncates:
        after = {name: off for name, off in _AFTER.items() if name not in TRUNCATIONS}
        steps = _policy_steps(policy, given)
    warpers = values.active(after) if sampling else []
    end = ("sample" if sampling else "top") + (f" of {beams} beams" if beams > 1 else "")
    return (*values.active(_BEFORE), *steps, *warpers, *values.active(_LAST), end)


def taken_settings(generation_config: Any, policy: Policy) -> RequestSettings:
    """The settings of a generation config that a policy takes over: none unless it truncates.

    Raises InputError or RefusedError where both give one. A top_k of 50, which generate() has of
    itself, counts as not given where the policy states another.
    """
    values = _Values(generation_config)
    if not (policy.truncates and values("do_sample")):
        return NOTHING_GIVEN
    own = {name: values(name) for name in SETTINGS}
    chosen = dict(own)
    if "top_k" in stated_settings(policy) and own["top_k"] == values.defaults.get("top_k"):
        chosen["top_k"] = 0
    check_given(policy, settings_of(chosen), "the generation config")
    return settings_of(own)


class _Values:
    """The values of a generation config; those left None are generate()'s own defaults."""

    def __init__(self, generation_config: Any) -> None:
        self.config = generation_config
        self.defaults: dict[str, Any] = generation_config._get_default_generation_params()

    def __call__(self, name: str) -> Any:
        given = getattr(self.config, name, None)
        return self.defaults.get(name) if given is None else given

    def active(self, fields: dict[str, Any]) -> list[str]:
        return [
            f"{name}={self(name)}"
            for name, off in fields.items()
            if self(name) is not None and self(name) != off
        ]


def _policy_steps(policy: Policy, given: RequestSettings) -> list[str]:
    """What a policy that truncates does, in order; in one step where its phases differ in that."""
    orders, stated, active = orders_of(policy), stated_settings(policy), given.active()
    if len(orders) > 1:
        rest = [f"{n}={number_text(v)}" for n, v in active.items() if n not in stated]
        return [f"{policy} with {', '.join(rest)}" if rest else str(policy)]
    steps = []
    for name in orders.pop():
        if name == "temperature":
            own = name not in stated and name in active
            steps.append(f"{policy} at {number_text(active[name])}" if own else str(policy))
        elif name in stated:
            steps.append(f"{name} of the policy")
        elif name in active:
            steps.append(f"{name}={number_text(active[name])}")
    return steps


def _check(policy: Policy, value: _Values, sampling: bool, beams: int) -> None:
    temperature = value("temperature")
    if sampling and temperature != 1 and "temperature" in stated_settings(policy):
        raise RefusedError(
            f"two temperatures: the policy {policy}, then temperature={temperature} of the "
            "generation config, which divides the logits again; give generate(temperature=1.0)"
        )
    if not sampling and beams == 1:
        raise RefusedError(
            "do_sample=False takes the likeliest token, which is the same at every temperature; "
            "give generate(do_sample=True), with constant(0) for the likeliest token"
        )
    if (policy.truncates or policy.forces) and sampling and beams > 1:
        raise RefusedError(
            f"{policy} may leave a single token, but beam sampling needs two of each beam or more; "
            "give num_beams=1"
        )
    n, rows = policy.samples, int(value("num_return_sequences") or 1)
    if n is not None and beams > 1:
        raise RefusedError(
            f"{policy} gives each row a temperature, but beam search moves histories between "
            "rows; give num_beams=1"
        )
    if n is not None and rows % n:
        raise InputError(
            f"{policy} has a temperature for each of {n} samples of a prompt, but "
            f"num_return_sequences={rows}; give num_return_sequences={n}"
        )
