"""Requests to the llama.cpp server: what is read of a body, and what is refused, by name.

The names are those of `tempering serve` on vLLM: OpenAI's own, and tempering's in `vllm_xargs`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tempering.engines.llamacpp.model import LlamaCpp
from tempering.engines.llamacpp.writing import SampledToken
from tempering.errors import InputError
from tempering.tokens.request import POLICY_KEYS, Asked, asked_of
from tempering.tokens.settings import SETTINGS, settings_of

_SAMPLE, _TRACE = "tempering_sample", "tempering_trace"
# Of OpenAI's names, what is carried out (the first two by one kind of request each), and what
# changes nothing here.
_READ = ("max_tokens", "max_completion_tokens", *SETTINGS, "n", "seed", "stop", "stream",
         "stream_options", "logprobs", "model", "vllm_xargs")  # fmt: skip
_OWN = {True: ("messages",), False: ("prompt", "echo")}
_IDLE = ("user", "metadata", "store", "safety_identifier", "prompt_cache_key", "service_tier")
# What asks for nothing at these values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "repetition_penalty": (1,),
    "suffix": ("",),
    "tools": ([],),
    "response_format": ({"type": "text"},),
    "top_logprobs": (0,),
}
_MOST = 4096  # new tokens where a request names no limit


@dataclass(frozen=True)
class ServedRequest:
    """A request that can be carried out.

    echo: also the prompt, with its log probabilities. trace: also what each token was drawn from.
    """

    chat: bool
    prompt: list[int]
    samples: list[SampledToken]
    tokens: int
    stop: tuple[str, ...]
    stream: bool
    usage: bool
    echo: bool
    logprobs: bool
    trace: bool


def read_request(body: object, model: LlamaCpp, name: str, *, chat: bool) -> ServedRequest:
    """A checked request; InputError (HTTP 400) names the argument that can't be carried out."""
    if not isinstance(body, Mapping):
        raise InputError("a request is a JSON object")
    # JSON's null is the same as nothing.
    body = {key: value for key, value in body.items() if value is not None}
    read = (*_OWN[chat], *_READ)
    for key, value in body.items():
        neutral = not isinstance(value, bool) and value in _NEUTRAL.get(key, ())
        if key in read or key in _IDLE or neutral:
            continue
        # OpenAI's chats have no echo; false asks for nothing.
        if chat and key == "echo" and value is False:
            continue
        where = "/v1/chat/completions" if chat else "/v1/completions"
        raise InputError(f"{key!r:.60} can't be carried out here; {where} takes {', '.join(read)}")
    asked = body.get("model")
    if asked not in (None, name):
        raise InputError(f"this server has the model {name!r}, not {asked!r:.80}")
    prompt = _prompt(body, model, chat)
    echo = _flag(body, "echo")
    n = _whole(body.get("n", 1), "n", 1)
    if n > model.rows:
        raise InputError(f"n = {n}: this server was started for {model.rows} texts side by side")
    stream = _flag(body, "stream")
    logprobs = _logprobs(body, chat)
    extra = _extra(body)
    if stream and (echo or logprobs):
        raise InputError("echo and logprobs can't be streamed here; send stream=false")
    return ServedRequest(
        chat=chat,
        prompt=prompt,
        samples=_samples(body, extra, model, n),
        tokens=_limit(body, model, len(prompt), chat, echo),
        stop=_stop(body),
        stream=stream,
        usage=_usage(body, stream),
        echo=echo,
        logprobs=logprobs,
        trace=_flag(extra, _TRACE),
    )


def _limit(body: Mapping[str, Any], model: LlamaCpp, read: int, chat: bool, echo: bool) -> int:
    """How many new tokens are asked for, at most, after a prompt of so many."""
    names = [name for name in ("max_tokens", "max_completion_tokens") if name in body]
    wanted = [_whole(body[name], name, 0) for name in names]
    if len(set(wanted)) > 1:
        raise InputError(
            f"two limits: max_tokens = {wanted[0]}, max_completion_tokens = {wanted[1]}; send one"
        )
    room = model.length - read
    if room < (0 if wanted[:1] == [0] else 1):
        raise InputError(
            f"the prompt has {read} tokens, and this server was started for {model.length}, prompt "
            "and reply together; give a shorter prompt"
        )
    tokens = wanted[0] if wanted else min(room, _MOST if chat else 16)
    if tokens == 0 and not echo:
        raise InputError("max_tokens is 1 or more (0 only with echo)")
    if tokens > room:
        raise InputError(
            f"a prompt of {read} tokens and {tokens} new ones don't fit the {model.length} that "
            "this server was started for"
        )
    return tokens


