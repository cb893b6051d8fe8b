"""Text under several profiles at once, streamed; and what else might have been written."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float

from tempering.attention.control.tempered import tempered
from tempering.attention.examining.stored import input_device
from tempering.attention.measuring.measure import watching
from tempering.attention.profiles.profile import Profile
from tempering.console.fields import MOST_COLUMNS, Fields
from tempering.console.heads import LastQuery, packed
from tempering.console.subject import Subject
from tempering.console.turns import Event, Job
from tempering.engines.generating.rows import forward_options
from tempering.engines.generating.side_by_side import prompt_ids, stream
from tempering.errors import InputError
from tempering.evaluation.cost import losses_and_divergence
from tempering.posterior import responsibilities
from tempering.tokens import parse_policy
from tempering.tokens.applying import temper_logits
from tempering.tokens.policy import Policy

_SHOWN = 12  # likeliest alternatives of each distribution


@dataclass
class Order:
    """What the page wants written; the profiles may change while it is.

    profiles: of the columns, the untempered one first.
    """

    profiles: list[Profile]
    prompt: torch.Tensor
    tokens: int
    policy: Policy
    seed: int
    watch: bool
    _changed: tuple[int, list[Profile]] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, subject: Subject, given: Fields) -> Order:
        """Checked, before the model is asked for anything."""
        subject.require()
        profiles = [subject.profile(item) for item in given.items("profiles", MOST_COLUMNS)]
        ids = prompt_ids(subject.tokenizer, given.text("prompt"), chat=given.flag("chat", True))
        tokens = given.whole("tokens", 1, 100_000, 64)
        if subject.context is not None and len(ids) + tokens > subject.context:
            raise InputError(
                f"the prompt has {len(ids)} tokens, and with {tokens} new ones that is more than "
                f"the {subject.context} that the model reads; shorten it, or ask for at most "
                f"{max(0, subject.context - len(ids))} new ones"
            )
        return cls(
            [Profile.neutral(subject.plan), *profiles],
            ids,
            tokens,
            policy_of(subject, given),
            given.whole("seed", 0, 2**63 - 1, 0),
            given.flag("watch", True),
        )

    def change(self, profiles: Sequence[Profile], edit: int) -> None:
        """Go on with these profiles from the next token. edit: the page's number for them."""
        if len(profiles) + 1 != len(self.profiles):
            raise InputError(
                f"{len(self.profiles) - 1} columns are being written, the page sent "
                f"{len(profiles)} profiles; start again to add or take away a column"
            )
        with self._lock:
            self._changed = (edit, [self.profiles[0], *profiles])

    def changed(self) -> tuple[int, list[Profile]] | None:
        """The newest edit and its profiles, once."""
        with self._lock:
            found, self._changed = self._changed, None
            return found


def policy_of(subject: Subject, given: Fields) -> Policy:
    """The policy in the page's box."""
    policy = parse_policy(given.text("policy", "constant(0.7)"), subject.tokenizer)
    if policy.samples is not None:
        raise InputError(
            f"{policy} has a temperature for each of {policy.samples} samples of a prompt; the "
            "columns are one sample under several profiles, compared at one temperature"
        )
    return policy


