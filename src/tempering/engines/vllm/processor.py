"""The entry point `vllm.logits_processors`: token policies in vLLM, for both of its model runners.

The older runner tells a processor how rows are added, moved and removed; the newer one names a
slot for each row. Either way the state of a row is made from the tokens of its own request, so no
request gets another's temperature. The order is that of transformers: penalties and constraints,
then the policy in place of the temperature, then min-p, top-k and top-p. A policy that truncates
does these itself, and vLLM's own are off for its request (`arguments.with_taken`).
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from tempering.engines.vllm.by_row import ByRow
from tempering.engines.vllm.by_slot import BySlot
from tempering.engines.vllm.policies import EnginePolicies


class TemperingPolicies(LogitsProcessor):
    """The class that vLLM loads: it makes a `ByRow` for the older model runner, else a `BySlot`."""

    validate_params = EnginePolicies.validate_params

    def __new__(cls, config: Any, device_or_state: Any, is_pin_memory: bool | None = None) -> Any:
        # Only the older interface passes three arguments.
        return BySlot(config, device_or_state) if is_pin_memory is None else ByRow(config)
