"""AnnealedMixture: a mixture that is cooled into its clusters instead of dropped among them."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from tempering.errors import InputError
from tempering.estimators.mixture.advice import (
    check_distinct,
    check_fits,
    warn_of_few_rows,
    warn_of_ridge,
)
from tempering.estimators.mixture.density import FittedMixture, like
from tempering.estimators.mixture.driver import FitProgress, best_of, cool, finish
from tempering.estimators.mixture.em import Components, Family, expect
from tempering.estimators.mixture.online import RunningSums
from tempering.estimators.mixture.path import MixtureSplit, plot, record
from tempering.estimators.mixture.ranks import same_on_all
from tempering.estimators.mixture.reading import rows_of
from tempering.estimators.mixture.rows import Rows
from tempering.estimators.mixture.select import Bic, Criterion, HeldOutLikelihood, grow_selected
from tempering.estimators.mixture.settings import (
    CONSTRAINTS,
    check_parameters,
    temperatures_of,
    warn,
)
from tempering.estimators.mixture.start import from_means, from_responsibilities
from tempering.estimators.refits import keeping

_HELD_OUT = 0.2


class AnnealedMixture(FittedMixture):
    """Fit a mixture by deterministic annealing: hot, all components are one; cooling splits them.

        r_k(x) = mass_k p_k(x)^(1/T) / sum_j mass_j p_j(x)^(1/T),   T from T_c down to 1

    While it is hot the components share one variance, and a component splits at its critical
    temperature, where the largest eigenvalue of its responsibility-weighted covariance exceeds
    the kernel's variance, along the eigenvector; the first at lambda_max(cov). Near T = 1 the
    covariances are set free. At T = 1 it is ordinary EM, and components are merged and split
    elsewhere, and warmed and cooled, for as long as that raises the likelihood. Distances are
    Euclidean while hot: columns of different units should be scaled first. One unit for all
    columns changes nothing: rows are measured from the medians, in the power of two near their
    spread.

    Parameters
    ----------
    n_components: components to grow; with a criterion, the most it may choose.
    covariance_type: "full", "tied", "diag" or "spherical", as in GaussianMixture.
    kernel: "gaussian", "laplace" (density exp(-m) in the Mahalanobis distance m) or "student_t".
        Annealing uses the Gaussian; the kernel takes over when the covariances are set free.
    nu: degrees of freedom of "student_t", above 0.
    schedule: "adaptive" follows the critical temperatures. Or a schedule of the project, or its
        text, that ends at 1: its first value is put at the first critical temperature, so it says
        how far to cool: "geometric(50,1)" ends with a kernel of a 50th of lambda_max(cov).
    criterion: None fits n_components. "bic" or "held-out" (the likelihood of a fifth of the
        distinct rows, drawn at random; one more component has to gain more than its standard
        error) choose their number, up to n_components.
    means_init: [n_components, n_features]; components given, that neither split nor move.
    reg_covar: variance added to the diagonal of covariances; squared units of the data, 0 or more.
        A warning says so where it is large next to the variance within the components.
    tol: EM ends when its limit is estimated to be this near; nats per row, above 0.
    max_iter: most passes of EM at T = 1 in a row.
    n_init: starts, of which the likeliest is kept: the first is annealed, the second, fourth ...
        take the clusters of k-means (the second those of one run, as GaussianMixture does, later
        ones the best of ten), the third, fifth ... those around rows drawn at random. Components
        that are given, and a criterion, have one start.
    random_state: seed of the directions in which splits at T = 1 are sought, of k-means, and of
        held-out rows.
    distributed: whether every rank of torch.distributed's default group holds a part of the rows.

    Attributes
    ----------
    weights_, means_, covariances_: the mixture, in the shapes of GaussianMixture; covariances are
        the kernel's scale matrices. Tensors on the data's device when X is one.
    responsibilities_: [rows, components] of the fitted rows (rows of weight 0 left out), computed
        when asked for; not pickled.
    temperature_path_: the temperatures passed through. T = 1 is the kernel's variance where
        annealing ended, `kernel_variance_`; from there covariances are free, at 1.2, 1.1 and 1.
    splits_: one MixtureSplit for each split of the annealing.
    path_: a record array, one row a temperature: temperature, n_components, effective_components
        (exp of the entropy of the masses), information (nats), distortion (mean squared distance)
        and heat_capacity (nats). positions_: the means at each temperature.
    lower_bound_: mean log-likelihood of a row, nats. converged_. n_iter_: passes over the rows.
    n_moves_: splits with merges at T = 1 that were kept. n_components_: components fitted.
    best_start_: which of the starts gave the mixture; 0 is the annealed one, of which the path and
        the splits tell in any case.
    criteria_: with a criterion, its best value at each number of components tried; per row.

    Sources: Rose, Deterministic annealing for clustering, compression, classification, regression,
    and related optimization problems, 1998; Ueda and Nakano, Deterministic annealing EM algorithm,
    1998; Ueda, Nakano, Ghahramani and Hinton, SMEM algorithm for mixture models, 2000. Departures:
    masses enter the energies as T log mass; covariances stay out of the annealing until its end,
    since a component with the covariance of its own rows has T_c = 1 and never splits above.
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = CONSTRAINTS

    n_iter_: int
    _fitted_rows: Rows

    def __init__(
        self,
        n_components: Any = 1,
        *,
        covariance_type: Any = "full",
        kernel: Any = "gaussian",
        nu: Any = 4.0,
        schedule: Any = "adaptive",
        criterion: Any = None,
        means_init: Any = None,
        reg_covar: Any = 1e-6,
        tol: Any = 1e-5,
        max_iter: Any = 1000,
        n_init: Any = 4,
        random_state: Any = None,
        distributed: Any = False,
    ) -> None:
        self.n_components = n_components
        self.covariance_type = covariance_type
        self.kernel = kernel
        self.nu = nu
        self.schedule = schedule
        self.criterion = criterion
        self.means_init = means_init
        self.reg_covar = reg_covar
        self.tol = tol
        self.max_iter = max_iter
        self.n_init = n_init
        self.random_state = random_state
        self.distributed = distributed

    def fit(
        self, X: Any, y: Any = None, sample_weight: Any = None, responsibilities: Any = None
    ) -> AnnealedMixture:
        """Anneal a mixture to the rows of X.

        Parameters
        ----------
        X: [rows, features], an array, data frame or torch tensor; float32 is worked on in
            float32 where that is exact enough. A tensor stays on its device.
        y: ignored.
        sample_weight: [rows], 0 or more; weights count as numbers of rows.
        responsibilities: [rows, n_components] to start from, 0 or more, summing to 1 in each row;
            the components are then given: they neither split nor move.

        Returns
        -------
        self.

        Raises
        ------
        DataError, naming the row and column: NaN or infinity; fewer distinct rows than components;
        weights that are negative or sum to 0; a covariance that collapsed, or whose variances are
        no float64 in the data's units; a row too far from all others. ParameterError (an
        InputError): a setting out of its range. ScheduleError: a schedule that does not end at 1.
        Warns MixtureConvergenceWarning when EM did not converge, or when starts collapsed;
        TemperingWarning when reg_covar is large for the data, or when two components or more have
        more free numbers than there are distinct rows. Ctrl-C returns the best so far with
        a warning and `converged_` False; with distributed=True it is raised.
        """
        with keeping(self):
            self._fit(X, sample_weight, responsibilities)
        return self

    def _met(self, sample_weight: Any, responsibilities: Any) -> bool | None:
        """The process group, whose ranks were given the same settings; but for rows and seeds."""
        if not isinstance(self.distributed, bool):
            check_parameters(self)
        group = self._group()
        given = {name: value for name, value in self.get_params().items() if name != "random_state"}
        of_rows = {"sample_weight": sample_weight, "responsibilities": responsibilities}
        given |= {f"{name} is None": value is None for name, value in of_rows.items()}
        same_on_all(group, given)
        return group

    def _fit(self, X: Any, sample_weight: Any, responsibilities: Any) -> Rows:
        """`fit`; returns the rows, with their process group."""
        group = self._met(sample_weight, responsibilities)
        check_parameters(self)
        count, starts, max_iter = map(int, (self.n_components, self.n_init, self.max_iter))
        tol, family = float(self.tol), self._family()
        temperatures = temperatures_of(self.schedule)
        least = 2 if group is None else 1
        rows, alive = rows_of(
            lambda: self._values(X, reset=True, least=least), sample_weight, group, family.ridge
        )
        family = family.within(rows.unit)
        check_distinct(rows, count)
        given = self._given(rows, count, family, responsibilities, alive)
        seed = self._seed(rows)
        generator = torch.Generator().manual_seed(seed)
        progress, interrupted = FitProgress(), False
        try:
            if given is not None:
                progress.components = given
                cool(rows, temperatures[:-1] if temperatures else (), family, progress)
            elif self.criterion is None:
                random = np.random.RandomState(seed)
                best_of(
                    starts, rows, count, family, generator, random, temperatures, max_iter, progress
                )
            else:
                self._select(rows, count, family, generator, max_iter, progress, temperatures)
            finish(rows, family, tol, max_iter, progress)
        except KeyboardInterrupt:
            # Ranks are interrupted at passes of their own, so none could add up its sums.
            if progress.components is None or self._group():
                raise
            interrupted = True
            sums = expect(rows, progress.reached, family)
            progress.value = sums.objective / rows.total
        self._publish(progress, rows, family, X)
        warn_of_ridge(progress.reached, family, rows, 3)
        warn_of_few_rows(len(progress.reached.means), family, rows, 3)
        if interrupted:
            warn(
                "interrupted: this is the best mixture so far, not a converged one; fit again, "
                "with a larger tol or fewer rows if it takes too long",
                3,
            )
        elif not progress.converged:
            warn(
                f"EM did not converge within max_iter = {max_iter} passes at T = 1; raise "
                "max_iter, or tol, or scale the columns to similar spreads",
                3,
            )
        if progress.collapsed and not family.bounded:  # else it was rounding that stopped a start
            warn(
                f"{progress.collapsed} of {starts} starts put a component on rows that agree, "
                "where the likelihood grows without bound; the mixture is the best of the others. "
                "Raise reg_covar, or fit fewer components",
                3,
            )
        return rows

    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> AnnealedMixture:
        """Learn from one more chunk of rows; the first one is annealed, by `fit`.

        A later chunk is shared out by the mixture so far (one E-step at T = 1), its sums are
        added to those of all rows seen, and the M-step follows. Every row counts alike, so
        several passes over the same chunks would count them several times.

        Parameters, errors: as for `fit`. Returns self.
        """
        with keeping(self):
            if not hasattr(self, "_seen"):
                rows = self._fit(X, sample_weight, None)
                family = self._family().within(rows.unit)
                self._seen = RunningSums.of(rows, self._components(rows), family)
                self.n_samples_seen_ = rows.count
                return self
            group = self._met(sample_weight, None)
            check_parameters(self)
            family = self._family()
            rows, _ = rows_of(
                lambda: self._values(X, reset=False), sample_weight, group, family.ridge
            )
            within = family.within(rows.unit)
            self._seen = self._seen.plus(
                RunningSums.of(rows, self._components(rows), within), family
            )
            self._mixture(self._seen.components(family), X)
            found = expect(rows, self._components(rows), within).objective
            self.lower_bound_ = found / rows.total - rows.log_volume
            self.n_samples_seen_ += rows.count
            self.n_iter_ += 1
            self._fitted_rows = rows.alone()
            return self

    def plot_path(self, feature: int = 0, axes: Any = None) -> Any:
        """Draw the rate-distortion curve, the components' positions, and the phase diagram.

        Parameters
        ----------
        feature: the column of the data whose positions are drawn.
        axes: three matplotlib axes; None makes a figure.

        Returns
        -------
        The matplotlib figure.
        """
        check_is_fitted(self)
        if feature not in range(self.n_features_in_):
            raise InputError(
                f"feature = {feature!r}; expected a column, 0..{self.n_features_in_ - 1}"
            )
        return plot(self.path_, self.positions_, feature, axes)

    def _select(
        self,
        rows: Rows,
        count: int,
        family: Family,
        generator: torch.Generator,
        max_iter: int,
        progress: FitProgress,
        temperatures: Any,
    ) -> None:
        if temperatures is not None:
            raise InputError(
                f'criterion = {self.criterion!r} needs schedule = "adaptive", which finds the '
                f"temperatures where components split; got {self.schedule!r}"
            )
        criterion: Criterion
        train, criterion = rows, Bic(rows, family)
        if self.criterion == "held-out":
            train, held = rows.divide(_HELD_OUT, generator)
            criterion = HeldOutLikelihood(held, family)
        found = grow_selected(train, count, family, generator, criterion, max_iter, progress)
        self.criteria_ = {size: value - rows.log_volume for size, value in found.items()}

    def _given(
        self,
        rows: Rows,
        count: int,
        family: Family,
        responsibilities: Any,
        alive: Tensor,
    ) -> Components | None:
        if responsibilities is not None and self.means_init is not None:
            raise InputError("means_init and responsibilities both give components; give one")
        if (responsibilities is not None or self.means_init is not None) and self.criterion:
            raise InputError(
                f"criterion = {self.criterion!r} chooses how many components; they can't be given "
                "too"
            )
        if self.means_init is not None:
            return from_means(rows, self.means_init, count, family)
        if responsibilities is not None:
            return from_responsibilities(rows, responsibilities, alive, count, family)
        return None

    def _seed(self, rows: Rows) -> int:
        """One seed for all ranks: that of the first."""
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        (shared,) = rows.reduce([rows.pivot.new_tensor([float(seed * (rows.rank == 0))])])
        return int(shared)

    def _publish(self, progress: FitProgress, rows: Rows, family: Family, X: Any) -> None:
        public, pivot, square = like(X), rows.pivot, rows.unit * rows.unit
        components = check_fits(progress.reached, family, rows)
        self._mixture(components, X)
        temperatures, snapshots = progress.path()
        self.path_ = record(temperatures, snapshots, square)
        self.temperature_path_ = np.array(temperatures)
        self.positions_ = [(seen.means * rows.unit + pivot).cpu().numpy() for seen in snapshots]
        self.kernel_variance_ = progress.unit * square
        self.splits_ = [
            MixtureSplit(
                parting.critical / progress.unit,
                parting.parent,
                parting.child,
                public(parting.mean * rows.unit + pivot),
                public(parting.eigenvector),
                parting.critical * square,
            )
            for parting in progress.breaks
        ]
        self.n_components_ = len(components.means)
        self.lower_bound_ = progress.value - rows.log_volume
        self.converged_ = progress.converged
        self.n_iter_ = progress.passes
        self.n_moves_ = progress.moves
        self.best_start_ = progress.start
        self._fitted_rows = rows.alone()
        for stale in ("_seen", "n_samples_seen_"):
            self.__dict__.pop(stale, None)
        if self.criterion is None:
            self.__dict__.pop("criteria_", None)
