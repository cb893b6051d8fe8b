"""The tempered posterior as scikit-learn estimators."""

from __future__ import annotations

from tempering.estimators.calibration.report import (
    Bin,
    CalibrationReport,
    Estimate,
    Metric,
    calibration_report,
)
from tempering.estimators.calibration.scaler import TemperatureScaler
from tempering.estimators.calibration.source import Logits
from tempering.estimators.mixture.estimator import AnnealedMixture
from tempering.estimators.mixture.path import MixtureSplit
from tempering.estimators.mixture.settings import MixtureConvergenceWarning

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
