"""The ground floor: hypotheses compete, temperature decides how many stay alive.

competition      one row of energies at one temperature, exact in both limits
solve            the temperature at which a stated number of hypotheses stays alive
thermodynamics   responsibilities, free energy, entropy, support, and more
"""

from tempering.posterior.solve import temperature_for
from tempering.posterior.thermodynamics import (
    Canonical,
    Thermodynamics,
    canonical,
    entropy,
    free_energy,
    heat_capacity,
    information,
    log_partition,
    mean_energy,
    peak,
    responsibilities,
    support,
    susceptibility,
    temperature_from_variance,
    thermodynamics,
    variance_from_temperature,
)

__all__ = [
    "Canonical",
    "Thermodynamics",
    "canonical",
    "entropy",
    "free_energy",
    "heat_capacity",
    "information",
    "log_partition",
    "mean_energy",
    "peak",
    "responsibilities",
    "support",
    "susceptibility",
    "temperature_for",
    "temperature_from_variance",
    "thermodynamics",
    "variance_from_temperature",
]
