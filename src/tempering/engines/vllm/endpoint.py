"""The entry point `vllm.endpoint_plugins`: the profile of a running server, read and swapped.

    GET  /v1/tempering/profile              {"active": digest}
    POST /v1/tempering/profile  {"profile": the JSON of a profile, or null for none}
    GET  /v1/tempering/layers               {"layers": [[name, heads, kv_heads], ...], "depth": n}

vLLM loads the routes only where VLLM_PLUGINS names them, which `tempering serve` does. They lie
under /v1, because vLLM's --api-key guards that path. This module also explains vLLM's refusal of an
argument of ours that has a type which vLLM doesn't take.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from tempering.attention.profiles.profile import Profile
from tempering.engines.vllm.arguments import KEYS
from tempering.engines.vllm.client import LAYERS, PATH
from tempering.engines.vllm.swap import agreed_answer, all_layers, asked_of_served, swap_served
from tempering.errors import InputError, TemperingError


class ProfileEndpoint:
    """vLLM's endpoint plugin: three routes over the engine's own client."""

    name = "tempering"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""
        explain_types()
        app.add_api_route(PATH, read, methods=["GET"])
        app.add_api_route(PATH, swap, methods=["POST"])
        app.add_api_route(LAYERS, layers, methods=["GET"])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Keep the engine, and a lock: swaps of one server follow one another."""
        state.tempering = (engine_client, asyncio.Lock())


def explain_types() -> None:
    """Replace vLLM's message when it refuses one of our arguments by its type."""
    from vllm.entrypoints.serve.exception_handling import register

    original = register.validation_exception_handler
    if hasattr(original, "_tempering"):
        return

    async def explained(request: Request, error: Any) -> Any:
        for each in error.errors():
            location = [str(part) for part in each.get("loc", ())]
            key = next((key for key in KEYS if key in location and "vllm_xargs" in location), None)
            if key is not None:
                return _refusal(
                    InputError(
                        f"{key} in vllm_xargs is a text or a number, because vLLM passes on "
                        f"no objects; send JSON as a text: {_EXAMPLE}"
                    )
                )
        return await original(request, error)

    explained._tempering = True  # type: ignore[attr-defined]
    register.validation_exception_handler = explained  # vLLM registers it after the plugins


_EXAMPLE = '"post_thinking": "{\\"temperature\\": 0.2}"'


async def read(request: Request) -> JSONResponse:
    """The digest of the profile in use."""
    engine, _ = request.app.state.tempering
    try:
        active = agreed_answer(await asked_of_served(engine, "tempering_active"))
    except TemperingError as error:
        return _refusal(error)
    return JSONResponse({"active": active})


async def layers(request: Request) -> JSONResponse:
    """The attention layers, as the workers hold them, and the number of all layers."""
    engine, _ = request.app.state.tempering
    try:
        rows = all_layers(await asked_of_served(engine, "tempering_layers"))
    except TemperingError as error:
        return _refusal(error)
    depth = int(engine.model_config.get_total_num_hidden_layers())
    return JSONResponse({"layers": rows, "depth": depth})


async def swap(request: Request) -> JSONResponse:
    """Swap the profile; the digest of the one now in use."""
    engine, lock = request.app.state.tempering
    try:
        profile = _profile_of(await request.body())
        async with lock:
            active = await swap_served(engine, profile)
    except TemperingError as error:
        return _refusal(error)
    return JSONResponse({"active": active})


def _profile_of(body: bytes) -> Profile | None:
    expected = 'send {"profile": the JSON of a profile, or null}'
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the body is no JSON ({error}); {expected}") from error
    if not isinstance(data, dict) or set(data) != {"profile"}:
        raise InputError(f"the body is JSON of another form; {expected}")
    given = data["profile"]
    return None if given is None else Profile.from_json(given, "the new profile")


def _refusal(error: TemperingError) -> JSONResponse:
    status = 400 if isinstance(error, InputError) else 409
    body = {"message": str(error), "type": type(error).__name__, "code": status}
    return JSONResponse({"error": body}, status_code=status)
