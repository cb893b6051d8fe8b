"""The interface of every regime of temperature, and the fixed regime."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tempering.errors import EnergyError, TemperatureError
from tempering.tensors import TensorLike, as_tensor


class Temperature(nn.Module, ABC):
    """What gives a competition its temperature; see `Fixed`, `Learned`, `Scheduled`, `Targeted`."""

    def forward(
        self,
        energies: TensorLike | None = None,
        *,
        u: float | int | Tensor | None = None,
    ) -> Float[Tensor, "..."]:
        """The temperature, for these energies and this progress where the regime asks for them.

        Parameters
        ----------
        energies: hypotheses last; gives the dtype, and `Targeted` what it solves for. A tensor,
            an array or a list.
        u: progress in [0, 1], a number or a tensor, read instead of the module's own clock by
            the regimes that have one; fixed and learned temperatures don't depend on it.

        Returns
        -------
        T >= 0, of a shape that broadcasts to the energies' rows.
        """
        return self._temperature(
            None if energies is None else as_tensor(energies, "energies", EnergyError), u
        )

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Called by load_state_dict for each module; checks the state before it is loaded."""
        state = {
            key.removeprefix(prefix): value
            for key, value in state_dict.items()
            if key.startswith(prefix) and isinstance(value, Tensor) and not value.is_meta
        }
        self._check_state(state)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_state(self, state: Mapping[str, Tensor]) -> None:
        """Raise TemperatureError or ScheduleError for a state that this module can't have saved."""

    @abstractmethod
    def _temperature(self, energies: Tensor | None, u: float | int | Tensor | None) -> Tensor: ...

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            wide = torch.promote_types(tensor.dtype, moved.dtype)
            if moved.dtype == wide:
                return moved
            source = moved if tensor.is_meta else tensor  # a meta tensor has no values to keep
            return source.to(device=moved.device, dtype=wide)

        return super()._apply(keep, recurse)


class Fixed(Temperature):
    """A constant temperature: a prior belief about noise.

    Parameters
    ----------
    value: T, 0..inf with both limits; a number, or a tensor, array or list with one value for
        each unit.

    Raises
    ------
    TemperatureError: negative or NaN; names the position.
    """

    value: Tensor

    def __init__(self, value: TensorLike) -> None:
        super().__init__()
        level = as_tensor(value, "a temperature", TemperatureError)
        level = level.detach().to(torch.float64, copy=True)
        _check_level(level)
        self.register_buffer("value", level)

    def _check_state(self, state: Mapping[str, Tensor]) -> None:
        if "value" in state:
            _check_level(state["value"])

    def _temperature(self, energies: Tensor | None, u: float | int | Tensor | None) -> Tensor:
        return as_result(self.value, energies)

    def extra_repr(self) -> str:
        return level_text(self.value)


def _check_level(level: Tensor) -> None:
    wrong = ~(level >= 0)
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        at = f" at position {list(where)}" if where else ""
        raise TemperatureError(
            f"a temperature is >= 0 (0 and inf are the limits), got {level[where].item():g}{at}"
        )


def as_result(level: Tensor, energies: Tensor | None) -> Tensor:
    """A copy of T in the dtype that `forward` promises; moving a clock doesn't change the copy."""
    given = torch.get_default_dtype() if energies is None else energies.dtype
    if not given.is_floating_point:
        given = torch.float64  # as the posterior works on whole-number energies
    return level.to(dtype=torch.promote_types(given, torch.float32), copy=True)


def level_text(level: Tensor) -> str:
    """A level in a module's repr: the number, or the shape where there are many."""
    return f"{level.item():g}" if level.ndim == 0 else f"shape={tuple(level.shape)}"
