"""Engines over HTTP: OpenAI-compatible servers, Anthropic, Gemini."""

from __future__ import annotations

from pathlib import Path

from tempering.agents.temperatures import rule_for, user_rules
from tempering.engines.providers.anthropic_messages import Anthropic
from tempering.engines.providers.gemini import Gemini
from tempering.engines.providers.openai_compatible import OpenAICompatible
from tempering.engines.providers.remote import Client, RemoteEngine
from tempering.engines.providers.replicas import addresses_in
from tempering.engines.providers.retry import Backoff

__all__ = ["Anthropic", "Backoff", "Gemini", "OpenAICompatible", "RemoteEngine", "provider"]


def provider(
    spec: str,
    model: str,
    *,
    policy: str = "strict",
    models: str | Path | None = None,
    concurrency: int = 8,
    timeout: float = 120.0,
    retries: int = 5,
) -> RemoteEngine:
    """The engine of a provider by its name on the command line.

    Parameters
    ----------
    spec: openai, anthropic, gemini, the address of an OpenAI-compatible server, or vllm:ADDRESS
        for a vLLM server with tempering's plugin, which tempers attention too. Several servers of
        one model (replicas) are addresses separated by commas, or a file with one a line.
    model: name of the model at the provider.
    policy: strict, clamp or omit; see `tempering.agents.temperatures`.
    models: a user's file with more rows for the table of temperatures.
    concurrency, timeout, retries: requests at once, seconds for one try, tries after the first.

    Raises InputError for an unknown engine, a missing key, or (strict) an unknown model.
    """
    extra = () if models is None else user_rules(models)
    clients: list[Client]
    if spec == "openai":
        clients = [OpenAICompatible()]
    elif spec == "anthropic":
        clients = [Anthropic()]
    elif spec == "gemini":
        clients = [Gemini()]
    else:
        attention = spec.startswith("vllm:")
        places = addresses_in(spec.removeprefix("vllm:"))
        clients = [OpenAICompatible(place, attention=attention) for place in places]
    return RemoteEngine(
        clients,
        model,
        rule_for(clients[0].provider, model, policy, extra),
        policy=policy,
        concurrency=concurrency,
        timeout=timeout,
        backoff=Backoff(retries=retries),
    )
