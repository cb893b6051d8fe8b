"""lm-evaluation-harness runs a tempered model:

    python -m tempering.engines.generating.lm_eval_model run --model tempering \\
        --model_args pretrained=smollm2,pattern='throb(12;3;1;12)|amplitude(1.2)' --tasks arc_easy

The module registers the model `tempering` and then runs lm-eval's own command; another program
calls `register()` first. Model arguments are those of lm-eval's `hf`, and one of

    profile=FILE      a profile as `tempering profile` writes it
    pattern=TEXT      a schedule over depth, with ; for , since lm-eval splits arguments at commas

The profile acts on every forward pass, for multiple-choice scores as for generated text: the
tempered model is evaluated. The task sets the sampling temperature, as it does without a profile.
"""

from __future__ import annotations

from typing import Any

import torch

from tempering.attention.control.tempered import tempered
from tempering.attention.profiles.profile import Profile
from tempering.engines.loading.catalogue import MODELS, check_writes_text
from tempering.engines.loading.hub import load_model
from tempering.errors import InputError, MissingExtraError

NAME = "tempering"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def register() -> type:
    """Register the model `tempering` with lm-eval, and return its class.

    Raises MissingExtraError when lm-eval is not installed.
    """
    try:
        from lm_eval.api.registry import register_model
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        package = (error.name or "lm_eval").partition(".")[0]
        raise MissingExtraError(package, "lm-eval") from error

    class TemperedLM(HFLM):
        """lm-eval's `hf` with a temperature for every attention head."""

        def __init__(
            self,
            pretrained: Any,
            profile: str | None = None,
            pattern: str | None = None,
            **more: Any,
        ) -> None:
            if (profile is None) == (pattern is None):
                raise InputError(
                    "give profile=FILE or pattern=TEXT to --model_args, one of the two; the "
                    "untempered model is lm-eval's own --model hf"
                )
            if pretrained in MODELS:
                check_writes_text(pretrained)
                # lm-eval ignores dtype and device for a model that is loaded already.
                dtype = more.pop("dtype", "float32")
                if dtype not in DTYPES:
                    raise InputError(f"dtype is {', '.join(DTYPES)}; got {dtype!r}")
                pretrained, tokenizer = load_model(
                    pretrained, device=more.get("device"), dtype=DTYPES[dtype]
                )
                more.setdefault("tokenizer", tokenizer)
            super().__init__(pretrained=pretrained, **more)
            found = chosen_profile(self.model, profile, pattern)
            self.tempering = tempered(self.model, found)

    register_model(NAME)(TemperedLM)
    return TemperedLM


def chosen_profile(model: Any, profile: str | None, pattern: str | None) -> Profile:
    """The profile of a file, or of a pattern whose commas may be written as semicolons."""
    if profile is not None:
        return Profile.load(profile)
    return Profile.from_schedule((pattern or "").replace(";", ","), model)


def main() -> None:
    """lm-eval's command, with the model `tempering` known to it."""
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
