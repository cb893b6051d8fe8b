"""A plan: stages with widths, temperatures and prompts, from one pattern or from a YAML file.

A pattern such as throb(12,3,1,12) is read as widths: 12 explorers, 3 synthesisers, 1 executor, and
then 12 again, which is the next round. The same pattern gives the temperatures: a stage of width v
is as hot as

    t(v) = log(v / coldest) / log(hottest / coldest)        1 for the widest, 0 for the narrowest

and the workers of a stage differ, in steps towards the next stage: worker i = 0..v-1 of a stage at
t, before a stage at t', is as hot as

    t_i = t + (i/v) (t' - t)

So the temperatures of all workers, stage after stage, follow one curve without a jump. The
amplitude of a worker's attention pattern is A^(t_i).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from tempering.agents import prompts, strict_yaml
from tempering.errors import InputError, ScheduleError
from tempering.files import read_text, write_new
from tempering.schedules import Schedule, as_schedule

VERSION = 1
MOST_WORKERS = 10_000  # in a stage; a typing error should not become a bill


@dataclass(frozen=True)
class Stage:
    """One stage of a plan.

    width: number of workers. temperature: normalised, 0 cold to 1 hot, of the first and the last
    worker; those between are evenly spaced. amplitude: of the attention pattern, 1 or more, of the
    first and the last worker; those between are evenly spaced in logs. tokens: new tokens of a
    worker, at most. prompt: a template. again: the template in rounds after the first, where it is
    another. system: the system turn before the prompt. top_p: probability mass of the nucleus.
    """

    name: str
    width: int
    temperature: tuple[float, float]
    prompt: str
    amplitude: tuple[float, float] = (1.0, 1.0)
    tokens: int = 256
    again: str | None = None
    system: str | None = None
    top_p: float | None = None

    def rungs(self) -> list[tuple[float, float]]:
        """(normalised temperature, amplitude) of each worker."""
        (first, last), (low, high) = self.temperature, self.amplitude
        steps = [i / max(1, self.width - 1) for i in range(self.width)]
        return [(first + u * (last - first), low * (high / low) ** u) for u in steps]


@dataclass(frozen=True)
class Plan:
    """Stages in order. attention: the pattern over depth that their amplitudes scale, or None."""

    stages: tuple[Stage, ...]
    attention: str | None = None

    def patterns(self, stage: Stage) -> list[str | None]:
        """The attention pattern of each worker of a stage, or None for the model's own."""
        return [
            None
            if self.attention is None or amplitude <= 1
            else str(as_schedule(self.attention).amplitude(round(amplitude, 4)))
            for _, amplitude in stage.rungs()
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain values, as the YAML holds them and `from_data` reads them."""
        stages = []
        for stage in self.stages:
            row = {name: value for name, value in asdict(stage).items() if value is not None}
            for name in ("temperature", "amplitude"):
                first, last = row[name]
                row[name] = first if first == last else [first, last]
            stages.append(row)
        return {"version": VERSION, "attention": self.attention, "stages": stages}

    def to_yaml(self) -> str:
        """The plan as a file that a user edits."""
        body = yaml.dump(self.to_json(), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
        return HEADER + body

    def save(self, path: str | Path) -> Path:
        """Write the YAML to a new file; InputError where another plan is there."""
        return write_new(path, self.to_yaml())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan; DataError or InputError names the line or the key that is off."""
        return cls.from_data(strict_yaml.load(read_text(path), str(path)), str(path))

    @classmethod
    def from_data(cls, data: Any, where: str = "plan") -> Plan:
        """The inverse of `to_json`; `where` names the source in errors."""
        data = strict_yaml.fields(data, where, ("version", "stages"), ("attention",))
        if data["version"] != VERSION:
            raise InputError(
                f"{where}: version {data['version']!r}; this tempering reads version {VERSION}"
            )
        if not isinstance(data["stages"], list) or not data["stages"]:
            raise InputError(f"{where}: stages is a list of at least one stage")
        attention = data.get("attention")
        if attention is not None:
            attention = str(as_schedule(strict_yaml.text(attention, f"{where}: attention")))
        stages = tuple(_stage(row, f"{where}: stages[{i}]") for i, row in enumerate(data["stages"]))
        names = [stage.name for stage in stages]
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"{where}: two stages are called '{name}'; names must differ")
        for stage in stages:
            if attention is None and stage.amplitude != (1.0, 1.0):
                raise InputError(
                    f"{where}: stage '{stage.name}' has an amplitude, but the plan has no "
                    "attention pattern; add e.g. attention: throb(12,3,1,12)"
                )
        return cls(stages, attention)

    @classmethod
    def from_pattern(
        cls,
        pattern: str | Schedule,
        *,
        amplitude: float = 1.0,
        attention: str | Schedule | None = None,
        tokens: int = 256,
    ) -> Plan:
        """The plan that one pattern of widths draws.

        Parameters
        ----------
        pattern: e.g. throb(12,3,1,12); whole widths of 1 or more. Where the last width is the
            first one again, it stands for the first stage of the next round.
        amplitude: of the hottest explorers' attention; 1 leaves the attention alone.
        attention: pattern over depth; None takes `pattern` itself.
        tokens: new tokens of a worker, at most.

        Raises ScheduleError for widths that are not whole numbers, or that don't differ.
        """
        course = as_schedule(pattern)
        if not 1 <= amplitude < math.inf:
            raise InputError(f"an amplitude is 1 or more, got {amplitude:g}")
        widths = _widths(course)
        cycle = len(widths) > 2 and widths[0] == widths[-1]
        heats = _heats(widths, course)
        count = len(widths) - 1 if cycle else len(widths)
        stages = []
        for i, (name, prompt, again) in enumerate(_roles(widths[:count])):
            following = heats[i + 1] if i + 1 < len(heats) else heats[i]
            last = heats[i] + (widths[i] - 1) / widths[i] * (following - heats[i])
            ends = (round(heats[i], 3), round(last, 3))
            stages.append(
                Stage(
                    name=name,
                    width=widths[i],
                    temperature=ends,
                    amplitude=(
                        round(amplitude ** ends[0], 4),
                        round(amplitude ** ends[1], 4),
                    ),
                    tokens=tokens,
                    prompt=prompt,
                    again=again,
                )
            )
        over_depth = None
        if amplitude > 1:
            over_depth = str(as_schedule(course if attention is None else attention))
        return cls(tuple(stages), over_depth)


