"""The rules of temperatures per query in float64: bisection inside the model's own softmax."""

from __future__ import annotations

import contextlib
import math
from unittest import mock

import torch

from tests.integration import attention_oracle as oracle

IDS = oracle.tokens(1, 2, 13)
PADDED = torch.ones(2, 13, dtype=torch.long)
PADDED[1, :4] = 0


def entropy_at(x, t):
    r = torch.softmax(x / t, 0)
    return float(torch.special.entr(r).sum())


def held(level, coldest=1e-3, hottest=1e3):
    """The temperature of one query by bisection; level in nats."""

    def temperature(x):
        if len(x) == 0 or bool((x == x[0]).all()):
            return 1.0
        if entropy_at(x, coldest) >= level:
            return coldest
        if entropy_at(x, hottest) <= level:
            return hottest
        low, high = math.log(coldest), math.log(hottest)
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if entropy_at(x, math.exp(middle)) < level else (low, middle)
        return math.exp((low + high) / 2)

    return temperature


def velickovic(x):
    s = entropy_at(x, 1.0) if len(x) else 0.0
    beta = -0.037 * s**4 + 0.481 * s**3 - 2.3 * s**2 + 4.917 * s - 1.791
    return 1 / max(beta, 1.0) if s > 0.5 else 1.0


def by_length(x):
    return 1 / max(1.0, math.log(max(len(x), 1)) / math.log(4))


ORACLES = {
    "support(3)": held(math.log(3)),
    "entropy(0.7)": held(0.7),
    "support(3,0.8,1.25)": held(math.log(3), 0.8, 1.25),
    "support(1)": held(0.0),
    "polynomial()": velickovic,
    "log_length(4)": by_length,
}


@contextlib.contextmanager
def softmax_with(temperature, chosen=lambda call: True, base=None):
    """Divide each row of each 4-D softmax by its own temperature; eager attention only."""
    original, calls = torch.nn.functional.softmax, []

    def divided(x, *args, **kwargs):
        if x.ndim != 4:
            return original(x, *args, **kwargs)
        call = len(calls) % oracle.LAYERS
        calls.append(call)
        if base is not None:
            x = x / base[call][:, None, None].to(x.dtype)
        if not chosen(call):
            return original(x, dim=-1)
        rows = x.clone().flatten(0, 2)
        for row in rows:
            seen = row > -1e30
            row[seen] = (row[seen].double() / temperature(row[seen].double())).to(row)
        # Without the rounding to float32 that models ask for here.
        return original(rows.view(x.shape), dim=-1)

    with mock.patch.object(torch.nn.functional, "softmax", divided):
        yield


def expected(model, temperature, ids=IDS, **more):
    """The logits of an eager copy of the model, tempered by the oracle."""
    keep = {key: more.pop(key) for key in ("chosen", "base") if key in more}
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with softmax_with(temperature, **keep), torch.no_grad():
            return model(ids, use_cache=False, **more).logits
    finally:
        model.set_attn_implementation(implementation)


def close(ours, exact, relative=2e-5):
    plain = exact.double().std()
    assert (ours.double() - exact.double()).abs().max() < relative * plain