def _stop(body: Mapping[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop", [])
    texts = [stop] if isinstance(stop, str) else stop
    if not isinstance(texts, list) or not all(isinstance(x, str) and x for x in texts):
        raise InputError(f"stop is a text or a list of texts, none of them empty, got {stop!r:.40}")
    return tuple(texts)


def _usage(body: Mapping[str, Any], stream: bool) -> bool:
    """Whether a stream ends with the numbers of tokens."""
    options = body.get("stream_options")
    if options is None:
        return False
    if not stream:
        raise InputError("stream_options is for streams; send stream=true, or leave it out")
    if not isinstance(options, Mapping) or options.keys() - {"include_usage"}:
        raise InputError(f'stream_options is {{"include_usage": true}}, got {options!r:.60}')
    return _flag(options, "include_usage")


def _logprobs(body: Mapping[str, Any], chat: bool) -> bool:
    """Whether log probabilities of tokens are asked for: a flag of chats, elsewhere 0 or 1."""
    if chat:
        return _flag(body, "logprobs")
    value = body.get("logprobs")
    if value is None:
        return False
    if _whole(value, "logprobs", 0) > 1:
        raise InputError(
            f"logprobs = {value}: this server gives those of the tokens themselves, without others "
            "that were likely; send logprobs=1"
        )
    return True


def _prompt(body: Mapping[str, Any], model: LlamaCpp, chat: bool) -> list[int]:
    if not chat:
        prompt = body.get("prompt")
        if isinstance(prompt, str) and prompt:
            return _some(model.ids(prompt, special=True))
        if (
            isinstance(prompt, list)
            and prompt
            and all(isinstance(x, int) and not isinstance(x, bool) for x in prompt)
        ):
            if bad := [x for x in prompt if not 0 <= x < model.words]:
                raise InputError(f"token {bad[0]}: this model has ids 0 to {model.words - 1}")
            return list(prompt)
        raise InputError("prompt is one text or one list of token ids")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InputError('messages is a list of {"role": ..., "content": ...}')
    turns = []
    for place, item in enumerate(messages):
        role = item.get("role") if isinstance(item, Mapping) else None
        content = item.get("content") if isinstance(item, Mapping) else None
        if isinstance(content, list):
            if not all(_is_text(part) for part in content):
                raise InputError(f"messages[{place}]: this server reads texts alone")
            content = "".join(part["text"] for part in content)
        if not isinstance(role, str) or not isinstance(content, str):
            raise InputError(f"messages[{place}] has no role, or no text as its content")
        if more := [x for x in item if x not in ("role", "content") and item[x] is not None]:
            raise InputError(
                f"messages[{place}]: {more[0]!r:.60} can't be carried out here; a message has a "
                "role and content"
            )
        turns.append({"role": role, "content": content})
    tokenizer = model.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("this model's file has no chat template; use /v1/completions")
    try:
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # templates raise what they please
        raise InputError(f"the model's chat template refuses the messages: {error}") from error
    return _some(model.ids(str(text)))


def _is_text(part: object) -> bool:
    """Whether a part of a message is {"type": "text", "text": ...}."""
    return (
        isinstance(part, Mapping)
        and part.get("type") == "text"
        and isinstance(part.get("text"), str)
        and len(part) == 2
    )


def _some(ids: list[int]) -> list[int]:
    if not ids:
        raise InputError("the prompt has no tokens; give some text")
    return ids


def _extra(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of tempering, each of them one that can be carried out here."""
    extra = body.get("vllm_xargs", {})
    if not isinstance(extra, Mapping):
        raise InputError(f"vllm_xargs is a mapping, got {extra!r:.40}")
    for key in extra:
        if key in ("tempering_profile", "tempering_room"):
            raise InputError(
                f"{key}: llama.cpp has no attention profiles of requests; bake the "
                "profile into the file: tempering bake FILE.gguf --profile P --in-place-scales"
            )
        if key not in (*POLICY_KEYS, _SAMPLE, _TRACE):
            raise InputError(
                f"there is no argument {key!r:.60}; vllm_xargs takes "
                f"{', '.join((*POLICY_KEYS, _SAMPLE, _TRACE))}"
            )
    return extra


def _samples(
    body: Mapping[str, Any], extra: Mapping[str, Any], model: LlamaCpp, n: int
) -> list[SampledToken]:
    asked = _asked(body, extra, model)
    policy = asked.policy
    number = extra.get(_SAMPLE)
    if number is not None and (policy.samples is None or n != 1):
        raise InputError(f"{_SAMPLE} is for one sample of a ladder: send n=1 with it")
    if policy.samples is not None and number is None and n != policy.samples:
        raise InputError(
            f"{policy} has a temperature for each of {policy.samples} samples; send "
            f"n={policy.samples}, or n=1 with {_SAMPLE}"
        )
    first = 0 if number is None else _whole(number, _SAMPLE, 0)
    if policy.samples is not None and first >= policy.samples:
        raise InputError(f"{_SAMPLE} is a whole number from 0 to {policy.samples - 1}")
    seed = body.get("seed")
    if seed is None:
        import secrets

        seed = secrets.randbits(62)
    seed = _whole(seed, "seed", 0)
    return [SampledToken(policy, (seed + i) % 2**63, first + i, asked.given) for i in range(n)]


def _asked(body: Mapping[str, Any], extra: Mapping[str, Any], model: LlamaCpp) -> Asked:
    """The policy of a request, which truncates by the request's settings where it states none."""
    own = settings_of(body)
    request = {key: extra[key] for key in POLICY_KEYS if key in extra}
    return asked_of(request, own, model.tokenizer).truncating(own)


def _whole(value: Any, name: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**63:
        raise InputError(f"{name} is a whole number, {least} or more, got {value!r:.40}")
    return value


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{name} is true or false, got {value!r:.40}")
    return bool(value)
