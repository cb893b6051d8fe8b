"""Two thousand data sets against AnnealedMixture: each fit holds, warns, or refuses truthfully.

    python benchmarks/mixture_fuzz.py                        2,000 data sets
    python benchmarks/mixture_fuzz.py --jobs 4               the same, in four processes
    python benchmarks/mixture_fuzz.py --first 7 --count 1    one of them, by its seed

Scales from 1e-150 to 1e150, ties, gaps of up to 1e9 widths, far rows, constant and dependent
columns, columns of different units, weights from 1e-300 to 1e308, dtypes, strides, tensors; all
kinds of covariance and kernels. Each fit has to end in bounded time and

    be finite, with responsibilities that sum to 1;
    say of each row what it says of that row alone, to the last bit;
    be no less likely than one start of GaussianMixture by more than 1e-3 nats a row, or warn;
    or else refuse, for a reason that an independent look at the data confirms.

Prints a table of outcomes and the seeds that fail. The tests run the first few.
"""

from __future__ import annotations

import argparse
import collections
import math
import multiprocessing
import signal
import time
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from _bench import write
from sklearn.mixture import GaussianMixture

from tempering.errors import InputError, TemperingWarning
from tempering.estimators import AnnealedMixture

KINDS = ("full", "tied", "diag", "spherical")
WORSE = 1e-3  # nats a row
EPS = np.finfo(np.float64).eps
SECONDS = 60.0  # of wall time; a fit takes a part of a second
FAILED = ("raised", "slow", "not finite", "depends on other rows", "less likely", "false reason")


class Case(NamedTuple):
    """A data set, the settings, and what to compare with."""

    x: Any  # as given: array or tensor of any dtype and strides
    weights: Any
    settings: dict[str, Any]
    what: str


class Outcome(NamedTuple):
    """What came of a case; the kinds in FAILED are failures."""

    kind: str
    detail: str = ""


def draw(seed: int) -> Case:
    """The case of a seed."""
    random = np.random.default_rng([seed, 22])
    count, features = int(random.integers(1, 6)), int(random.integers(1, 5))
    rows = int(random.integers(max(4, count), 160))
    what = [f"{rows} rows, {features} columns, {count} components"]
    gap = 10 ** random.choice([random.uniform(-0.5, 1.2), random.uniform(1, 9)], p=[0.75, 0.25])
    clusters = int(random.integers(1, count + 2))
    centres = gap * random.standard_normal((clusters, features))
    share = random.dirichlet(np.full(clusters, random.choice([0.3, 5.0])))
    noise = random.standard_normal if random.random() < 0.8 else _heavy(random)
    x = centres[random.choice(clusters, rows, p=share)] + noise((rows, features))
    what.append(f"gap {gap:.2g}")
    x = _shaped(random, x, what)
    scale = 2.0 ** int(random.choice([0, random.uniform(-40, 40), random.uniform(-498, 498)]))
    x = x * scale
    ridge = random.choice([1e-6 * scale**2, 1e-6 * scale**2, 0.0, 1e-6])
    what.append(f"scale {scale:.2g}, reg_covar {ridge:.2g}")
    settings = {
        "n_components": count,
        "covariance_type": str(random.choice(KINDS)),
        "kernel": str(random.choice(["gaussian", "laplace", "student_t"], p=[0.8, 0.1, 0.1])),
        "reg_covar": float(ridge),
        "random_state": seed,
    }
    weights = _weights(random, rows, what)
    return Case(_typed(random, x, what), weights, settings, "; ".join(what))


