"""tempering activation: draw a member of the family kernel x statistic, with its posterior."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from tempering.kernels import Kernel
    from tempering.units import ActivationReport

EPILOG = """Examples:

  tempering activation gaussian mean

  tempering activation gaussian gate-mean -T 0.25 --plot gate.png

  tempering activation student-t mean --nu 2 --span 8

  tempering activation laplace full --centres=-1,0,2 --prior 1,2,1 --json
"""

# Options that set a kernel's shape.
_SHAPES = ("sigma", "b", "nu", "delta", "kappa")
_CURVE_POINTS = 401
_SAMPLE = 2048
_TABLE_ROWS = 9


def activation(
    kernel: Annotated[
        str,
        typer.Argument(
            help="gaussian, laplace, student-t, huber, pseudo-huber, logistic or angular."
        ),
    ],
    statistic: Annotated[
        str,
        typer.Argument(help="mean, mode, full, variance, entropy, gate-mean or gate-mode."),
    ] = "mean",
    temperature: Annotated[
        float, typer.Option("--temperature", "-T", help="Temperature, 0 to inf.")
    ] = 1.0,
    m: Annotated[
        float | None, typer.Option(help="Centres of the signed hypotheses, -m and +m; 1 if none.")
    ] = None,
    centres: Annotated[
        str | None, typer.Option(help="Centres in place of -m and +m, e.g. --centres=-1,0,2.")
    ] = None,
    prior: Annotated[
        str | None, typer.Option(help="Weight of each hypothesis, e.g. --prior 1,2.")
    ] = None,
    sigma: Annotated[float | None, typer.Option(help="Width (gaussian, student-t).")] = None,
    b: Annotated[float | None, typer.Option(help="Width (laplace, logistic).")] = None,
    nu: Annotated[float | None, typer.Option(help="Degrees of freedom (student-t).")] = None,
    delta: Annotated[
        float | None, typer.Option(help="Where the line begins (huber, pseudo-huber).")
    ] = None,
    kappa: Annotated[float | None, typer.Option(help="Concentration (angular).")] = None,
    span: Annotated[float, typer.Option(help="Inputs are z in [-span, span].")] = 4.0,
    plot: Annotated[
        Path | None, typer.Option(help="Draw to this file: .png, .svg or .pdf.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Show an activation: the statistic of a posterior.

    Prints values of the activation and its posterior, and what it does to evenly spaced inputs.
    """
    import math

    import torch

    from tempering.errors import InputError
    from tempering.units import activation as evaluate
    from tempering.units import closed_form, report

    if not 0 < span < math.inf:
        raise InputError(f"--span is {span:g}; expected a positive finite number")
    given = {"sigma": sigma, "b": b, "nu": nu, "delta": delta, "kappa": kappa}
    shape = {name: value for name, value in given.items() if value is not None}
    chosen = _kernel(kernel, shape, m, _numbers("--centres", centres), _numbers("--prior", prior))
    half = _CURVE_POINTS // 2
    z = span * torch.arange(-half, half + 1, dtype=torch.float64) / half  # 0 is among them exactly
    values = evaluate(z, chosen, statistic, temperature)
    r = evaluate(z, chosen, "full", temperature)
    sample = torch.linspace(-span, span, _SAMPLE, dtype=torch.float64)
    measured = report(chosen, statistic, temperature, sample)
    form = closed_form(chosen, statistic, temperature)
    if plot is not None:
        from tempering.reports import save_figure

        save_figure(_figure(chosen, measured, z, values, r), plot)
    if as_json:
        import json

        payload = {
            **measured.as_dict(),
            "closed_form": None if form is None else type(form).__name__,
            "z": z.tolist(),
            "activation": values.tolist(),
            "responsibilities": r.tolist(),
        }
        typer.echo(json.dumps(_json_value(payload)))
        return
    _print(measured, "none" if form is None else type(form).__name__, z, values, r)


def _kernel(
    name: str,
    shape: dict[str, float],
    m: float | None,
    centres: list[float] | None,
    prior: list[float] | None,
) -> Kernel:
    """The kernel with the options that it takes."""
    from dataclasses import fields

    from tempering.errors import InputError
    from tempering.kernels import KERNELS, Centred, Mahalanobis, Signed, as_kernel

    kind = KERNELS.get(name)
    if kind is None:
        return as_kernel(name)  # refuses with the reason
    if kind is Mahalanobis:
        raise InputError(
            "this command draws kernels on the line, and Mahalanobis compares vectors; on the "
            "line it is gaussian with --sigma. For vectors use tempering.Mahalanobis in Python"
        )
    takes = [field.name for field in fields(kind) if field.name in _SHAPES]
    for option in shape:
        if option not in takes:
            raise InputError(
                f"{name} takes no --{option}; it takes "
                f"{' and '.join(f'--{taken}' for taken in takes)}"
            )
    if m is not None and centres is not None:
        raise InputError("--m places two signed hypotheses and --centres any number; give one")
    if centres is not None:
        return kind(Centred(centres, prior), **shape)
    hypotheses = Signed(1.0 if m is None else m, prior)
    return kind(hypotheses, **shape)


