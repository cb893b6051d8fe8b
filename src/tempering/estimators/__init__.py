"""The tempered posterior as scikit-learn estimators."""

from __future__ import annotations

from tempering.estimators._calibration_report import (
    Bin,
    CalibrationReport,
    Estimate,
    Metric,
    calibration_report,
)
from tempering.estimators._calibration_source import Logits
from tempering.estimators._mixture_input import MixtureConvergenceWarning
from tempering.estimators._path import MixtureSplit
from tempering.estimators.calibration import TemperatureScaler
from tempering.estimators.mixture import AnnealedMixture

__all__ = [
    "AnnealedMixture",
    "Bin",
    "CalibrationReport",
    "Estimate",
    "Logits",
    "Metric",
    "MixtureConvergenceWarning",
    "MixtureSplit",
    "TemperatureScaler",
    "calibration_report",
]
