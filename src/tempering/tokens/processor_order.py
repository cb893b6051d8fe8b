"""The order of a policy among transformers' own processors, and what may not be used with it."""

from __future__ import annotations

from typing import Any

from tempering.errors import InputError, RefusedError
from tempering.tokens.policy import Policy

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
    a ladder in beams. InputError: a ladder without its n samples of each prompt.
    """
    defaults = generation_config._get_default_generation_params()

    def value(name: str) -> Any:
        given = getattr(generation_config, name, None)
        return defaults.get(name) if given is None else given

    sampling, beams = bool(value("do_sample")), int(value("num_beams") or 1)
    _check(policy, value, sampling, beams)

    def active(fields: dict[str, Any]) -> list[str]:
        return [
            f"{name}={value(name)}"
            for name, off in fields.items()
            if value(name) is not None and value(name) != off
        ]

    warpers = active(_AFTER) if sampling else []
    end = ("sample" if sampling else "top") + (f" of {beams} beams" if beams > 1 else "")
    return (*active(_BEFORE), str(policy), *warpers, *active(_LAST), end)


def _check(policy: Policy, value: Any, sampling: bool, beams: int) -> None:
    temperature = value("temperature")
    if sampling and temperature != 1:
        raise RefusedError(
            f"two temperatures: the policy {policy}, then temperature={temperature} of the "
            "generation config, which divides the logits again; give generate(temperature=1.0)"
        )
    if not sampling and beams == 1:
        raise RefusedError(
            "do_sample=False takes the likeliest token, which is the same at every temperature; "
            "give generate(do_sample=True), with constant(0) for the likeliest token"
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
