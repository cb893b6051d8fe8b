"""The chat template that wrote a prompt, carried to the policies of its request."""

import asyncio
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tempering.engines.vllm import templates
from tempering.engines.vllm.arguments import asked_by
from tempering.tokens.turns import Templated
from tests.unit.test_tokens_phases import CHATML, byte_level

OTHER = CHATML.replace("<|im_start|>", "### ").replace("<|im_end|>", "").replace("\n", " ")
THOUGHT = OTHER + "{# <thought> #}"
NAMED = byte_level(CHATML + "{# <think> #}")


@dataclass
class Params:
    extra_args: dict[str, Any] | None = None
    temperature: float = 1.0
    n: int = 1
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


@dataclass
class Renderer:
    """What is read of vLLM's HfRenderer."""

    tokenizer: Any = NAMED
    model_config: Any = None
    seen: list[Any] = field(default_factory=list)

    def get_tokenizer(self):
        return self.tokenizer


@pytest.fixture
def hf(monkeypatch):
    """vLLM's module of that renderer, with its rule: what is given, then the tokenizer's."""
    module = ModuleType("vllm.renderers.hf")
    module.HfRenderer = Renderer

    def resolve_chat_template(tokenizer, chat_template, tools, *, model_config):
        return chat_template or tokenizer.chat_template

    module.resolve_chat_template = resolve_chat_template
    for name in ("vllm", "vllm.renderers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "vllm.renderers.hf", module)


def render(template, renderer=None):
    """The prompts of a chat: by `render_chat`, and by its async twin."""
    params = SimpleNamespace(chat_template=template, chat_template_kwargs={})
    made = renderer or Renderer()

    def original(self, conversations, chat_params, *args, **kwargs):
        return ["chat"], [{"type": "token", "prompt_token_ids": [1]}]

    async def later(*args, **kwargs):
        return original(*args, **kwargs)

    _, (prompt,) = templates._render_chat(original, made, [[]], params)
    _, (again,) = asyncio.run(templates._render_chat_async(later, made, [[]], params, None))
    assert prompt == again
    return prompt


def test_the_template_of_a_server_or_request_reaches_the_policy(hf):
    params = templates.carried(
        Params({"tempering": "phases(thinking=1, answer=0.2)"}), render(THOUGHT)
    )
    policy = asked_by(params, NAMED).policy
    assert policy.state([], NAMED.encode("<thought>a")).phase == "thinking"
    assert policy.state([], NAMED.encode("<think>a")).phase == "answer"
    assert policy.state(NAMED.encode("<thought> ### assistant ")).phase == "answer"
    # One tokenizer object for one template, so that equal requests share a policy.
    assert isinstance(policy.tokenizer, Templated)
    assert asked_by(params, NAMED).policy is policy


def test_the_tokenizers_own_template_is_not_carried(hf):
    for prompt in (render(None), render(NAMED.chat_template), {"type": "token"}, [1, 2]):
        params = Params({"tempering": "phases(thinking=1, answer=0.2)"})
        assert templates.carried(params, prompt) is params
        assert asked_by(params, NAMED).policy.tokenizer is NAMED


def test_a_template_among_a_requests_own_arguments_is_not_believed(hf):
    forged = Params({"tempering": "constant(1)", "_chat_template": "{{ 1/0 }}"})
    for prompt, wanted in ((render(None), None), (render(THOUGHT), THOUGHT)):
        params = templates.carried(forged, prompt)
        assert params.extra_args.get("_chat_template") == wanted
        assert params.extra_args["tempering"] == "constant(1)"
    assert forged.extra_args["_chat_template"] == "{{ 1/0 }}"  # the caller's own stay his


def test_other_renderers_and_requests_without_a_tokenizer_go_on(hf):
    prompt = render(THOUGHT, SimpleNamespace(get_tokenizer=lambda: 1 / 0))
    assert prompt == {"type": "token", "prompt_token_ids": [1]}
    assert templates.tokenizer_of(Params({"_chat_template": THOUGHT}), None) is None
    assert templates.carried(Params(None), render(None)).extra_args is None
