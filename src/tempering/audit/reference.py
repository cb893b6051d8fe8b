"""The reference in this process: its log probabilities of prompts, as it is, changed, tempered."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tempering.attention.control.handle import Tempering
from tempering.attention.control.tempered import tempered
from tempering.attention.examining.layout_of import layout
from tempering.attention.examining.stored import input_device
from tempering.attention.profiles.profile import Profile
from tempering.attention.tuning.basis import Basis, make_basis, uniform_basis
from tempering.audit.scores import Scored
from tempering.errors import DataError, RefusedError

# Copies of a prompt with temperatures of their own that run side by side, and tokens in all.
_ROWS, _TOKENS = 8, 2048


class Reference:
    """A model whose log probabilities are compared with an engine's.

    profile: what the engine should apply; temperatures are relative to it.
    """

    def __init__(self, model: nn.Module, profile: Profile | None = None) -> None:
        self.model: Any = model
        self.profile = profile
        if getattr(self.model.config, "is_encoder_decoder", False):
            raise RefusedError(
                f"{type(model).__name__} has an encoder and a decoder; an audit compares the log "
                "probabilities of prompts, which decoders alone give"
            )
        self.plan = layout(model)

    @property
    def slopes(self) -> bool:
        """Whether a temperature that changes with position can be put into every layer."""
        ruled = self.profile is not None and any(self.profile.rules_by_layer(self.plan))
        return not ruled and all(layer.route == "interface" for layer in self.plan.layers)

    def check(self, prompts: Sequence[Scored]) -> None:
        """DataError for a prompt that this model can't read."""
        words = self.model.get_input_embeddings().weight.shape[0]
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        for item in prompts:
            if max(item.tokens) >= words:
                raise DataError(
                    f"{item.origin} holds id {max(item.tokens)}, and the reference has {words} "
                    "tokens: its tokenizer is another one; name the model that the engine serves"
                )
            if isinstance(longest, int) and len(item.tokens) > longest:
                raise DataError(
                    f"{item.origin} has {len(item.tokens)} tokens, and the reference reads "
                    f"{longest} at most; give shorter prompts"
                )

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """The model with the profile in force, if there is one."""
        with contextlib.ExitStack() as stack:
            if self.profile is not None:
                stack.enter_context(tempered(self.model, self.profile))
            yield

    def scores(self, prompts: Sequence[Scored]) -> Float[Tensor, "targets"]:
        """Log probabilities of the tokens that count, as the model is now."""
        return torch.cat([_scores(self.model, item, 1)[0] for item in prompts])

    def bases(self) -> dict[str, Basis]:
        """Temperatures that are fitted: one in all, one for each kind of layer, one a layer."""
        found = {"model": uniform_basis(self.plan)}
        for per in ("type", "layer"):
            basis = make_basis(self.model, self.plan, per)
            if basis.matrix.shape[1] > 1:
                found[per] = basis
        return found

    @contextlib.contextmanager
    def live(self, basis: Basis, prompts: Sequence[Scored]) -> Iterator[Callable[[Tensor], Tensor]]:
        """theta [rows, numbers] -> log probabilities [rows, targets], where log T = B theta."""
        with tempered(self.model, Profile.neutral(self.plan)) as handle:

            def run(theta: Tensor) -> Tensor:
                return _in_rows(self.model, prompts, theta, lambda part: _set(handle, basis, part))

            yield run

    @contextlib.contextmanager
    def sloped(self, prompts: Sequence[Scored]) -> Iterator[Callable[[Tensor], Tensor]]:
        """theta = (log T, slope) -> log probabilities; log T of a query that sees n keys is

        theta_0 + theta_1 (log n - log n'),    n' half the longest prompt.
        """
        middle = max(len(item.tokens) for item in prompts) / 2
        with tempered(self.model, Profile.neutral(self.plan)) as handle:
            states = handle.states()

            def put(theta: Tensor) -> None:
                def rule(state: Any, query: Tensor, *_: Any) -> Tensor:
                    n = torch.arange(1, query.shape[2] + 1, device=query.device)
                    away = (n / middle).log()
                    level = theta[:, :1] + theta[:, 1:] * away.to(theta)
                    beta = (-level).exp().to(query.device, state.beta.dtype)
                    return state.beta * beta[:, None, :, None]

                for state in states:
                    state.rule = rule

            try:
                yield lambda theta: _in_rows(self.model, prompts, theta, put)
            finally:
                for state in states:
                    state.rule = None


def _set(handle: Tempering, basis: Basis, theta: Tensor) -> None:
    handle.set_rows([row.exp() for row in basis.rows(theta)])


def _in_rows(
    model: Any, prompts: Sequence[Scored], theta: Tensor, put: Callable[[Tensor], None]
) -> Tensor:
    """[rows, targets]: every prompt under every row of theta, some rows at a time."""
    found = []
    for item in prompts:
        at_once = max(1, min(_ROWS, _TOKENS // len(item.tokens)))
        parts = []
        for part in theta.split(at_once):
            put(part)
            parts.append(_scores(model, item, len(part)))
        found.append(torch.cat(parts))
    return torch.cat(found, dim=1)


@torch.no_grad()
def _scores(model: Any, item: Scored, rows: int) -> Tensor:
    """[rows, targets] in float64."""
    ids = torch.tensor([item.tokens], device=input_device(model))
    logits = model(input_ids=ids.expand(rows, -1), use_cache=False).logits
    places = torch.tensor(item.places, device=logits.device)
    goals = ids[0].to(logits.device)[places]
    # float32 and less: the logits' own rounding is far above that of the softmax.
    seen = logits[:, places - 1].float()
    chosen = seen.gather(2, goals.expand(rows, -1)[..., None])[..., 0]
    return (chosen - seen.logsumexp(-1)).double().cpu()


@contextlib.contextmanager
def gains(model: Any, names: Sequence[str]) -> Iterator[Callable[[dict[str, Tensor]], None]]:
    """Outputs of modules times numbers [rows], by name; for layers, of what a layer adds."""
    current: dict[str, Tensor] = {}

    def hook(name: str, whole: bool) -> Any:
        def change(module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
            factor = current.get(name)
            if factor is None:
                return out
            first = out[0] if isinstance(out, tuple) else out
            shape = (-1, *(1,) * (first.ndim - 1))
            start = (args[0] if args else kwargs["hidden_states"]) if whole else 0
            first = start + (first - start) * factor.to(first).view(shape)
            return (first, *out[1:]) if isinstance(out, tuple) else first

        return change

    handles = []
    try:
        for name in names:
            module = model.get_submodule(name)
            whole = not name.endswith(("attn", "attention", "mlp"))
            handles.append(module.register_forward_hook(hook(name, whole), with_kwargs=True))

        def put(values: dict[str, Tensor]) -> None:
            current.clear()
            current.update(values)

        yield put
    finally:
        for handle in handles:
            handle.remove()
