"""1/T of many layers at once is what each layer's state computes for itself, to the last bit."""

from __future__ import annotations

import pytest
import torch

from tempering.attention.hooks.temperature_state import TemperatureState, inverses
from tempering.attention.layout import AttentionLayer

CPU = torch.device("cpu")


def layer(heads, name="layers.0"):
    return AttentionLayer(name, "decoder", 0, heads, heads)


def table(seed, rows, heads, dtype=torch.float64):
    """Temperatures over the whole range, whose inverses round in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(rows, heads, generator=generator, dtype=torch.float64)
    return (10 ** (6 * drawn - 3)).clamp(1e-3, 1e3).to(dtype)


TABLES = {
    "of many shapes": [table(i, 1 + i % 3, 1 + i % 4) for i in range(12)],
    "of one number each": [torch.full((2, 5), x, dtype=torch.float64) for x in (0.1, 1.0, 3.0)],
    "1 and the limits": [torch.tensor([[1e-3, 1.0, 1e3]]), torch.ones(1, 3), torch.ones(1, 7)],
    "of two dtypes": [table(i, 1, 4, (torch.float32, torch.float64)[i % 2]) for i in range(6)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tables", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("inference", [False, True])
def test_many_layers_at_once_are_each_layer_alone(tables, dtype, inference):
    with torch.inference_mode(inference):
        together = inverses(tables, [(CPU, dtype)] * len(tables))
        for T, found in zip(tables, together, strict=True):
            alone = TemperatureState(layer(T.shape[1]), CPU, dtype)
            alone.set(1, T)
            assert found.beta.dtype == alone.beta.dtype == dtype
            assert found.beta.shape == (*T.shape, 1, 1)
            assert torch.equal(found.beta, alone.beta)
            assert torch.equal(found.beta[..., 0, 0], (1 / T).to(dtype))
            assert (found.uniform, found.shift) == (alone.uniform, alone.shift)
            assert not found.beta.is_inference()


def test_each_has_memory_of_its_own():
    first, second = inverses([torch.ones(1, 3), torch.ones(1, 3)], [(CPU, torch.float32)] * 2)
    first.beta.mul_(2)
    assert torch.equal(second.beta, torch.ones(1, 3, 1, 1))
    assert first.beta.untyped_storage().nbytes() == 3 * 4


def test_layers_that_learn_are_left_to_their_states():
    learned = table(0, 1, 3).requires_grad_()
    found = inverses([table(1, 1, 3), learned], [(CPU, torch.float32)] * 2)
    assert found[0] is not None and found[1] is None
