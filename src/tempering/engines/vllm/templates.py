"""Carries the chat template that wrote a prompt to the processes that tell its phases apart.

vLLM takes a template from the request, the server's `--chat-template`, the model's processor or
the tokenizer. The processes behind the front end are not told which, but they make the request's
policy, too, and need the turns and delimiters of the template that was used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

from tempering.tokens.turns import with_template

# The extra argument that carries the template between processes. It is no argument of users (KEYS):
# one that a request sends is dropped.
_CARRIED = "_chat_template"
_RENDERED = "tempering_chat_template"


def wrap_rendering() -> None:
    """Wrap the places where vLLM writes chats as prompts."""
    from vllm.renderers.base import BaseRenderer

    from tempering.engines.vllm.wrapping import wrap

    wrap(BaseRenderer, "render_chat", _render_chat)
    wrap(BaseRenderer, "render_chat_async", _render_chat_async)


def carried(params: Any, prompt: Any) -> Any:
    """The parameters of a request, with the template of its prompt among them."""
    template = prompt.get(_RENDERED) if isinstance(prompt, Mapping) else None
    extra = getattr(params, "extra_args", None) or {}
    if template is None and _CARRIED not in extra:
        return params
    params = copy.copy(params)
    params.extra_args = {key: value for key, value in extra.items() if key != _CARRIED}
    if template is not None:
        params.extra_args[_CARRIED] = template
    return params


def tokenizer_of(params: Any, tokenizer: Any) -> Any:
    """The tokenizer with the template that wrote the request's prompt."""
    template = (getattr(params, "extra_args", None) or {}).get(_CARRIED)
    return tokenizer if tokenizer is None else with_template(tokenizer, template)


def _render_chat(
    original: Callable[..., Any],
    self: Any,
    conversations: Any,
    chat_params: Any,
    *args: Any,
    **kw: Any,
) -> Any:
    """vLLM's `render_chat`: its prompts say which template wrote them."""
    chats, prompts = original(self, conversations, chat_params, *args, **kw)
    _note(self, chat_params, prompts)
    return chats, prompts


async def _render_chat_async(
    original: Callable[..., Any],
    self: Any,
    conversations: Any,
    chat_params: Any,
    *args: Any,
    **kw: Any,
) -> Any:
    chats, prompts = await original(self, conversations, chat_params, *args, **kw)
    _note(self, chat_params, prompts)
    return chats, prompts


def _note(renderer: Any, chat_params: Any, prompts: Iterable[MutableMapping[str, Any]]) -> None:
    from vllm.renderers.hf import HfRenderer, resolve_chat_template

    # The other renderers write the format of one model family by code, and that family's tokenizer
    # writes the same.
    if not isinstance(renderer, HfRenderer):
        return
    tokenizer = renderer.get_tokenizer()
    template = resolve_chat_template(
        tokenizer,
        chat_params.chat_template,
        chat_params.chat_template_kwargs.get("tools"),
        model_config=renderer.model_config,
    )
    if template is not None and template != tokenizer.chat_template:
        for prompt in prompts:
            prompt[_RENDERED] = template
