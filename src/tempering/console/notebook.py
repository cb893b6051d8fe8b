"""The matrix in a notebook: the page's own canvas, with its profile as a trait in Python."""

from __future__ import annotations

import re
from importlib import resources
from typing import Any

from torch import nn

from tempering.attention.examining.layout_of import layout
from tempering.attention.limits import COLDEST, HOTTEST
from tempering.attention.measuring.measure import Measurement, measure
from tempering.attention.profiles.fingerprint import describe_model
from tempering.attention.profiles.profile import Profile
from tempering.console.costs import QUANTITIES
from tempering.console.subject import Subject
from tempering.data import sample_text
from tempering.errors import MissingExtraError, ProfileError

try:
    import anywidget
    import traitlets
except ImportError as error:
    raise MissingExtraError((error.name or "anywidget").partition(".")[0], "notebook") from error

# In the order that each needs the ones before it.
_PARTS = ("colour.js", "dom.js", "matrix.js", "grid.js", "widget.js")
_IMPORT = re.compile(r"^import [^;]*;\n", re.MULTILINE)


def module_text() -> str:
    """The page's modules as the one module that a widget may have."""
    folder = resources.files("tempering.console").joinpath("static")
    parts = []
    for name in _PARTS:
        text = _IMPORT.sub("", folder.joinpath(name).read_text(encoding="utf-8"))
        parts.append(re.sub(r"^export (?!default)", "", text, flags=re.MULTILINE))
    return "\n".join(parts)


class MatrixWidget(anywidget.AnyWidget):
    """The matrix of a model's temperatures; `widget` makes one.

    profile: the Profile that is painted; setting it repaints. measured: None, or {"before":
    Measurement, "after": Measurement} once `measure` was called or its button pressed.
    """

    _esm = module_text()
    _css = resources.files("tempering.console").joinpath("static", "widget.css").read_text("utf-8")

    profile = traitlets.Instance(Profile)
    measured = traitlets.Dict(allow_none=True, default_value=None)

    _known: Any = traitlets.Dict().tag(sync=True)
    _rows: Any = traitlets.List().tag(sync=True)
    _tables: Any = traitlets.Dict().tag(sync=True)
    _said = traitlets.Unicode("").tag(sync=True)

    def __init__(self, subject: Subject, profile: Profile) -> None:
        self._subject = subject
        known = {"rows": subject.for_page()["rows"], "heads": list(subject.plan.heads)}
        super().__init__(
            profile=profile,
            _rows=_rows_of(subject, profile),
            _known={**known, "coldest": COLDEST, "hottest": HOTTEST},
        )
        self.on_msg(self._asked)

    @traitlets.validate("profile")
    def _fits(self, proposal: Any) -> Profile:
        """ProfileError for a profile of another shape; the widget keeps the one that it has."""
        profile: Profile = proposal["value"]
        profile.resolve(self._subject.plan, rules=True)
        if any(profile.rules):
            raise ProfileError("a profile with rules has more than a matrix; it can't be painted")
        return profile

    @traitlets.observe("profile")
    def _show(self, change: Any) -> None:
        rows = _rows_of(self._subject, self.profile)
        if rows != self._rows:
            self._rows = rows

    @traitlets.observe("_rows")
    def _painted(self, change: Any) -> None:
        if self._rows == _rows_of(self._subject, self.profile):
            return
        self.profile = self._subject.profile({"rows": self._rows})

    def _asked(self, _: Any, content: Any, buffers: Any) -> None:
        """The page's button."""
        if content == "measure":
            self._said = "measuring"
            self.measure()
            self._said = "measured"

    def measure(self, text: str | None = None, *, chunk: int = 128, limit: int = 2) -> None:
        """Measure every head on a text (the package's own by default), before and after."""
        text = sample_text("demo") if text is None else text
        found: dict[str, Measurement] = {}
        for name, profile in (("before", None), ("after", self.profile)):
            found[name] = measure(
                self._subject.model,
                self._subject.tokenizer,
                text,
                profile=profile,
                chunk=chunk,
                limit=limit,
            )
        self.measured = found
        self._tables = {
            when: {name: _table(getattr(own, name)) for name in QUANTITIES}
            for when, own in found.items()
        }


def widget(model: nn.Module, tokenizer: Any, profile: Profile | str | None = None) -> MatrixWidget:
    """The matrix of a model's temperatures in a notebook: painted with the mouse or with keys.

        w = tempering.console.widget(model, tokenizer)
        w                                     # paint, then in another cell
        with tempered(model, w.profile): ...

    Parameters
    ----------
    model, tokenizer: of transformers; the tokenizer is for `measure`.
    profile: to begin with: a Profile, a schedule's text, or None for T = 1.

    Raises MissingExtraError without anywidget (extra `tempering[notebook]`), ArchitectureError for
    a model whose attention can't be tempered, ProfileError for a profile of another shape.
    """
    plan = layout(model)
    subject = Subject(type(model).__name__, model, tokenizer, plan, describe_model(model))
    if not isinstance(profile, Profile):
        profile = Profile.from_schedule(1.0 if profile is None else profile, model)
    return MatrixWidget(subject, profile)


def _rows_of(subject: Subject, profile: Profile) -> list[list[float]]:
    return [row.tolist() for row in profile.resolve(subject.plan, rules=True)]


def _table(values: Any) -> list[list[float | None]]:
    return [[None if x != x else x for x in row] for row in values.tolist()]
