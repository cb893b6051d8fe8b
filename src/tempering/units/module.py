"""Activation: kernel x statistic as a module, under any regime of temperature."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tempering.errors import InputError, RefusedError
from tempering.kernels import Kernel, as_kernel
from tempering.temperature import Fixed, Targeted, Temperature
from tempering.tensors import TensorLike, as_tensor
from tempering.units.family import activation, check_input, check_statistic


class Activation(nn.Module):
    """An activation that is a statistic of a tempered posterior.

        a(z) = statistic of r_h = pi_h exp(-d_h(z)/T) / sum_k pi_k exp(-d_k(z)/T)

    Activation("gaussian", "mean") is tanh. Tensors in the kernel become buffers of the module,
    and nn.Parameters its parameters, under their own names (m, sigma, centres, prior, ...).

    Parameters
    ----------
    kernel: a Kernel, or the name of one.
    statistic: one of tempering.units.STATISTICS.
    temperature: a number (fixed), or any regime: Fixed, Learned, Scheduled, Targeted. Shared
        where T is a single value; per unit where its shape is that of the units.

    Raises
    ------
    RefusedError: a linear layer or the identity, which induce no posterior; a targeted
        temperature together with a prior.
    InputError: an unknown kernel or statistic. TemperatureError: from the regime.
    """

    def __init__(
        self,
        kernel: Kernel | str | nn.Module | type,
        statistic: str,
        temperature: Temperature | float | int = 1.0,
    ) -> None:
        super().__init__()
        check_statistic(statistic)
        self._kernel = as_kernel(kernel)
        self.statistic = statistic
        self.temperature = (
            temperature if isinstance(temperature, Temperature) else Fixed(temperature)
        )
        if isinstance(self.temperature, Targeted) and self._kernel.hypotheses.prior is not None:
            raise RefusedError(
                "a targeted temperature is solved from energies alone, so it would miss the "
                "stated support once a prior tilts the posterior. Leave the prior out, or use "
                "another regime"
            )
        for owner in (self._kernel, self._kernel.hypotheses):
            for name, tensor in _tensors(owner):
                if isinstance(tensor, nn.Parameter):
                    self.register_parameter(name, tensor)
                else:
                    self.register_buffer(name, tensor)

    @property
    def kernel(self) -> Kernel:
        """The kernel, with the tensors that the module holds now."""
        own, of_hypotheses = (
            {name: getattr(self, name) for name, _ in _tensors(owner)}
            for owner in (self._kernel, self._kernel.hypotheses)
        )
        if not own and not of_hypotheses:
            return self._kernel
        hypotheses: Any = self._kernel.hypotheses
        return self._kernel.with_parameters(m=replace(hypotheses, **of_hypotheses), **own)

    def forward(
        self, z: TensorLike, *, u: float | int | Tensor | None = None
    ) -> Float[Tensor, "..."]:
        """The activation at z; `u` is progress for a regime that follows a schedule.

        Shapes, raises: as `tempering.activation`.
        """
        kernel = self.kernel
        z = as_tensor(z, "z", InputError)
        return activation(z, kernel, self.statistic, self.level(z, kernel, u))

    def level(self, z: Tensor, kernel: Kernel, u: float | int | Tensor | None = None) -> Tensor:
        """The temperature of the competitions at z."""
        if isinstance(self.temperature, Targeted):
            check_input(z)
            return self.temperature(kernel.excess(z), u=u)
        # The other regimes read only the dtype of the energies.
        work = torch.promote_types(z.dtype, torch.float32)
        return self.temperature(torch.empty(1, dtype=work, device=z.device), u=u)

    def extra_repr(self) -> str:
        kernel = self._kernel
        hypotheses = type(kernel.hypotheses).__name__
        return f"{type(kernel).__name__} ({hypotheses}) x {self.statistic}"


def _tensors(owner: Any) -> list[tuple[str, Tensor]]:
    named = [(f.name, getattr(owner, f.name)) for f in fields(owner)]
    return [(name, value) for name, value in named if isinstance(value, Tensor)]
