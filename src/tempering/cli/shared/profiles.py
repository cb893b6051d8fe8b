"""The profile that a command runs a model with, from its options: a pattern, or a file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tempering.cli.shared import common
from tempering.errors import InputError
from tempering.ranks import here

if TYPE_CHECKING:
    from tempering.attention.profiles.profile import Profile
    from tempering.text_tables import TextTable


def pattern_profile(
    model: Any,
    tokenizer: Any,
    pattern: str,
    *,
    amplitude: float | None = None,
    reading: str = "temperature",
    layers: str | None = None,
    heads: str | None = None,
    stack: str | None = None,
    text: str | TextTable | None = None,
    chunk: int = 256,
    limit: int | None = None,
) -> Profile:
    """A profile from the options of a command; text is the sample for patterns of support."""
    from tempering.attention.profiles.profile import Profile
    from tempering.attention.profiles.rules import is_rule
    from tempering.schedules import schedule

    if is_rule(pattern):
        from tempering.attention.profiles.adaptive import adaptive_profile

        if amplitude is not None or reading != "temperature" or heads is not None:
            raise InputError(
                f"{pattern} is a rule for every query; only --layers and --stack go with it"
            )
        return adaptive_profile(
            pattern, model, layers=common.numbers(layers, "--layers"), stack=stack
        )
    plan = schedule(pattern)
    if reading == "temperature":
        if amplitude is not None:
            plan = plan.amplitude(amplitude)
        profile = Profile.from_schedule(
            plan,
            model,
            layers=common.numbers(layers, "--layers"),
            heads=common.numbers(heads, "--heads"),
            stack=stack,
        )
        hottest = float(profile.temperature.nan_to_num(1.0).max())
        coldest = float(profile.temperature.nan_to_num(1.0).min())
        if amplitude is None and max(hottest, 1 / coldest) > 2:
            common.note(
                f"note: {pattern} is read as written, T from {coldest:g} to {hottest:g} times the "
                "model's own; --amplitude 1.3 maps it onto 1/1.3 to 1.3"
            )
        return profile
    if reading not in ("support", "relative-support"):
        raise InputError(f"--read-as is temperature, support or relative-support, not '{reading}'")
    if layers is not None or heads is not None or stack is not None:
        raise InputError("--layers, --heads and --stack go with --read-as temperature")
    from tempering.attention.measuring.targets import profile_for_support
    from tempering.chunks import token_chunks
    from tempering.data import sample_text

    # Four chunks settle a layer's mean support; they run as one batch.
    sample = token_chunks(tokenizer, text or sample_text("demo"), chunk, min(4, limit or 4))
    solved = profile_for_support(
        model,
        sample,
        plan,
        reading="absolute" if reading == "support" else "relative",
        amplitude=1.0 if amplitude is None else amplitude,
    )
    return here().same(solved.profile)


def chosen_profile(
    model: Any, tokenizer: Any, pattern: str | None, profile: str | None, **options: Any
) -> Profile:
    """From --pattern or --profile, exactly one of which is given."""
    from tempering.attention.profiles.profile import Profile

    if (pattern is None) == (profile is None):
        raise InputError("give --pattern or --profile, one of the two")
    if pattern is not None:
        return pattern_profile(model, tokenizer, pattern, **options)
    named = ("amplitude", "reading", "layers", "heads", "stack")
    only_patterns(**{name: options.get(name) for name in named})
    return Profile.load(profile or "")


def only_patterns(
    amplitude: float | None = None,
    reading: str | None = None,
    layers: str | None = None,
    heads: str | None = None,
    stack: str | None = None,
) -> None:
    """InputError for an option that would be left unread, since there is no pattern."""
    given = {
        "--amplitude": amplitude is not None,
        "--read-as": reading not in (None, "temperature"),
        "--layers": layers is not None,
        "--heads": heads is not None,
        "--stack": stack is not None,
    }
    named = [option for option, is_given in given.items() if is_given]
    if named:
        raise InputError(f"{', '.join(named)} needs a --pattern (a profile is taken as it is)")
