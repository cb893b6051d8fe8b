"""Mistakes after the last layer: the scale and the soft cap of the logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tempering.audit.mistakes.base import MistakeCase, attributes, mistake, text_config


@mistake
def logit_scale_missing(model: Any) -> Iterator[MistakeCase]:
    """What divides or multiplies the logits (Granite, Cohere) left out."""
    targets = {id(item): item for item in (model.config, text_config(model), model)}
    for target in targets.values():
        for name in ("logits_scaling", "logit_scale"):
            own = getattr(target, name, None)
            if isinstance(own, int | float) and own != 1:
                if target is not model and isinstance(getattr(model, name, None), int | float):
                    continue  # the model reads its own copy
                yield MistakeCase(
                    f"the scale {own:g} of its logits were missing",
                    attributes([target], **{name: 1.0}),
                )


@mistake
def final_soft_cap_missing(model: Any) -> Iterator[MistakeCase]:
    """The soft cap of the logits left out."""
    config = text_config(model)
    targets = [c for c in {id(c): c for c in (model.config, config)}.values()
               if getattr(c, "final_logit_softcapping", None)]  # fmt: skip
    if targets:
        yield MistakeCase(
            "the soft cap of its logits were missing",
            attributes(targets, final_logit_softcapping=None),
        )
