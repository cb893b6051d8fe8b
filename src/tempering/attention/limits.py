"""The temperatures that attention takes, and the output scales of its heads."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from tempering.errors import ProfileError, TemperatureError

# Beyond these, a masked logit (float16: -65504) or a query could cross over into the live range.
COLDEST, HOTTEST = 1e-3, 1e3
# What float16 takes of the numbers that pass through a head.
SMALLEST, LARGEST = 1e-3, 1e3


def check_values(temperature: Float[Tensor, "... heads"], where: str) -> None:
    """TemperatureError for a temperature that attention doesn't take; `where` names its layer."""
    values = temperature.detach()
    bad = ~((values >= COLDEST) & (values <= HOTTEST))
    if bool(bad.any()):
        place = bad.nonzero()[0].tolist()
        value = float(values[tuple(place)])
        limit = " (the limits 0 and inf are refused in attention)" if value in (0, math.inf) else ""
        raise TemperatureError(
            f"{where}, head {place[-1]}: temperature {value:g}{limit}; "
            f"give one between {COLDEST:g} and {HOTTEST:g}, where 1 is the model's own"
        )


def check_scale_values(scale: Float[Tensor, "... heads"], where: str) -> None:
    """ProfileError for an output scale that a head doesn't take; `where` names its layer."""
    values = scale.detach()
    bad = ~((values >= SMALLEST) & (values <= LARGEST))
    if bool(bad.any()):
        place = bad.nonzero()[0].tolist()
        raise ProfileError(
            f"{where}, head {place[-1]}: output scale {float(values[tuple(place)]):g}; give one "
            f"from {SMALLEST:g} to {LARGEST:g}, where 1 changes nothing"
        )