HEADER = """# A plan for: tempering throb "task" --plan FILE
#
#   attention    pattern over the layers, scaled by each worker's amplitude; null leaves it alone
#   width        workers of the stage
#   temperature  0 (cold) to 1 (hot), mapped to the model's range; [first worker, last worker]
#   amplitude    of the attention pattern, 1 or more; [first worker, last worker]
#   tokens       new ones at most, each worker
#   prompt       {task}, {notes} of the stage before, {answer} of the round before
#   again        the prompt in rounds after the first, where it differs
#   system, top_p   optional
"""


class _Dumper(yaml.SafeDumper):
    """Long texts as blocks, pairs of numbers on one line: easier to edit."""


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


def _represent_list(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.Node:
    numbers = all(isinstance(item, float) for item in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=numbers)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)


def _stage(row: Any, where: str) -> Stage:
    row = strict_yaml.fields(
        row,
        where,
        ("name", "width", "temperature", "prompt"),
        ("amplitude", "tokens", "again", "system", "top_p"),
    )
    width = strict_yaml.whole(row["width"], f"{where}.width", 1)
    if width > MOST_WORKERS:
        raise InputError(f"{where}.width: at most {MOST_WORKERS} workers, got {width}")
    for name in ("prompt", "again", "system"):
        if name in row:
            strict_yaml.text(row[name], f"{where}.{name}")
    for name in ("prompt", "again"):
        if name in row:
            prompts.check_template(row[name], f"{where}.{name}")
    top_p = row.get("top_p")
    if top_p is not None:
        top_p = strict_yaml.number(top_p, f"{where}.top_p", 0.0, 1.0)
        if top_p == 0:
            raise InputError(
                f"{where}.top_p: expected more than 0; for the likeliest token alone "
                "set temperature: 0"
            )
    return Stage(
        name=strict_yaml.text(row["name"], f"{where}.name"),
        width=width,
        temperature=_ends(row["temperature"], f"{where}.temperature", 0.0, 1.0),
        amplitude=_ends(row.get("amplitude", 1.0), f"{where}.amplitude", 1.0, 1000.0),
        tokens=strict_yaml.whole(row.get("tokens", 256), f"{where}.tokens", 1),
        prompt=row["prompt"],
        again=row.get("again"),
        system=row.get("system"),
        top_p=top_p,
    )


def _ends(value: Any, where: str, low: float, high: float) -> tuple[float, float]:
    """A number, or [first worker, last worker]."""
    if isinstance(value, list):
        if len(value) != 2:
            raise InputError(f"{where}: expected a number or [first, last], got {value!r}")
        first, last = (strict_yaml.number(item, where, low, high) for item in value)
        return first, last
    single = strict_yaml.number(value, where, low, high)
    return single, single


def _widths(pattern: Schedule) -> list[int]:
    stages = pattern.stages
    if stages > 1000:
        raise ScheduleError(f"{pattern} has {stages} stages; a plan has at most 1000")
    values = [pattern(i / max(1, stages - 1)) for i in range(stages)]
    widths = [round(value) for value in values]
    for value, width in zip(values, widths, strict=True):
        # 1e-9: a pattern interpolates in logs, which rounds whole numbers.
        if abs(value - width) > 1e-9 or not 1 <= width <= MOST_WORKERS:
            raise ScheduleError(
                f"{pattern} has a stage of {value:g} workers; widths are whole numbers from 1 to "
                f"{MOST_WORKERS}, e.g. throb(12,3,1,12)"
            )
    return widths


def _heats(widths: Sequence[int], pattern: Schedule) -> list[float]:
    """t(v) of each width v: 1 for the widest stage, 0 for the narrowest."""
    coldest, hottest = min(widths), max(widths)
    if coldest == hottest:
        raise ScheduleError(
            f"{pattern} has one width, {hottest}, so it doesn't say what is hot and what is cold; "
            "give widths that differ, or a plan file"
        )
    return [math.log(width / coldest) / math.log(hottest / coldest) for width in widths]


def _roles(widths: Sequence[int]) -> list[tuple[str, str, str | None]]:
    """(name, prompt, prompt in later rounds): the widest stages explore, the last one executes,
    the others merge."""
    roles: list[tuple[str, str, str | None]] = []
    for i, width in enumerate(widths):
        if i == len(widths) - 1:
            roles.append(("execute", prompts.EXECUTE, None))
        elif i == 0 or width == max(widths):
            later = prompts.EXPLORE_AGAIN.replace("{answer}", "{notes}")
            prompt = prompts.EXPLORE if i == 0 else later
            roles.append(("explore", prompt, prompts.EXPLORE_AGAIN if i == 0 else None))
        else:
            roles.append(("consolidate", prompts.MERGE, None))
    seen: dict[str, int] = {}
    named: list[tuple[str, str, str | None]] = []
    for name, prompt, again in roles:
        seen[name] = seen.get(name, 0) + 1
        label = name if seen[name] == 1 else f"{name} {seen[name]}"
        named.append((label, prompt, again))
    return named
