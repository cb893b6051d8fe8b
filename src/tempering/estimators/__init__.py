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
from tempering.estimators.calibration import TemperatureScaler

__all__ = [
    "Bin",
    "CalibrationReport",
    "Estimate",
    "Logits",
    "Metric",
    "TemperatureScaler",
    "calibration_report",
]
