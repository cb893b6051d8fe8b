"""Temperatures that follow a schedule: of temperatures, or of supports to solve for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real

import torch
from torch import Tensor

from tempering.errors import ScheduleError, SupportError, TemperatureError
from tempering.posterior import temperature_for
from tempering.schedules import Schedule, as_schedule
from tempering.temperature.base import Temperature, as_result


class Clocked(Temperature):
    """A temperature that follows a schedule; its clock stands at u = 0 until `step` moves it.

    The clock is in the state_dict (`progress`, and `reading`, the schedule's value there), so a
    restored module goes on exactly where the saved one stood.
    """

    progress: Tensor
    reading: Tensor

    def __init__(self, schedule: str | float | int | Schedule) -> None:
        super().__init__()
        self.schedule = as_schedule(schedule)
        self.register_buffer("progress", torch.zeros((), dtype=torch.float64))
        self.register_buffer("reading", torch.zeros((), dtype=torch.float64))
        self.step(0)

    @torch.no_grad()
    def step(self, u: float | int) -> None:
        """Move the clock to progress u in [0, 1]; ScheduleError where u is outside."""
        reading = self.schedule(float(u))
        self.progress.fill_(u)
        self.reading.fill_(reading)

    def _check_state(self, state: Mapping[str, Tensor]) -> None:
        if "progress" not in state or "reading" not in state:
            return  # load_state_dict reports what is missing
        u, reading = float(state["progress"]), float(state["reading"])
        expected = self.schedule(u)  # raises where u lies outside [0, 1]
        # A state that was converted to a narrower dtype is rounded to it.
        near = 8 * torch.finfo(state["reading"].dtype).eps
        if not math.isclose(reading, expected, rel_tol=near, abs_tol=0.0):
            raise ScheduleError(
                f"the state is of another schedule: it reads {reading:g} at u = {u:g}, and "
                f"{self.schedule} is {expected:g} there; make the module with the schedule that "
                "was saved"
            )

    def _read(self, u: float | int | Tensor | None, energies: Tensor | None) -> Tensor:
        if u is None:
            return as_result(self.reading, energies)
        values = self.schedule(u.double() if isinstance(u, Tensor) else float(u))
        return as_result(torch.as_tensor(values, device=self.reading.device), energies)

    def extra_repr(self) -> str:
        return f"{self.schedule}, u={self.progress.item():g}"


class Scheduled(Clocked):
    """A temperature read from a schedule: annealing over training, a pattern over depth or tokens.

    Parameters
    ----------
    schedule: a pattern, its text form, or a number. A control (shuffled, uniform, inverted) exists
        only on a clock: give it as `control.on_clock(n)`.
    """

    def _temperature(self, energies: Tensor | None, u: float | int | Tensor | None) -> Tensor:
        return self._read(u, energies)


class Targeted(Clocked):
    """The temperature at which a stated number of hypotheses stay alive, solved for each row.

        support(energies, T) = N(u)

    Gradients flow to the energies by the implicit function theorem; see `temperature_for`.

    Parameters
    ----------
    support: N >= 1, a number, or a pattern of such numbers or its text form.

    Raises
    ------
    SupportError: N under 1 or infinite; when called, an N that the energies can't reach.
    """

    def __init__(self, support: str | float | int | Schedule) -> None:
        if isinstance(support, Real) and not 1 <= float(support) < math.inf:
            raise SupportError(f"a support is a finite number >= 1, got {float(support):g}")
        super().__init__(support)

    def _temperature(self, energies: Tensor | None, u: float | int | Tensor | None) -> Tensor:
        if energies is None:
            raise TemperatureError(
                "a targeted temperature is solved from energies, and none were given: "
                "call module(energies)"
            )
        return temperature_for(energies, self._read(u, energies))
