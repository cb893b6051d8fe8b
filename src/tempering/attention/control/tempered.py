"""`tempered`: run a model with a profile of attention temperatures, and give it back untouched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from tempering.attention.control.handle import Tempering, as_profiles, check_profiles
from tempering.attention.control.self_check import ensure_checked
from tempering.attention.examining.layout_of import examined
from tempering.attention.examining.structure import walk
from tempering.attention.examining.subject import check_subject, unwrapped
from tempering.attention.profiles.profile import Profile
from tempering.errors import RefusedError

BAKED_MARK = "tempering"


def tempered(
    model: nn.Module,
    profile: Profile | Sequence[Profile],
    *,
    check: bool = True,
    again: bool = False,
    sample: dict[str, Any] | None = None,
) -> Tempering:
    """Attach a profile: head h of layer l attends with softmax(logits / T[l, h]).

    It acts at once and until `.remove()`, or the end of a `with` block, exceptions included:

        with tempered(model, profile):
            model.generate(...)

    Handles nest, and their temperatures multiply: T = 1 changes nothing, bit for bit. Copies and
    pickles of a tempered model are untempered.

    A temperature belongs to the thread or asyncio task that sets it, and to what is started with a
    copy of its context (tasks, `asyncio.to_thread`, `contextvars.copy_context().run`). Many
    threads may temper one model, each its own way. One that has set nothing, where another holds
    a profile other than T = 1, gets a RefusedError when it runs the model: temper it there too
    (`Profile.neutral(model)` for none), or start the work with the setter's context. A handle
    may be updated and removed anywhere; forgotten, it acts until its thread ends.

    Attention that the sample did not reach, run under a profile, is an ArchitectureError, and so
    is a layer that runs without meeting its temperature. With activation checkpointing, run the
    backward pass inside the block as well: it computes the layers once more.

    Parameters
    ----------
    model: a model of transformers or diffusers, compiled or not.
    profile: one Profile, or a sequence with one for each row of the batches to come.
    check: on the first use of this kind of model in the process, prove on a small batch that
        the model obeys the temperatures exactly (see `attention.check`).
    again: allow a model whose weights were baked with a profile already.
    sample: keyword arguments of a forward call, for models that don't take `input_ids` (see
        `recorded_call`); those that the model was examined with before, where none are given.

    Raises ProfileError (another shape or model), ArchitectureError (refused), CheckError (the
    self-check failed). The model is left as it was after each of them.
    """
    model = unwrapped(model)
    profiles = as_profiles(profile)
    if getattr(getattr(model, "config", None), BAKED_MARK, None) and not again:
        raise RefusedError(
            "this model's weights were baked with a temperature profile already; "
            "temper it again on purpose with tempered(..., again=True)"
        )
    check_subject(model)
    walked = walk(model)
    known = examined(model, sample, walked[0])
    check_profiles(profiles, model, known.layout, walked)
    if check:
        ensure_checked(model, known, sample)
    return Tempering(model, known.layout, profiles)