def write(subject: Subject, order: Order, job: Job) -> Iterator[Event]:
    """Tokens as they come, with what every head kept at that step before them."""
    rows = len(order.profiles)
    asked = order.prompt.tolist()
    yield {"type": "prompt", "tokens": asked, "texts": texts_of(subject, asked)}
    steps = [0] * rows
    edit: int | None = None

    def revised() -> list[Profile] | None:
        nonlocal edit
        found = order.changed()
        if found is None:
            return None
        edit, profiles = found
        return profiles

    with contextlib.ExitStack() as stack:
        observer = None
        if order.watch:
            observer = LastQuery(subject.model, subject.plan)
            stack.enter_context(watching(subject.model, subject.plan, None, observer))
        written = stream(
            subject.model,
            subject.tokenizer,
            order.prompt,
            order.profiles,
            tokens=order.tokens,
            policy=order.policy,
            seed=order.seed,
            revised=revised,
        )
        # A generator that holds a profile gives it back here, not when it is collected.
        stack.callback(written.close)  # type: ignore[attr-defined]
        for token in written:
            if edit is not None:
                yield {"type": "changed", "edit": edit}
                edit = None
            if observer is not None and observer.found:
                step, kept = steps[token.row], observer.statistics(rows)
                # Rows that have ended stay in the batch, and what they keep means nothing.
                kept[:, [row for row in range(rows) if steps[row] < step]] = math.nan
                yield {"type": "heads", "step": step, "values": packed(kept)}
            steps[token.row] += 1
            yield {
                "type": "token",
                "row": token.row,
                "id": token.token,
                "text": token.text,
                "phase": token.known.phase,
                "temperature": _number(token.known.temperature),
                "entropy": token.known.entropy_after,
                "entropy_before": token.known.entropy_before,
                "support": token.known.support,
                "raw": _number(token.raw),
                "log_probability": _number(token.tempered),
            }
    yield {"type": "done", "tokens": steps}


def texts_of(subject: Subject, tokens: Sequence[int]) -> list[str]:
    """The text of each token by itself; a part of a character is the replacement sign."""
    return subject.tokenizer.batch_decode([[token] for token in tokens])


def _number(value: float) -> float | str:
    """A number for JSON, which has no limits: those are words that JavaScript reads."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def alternatives(
    subject: Subject, tokens: Sequence[int], start: int, profile: Profile, policy: Policy
) -> Iterator[Event]:
    """The likeliest next tokens after a text: of the untempered model, and under the profile.

    start: where the reply begins among the tokens. `before` is the model at T = 1 in attention and
    in sampling; `after` has the profile and the policy. Both read the whole text anew.
    """
    logits = _both(subject, tokens, profile, 1)[:, 0]
    state = policy.state(list(tokens[:start]), list(tokens[start:]))
    cooled, temperature = temper_logits(policy, logits[1:], [state])
    before, after = (responsibilities(-row.float()).double() for row in (logits[0], cooled[0]))
    most = min(_SHOWN, len(before))
    named = dict.fromkeys(i for p in (after, before) for i in p.topk(most).indices.tolist())
    yield {
        "type": "alternatives",
        "temperature": _number(float(temperature[0])),
        "tokens": [
            {"id": i, "text": text, "before": float(before[i]), "after": float(after[i])}
            for i, text in zip(named, texts_of(subject, list(named)), strict=True)
        ],
    }


def divergence(
    subject: Subject, tokens: Sequence[int], start: int, profile: Profile
) -> Iterator[Event]:
    """KL(untempered || tempered) at every token of a reply, both reading the same text, nats."""
    if start == len(tokens):
        raise InputError("the reply has no token yet; write one first")
    reply = torch.tensor(list(tokens[start:]))
    logits = _both(subject, tokens, profile, len(reply) + 1)[:, :-1]
    _, kl = losses_and_divergence(logits[1], logits[0], reply)
    yield {"type": "divergence", "kl": kl.tolist()}


def _both(
    subject: Subject, tokens: Sequence[int], profile: Profile, last: int
) -> Float[torch.Tensor, "2 last vocab"]:
    """Logits at the last places of a text, of the untempered model and under the profile."""
    ids = torch.tensor([list(tokens)] * 2, device=input_device(subject.model))
    mask = torch.ones_like(ids)
    options = forward_options(subject.model)(mask, len(tokens), last)
    with torch.no_grad(), tempered(subject.model, [Profile.neutral(subject.plan), profile]):
        out = subject.model(input_ids=ids, attention_mask=mask, use_cache=False, **options)
    return out.logits[:, -last:]
