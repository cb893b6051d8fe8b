"""The regimes of temperature: fixed, learned, scheduled, targeted; one small module for each.

    T = module(energies)          the temperature for the competition of these energies

All four have this interface, so a unit, a head, a layer or a training loop takes any of them. T
comes in the energies' dtype (the default dtype without energies), at least float32. The modules'
tensors move with `.to(device)` but are never narrowed: in a bfloat16 model a temperature keeps the
digits that it was given.
"""

from __future__ import annotations

from tempering.temperature.base import Fixed, Temperature
from tempering.temperature.clocked import Clocked, Scheduled, Targeted
from tempering.temperature.learned import Collapse, Learned, LogNormalPrior

__all__ = [
    "Clocked",
    "Collapse",
    "Fixed",
    "Learned",
    "LogNormalPrior",
    "Scheduled",
    "Targeted",
    "Temperature",
]
