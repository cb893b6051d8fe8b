"""tempering: temperature as the inference parameter that decides how many hypotheses stay alive.

This page is the table of contents. Names load on first use, so `import tempering`
imports neither torch nor transformers, patches nothing and downloads nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from tempering.version import __version__ as __version__

# module -> the public names that live in it
_CONTENTS: dict[str, tuple[str, ...]] = {
    "tempering.posterior": (
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
    ),
    "tempering.schedules": ("PATTERNS", "Schedule", "as_schedule", "controls", "schedule"),
    "tempering.temperature": (
        "Collapse",
        "Fixed",
        "Learned",
        "LogNormalPrior",
        "Scheduled",
        "Targeted",
        "Temperature",
    ),
    "tempering.training": ("ScheduleStepper", "trainer_callback"),
    "tempering.attention": (
        "Layout",
        "Measurement",
        "Profile",
        "Tempering",
        "adaptive_profile",
        "fingerprint",
        "layout",
        "measure",
        "profile_for_support",
        "tempered",
    ),
    "tempering.evaluation": ("Comparison", "Variant", "compare"),
    "tempering.engines.loading.embedded": ("MODELS",),
    "tempering.engines.loading.hub": ("load_model",),
    "tempering.tokens": (
        "POLICIES",
        "Policy",
        "TemperingLogitsProcessor",
        "TokenState",
        "Trace",
        "TraceRow",
        "check_engine",
        "effective_order",
        "parse_policy",
        "policy_from_request",
        "temper_logits",
    ),
    "tempering.units": (
        "Activation",
        "PrototypeLayer",
        "activation",
        "closed_form",
    ),
    "tempering.kernels": (
        "Angular",
        "Centred",
        "Gaussian",
        "Huber",
        "KERNELS",
        "Laplace",
        "Logistic",
        "Mahalanobis",
        "Prototypes",
        "PseudoHuber",
        "Signed",
        "StudentT",
    ),
    "tempering.estimators": (
        "AnnealedMixture",
        "CalibrationReport",
        "TemperatureScaler",
        "calibration_report",
    ),
    "tempering.reports": ("Record",),
    "tempering.chunks": ("token_chunks",),
    "tempering.data": ("sample_text", "texts"),
    "tempering.errors": (
        "ArchitectureError",
        "BakeError",
        "CheckError",
        "CollapseWarning",
        "ConvergenceWarning",
        "DataError",
        "DepthWarning",
        "EnergyError",
        "InputError",
        "MissingExtraError",
        "ModelError",
        "OutputError",
        "ProfileError",
        "RefusedError",
        "ScheduleError",
        "SupportError",
        "TemperatureError",
        "TemperingError",
        "TemperingWarning",
    ),
}
_HOME = {name: module for module, names in _CONTENTS.items() for name in names}

__all__ = sorted([*_HOME, "__version__"])

if TYPE_CHECKING:
    from tempering.attention import *  # noqa: F403
    from tempering.chunks import *  # noqa: F403
    from tempering.data import *  # noqa: F403
    from tempering.engines.loading.embedded import *  # noqa: F403
    from tempering.engines.loading.hub import *  # noqa: F403
    from tempering.errors import *  # noqa: F403
    from tempering.estimators import *  # noqa: F403
    from tempering.evaluation import *  # noqa: F403
    from tempering.kernels import *  # noqa: F403
    from tempering.posterior import *  # noqa: F403
    from tempering.reports import Record  # noqa: F401
    from tempering.schedules import *  # noqa: F403
    from tempering.temperature import *  # noqa: F403
    from tempering.tokens import *  # noqa: F403
    from tempering.training import *  # noqa: F403
    from tempering.units import *  # noqa: F403


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'tempering' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
