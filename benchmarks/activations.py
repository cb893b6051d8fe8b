"""Activations of the family against the PyTorch built-ins that they generalise, forward and back.

    python benchmarks/activations.py                      16M float32, one thread
    python benchmarks/activations.py --elements 1000000   a quick look

Ratios of each to its own built-in, turn by turn. "scaled" members have a temperature or a width
that the built-in has not: the naive way is a second pass over the memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from _bench import interleave, ratios, show, threads, write
from torch import Tensor, nn
from torch.nn import functional

from tempering.kernels import Gaussian, Laplace
from tempering.posterior import responsibilities
from tempering.units import Activation


def naive(z: Tensor) -> Tensor:
    """The mean of the signed Gaussian by way of its two energies."""
    energies = torch.stack([(z + 1).square() / 2, (z - 1).square() / 2], dim=-1)
    r = responsibilities(energies, 0.5)
    return r[..., 1] - r[..., 0]


# built-in -> what is held against it
FAMILIES: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, Callable[[Tensor], Tensor]]]] = {
    "torch.tanh": (
        torch.tanh,
        {
            "gaussian x mean, T = 1": Activation("gaussian", "mean"),
            "gaussian x mean, scaled": Activation(Gaussian(1.0, 0.8), "mean", 0.5),
            "torch.tanh(c * z)": lambda z: torch.tanh(3.125 * z),
        },
    ),
    "functional.silu": (
        functional.silu,
        {
            "gaussian x gate-mean, c = 1": Activation(Gaussian(0.5), "gate-mean"),
            "gaussian x gate-mean, scaled": Activation(Gaussian(1.0, 0.8), "gate-mean", 0.5),
            "z * sigmoid(c * z)": lambda z: z * torch.sigmoid(3.125 * z),
        },
    ),
    "functional.relu": (
        functional.relu,
        {"gaussian x gate-mode": Activation("gaussian", "gate-mode")},
    ),
    "functional.hardtanh": (
        functional.hardtanh,
        {
            "laplace x mean, scaled": Activation(Laplace(1.0, 0.8), "mean", 0.5),
            "tanh(c * hardtanh(z))": lambda z: torch.tanh(2.5 * functional.hardtanh(z)),
        },
    ),
}


def measure(elements: int, repeats: int) -> dict[str, object]:
    """Every family, forward and backward."""
    torch.manual_seed(0)
    z = torch.randn(elements, requires_grad=True)
    grad = torch.randn(elements)
    results: dict[str, object] = {}
    for builtin, (reference, rivals) in FAMILIES.items():
        functions = {builtin: reference, **rivals}
        outputs = {name: function(z) for name, function in functions.items()}

        def back(y: Tensor) -> object:
            return torch.autograd.grad(y, z, grad, retain_graph=True)

        directions = {
            "forward": {name: lambda f=f: f(z) for name, f in functions.items()},
            "backward": {name: lambda y=y: back(y) for name, y in outputs.items()},
        }
        for direction, calls in directions.items():
            report = ratios(interleave(calls, repeats, warmup=2), builtin)
            print(f"\n{direction}, {elements:,} float32")
            show(report, builtin)
            results[f"{builtin}, {direction}"] = report
    return results


def measure_naive(elements: int, repeats: int) -> dict[str, object]:
    """The two-hypothesis softmax written out, on a sixteenth of the elements."""
    z = torch.randn(max(elements // 16, 1), requires_grad=True)
    grad = torch.randn_like(z)
    module: nn.Module = Activation("gaussian", "mean", 0.5)

    def both(function: Callable[[Tensor], Tensor]) -> object:
        return torch.autograd.grad(function(z), z, grad)

    calls = {"gaussian x mean": lambda: both(module), "two energies": lambda: both(naive)}
    report = ratios(interleave(calls, repeats), "gaussian x mean")
    print(f"\nforward and backward, {z.numel():,} float32")
    show(report, "gaussian x mean")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=16_000_000)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    with threads(options.threads):
        results = measure(options.elements, options.repeats)
        results["naive"] = measure_naive(options.elements, max(options.repeats // 3, 2))
        path = write("activations", {"settings": vars(options), "ratios": results})
    print(f"\n{path}")


if __name__ == "__main__":
    main()
