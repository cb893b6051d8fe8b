"""Stages as they run: a row a stage and a mark a worker on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tempering.agents.plan import Plan, Stage

MARKS = {"waiting": "·", "retrying": "~", "done": "●", "failed": "x", "kept": "●"}
LEVELS = "▁▂▃▄▅▆▇█"  # how much of its tokens a running worker has written
STYLES = {"running": "yellow", "retrying": "magenta", "done": "green", "failed": "red"}
WIDEST = 40  # workers shown one by one; a wider stage shows counts


class LiveStages:
    """A view of a run: `watch` takes its events; use as a context manager."""

    def __init__(self, plan: Plan, rounds: int) -> None:
        from rich.console import Console

        self.plan = plan
        self.rounds = rounds
        self.console = Console(stderr=True)
        self.start = time.monotonic()
        self.states: dict[tuple[int, str], list[str]] = {}
        self.tokens: dict[tuple[int, str], dict[int, int]] = {}
        self.told: set[tuple[int, str]] = set()
        self.display: Any = None

    def __enter__(self) -> LiveStages:
        if self.console.is_terminal:
            from rich.live import Live as Display

            self.display = Display(
                get_renderable=self._table, console=self.console, refresh_per_second=8
            )
            self.display.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.display is not None:
            self.display.__exit__(kind, error, trace)
            return
        for turn, name in self.states:  # stages that were cut off
            self._line(turn, name)

    def watch(self, turn: int, stage: Stage, worker: int, state: str, count: int) -> None:
        """One event of the run."""
        key = (turn, stage.name)
        states = self.states.setdefault(key, ["waiting"] * stage.width)
        states[worker] = state
        if state in ("running", "done", "failed"):
            self.tokens.setdefault(key, {})[worker] = count
        if self.display is None and not {"waiting", "running", "retrying"}.intersection(states):
            self._line(*key)

    def _line(self, turn: int, name: str) -> None:
        if (turn, name) in self.told:
            return
        self.told.add((turn, name))
        states = self.states[turn, name]
        failed = states.count("failed")
        ready = states.count("done") + states.count("kept")
        text = f"round {turn}, {name}: {ready} of {len(states)} workers"
        text += f", {failed} failed" if failed else ""
        written = sum(self.tokens.get((turn, name), {}).values())
        text += f", {written} tokens written, {time.monotonic() - self.start:.0f} s"
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _table(self) -> Any:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for column in ("round", "stage", "workers", "done", "tokens"):
            table.add_column(column, justify="left" if column != "tokens" else "right")
        for turn in range(1, self.rounds + 1):
            for stage in self.plan.stages:
                key = (turn, stage.name)
                states = self.states.get(key, ["waiting"] * stage.width)
                marks = Text()
                counts = self.tokens.get(key, {})
                for worker, state in enumerate(states[:WIDEST]):
                    level = min(7, 8 * counts.get(worker, 0) // stage.tokens)
                    marks.append(MARKS.get(state, LEVELS[level]), STYLES.get(state, ""))
                if len(states) > WIDEST:
                    marks.append(f" +{len(states) - WIDEST}")
                ready = states.count("done") + states.count("kept")
                written = sum(counts.values())
                table.add_row(
                    str(turn), Text(stage.name), marks, f"{ready}/{len(states)}", str(written)
                )
        return table
