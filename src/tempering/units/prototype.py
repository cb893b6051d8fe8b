"""The trainable competitive layer: K prototypes compete for each input."""

from __future__ import annotations

from typing import SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tempering import posterior
from tempering.counts import whole_number
from tempering.errors import InputError, TemperatureError
from tempering.kernels import Kernel, Prototypes, as_kernel
from tempering.kernels.hypotheses import Weights
from tempering.temperature import Temperature
from tempering.tensors import TensorLike, as_tensor
from tempering.units.family import activation, row_temperatures
from tempering.units.liveness import HypothesisReport, monitor
from tempering.units.module import Activation
from tempering.units.volume import VolumeTerms, volume_terms


class PrototypeLayer(Activation):
    """z -> responsibilities over K prototypes -> statistic.

    The prototypes are the parameter `vectors`, [K, in_features], drawn from a standard normal:
    copy in rows of data where data are at hand. Their natural loss is the free energy,
    `free_energy(z).mean()`, whose gradient moves each prototype by its responsibility (implicit
    EM). With an encoder before it, collapse is an optimum of that loss; without one, dead
    prototypes are local optima. So add `regulariser(z)`, and look at `monitor(r)`.

    Parameters
    ----------
    in_features: features of z, >= 1.
    prototypes: K >= 2.
    kernel: a Kernel or the name of one; its own hypotheses are replaced by the layer's.
    statistic: as Activation; "full" gives [..., K].
    temperature: as Activation; one value, or a value for each row.
    prior: [K] positive weights; None for equal.
    """

    vectors: nn.Parameter

    def __init__(
        self,
        in_features: SupportsIndex,
        prototypes: SupportsIndex,
        kernel: Kernel | str | nn.Module | type = "gaussian",
        statistic: str = "full",
        temperature: Temperature | float | int = 1.0,
        *,
        prior: Weights | None = None,
    ) -> None:
        in_features = whole_number(in_features, "in_features", 0)
        prototypes = whole_number(prototypes, "prototypes", 0)
        if in_features < 1 or prototypes < 2:
            raise InputError(
                f"got {in_features} features and {prototypes} prototypes; expected at least 1 "
                "and 2: a single hypothesis has no rival"
            )
        vectors = nn.Parameter(torch.randn(prototypes, in_features))
        hypotheses = Prototypes(vectors, prior)
        super().__init__(as_kernel(kernel).with_parameters(m=hypotheses), statistic, temperature)

    def responsibilities(
        self, z: TensorLike, *, u: float | int | Tensor | None = None
    ) -> Float[Tensor, "*rows prototypes"]:
        """r_k, independent of the statistic that the layer passes on."""
        kernel = self.kernel
        z = as_tensor(z, "z", InputError)
        return activation(z, kernel, "full", self.level(z, kernel, u))

    def free_energy(
        self, z: TensorLike, *, u: float | int | Tensor | None = None
    ) -> Float[Tensor, "*rows"]:
        """F(z) = -T log sum_k pi_k exp(-d_k/T): the loss whose gradient is that of EM.

        pi sums to 1 where it is given; without a prior it is 1 for each, as in log Z.
        Raises TemperatureError at T = 0 and T = inf.
        """
        z = as_tensor(z, "z", InputError)
        excess, tilted, level = self._competition(z, u)
        # F of the excess, raised by the energy that the excess is measured from.
        best = excess.detach().argmin(-1, keepdim=True)
        base = self.kernel.energies(z).gather(-1, best) - excess.gather(-1, best)
        return base.squeeze(-1) + posterior.free_energy(tilted, level)

    def regulariser(
        self,
        z: TensorLike,
        *,
        support_floor: float | int | None = None,
        minimum: float | int | None = None,
        u: float | int | Tensor | None = None,
    ) -> VolumeTerms:
        """The volume controls on a batch: see tempering.units.volume_terms.

        Raises TemperatureError at T = 0 and T = inf, where responsibilities have no gradient.
        """
        _, tilted, level = self._competition(z, u)
        log_r = torch.log_softmax(-tilted / level.unsqueeze(-1), dim=-1)
        return volume_terms(log_r, support_floor=support_floor, minimum=minimum)

    @staticmethod
    def monitor(r: Float[Tensor, "*rows prototypes"]) -> HypothesisReport:
        """Dead and dominant prototypes of a batch: see tempering.units.monitor."""
        return monitor(r)

    def _competition(
        self, z: TensorLike, u: float | int | Tensor | None
    ) -> tuple[
        Float[Tensor, "*rows prototypes"], Float[Tensor, "*rows prototypes"], Float[Tensor, "*rows"]
    ]:
        """Energies above the best, the same with the prior in them, and T of each row."""
        kernel = self.kernel
        z = as_tensor(z, "z", InputError)
        excess = kernel.excess(z)
        level = row_temperatures(self.level(z, kernel, u), excess.shape[:-1], excess)
        if not bool(((level > 0) & (level < torch.inf)).all()):
            raise TemperatureError(
                "free energy and volume controls need 0 < T < inf; at the limits responsibilities "
                "have no gradient to learn from"
            )
        log_prior = kernel.hypotheses.log_prior(excess)
        tilted = excess if log_prior is None else excess - level.unsqueeze(-1) * log_prior
        return excess, tilted, level
