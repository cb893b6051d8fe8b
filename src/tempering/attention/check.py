"""The self-check on attach: does the model in hand obey softmax(l / T), exactly?

On a small padded batch of two equal rows, one untempered and one with random temperatures per
head, the controlled model is compared with a reference that divides the logits below the
model's code (`probe.py`). Four things must hold:

- the untempered row equals the original, bit for bit;
- every layer of the layout was reached;
- each layer's output for the tempered row agrees with the reference, relative to the effect;
- the output moved.
"""

from __future__ import annotations

import json
import zlib
from typing import Any

import torch
from torch import Tensor, nn

from tempering.attention.layout import Layout
from tempering.attention.probe import Observation, observe
from tempering.errors import CheckError

# Disagreement allowed, as a share of what the temperatures changed. Rounding of half precision
# is of the order of the effect of a temperature on weak logits, so only gross errors show there.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 2e-2, torch.bfloat16: 0.5, torch.float16: 0.3}
_VERDICTS: set[str] = set()


def random_temperatures(name: str, heads: int) -> Tensor:
    """Log-uniform in 1/3..3, fixed by the layer's name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.exp((torch.rand(heads, generator=generator) * 2 - 1) * 1.1)


def verdict_key(model: nn.Module) -> str:
    """What a verdict holds for: class, configuration, implementation, dtype and device."""
    config: Any = model.config
    parameter = next(model.parameters())
    fields = config.to_dict()
    for name in ("_name_or_path", "transformers_version", "torch_dtype", "dtype"):
        fields.pop(name, None)
    return "|".join(
        (
            f"{type(model).__module__}.{type(model).__qualname__}",
            str(config._attn_implementation),
            str(parameter.dtype),
            parameter.device.type,
            json.dumps(fields, sort_keys=True, default=str),
        )
    )


def ensure_checked(model: nn.Module, layout: Layout, sample: dict[str, Any] | None = None) -> None:
    """Run the self-check unless this kind of model has passed it in this process."""
    key = verdict_key(model)
    if key not in _VERDICTS:
        self_check(model, layout, sample)
        _VERDICTS.add(key)


def self_check(model: nn.Module, layout: Layout, sample: dict[str, Any] | None = None) -> float:
    """Compare the controlled model with the reference; the largest disagreement, as a share.

    Raises CheckError that names the first layer that disagrees.
    """
    reference = _reference(model, sample)
    controlled, calls = _controlled(model, layout, sample)
    dtype = next(model.parameters()).dtype
    tolerance = _TOLERANCE.get(dtype, 2e-2)
    worst = moved = 0.0
    for layer in sorted(
        layout.layers,
        key=lambda item: (
            list(controlled.outputs).index(item.name) if item.name in controlled.outputs else -1
        ),
    ):
        if calls.get(layer.name, 0) == 0:
            raise CheckError(
                f"{layer.name} was not reached by its temperature (route: {layer.route}); "
                "nothing was changed. This model can't be controlled exactly"
            )
        ours, theirs = controlled.outputs[layer.name], reference.outputs[layer.name]
        original = theirs[0]
        if not torch.equal(ours[0], original):
            raise CheckError(
                f"{layer.name}: temperature 1 does not reproduce the original bit for bit "
                f"(largest difference {(ours[0] - original).abs().max().item():.3g})"
            )
        effect = (theirs[1] - theirs[0]).double().norm().item()
        error = (ours[1] - theirs[1]).double().norm().item()
        scale = theirs[1].double().norm().item()
        moved = max(moved, effect / max(scale, 1e-300))
        # What rounding alone may do, where temperatures change next to nothing.
        noise = 64 * torch.finfo(dtype).eps * scale
        if not error <= tolerance * effect + noise:
            raise CheckError(
                f"{layer.name} disagrees with the reference: its output is off by "
                f"{error / max(effect, 1e-300):.2g} of what the temperatures changed "
                f"(allowed {tolerance:g}). This model can't be controlled exactly"
            )
        worst = max(worst, error / max(effect, 1e-300) if effect > noise else 0.0)
    if moved < 16 * torch.finfo(dtype).eps:
        raise CheckError(
            f"random temperatures did not move the output of {type(model).__name__} "
            f"(largest relative change {moved:.2g})"
        )
    return worst


def _reference(model: nn.Module, sample: dict[str, Any] | None) -> Observation:
    implementation = model.config._attn_implementation  # type: ignore[union-attr]
    if implementation in (None, "eager", "sdpa"):
        return observe(model, sample, temperature=random_temperatures)
    # Fused kernels offer no softmax to intercept: eager attention is the reference, and the
    # model's own implementation gives the untempered row.
    plain = observe(model, sample)
    setter: Any = model.set_attn_implementation
    setter("eager")
    try:
        reference = observe(model, sample, temperature=random_temperatures)
    finally:
        setter(implementation)
    for name, output in plain.outputs.items():
        reference.outputs[name] = torch.stack([output[0], reference.outputs[name][1]])
    return reference


def _controlled(
    model: nn.Module, layout: Layout, sample: dict[str, Any] | None
) -> tuple[Observation, dict[str, int]]:
    from tempering.attention.control import Tempering
    from tempering.attention.profile import Profile

    temperatures = [random_temperatures(item.name, item.heads) for item in layout.layers]
    rows = [Profile.neutral(layout), Profile.from_rows(temperatures, layout)]
    with Tempering(model, layout, rows) as handle:
        observation = observe(model, sample)
        return observation, handle.calls()
