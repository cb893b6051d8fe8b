"""Temperatures that follow a schedule over the denoising steps of a diffusers pipeline."""

from __future__ import annotations

from typing import Any

from tempering.attention.control.handle import Tempering
from tempering.errors import ProfileError, RefusedError
from tempering.schedules import Schedule, as_schedule


def pipeline_callback(
    handle: Tempering, schedule: str | float | int | Schedule, *, stack: str | None = None
) -> StepCallback:
    """A callback for one run of a pipeline, which moves a handle's temperatures with its steps.

    Step i of n runs at progress u = i/(n-1), with the temperatures that the handle has now times
    the schedule's value there, T[l, h] s(u):

        with tempered(pipe.unet, profile, sample=sample) as handle:
            pipe("a photo", callback_on_step_end=pipeline_callback(handle, "linear(1.3,1)"))

    After the last step, the handle stands as at the first again, so a callback serves one run
    after the other. n is the pipeline's own `num_timesteps`.

    Parameters
    ----------
    handle: of `tempered`, on the model that denoises.
    schedule: relative temperatures over progress; a control (shuffled, ...) as `.on_clock(n)`.
    stack: "encoder" (own attention, image and text together too) or "cross"; both by default.

    Raises ScheduleError for a pattern with more stages than the run has steps; TemperatureError
    where a product leaves the range of temperatures; ProfileError for another stack; RefusedError
    for a run that begins where the one before was interrupted. The handle keeps its temperatures.
    """
    return StepCallback(handle, as_schedule(schedule), stack)


class StepCallback:
    """What a pipeline calls after each step; see `pipeline_callback`."""

    def __init__(self, handle: Tempering, schedule: Schedule, stack: str | None) -> None:
        depths = handle.layout.depths
        if stack is not None and stack not in depths:
            raise ProfileError(f"this model has no stack '{stack}'; it has {', '.join(depths)}")
        self.handle, self.schedule = handle, schedule
        self._own = handle.rows()
        self._moved = [stack in (None, layer.stack) for layer in handle.layout.layers]
        self._next = 0
        self._set(float(schedule(0.0)))

    def __call__(
        self, pipeline: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Go on to the step after `step`."""
        if step != self._next:
            raise RefusedError(
                f"step {step} of a pipeline ended where step {self._next} was expected: the run "
                "before was interrupted, so this step had the temperatures of another; make a new "
                "pipeline_callback for every run that may be interrupted"
            )
        steps = _steps_of(pipeline)
        values = self.schedule.sample(steps)
        self._next = (step + 1) % steps
        self._set(float(values[self._next]))
        return callback_kwargs

    def _set(self, value: float) -> None:
        self.handle.set_rows(
            row * value if moved else row for row, moved in zip(self._own, self._moved, strict=True)
        )


def _steps_of(pipeline: Any) -> int:
    steps = getattr(pipeline, "num_timesteps", None)
    if isinstance(steps, int) and steps > 0:
        return steps
    return len(pipeline.scheduler.timesteps)
