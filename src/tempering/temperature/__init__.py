"""The regimes of temperature: fixed, learned, scheduled, targeted; one small module for each.

    T = module(energies)          what the competition of these energies is tempered with

All four have this one interface, so that a unit, a head, a layer or a training loop takes any of
them. T comes in the energies' dtype (the default dtype without energies), at least float32. What
the modules hold moves with `.to(device)` but is never narrowed: a model in bfloat16 keeps the
temperature it was given, not the nearest of bfloat16's.
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
