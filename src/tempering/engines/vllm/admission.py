"""Checks a request before vLLM takes it in, so that its policy can't fail while vLLM samples.

The checks need the request, its prompt, the tokenizer and the engine's configuration. vLLM shows
only the sampling parameters to `validate_params`; its `process_inputs` has all four, and is wrapped
to hand the rest over.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from tempering.attention.profiles.length_base import LengthRule
from tempering.attention.profiles.length_limits import check_lengths
from tempering.engines.vllm import templates
from tempering.engines.vllm.arguments import (
    KEYS,
    PROFILE,
    ROOM,
    SAMPLE,
    TRACE,
    asked_by,
    asks_policy,
    extra_of,
    profile_of,
    sample_of,
    trace_asked,
    with_taken,
    without_taken,
)
from tempering.engines.vllm.failing import failure_message
from tempering.engines.vllm.settings import named_profiles, settings_of
from tempering.errors import (
    InputError,
    ProfileError,
    RefusedError,
    TemperatureError,
    TemperingError,
)


@dataclass(frozen=True)
class Admission:
    """What the check of a request needs besides its sampling parameters.

    tokens: whether the prompt's token ids are known. grows: whether the prompt may still grow.
    """

    config: Any
    tokenizer: Any
    tokens: bool
    grows: bool


_MARK = "|tempering:"
_CURRENT: ContextVar[Admission | None] = ContextVar("tempering_admission", default=None)


def process_inputs(
    original: Callable[..., Any],
    self: Any,
    request_id: str,
    prompt: Any,
    params: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """vLLM's `InputProcessor.process_inputs`, during which `check_request` knows the admission."""
    params = without_taken(templates.carried(params, prompt))
    tokens = not (
        isinstance(prompt, Mapping)
        and (prompt.get("type") == "embeds" or prompt.get("prompt_embeds") is not None)
    )
    admission = Admission(
        self.vllm_config, self.tokenizer, tokens, bool(kwargs.get("resumable", False))
    )
    token = _CURRENT.set(admission)
    try:
        request = original(self, request_id, prompt, params, *args, **kwargs)
    finally:
        _CURRENT.reset(token)
    request.cache_salt = _salt(request.cache_salt, *profile_of(params))
    if asks_policy(params):
        request.sampling_params = with_taken(request.sampling_params, self.tokenizer)
    return request


def _salt(own: str | None, profile: str | None, room: float) -> str | None:
    """The salt of a request's prefix cache, since keys and values depend on profile and room.

    Requests share a prefix only where their own salts, profiles and rooms are the same: JSON
    escapes the quotes of a name, and a request's own salt that has our mark gets another one.
    """
    if profile is not None:
        return f"{own or ''}{_MARK}{json.dumps([profile, room])}"
    return f"{own}{_MARK}" if own and _MARK in own else own


def child_params(original: Callable[..., Any], self: Any, index: int) -> Any:
    """vLLM's parameters of sample `index` of n, with the index added, which a ladder needs."""
    child = original(self, index)
    if asks_policy(child) and SAMPLE not in child.extra_args:
        child = copy.copy(child)
        child.extra_args = {**child.extra_args, SAMPLE: index}
    return child


