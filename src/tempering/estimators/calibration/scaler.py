"""TemperatureScaler: calibrates a classifier's probabilities by a temperature."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import Tags
from sklearn.utils._param_validation import Interval, StrOptions, make_constraint
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from tempering.errors import DataError, InputError, TemperatureError
from tempering.estimators.calibration.advice import advised
from tempering.estimators.calibration.check import Rows, check_logit_rows
from tempering.estimators.calibration.designs import Blocks, ByGroup, ByPrediction, OneBlock
from tempering.estimators.calibration.files import check_table, open_logits
from tempering.estimators.calibration.input import InputModel, fit_inputs
from tempering.estimators.calibration.known import explain, explain_inputs, warn_missing
from tempering.estimators.calibration.labels import (
    check_weights,
    encode_labels,
    groups_of,
    listing,
    named_rows,
    positions,
    row_tensor,
)
from tempering.estimators.calibration.moments import CalibrationProblem, as_logits, tempered_softmax
from tempering.estimators.calibration.newton import fit_blocks
from tempering.estimators.calibration.report import CalibrationReport, calibration_report
from tempering.estimators.calibration.settings import FitSettings
from tempering.estimators.calibration.source import (
    ArrayLogits,
    Binary,
    Logits,
    TensorLogits,
    agree_on_rows,
    one_threaded,
)
from tempering.estimators.refits import keeping
from tempering.tensors import refuse_masked

_CHOICES = {
    "inputs": ("logits", "probabilities"),
    "per": ("global", "class", "group", "input"),
}


class TemperatureScaler(ClassifierMixin, BaseEstimator):
    """Calibrate a classifier by the temperature of its softmax, fitted to labels.

        minimise over log T:  -sum_i w_i log softmax(z_i / T_i)[y_i] + (log T - mean)^2 / (2 sd^2)

    by safeguarded Newton in log beta = -log T, one pass over the rows a step, after a warm start
    on a sample of them. Rows are read a chunk at a time, so logits larger than memory fit. A row
    is divided by one temperature, so its order is kept, and so are predictions.

    To scikit-learn it is a classifier whose features are logits, one column a class; `score` is
    the accuracy. One score a row, as scikit-learn's binary classifiers give, is the log odds of
    class 1 (or its probability): the logits (0, s), so that T = 1 is sigmoid(s).

    Parameters
    ----------
    inputs: "logits", or "probabilities" whose logs are the logits. Never guessed: rows of the
        other kind are an error.
    per: what T depends on. "global": nothing. "class": the predicted class, argmax_k z_k.
        "group": the group of the row, passed to `fit` and `predict_proba`. "input": the row's own
        logits, log T = c_0 + c_1 entropy' + c_2 log_peak', where entropy (the log of the support)
        and log peak are those of softmax(z) in nats, and ' means standardised over the fit's rows.
    prior: (mean, sd) of log T, a normal distribution; None is maximum likelihood. With "class"
        and "group" it holds for each temperature, with "input" for log T at the mean features,
        and (0, sd) for the slopes.
    bounds: (lowest, highest) T. Data that drive T to a bound are reported, never silently cut.
    classes: labels of the columns, in order; None reads labels as column indices 0..K-1, and K
        labels that are none in sorted order, as scikit-learn does, under a TemperingWarning. Text
        labels that name the columns of a data frame need neither.
    max_iter: most passes over all rows.

    Attributes
    ----------
    temperature_: T, a number; for "class" and "group" an array, NaN where the data don't fix it;
        for "input" T at the mean features.
    standard_error_: of log T, from the curvature of the loss; NaN at a bound. For "input" of c_0.
    coef_, feature_mean_, feature_sd_: for "input": (c_0, c_1, c_2), and what standardises.
    groups_: for "group": the groups, in the order of `temperature_`.
    classes_: labels of the columns. missing_classes_: those that no label names.
    converged_: whether the fit ended at a minimum or a bound. n_iter_: passes over all rows.
    n_features_in_: columns of the logits; 1 for one score a row.

    Source: Guo, Pleiss, Sun, Weinberger, On Calibration of Modern Neural Networks, 2017. It fits
    T by gradient steps on held-out logits; the objective is the same.
    """

    n_features_in_: int
    _parameter_constraints: ClassVar[Mapping[str, list[Any]]] = {
        **{name: [StrOptions(set(known))] for name, known in _CHOICES.items()},
        "prior": ["array-like", None],
        "bounds": ["array-like"],
        "classes": ["array-like", None],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
    }

    def __init__(
        self,
        *,
        inputs: Any = "logits",
        per: Any = "global",
        prior: Any = None,
        bounds: Any = (1e-3, 1e3),
        classes: Any = None,
        max_iter: Any = 100,
    ) -> None:
        self.inputs = inputs
        self.per = per
        self.prior = prior
        self.bounds = bounds
        self.classes = classes
        self.max_iter = max_iter

    @one_threaded
    def fit(
        self, X: Any, y: Any = None, sample_weight: Any = None, groups: Any = None
    ) -> TemperatureScaler:
        """Fit the temperature.

        Parameters
        ----------
        X: logits or probabilities [rows, classes], or [rows] or [rows, 1] for two classes: an
            array (a memory map stays on disk), a torch tensor on any device, a data frame, the
            path of a .npy, .npz, .parquet or .csv file, or `Logits`. -inf is a class ruled out.
        y: labels [rows].
        sample_weight: [rows], 0 or more; against a prior they count as numbers of rows.
        groups: [rows], for per="group"; none may be missing.

        Returns
        -------
        self.

        Raises
        ------
        DataError, naming the row, for NaN, inf, labels out of range, weights that sum to zero, and
        probabilities given as logits or the other way round. TemperatureError when every row of
        logits is constant and there is no prior. InputError for a parameter out of its range.
        Ctrl-C returns the best so far under a ConvergenceWarning, with `converged_` False.
        """
        with keeping(self):
            settings = self._settings()
            logits = self._open_logits(X, reset=True)
            if logits.n_rows < 2 or logits.n_columns < 2:
                raise DataError(
                    f"{logits.name} has n_samples = {logits.n_rows} and {logits.n_columns} "
                    "feature(s); expected logits of at least 2 rows and 2 classes, a column each"
                )
            names = getattr(self, "feature_names_in_", logits.column_names)
            codes, classes = encode_labels(y, logits.n_rows, logits.n_columns, self.classes, names)
            weights, unit = check_weights(sample_weight, logits.n_rows)
            if unit < 1 and settings.prior is not None:
                # Against a prior such rows count for nothing, in any unit.
                weights, unit = (None if weights is None else weights * unit), 1.0
            settings = settings.in_unit(unit)
            problem = CalibrationProblem(
                logits,
                row_tensor(codes, logits.device),
                None if weights is None else row_tensor(weights, logits.device),
                self.inputs,
            )
            agree_on_rows(logits, labels=codes, weights=weights, groups=groups)
            counts = np.bincount(codes, weights, minlength=logits.n_columns)
            self.classes_ = classes
            if self.per == "input":
                self._refuse_groups(groups)
                self._fit_inputs(problem, settings, unit)
            else:
                self._fit_blocks(problem, settings, groups, unit)
            self.missing_classes_ = warn_missing(counts, classes)
            return self

    def _fit_blocks(
        self, problem: CalibrationProblem, settings: FitSettings, groups: Any, unit: float
    ) -> None:
        blocks, names = self._blocks(problem.logits, groups)
        kind = "" if self.per == "global" else self.per
        fit = explain(problem, blocks, fit_blocks(problem, blocks, settings), settings, names, kind)
        temperature = torch.exp(-fit.log_beta).cpu().numpy()
        error = fit.standard_error(settings).cpu().numpy() / math.sqrt(unit)
        single = self.per == "global"
        self.temperature_ = float(temperature[0]) if single else temperature
        self.standard_error_ = float(error[0]) if single else error
        self.converged_, self.n_iter_ = fit.converged, fit.n_iter

    def _fit_inputs(self, problem: CalibrationProblem, settings: FitSettings, unit: float) -> None:
        fit = fit_inputs(problem, settings)
        explain_inputs(problem, fit, settings)
        self.coef_ = fit.model.coefficients.cpu().numpy()
        self.feature_mean_ = fit.model.mean.cpu().numpy()
        self.feature_sd_ = fit.model.sd.cpu().numpy()
        low, high = settings.bounds
        at_mean = float(self.coef_[0])
        inside = math.log(low) < at_mean < math.log(high)
        bound = low if at_mean <= math.log(low) else high
        self.temperature_ = math.exp(at_mean) if inside else bound
        self.standard_error_ = fit.standard_error() / math.sqrt(unit)
        self.converged_, self.n_iter_ = fit.converged, fit.n_iter

    @one_threaded
    def predict_proba(self, X: Any, groups: Any = None) -> Any:
        """Calibrated probabilities softmax(z_i / T_i), [rows, classes].

        A torch tensor gives a torch tensor on its device; all else gives an array. X and groups
        as in `fit`. Raises DataError as `fit` does, TemperatureError where a row's T is not known.
        """
        check_is_fitted(self)
        logits = self._open_logits(X, reset=False)
        result: Any = None
        for span, z, log_temperature in self._tempered_chunks(logits, groups):
            if result is None:
                shape = (logits.n_rows, logits.n_columns)
                result = torch.empty(shape, dtype=z.dtype, device=z.device)
            places = logits.places(range(span.start, span.stop))
            result[span] = tempered_softmax(z, log_temperature, places, logits.name)
        return result if isinstance(X, Tensor) else result.numpy()

    @one_threaded
    def predict(self, X: Any) -> np.ndarray:
        """The label of the top logit in each row, [rows]; no temperature changes it."""
        check_is_fitted(self)
        logits = self._open_logits(X, reset=False)
        top = np.empty(logits.n_rows, np.int64)
        for first, chunk in logits.chunks():
            places = logits.places(range(first, first + len(chunk)))
            z = as_logits(chunk, self.inputs, places, logits.name)
            check_logit_rows(z, places, logits.name)
            top[first : first + len(chunk)] = z.argmax(1).cpu().numpy()
        return self.classes_[top]

    @one_threaded
    def temperatures(self, X: Any, groups: Any = None) -> Float[np.ndarray, "rows"]:
        """T of each row, [rows]; X and groups as in `predict_proba`."""
        check_is_fitted(self)
        logits = self._open_logits(X, reset=False)
        result = np.empty(logits.n_rows)
        for span, _, log_temperature in self._tempered_chunks(logits, groups):
            result[span] = log_temperature.exp().squeeze(1).cpu().numpy()
        return result

    @one_threaded
    def report(self, X: Any, y: Any, **options: Any) -> CalibrationReport:
        """NLL, Brier score and ECE before and after, with bootstrap intervals.

        Use rows that were not fitted on. Options are those of
        `tempering.estimators.calibration_report`, which this calls.
        """
        return calibration_report(self, X, y, **options)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        # Columns are classes. scikit-learn's checks pair two columns with three labels, which is
        # refused here; this tag makes them use two labels. Nothing else in scikit-learn reads it.
        tags.classifier_tags.multi_class = False
        tags.classifier_tags.poor_score = True
        return tags

    def _settings(self) -> FitSettings:
        """The parameters, checked."""
        settings = FitSettings.checked(self.prior, self.bounds, self.max_iter)
        for name, allowed in self._parameter_constraints.items():
            value = getattr(self, name)
            constraints = [make_constraint(each) for each in allowed]
            if not any(each.is_satisfied_by(value) for each in constraints):
                known = _CHOICES.get(name)
                expected = (
                    f"one of {', '.join(known)}" if known else " or ".join(map(str, constraints))
                )
                raise InputError(f"{name} = {value!r}; expected {expected}")
        return settings

    def _open_logits(self, X: Any, *, reset: bool) -> Logits:
        """X as logits to stream, with its width noted at fit and compared later."""
        if isinstance(X, str | Path):
            logits: Logits = open_logits(X)
        elif isinstance(X, Logits):
            logits = X
        elif isinstance(X, Tensor):
            if X.ndim not in (1, 2) or X.is_complex() or X.dtype == torch.bool:
                raise DataError(
                    f"X is a tensor of shape {tuple(X.shape)} and {X.dtype}; expected logits "
                    "(rows, classes), or (rows,) for two classes, of a real dtype"
                )
            logits = TensorLogits(X)
        else:
            refuse_masked(X, "X", DataError)
            if (reset or self.n_features_in_ == 1) and _is_one_dimensional(X):
                X = np.asarray(X)[:, None]
            array = validate_data(self, X, reset=reset, ensure_all_finite=False)
            check_table(array.shape, array.dtype, "X")
            logits = ArrayLogits(array)
        if logits.n_rows == 0:
            raise DataError(f"{logits.name} has n_samples = 0; expected a row at least")
        if reset:
            self.n_features_in_ = logits.n_columns
        elif logits.n_columns != self.n_features_in_:
            raise DataError(
                f"{logits.name} has {logits.n_columns} columns; the temperature was fitted on "
                f"{self.n_features_in_} classes"
            )
        return Binary(logits, self.inputs) if logits.n_columns == 1 else logits

    def _refuse_groups(self, groups: Any) -> None:
        if groups is not None:
            raise InputError(f"groups were given, but per='{self.per}'; say per='group'")

    def _blocks(self, logits: Logits, groups: Any) -> tuple[Blocks, Any]:
        """The blocks of rows that share a temperature, and their names."""
        if self.per == "group":
            if groups is None:
                raise InputError(advised().groups)
            names, codes = groups_of(groups, "groups", logits.n_rows)
            self.groups_ = names
            return ByGroup(row_tensor(codes, logits.device), len(names)), names
        self._refuse_groups(groups)
        if self.per == "class":
            return ByPrediction(logits.n_columns), self.classes_
        return OneBlock(), ("all",)

    def _tempered_chunks(
        self, logits: Logits, groups: Any, own: bool = False
    ) -> Iterator[tuple[slice, Float[Tensor, "rows columns"], Float[Tensor, "rows 1"]]]:
        """(span, logits, log T of each row), checked, chunk by chunk; own: of this rank alone."""
        codes = self._group_codes(groups, logits.n_rows)
        for first, chunk in logits.own_chunks() if own else logits.chunks():
            span = slice(first, first + len(chunk))
            places = logits.places(range(first, first + len(chunk)))
            z = as_logits(chunk, self.inputs, places, logits.name)
            check_logit_rows(z, places, logits.name)
            group = None if codes is None else codes[span]
            yield span, z, self._log_temperature(z, places, group)

    def _log_temperature(
        self, z: Float[Tensor, "rows columns"], places: Rows, codes: np.ndarray | None
    ) -> Float[Tensor, "rows 1"]:
        if self.per == "input":
            parts = (self.coef_, self.feature_mean_, self.feature_sd_)
            coefficients, mean, sd = (torch.from_numpy(part).to(z.device) for part in parts)
            model = InputModel(coefficients, mean, sd, self.bounds)
            return model.log_temperature(model.inputs(z))[:, None]
        if self.per == "global":
            log_temperature = math.log(self.temperature_)
            return torch.full((len(z), 1), log_temperature, dtype=torch.float64, device=z.device)
        index = z.argmax(1).cpu().numpy() if codes is None else codes
        temperature = np.asarray(self.temperature_)[index]
        unknown = np.flatnonzero(np.isnan(temperature))
        if len(unknown):
            row = int(unknown[0])
            name = (self.classes_ if codes is None else self.groups_)[index[row]]
            raise TemperatureError(
                f"the temperature of {self.per} {name}, which row {places[row]} needs, is not "
                "known: no row of the fit says anything about it; fit with a prior on log T"
            )
        return torch.from_numpy(np.log(temperature)[:, None]).to(z.device)

    def _group_codes(self, groups: Any, n_rows: int) -> np.ndarray | None:
        """The index in `groups_` of each row's group, None where temperatures have no groups."""
        if self.per != "group":
            self._refuse_groups(groups)
            return None
        if groups is None:
            raise InputError(advised().groups)
        values = named_rows(groups, "groups", n_rows)
        codes = positions(values, self.groups_, "groups", "the groups of the fit")
        if np.any(codes < 0):
            row = int(np.flatnonzero(codes < 0)[0])
            raise DataError(
                f"groups[{row}] = {values[row]} was not in the fit, so its temperature is not "
                f"known; fitted groups are {listing(self.groups_)}"
            )
        return codes


def _is_one_dimensional(X: Any) -> bool:
    ndim = getattr(X, "ndim", None)
    return (np.asarray(X).ndim if ndim is None else ndim) == 1