def _numbers(option: str, text: str | None) -> list[float] | None:
    from tempering.errors import InputError

    if text is None:
        return None
    numbers = []
    for position, part in enumerate(text.split(","), 1):
        try:
            numbers.append(float(part))
        except ValueError:
            raise InputError(
                f"{option} {text}: item {position} is {part!r}; expected numbers with commas "
                f"between them, e.g. {option}=1,2"
            ) from None
    return numbers


def _print(measured: ActivationReport, form: str, z: Any, values: Any, r: Any) -> None:
    from rich.console import Console

    from tempering.reports import print_grid
    from tempering.reports.grids import Grid

    console = Console()
    name = f"{measured.kernel} x {measured.statistic} at T = {measured.temperature:g}"
    labels = [f"r{h}" for h in range(r.shape[-1])]
    wide = values.ndim > 1
    columns = ["z", *labels] if wide else ["z", "activation", *labels]
    step = (len(z) - 1) // (_TABLE_ROWS - 1)
    rows = []
    for i in range(0, len(z), step):
        numbers = [z[i], *r[i]] if wide else [z[i], values[i], *r[i]]
        rows.append([f"{float(number):.4f}" for number in numbers])
    print_grid(Grid(name, f"closed form: {form}", columns, rows), console)
    measures = [
        ("saturation", f"{measured.saturation:.3f}", "share of inputs under 1 % of the top slope"),
        ("sensitivity", f"{measured.sensitivity:.4f}", "mean slope"),
        ("steepest", f"{measured.steepest:.4f}", "greatest slope"),
        ("decisiveness", f"{measured.decisiveness:.4f}", "1 - mean S / log H"),
        ("robustness", f"{measured.robustness:.4f}", f"to noise of sd {measured.noise:.3g}"),
        ("noise gain", f"{measured.noise_gain:.4f}", "rms change over rms noise"),
    ]
    remark = f"over {measured.n} inputs evenly from {float(z[0]):g} to {float(z[-1]):g}"
    print_grid(
        Grid("On its inputs", remark, ["", "", ""], [list(row) for row in measures]), console
    )
    kept = [[statistic, f"{nats:.4f}"] for statistic, nats in measured.information.items()]
    print_grid(Grid("Information kept", "", ["statistic", "nats"], kept), console)


def _figure(kernel: Kernel, measured: ActivationReport, z: Any, values: Any, r: Any) -> Figure:
    """Three panels: the activation among its neighbours in T, the posterior, the trade-off."""
    import math

    from tempering.reports.axes import new, styled, title
    from tempering.reports.style import COLD, HOT, INK, QUIET, series
    from tempering.units import activation as evaluate

    @styled
    def draw() -> Figure:
        figure = new(620.0)
        upper, middle, lower = figure.subplots(3)
        level = measured.temperature
        neighbours = ((level / 4, COLD), (level * 4, HOT)) if 0 < level < math.inf else ()
        for temperature, colour in neighbours:
            other = evaluate(z, kernel, measured.statistic, temperature)
            upper.plot(z, other, color=colour, linewidth=1)
        upper.plot(z, values, color=INK)
        upper.set_xlabel("z")
        below = "blue T/4 · ink T · warm 4T" if neighbours else "at the limit"
        title(upper, f"{measured.kernel} x {measured.statistic}, T = {level:g}", below)
        for h in range(r.shape[-1]):
            colour = series(h)["color"]
            middle.plot(z, r[:, h], color=colour)
            middle.annotate(
                f"r{h}", (z[int(r[:, h].argmax())], r[:, h].max()), xytext=(2, 4),
                textcoords="offset points", color=colour,
            )  # fmt: skip
        middle.set_xlabel("z")
        middle.set_ylim(-0.03, 1.1)
        title(middle, f"its posterior at T = {level:g}")
        curve = measured.trade_off
        lower.plot(curve.decisiveness, curve.robustness, color=QUIET)
        lower.plot([measured.decisiveness], [measured.robustness], marker="o", color=INK)
        lower.set_xlabel("decisiveness, 1 - S / log H")
        lower.set_ylabel("robustness")
        title(lower, "robustness against decisiveness", f"hot at the left · dot: T = {level:g}")
        return figure

    return draw()


def _json_value(value: Any) -> Any:
    """A value for JSON, which has no infinity: it becomes the text "inf"."""
    if isinstance(value, float) and value == float("inf"):
        return "inf"
    if isinstance(value, dict):
        return {key: _json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    return value