def beam_params(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """vLLM's parameters of beam search. vLLM drops `vllm_xargs` from them, so ours are refused."""
    _refuse_misplaced(self)
    asked = [key for key in getattr(self, "vllm_xargs", None) or {} if key in KEYS]
    if asked:
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError(
            f"vLLM's beam search makes requests of its own and would ignore {asked[0]!r}; send it "
            "without use_beam_search"
        )
    return original(self, *args, **kwargs)


def request_params(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """vLLM's parameters of a request over HTTP.

    vLLM ignores fields that it doesn't know, so an argument of ours beside vLLM's own is refused.
    """
    _refuse_misplaced(self)
    try:
        traced = trace_asked(getattr(self, "vllm_xargs", None) or {})
    except InputError as error:
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError(str(error)) from error
    if traced and not getattr(self, "include_reasoning", True):
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError(
            f"include_reasoning=false hides tokens that {TRACE} would name; send one of the two"
        )
    return original(self, *args, **kwargs)


def untraced_params(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """`request_params` of a request whose reply has no choices that a trace could lie in."""
    params = request_params(original, self, *args, **kwargs)
    refuse_trace_of(self)
    return params


def refuse_trace_of(request: Any) -> None:
    """HTTP 400 where a request asks for a trace that its reply would drop."""
    if trace_asked(getattr(request, "vllm_xargs", None) or {}):
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError(
            f"{TRACE} comes with the choices of /v1/chat/completions and /v1/completions alone; "
            "send the request there, or without it"
        )


def _refuse_misplaced(request: Any) -> None:
    beside = [key for key in getattr(request, "model_extra", None) or {} if key in KEYS]
    if beside:
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError(
            f"vLLM ignores {beside[0]!r} beside its own parameters; send it inside vllm_xargs: "
            f'"vllm_xargs": {{"{beside[0]}": ...}}'
        )


def _check_room(params: Any, config: Any) -> None:
    name, room = profile_of(params)
    settings = settings_of(config) if name is not None and room != 1 else None
    if settings is None:
        return
    try:
        scaled = settings.profiles[str(name)].scaled(room)
        for index, (row, item) in enumerate(zip(scaled.rows, scaled.rules)):
            if isinstance(item, LengthRule):
                where = scaled.names[index] if scaled.names else f"layer {index}"
                longest = config.model_config.max_model_len
                check_lengths(item, longest, where, len(row), row.reciprocal()[None])
    except (TemperatureError, ProfileError) as error:
        raise InputError(f"{ROOM}={room:g} of the profile {name}: {error}") from error


# By these the drafted tokens that are accepted keep the law of the target logits.
_EXACT = ("standard", "block")


def _check_sampling(config: Any) -> None:
    """RefusedError where the engine samples in a way that the policies can't follow."""
    speculation = getattr(config, "speculative_config", None)
    method = getattr(speculation, "rejection_sample_method", _EXACT[0])
    if method not in _EXACT:
        raise RefusedError(
            f"this engine speculates with rejection_sample_method={method!r:.40}, which accepts "
            "drafted tokens whatever their probability; serve with 'standard', or send no policy"
        )
    parallel = getattr(config, "parallel_config", None)
    if getattr(parallel, "enable_batch_sharded_sampling", False):
        raise RefusedError(
            "this engine samples its requests on different ranks (enable_batch_sharded_sampling), "
            "of which only the first can say that a policy failed; serve without, or send no policy"
        )
    if getattr(parallel, "distributed_executor_backend", None) == "ray" and not _newer_ray():
        raise RefusedError(
            f"{_NEWER_RAY}=0 starts vLLM's older Ray executor, which doesn't pass on that a policy "
            "failed; serve with 1, vLLM's default, or send no policy"
        )


_NEWER_RAY = "VLLM_USE_RAY_V2_EXECUTOR_BACKEND"


def _newer_ray() -> bool:
    """As vLLM reads it: unset means 1."""
    return os.environ.get(_NEWER_RAY, "1").strip() != "0"


def check_request(params: Any) -> None:
    """Raise ValueError, which a server answers with HTTP 400, for arguments that can't be used."""
    try:
        _check(params)
    except TemperingError as error:
        raise ValueError(str(error)) from error
    except Exception as error:
        raise ValueError(failure_message(error)) from error


def _check(params: Any) -> None:
    extra = extra_of(params)
    if not extra:
        return
    admission = _CURRENT.get()
    if admission is None:
        raise RefusedError(
            "tempering's arguments need its plugin, which vLLM has not loaded; let VLLM_PLUGINS "
            "name 'tempering', or unset it"
        )
    config = admission.config
    if PROFILE in extra:
        names = named_profiles(config)
        if extra[PROFILE] not in names:
            known = f"it has {', '.join(names)}" if names else "it was started without any"
            raise InputError(f"the engine has no profile {extra[PROFILE]!r:.60}; {known}")
    _check_room(params, config)
    if not asks_policy(params):
        if SAMPLE in extra:
            raise InputError(f"{SAMPLE} does nothing without a ladder in 'tempering'")
        return
    _check_sampling(config)
    if getattr(config.model_config, "is_diffusion", False):
        raise RefusedError(
            "a diffusion model doesn't sample one token after another; send no policy"
        )
    if admission.grows:
        raise RefusedError("a policy needs its whole prompt at once; send it without streaming in")
    asked = asked_by(params, admission.tokenizer)
    if asked is None:
        return
    policy = asked.policy
    if policy.forces and getattr(params, "thinking_token_budget", None) is not None:
        raise InputError(
            f"two budgets: {policy!s:.200}, and thinking_token_budget="
            f"{params.thinking_token_budget} of the request; send one"
        )
    if policy.reads_tokens and not admission.tokens:
        raise RefusedError(
            f"{policy} reads the prompt's tokens, but this prompt is given as embeddings; "
            "send text or token ids"
        )
    sample_of(params, policy)