def judge(case: Case) -> Outcome:
    """Fit, and hold what came against the promises."""
    model = AnnealedMixture(**case.settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            _within(SECONDS, lambda: model.fit(case.x, sample_weight=case.weights))
        except InputError as error:
            truth = _is_true(str(error), case)
            return Outcome("refused" if truth else "false reason", str(error))
        except TimeoutError:
            return Outcome("slow", f"over {SECONDS:.0f} s")
        except Exception as error:
            return Outcome("raised", f"{type(error).__name__}: {error}")
    strange = [w for w in caught if not issubclass(w.category, TemperingWarning)]
    if strange:
        return Outcome("raised", f"{strange[0].category.__name__}: {strange[0].message}")
    if (found := _not_finite(model, case)) is not None:
        return Outcome("not finite", found)
    if (found := _depends(model, case)) is not None:
        return Outcome("depends on other rows", found)
    told = "; ".join(str(w.message)[:60] for w in caught)
    behind = _behind(model, case)
    if behind is not None and behind > WORSE:
        detail = f"by {behind:.4f} nats a row {told}"
        # A large reg_covar is no reason: GaussianMixture adds the same.
        says_so = any(not str(w.message).startswith("reg_covar") for w in caught)
        return Outcome("less likely, and says so" if says_so else "less likely", detail)
    return Outcome("fitted" if not told else "fitted with a warning", told)


def _heavy(random: np.random.Generator) -> Any:
    return lambda size: random.standard_t(1.5, size)


def _shaped(random: np.random.Generator, x: np.ndarray, what: list[str]) -> np.ndarray:
    """Ties, constant and dependent columns, units of columns, far rows."""
    rows, features = x.shape
    for shape in random.choice(["", "ties", "repeats", "constant", "dependent", "units", "far"], 2):
        if shape == "ties":
            x = np.round(x, int(random.integers(0, 2)))
        elif shape == "repeats":
            x = x[random.integers(0, random.integers(1, rows), rows)]
        elif shape == "constant":
            x[:, random.integers(features)] = 3.0
        elif shape == "dependent":
            x[:, -1] = 2 * x[:, 0]
        elif shape == "units":
            x = x * 10.0 ** random.integers(-6, 7, features)
        elif shape == "far":
            few = int(random.integers(1, 4))
            x[:few] += 10 ** random.uniform(1, 12)
        if shape:
            what.append(shape)
    return x


def _weights(random: np.random.Generator, rows: int, what: list[str]) -> Any:
    kind = random.choice(["none", "counts", "any", "huge", "tiny"], p=[0.6, 0.15, 0.1, 0.1, 0.05])
    what.append(f"weights {kind}")
    if kind == "none":
        return None
    if kind == "counts":
        weights = random.integers(0, 4, rows)
        weights[0] = 1
        return weights[::-1]
    weights = random.uniform(0.1, 2, rows)
    if kind == "huge":
        return np.minimum(weights, 1) * 1e308
    return weights * 1e-300 if kind == "tiny" else list(weights)


def _typed(random: np.random.Generator, x: np.ndarray, what: list[str]) -> Any:
    """Another dtype, other strides, or a tensor."""
    if random.random() < 0.25 and 1e-30 < np.abs(x).max() < 1e30:
        x = x.astype(np.float32)
        what.append("float32")
    kind = random.choice(["plain", "reversed", "columns", "sliced", "frozen", "swapped", "tensor"])
    what.append(str(kind))
    if kind == "reversed":
        return np.ascontiguousarray(x[::-1])[::-1]
    if kind == "columns":
        return np.asfortranarray(x)
    if kind == "sliced":
        return np.repeat(x, 2, 0)[::2]
    if kind == "frozen":
        x.setflags(write=False)
    if kind == "swapped":
        return x.astype(x.dtype.newbyteorder(">"))
    return torch.from_numpy(x) if kind == "tensor" else x


def _within(seconds: float, call: Any) -> None:
    def late(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        call()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _plain(case: Case) -> tuple[np.ndarray, np.ndarray, float]:
    """Rows of weight above 0 as float64 of about 1, their weights, and the power of two between."""
    x = np.asarray(case.x).astype(np.float64)
    weights = np.ones(len(x)) if case.weights is None else np.array(case.weights, dtype=np.float64)
    x, weights = x[weights > 0], weights[weights > 0]
    apart = np.abs(x - np.median(x, 0))
    middle = np.median(apart, 0).max() or apart.max() or 1.0
    unit = 2.0 ** math.frexp(middle)[1]
    return x / unit, weights / weights.max(), unit


def _is_true(reason: str, case: Case) -> bool:
    """Whether an independent look at the data confirms a refusal."""
    x, _, unit = _plain(case)
    ridge = case.settings["reg_covar"]
    count, features = case.settings["n_components"], x.shape[1]
    distinct = len(np.unique(x, axis=0))
    if "distinct row(s)" in reason or "with n_samples" in reason:
        return distinct < count
    if "has collapsed" in reason or "no longer finite" in reason:
        # Only where columns depend on each other can a larger ridge be lost in rounding.
        negligible = ridge / unit / unit < 1e-12 * x.var(0).max()
        mixing = case.settings["covariance_type"] in ("full", "tied") and features > 1
        if not (_unbounded(case, unit) or (negligible and mixing)):
            return False
        deviations = x.std(0)
        correlated = np.corrcoef(x.T) if mixing and deviations.all() else np.eye(1)
        dependent = mixing and np.linalg.eigvalsh(correlated)[0] < 1e-12
        few = distinct < count * (features + 1)
        constant = not deviations.all()
        flat = _flat(x, case)
        return few or dependent or constant or flat or (count > 1 and _collapses(case))
    if "outside the range of float64" in reason:
        powers = [2 * math.log10(unit * max(float(np.ptp(column)), 1e-9)) for column in x.T]
        return max(powers) > 300 or (min(powers) < -300 and ridge < 1e-300)
    if "squares of that do not fit" in reason:
        return float(np.abs(x - np.median(x, 0)).max()) > 1e115
    return False


def _not_finite(model: AnnealedMixture, case: Case) -> str | None:
    r = np.asarray(model.predict_proba(case.x))
    for name in ("weights_", "means_", "covariances_", "lower_bound_"):
        if not np.isfinite(np.asarray(getattr(model, name))).all():
            return f"{name} = {getattr(model, name)}"
    if not (np.isfinite(r).all() and (r >= 0).all() and (abs(r.sum(1) - 1) < 1e-5).all()):
        return "responsibilities"
    # Rows of a weight that is as good as 0 may be far away.
    if case.weights is None and not np.isfinite(np.asarray(model.score_samples(case.x))).all():
        return "score_samples"
    return None


def _depends(model: AnnealedMixture, case: Case) -> str | None:
    """Rows alone, turned round, and beside a row at the end of the dtype."""
    x = case.x if torch.is_tensor(case.x) else np.asarray(case.x)
    whole = np.asarray(model.predict_proba(x)), np.asarray(model.score_samples(x))
    flip = torch.flip if torch.is_tensor(x) else np.flip
    largest = (torch.finfo if torch.is_tensor(x) else np.finfo)(x.dtype).max
    end = x[:1] * 0 + largest
    beside = torch.cat([end, x]) if torch.is_tensor(x) else np.concatenate([end, x])
    looks = {
        "turned round": (flip(x, (0,)), slice(None, None, -1)),
        "beside a far row": (beside, slice(1, None)),
    }
    for name, (rows, order) in looks.items():
        found = np.asarray(model.predict_proba(rows)), np.asarray(model.score_samples(rows))
        if not all(np.array_equal(a, b[order]) for a, b in zip(whole, found)):
            return name
    for row in (0, len(x) // 2, len(x) - 1):
        one = x[row : row + 1]
        found = np.asarray(model.predict_proba(one)), np.asarray(model.score_samples(one))
        if not all(np.array_equal(a[row], b[0]) for a, b in zip(whole, found)):
            return f"row {row} alone"
    return None


def _rival(case: Case) -> tuple[GaussianMixture, np.ndarray, float] | None:
    """GaussianMixture as the case sets it, and the rows, in a unit; None where it can't be."""
    settings = case.settings
    x, _, unit = _plain(case)
    if case.weights is not None:
        counts = np.array(case.weights)
        if counts.dtype.kind == "i":
            x = np.repeat(x, counts[counts > 0], 0)
    ridge = settings["reg_covar"] / unit / unit
    if len(x) < 2 or not np.isfinite(ridge):
        return None
    rival = GaussianMixture(
        settings["n_components"],
        covariance_type=settings["covariance_type"],
        reg_covar=ridge,
        random_state=settings["random_state"],
    )
    return rival, x, unit


def _unbounded(case: Case, unit: float) -> bool:
    """Whether reg_covar is 0, or so small that float64 loses it in the square of the unit."""
    return case.settings["reg_covar"] / unit / unit < 1e-28


def _flat(x: np.ndarray, case: Case) -> bool:
    """Whether a column has as few values as there are components, so that a variance of 0 fits.

    Student's t bears others besides: of N rows, n off those values cost (nu + D) n log(1 / s), and
    the others gain N log(1 / s) as the deviation s falls to 0 (nu = 4).
    """
    share = 1 / (4 + x.shape[1]) if case.settings["kernel"] == "student_t" else 0
    if case.settings["covariance_type"] == "spherical":
        return False
    counts = (np.unique(column, return_counts=True)[1] for column in x.T)
    off = [len(x) - np.sort(c)[-case.settings["n_components"] :].sum() for c in counts]
    return bool(min(off) <= share * len(x))


def _collapses(case: Case) -> bool:
    """Whether GaussianMixture, run to its limit, comes to a covariance of 0 too.

    For other kernels the Gaussian stands in; their heavier tails leave even fewer rows to the
    components in the middle.
    """
    rival, x, _ = _rival(case) or (None, None, 1.0)
    if rival is None:
        return True
    for seed in range(8):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                rival.set_params(tol=1e-9, max_iter=1000, random_state=seed).fit(x)
            except ValueError:
                return True
        if _degenerate(rival):
            return True
    return False


def _degenerate(rival: GaussianMixture) -> bool:
    """Whether a covariance of a fitted GaussianMixture is rounding.

    It takes squares off each other: what is left for a single row is rounding of its square.
    """
    variances, kind = rival.covariances_, rival.covariance_type
    if kind in ("full", "tied"):
        variances = np.linalg.eigvalsh(variances)
    rounding = 64 * EPS * (rival.means_**2).max(1)
    if kind == "tied":
        rounding = rounding.min()
    elif kind != "spherical":
        rounding = rounding[:, None]
    return bool((variances <= rounding).any())


def _likelihood(rival: GaussianMixture, x: np.ndarray) -> float:
    """Mean log-likelihood, from the components' centres: GaussianMixture expands squares, and is
    off by nats where clusters are 1e8 widths apart."""
    features, kind = x.shape[1], rival.covariance_type
    joint = []
    for k, (weight, mean) in enumerate(zip(rival.weights_, rival.means_)):
        covariance = rival.covariances_ if kind == "tied" else rival.covariances_[k]
        root = np.linalg.cholesky(
            covariance * np.eye(features) if covariance.ndim < 2 else covariance
        )
        y = np.linalg.solve(root, (x - mean).T)
        log_det = np.log(np.diag(root)).sum() + features / 2 * math.log(2 * math.pi)
        joint.append(math.log(weight) - log_det - (y**2).sum(0) / 2)
    return float(np.logaddexp.reduce(joint).mean())


def _behind(model: AnnealedMixture, case: Case) -> float | None:
    """Nats a row that GaussianMixture is ahead by; None where it has nothing to say."""
    weighed = case.weights is not None and np.array(case.weights).dtype.kind != "i"
    if case.settings["kernel"] != "gaussian" or weighed:
        return None
    rival, x, unit = _rival(case) or (None, None, 1.0)
    if rival is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            theirs = _likelihood(rival.fit(x), x)
        except ValueError:
            return None
    if _unbounded(case, unit) and _degenerate(rival):
        return None  # on its way to a likelihood without bound
    mine = model.lower_bound_ + x.shape[1] * math.log(unit)
    return float(theirs) - mine if np.isfinite(theirs) else None


def timed(seed: int) -> tuple[int, Outcome, float]:
    """The outcome of a seed, with its seconds of processor time."""
    torch.set_num_threads(1)
    start = time.process_time()
    return seed, judge(draw(seed)), time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=2000, help="data sets")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    arguments = parser.parse_args()
    seeds = range(arguments.first, arguments.first + arguments.count)
    outcomes: dict[str, list[int]] = collections.defaultdict(list)
    failures, longest = [], 0.0
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        for done, (seed, outcome, seconds) in enumerate(pool.imap_unordered(timed, seeds), 1):
            longest = max(longest, seconds)
            outcomes[outcome.kind].append(seed)
            if outcome.kind in FAILED or arguments.count == 1:
                case = draw(seed)
                print(f"seed {seed}: {outcome.kind}: {outcome.detail[:300]}")
                print(f"    {case.settings}; {case.what}", flush=True)
            if outcome.kind in FAILED:
                failures.append({"seed": seed, "kind": outcome.kind, "detail": outcome.detail})
            if done % 100 == 0:
                counts = {kind: len(found) for kind, found in outcomes.items()}
                print(f"after {done}: {counts}", flush=True)
    print(f"\n{'outcome':24s} data sets")
    for kind in sorted(outcomes):
        print(f"{kind:24s} {len(outcomes[kind])}")
    print(f"longest {longest:.1f} s of processor time")
    if arguments.count >= 2000:
        table = {kind: len(seeds) for kind, seeds in outcomes.items()}
        path = write("mixture_fuzz", {"outcomes": table, "failures": failures, "longest": longest})
        print(f"written to {path}")


if __name__ == "__main__":
    main()
