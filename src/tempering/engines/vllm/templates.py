"""The chat template that a prompt was written with, carried to where its phases are told apart.

vLLM takes a template from the request, the server's `--chat-template`, the model's processor, or
the tokenizer, and keeps none of that beyond the front end. A policy is made in other processes
too, and each of them must know the turns and the delimiters of the template that was used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

from tempering.tokens.turns import with_template

# Between processes it travels among the request's extra arguments. Not a name of KEYS: a request
# that sends it itself is not believed.
_CARRIED = "_chat_template"
_RENDERED = "tempering_chat_template"


def register() -> None:
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
    """The tokenizer as it is with the template of the request's prompt."""
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

    # The other renderers write the format of one family by code, which its tokenizer has as well.
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
