"""Annealing during training: schedules stepped by a training loop, or by a transformers Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, SupportsIndex

from torch import Tensor, nn

from tempering.counts import whole_number
from tempering.errors import ScheduleError
from tempering.temperature import Clocked

if TYPE_CHECKING:
    from transformers import TrainerCallback

__all__ = ["ScheduleStepper", "trainer_callback"]


class ScheduleStepper:
    """Moves the clocks of scheduled and targeted temperatures through a training run.

    Training step l of n (l = 0..n-1) runs at progress u = l/(n-1): the first at u = 0, where this
    puts the clocks, and the last at u = 1. It is used as a learning-rate scheduler is:

        stepper = ScheduleStepper(model, total_steps=n)
        for batch in batches:  # n of them
            ...; optimizer.step(); stepper.step()

    Parameters
    ----------
    modules: a module, or several; every `Scheduled` and `Targeted` inside is moved.
    total_steps: n >= 1, optimizer steps of the whole run.

    Raises
    ------
    ScheduleError: no clock inside, or a pattern with more stages than there are steps.
    """

    def __init__(
        self, modules: nn.Module | Iterable[nn.Module], total_steps: SupportsIndex
    ) -> None:
        roots = [modules] if isinstance(modules, nn.Module) else list(modules)
        # A dict keeps the order, and holds a module once that is reached twice.
        parts = {part: None for root in roots for part in root.modules()}
        self.clocks = [part for part in parts if isinstance(part, Clocked)]
        self.completed = 0
        if not self.clocks:
            raise ScheduleError(
                "there is nothing to step: no Scheduled or Targeted temperature is inside "
                + (", ".join(type(root).__name__ for root in roots) or "an empty list")
            )
        self.total_steps = whole_number(total_steps, "total_steps", 1, ScheduleError)
        for clock in self.clocks:
            if clock.schedule.stages > self.total_steps:
                raise ScheduleError(
                    f"{clock.schedule} has {clock.schedule.stages} stages and can't show them in "
                    f"{total_steps} training steps; train longer, or use a shorter pattern"
                )
        self.seek(0)

    @property
    def progress(self) -> float:
        """Where the clocks stand, u in [0, 1]; 1 from the last training step on."""
        last = self.total_steps - 1
        return min(self.completed, last) / max(last, 1)

    def step(self) -> None:
        """Move on by one; call after each optimizer step, at most `total_steps` times."""
        self.seek(self.completed + 1)

    def seek(self, completed: SupportsIndex) -> None:
        """Put the clocks where they stand after that many training steps, 0..total_steps."""
        completed = whole_number(completed, "completed steps", 0, ScheduleError)
        if completed > self.total_steps:
            raise ScheduleError(
                f"{completed} completed steps lie outside this run of {self.total_steps}; "
                "give ScheduleStepper the number of optimizer steps of the whole run"
            )
        self.completed = completed
        for clock in self.clocks:
            clock.step(self.progress)

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint keeps: steps completed, and of how many."""
        return {"completed": self.completed, "total_steps": self.total_steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a checkpoint; ScheduleError where it belongs to a run of another length."""
        missing = [name for name in self.state_dict() if name not in state]
        if missing:
            raise ScheduleError(
                f"the checkpoint has no {' and no '.join(missing)}; it is not the state_dict of a "
                f"ScheduleStepper (it holds {', '.join(map(str, state)) or 'nothing'})"
            )
        # Some checkpoint formats turn numbers into tensors.
        total, completed = (_as_number(state[name]) for name in ("total_steps", "completed"))
        completed = whole_number(completed, "completed steps", 0, ScheduleError)
        if total != self.total_steps:
            raise ScheduleError(
                f"the checkpoint is of a run of {total} steps and this run has "
                f"{self.total_steps}, so its temperatures would jump; use the same total_steps"
            )
        self.seek(completed)


def _as_number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def trainer_callback(modules: nn.Module | Iterable[nn.Module]) -> TrainerCallback:
    """A callback with which a transformers `Trainer` does what `ScheduleStepper` does.

    Before each optimizer step the clocks are put at u = global_step/(max_steps - 1). The Trainer
    restores global_step from its checkpoints, so a resumed run follows the same path; gradient
    accumulation counts as one step.

    Parameters
    ----------
    modules: a module, or several; every `Scheduled` and `Targeted` inside is moved.

    Raises
    ------
    ScheduleError: as `ScheduleStepper`, when training begins.
    """
    return _callback_class()(modules)


@cache
def _callback_class() -> type[Any]:
    # Imported here because transformers takes long to import, and only the callback needs it.
    from transformers import TrainerCallback

    class ScheduleCallback(TrainerCallback):
        def __init__(self, modules: nn.Module | Iterable[nn.Module]) -> None:
            self.modules = [modules] if isinstance(modules, nn.Module) else list(modules)

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.stepper = ScheduleStepper(self.modules, state.max_steps)
            self.stepper.seek(state.global_step)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.stepper.seek(state.global_step)

    return ScheduleCallback
