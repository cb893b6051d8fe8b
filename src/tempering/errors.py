"""The exceptions and warnings of tempering.

    TemperingError                      all below; `exit_code` is what the command line returns
    |-- InputError (ValueError)         what was given can't be used; exit code 2
    |   |-- EnergyError                 NaN, -inf, or no finite energy in a row
    |   |-- TemperatureError            T < 0, NaN, or a limit where none is meant
    |   |-- SupportError                a support that no temperature reaches
    |   |-- ScheduleError               a pattern that doesn't parse or doesn't fit the depth
    |   |-- ProfileError                a profile of another shape, model or version
    |   `-- DataError                   text, tables or files that are not what they should be
    |-- RefusedError                    possible to ask, impossible to do exactly; exit code 1
    |   |-- ArchitectureError           attention that can't be controlled exactly
    |   |   `-- NoSoftmaxError          no softmax attention, so nothing to control
    |   `-- BakeError                   a profile that can't be folded into the weights
    |-- CheckError                      a self-check disagreed with its reference; exit code 1
    |-- ModelError                      a model that can't be found, read or converted; exit code 1
    |-- OutputError (OSError)           a result that can't be written; exit code 1
    |-- RankError                       a run on several ranks that can't go on; exit code 1
    `-- MissingExtraError (ImportError) an optional package; names the pip command; exit code 1

    TemperingWarning (UserWarning)
    |-- DepthWarning                    a pattern with less than two layers a stage
    |-- CollapseWarning                 a learned temperature at its bound, or support too low
    `-- ConvergenceWarning              a fit that stopped before it converged; says what to try

Every message says what was given, what was expected, where, and how to mend it.
"""

from __future__ import annotations


class TemperingError(Exception):
    """Base of every error that tempering raises on purpose.

    exit_code: what the command line returns.
    column: the place in a pattern, policy or rule that the message points at, counted from 1; None
        where it points at none.
    """

    exit_code = 1
    column: int | None = None


class InputError(TemperingError, ValueError):
    """What was given can't be used."""

    exit_code = 2


class EnergyError(InputError):
    """Energies with NaN, -inf, or a row without a finite value."""


class TemperatureError(InputError):
    """A temperature that is negative, NaN, or a limit where none is meant."""


class SupportError(InputError):
    """A support that no temperature reaches for the given energies."""


class ScheduleError(InputError):
    """A pattern that doesn't parse, or that doesn't fit the depth it is read at."""


class ProfileError(InputError):
    """A profile of another shape, model or version."""


class DataError(InputError):
    """Text, tables or files that can't be read as what they should be."""


class RefusedError(TemperingError):
    """A request that can't be carried out exactly, and so isn't."""


class ArchitectureError(RefusedError):
    """Attention that can't be controlled exactly; names the layer and the reason."""


class NoSoftmaxError(ArchitectureError):
    """A model without softmax attention; it has no attention temperature."""


class BakeError(RefusedError):
    """A profile that can't be folded into the weights; names the layer and the reason."""


class CheckError(TemperingError):
    """A self-check disagreed with its independent reference; names the first layer."""


class ModelError(TemperingError):
    """A model that can't be found, read or converted."""


class OutputError(TemperingError, OSError):
    """A result that can't be written; nothing half-written is left."""


class RankError(TemperingError):
    """A run on several processes that can't go on: one failed, ended, or has other input."""


class MissingExtraError(TemperingError, ImportError):
    """An optional package is missing; names the pip command that installs it.

    Parameters
    ----------
    package: the import name that failed, e.g. "vllm".
    extra: the extra of tempering that brings it, e.g. "vllm"; None where none does.
    install: the command, where it is another than that of the extra.
    """

    def __init__(
        self, package: str, extra: str | None = None, *, install: str | None = None
    ) -> None:
        super().__init__(
            f"this needs the package '{package}', which is not installed; "
            "mend it with: " + (install or f"pip install 'tempering[{extra}]'")
        )
        self.package = package
        self.extra = extra


class TemperingWarning(UserWarning):
    """Base of every warning that tempering emits on purpose."""


class DepthWarning(TemperingWarning):
    """A pattern has less than two layers a stage, so its cycle shows poorly."""


class CollapseWarning(TemperingWarning):
    """A learned temperature reached its bound, or support fell under its floor."""


class ConvergenceWarning(TemperingWarning):
    """A fit stopped before it converged; the message says what to try."""
