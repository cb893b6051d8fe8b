"""Units: activation = kernel x statistic.

activation       any kernel with any statistic at any temperature, as a function
Activation       the same as a module, under any regime of temperature
PrototypeLayer   K trainable prototypes that compete, with volume controls and a monitor
closed_form      which members are known by other names (tanh, SiLU, ReLU, ...)
report           saturation, sensitivity, robustness against decisiveness, information kept
"""

from __future__ import annotations

from tempering.units.closed import closed_form
from tempering.units.family import STATISTICS, activation
from tempering.units.liveness import HypothesisReport, monitor
from tempering.units.measures import ActivationReport, TradeOff, information_kept, report
from tempering.units.module import Activation
from tempering.units.prototype import PrototypeLayer
from tempering.units.volume import VolumeTerms, volume_terms

__all__ = [
    "STATISTICS",
    "Activation",
    "ActivationReport",
    "HypothesisReport",
    "PrototypeLayer",
    "TradeOff",
    "VolumeTerms",
    "activation",
    "closed_form",
    "information_kept",
    "monitor",
    "report",
    "volume_terms",
]
