"""Where a loss went wrong: the first head whose output is not a number, or the boldest one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tempering.attention.hooks import interface_patch
from tempering.attention.tuning.pieces import Piece


def locate_nan(live: Any, theta: Tensor | None, piece: Piece, gradient: Tensor | None) -> str:
    """A sentence that names the head at fault, and what to try."""
    if theta is None:
        return f"the model is untempered there: {_first_bad(live, piece)}; look at the data"
    named = _boldest(live, theta)
    with torch.no_grad():
        live.untempered()
        before = _first_bad(live, piece)
        plainly = torch.isfinite(piece.losses(live.model)).all()
        live.set(theta)
        after = _first_bad(live, piece)
    if not bool(plainly):
        return f"the untempered model fails there too ({before}); look at the data or the dtype"
    if gradient is not None:
        wrong = (~gradient.isfinite()).any(0).nonzero()[:, 0].tolist()
        names = ", ".join(live.basis.names[i] for i in wrong[:3])
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        return f"it fails for {names}{more} ({after}; {named}). {_MEND}"
    return f"{after}; {named}. {_MEND}"


_MEND = "Try narrower bounds, a smaller prior_sd or radius, or float32 weights"


def _boldest(live: Any, theta: Tensor) -> str:
    """The head whose temperature is farthest from 1."""
    rows = live.temperatures(theta.detach())
    place = int(torch.cat([row.log().abs() for row in rows]).argmax())
    for layer, row in zip(live.plan.layers, rows, strict=True):
        if place < len(row):
            return f"farthest from 1 is T {float(row[place]):.4g} of {layer.name}, head {place}"
        place -= len(row)
    return "there is no head"


def _first_bad(live: Any, piece: Piece) -> str:
    """The first head that gives a NaN or an infinity when the piece is run again."""
    found: list[str] = []
    names = {id(live.model.get_submodule(layer.name)): layer for layer in live.plan.layers}

    def wrap(function: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
        def attention(module: Any, *args: Any, **kwargs: Any) -> Any:
            output = function(module, *args, **kwargs)
            layer = names.get(id(module))
            values = output[0] if isinstance(output, tuple) else output
            # The attention interface of transformers gives [batch, queries, heads, values].
            if layer is not None and not found and values.ndim == 4:
                bad = (~values.isfinite()).flatten(0, 1).any(-1).any(0).nonzero()[:, 0]
                if len(bad):
                    found.append(f"the first bad values come from {layer.name}, head {int(bad[0])}")
            return output

        return attention

    def see(module: Any, args: Any, output: Any) -> None:
        values = output[0] if isinstance(output, tuple) else output
        if not found and isinstance(values, Tensor) and not bool(values.isfinite().all()):
            found.append(f"the first bad values come from {names[id(module)].name}")

    with contextlib.ExitStack() as stack:
        stack.enter_context(interface_patch.watched(wrap))
        for layer in live.plan.layers:
            module = live.model.get_submodule(layer.name)
            stack.callback(module.register_forward_hook(see).remove)
        with torch.no_grad():
            piece.losses(live.model)
    return found[0] if found else "no attention head gives a bad value"
