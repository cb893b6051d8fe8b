"""The worker extension: `--worker-extension-cls tempering.engines.vllm.worker.Worker`.

vLLM adds its methods to each worker and calls them through `collective_rpc`. A swap has two steps,
so that no worker changes unless all can: `tempering_stage` checks and keeps the new betas,
`tempering_commit` writes them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from tempering.attention.profiles.profile import UNTEMPERED, Profile
from tempering.engines.vllm.settings import PerEngine
from tempering.errors import InputError, RefusedError, TemperingError


def digest(profile: Profile | None) -> str:
    """A short name for exactly these temperatures."""
    if profile is None:
        return UNTEMPERED
    data = profile.to_json()
    temperatures = {key: data[key] for key in ("layers", "named", "partial")}
    return hashlib.sha256(json.dumps(temperatures, sort_keys=True).encode()).hexdigest()[:16]


def write_configured(config: Any, settings: Any, rank: int) -> None:
    """Check every layer and configured profile of a loaded model, and write the betas."""
    from vllm.logger import init_logger

    from tempering.engines.vllm.identity import check_identity
    from tempering.engines.vllm.layers import (
        layers_of,
        make_length_table,
        prepared_betas,
        write_betas,
    )

    layers = layers_of(config)
    if settings.knows_length:
        make_length_table(config, layers)
    for row, profile in enumerate((settings.profile, *settings.profiles.values())):
        values = prepared_betas(config, layers, profile)
        if profile is not None and rank == 0:
            reason = check_identity(profile, config.model_config)
            if reason:
                init_logger(__name__).warning(
                    "tempering: only architecture and shape of the profile were compared with the "
                    "model: %s",
                    reason,
                )
        write_betas(config, layers, values, row)
    state_of(config)["active"] = digest(settings.profile)


_STATES: PerEngine[dict[str, Any]] = PerEngine()


def state_of(config: Any) -> dict[str, Any]:
    """What is active and what is staged in the engine of a configuration, in this process."""
    known = _STATES.get(config)
    return _STATES.set(config, {}) if known is None else known


Answer = tuple[str, str]  # (name of the error, "" for none; digest or message)


def _answer(work: Callable[[], str]) -> Answer:
    """The answer, or the error as a value: vLLM would pass an error on without its type."""
    try:
        return "", work()
    except TemperingError as error:
        return type(error).__name__, str(error)


class Worker:
    """Methods that vLLM adds to its workers; each answers with an error's name and a text."""

    vllm_config: Any
    rank: int

    def tempering_active(self) -> Answer:
        """The digest of the profile in use; InputError where tempering isn't configured."""
        return _answer(lambda: _active(self.vllm_config))

    def tempering_layers(self) -> Answer:
        """[name, heads, key-value heads] of the stage's layers, for all ranks together, as JSON."""
        return _answer(lambda: _layers(self.vllm_config))

    def tempering_stage(self, text: str | None) -> Answer:
        """Check the JSON of a profile (None: untempered) against this worker, and keep it."""
        return _answer(lambda: _stage(self.vllm_config, self.rank, text))

    def tempering_commit(self, name: str) -> Answer:
        """Write what was staged under this digest; the digest that is now active."""
        return _answer(lambda: _commit(self.vllm_config, name))


def _active(config: Any) -> str:
    state = state_of(config)
    if "active" not in state:
        raise InputError(
            "this engine was started without tempering, so it has no profile to swap; start it "
            'with --additional-config \'{"tempering": {"profile": null}}\''
        )
    return str(state["active"])


def _layers(config: Any) -> str:
    from tempering.engines.vllm.layers import layers_of, rank_layers

    _active(config)
    layers = layers_of(config)
    shapes = [
        (slot.name, slot.heads * slot.ranks, layer.num_kv_heads * slot.ranks)
        for slot, layer in zip(rank_layers(layers), layers, strict=True)
    ]
    return json.dumps(shapes)


def _stage(config: Any, rank: int, text: str | None) -> str:
    from tempering.engines.vllm.identity import check_identity
    from tempering.engines.vllm.layers import layers_of, prepared_betas

    _active(config)
    profile = None if text is None else Profile.from_json(json.loads(text), "the new profile")
    layers = layers_of(config)
    values = prepared_betas(config, layers, profile)
    if profile is not None and rank == 0:
        check_identity(profile, config.model_config)
    state_of(config)["staged"] = (digest(profile), layers, values)
    return digest(profile)


def _commit(config: Any, name: str) -> str:
    from tempering.engines.vllm.layers import write_betas

    staged = state_of(config).pop("staged", None)
    if staged is None or staged[0] != name:
        raise RefusedError(f"no profile {name} is staged in this worker; swap it again")
    write_betas(config, staged[1], staged[2])
    state_of(config)["active"] = name
    return name
