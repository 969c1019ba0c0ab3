"""Figures: what a measured number is called, which way it is better, and where it is shown."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

import attrs
from attrs import validators

Better = Literal["low", "high"]
"""Whether a low or a high value of a figure is the better one."""

Place = Literal["line", "table", "charts"]
"""Where a figure is shown: `line` is the progress line, `table` the first table of a report, and
`charts` a chart of its own in a report and a curve in `curves.png`."""

_BETTER = validators.optional(validators.in_(("low", "high")))


def _is_format(figure: object, field: object, form: str) -> None:
    format(0.5, form)  # raises ValueError


@attrs.frozen
class Figure:
    """What a figure is called, how it is judged, where it is shown, and how the alarm takes it.

    A name such as `unexplained@0.5` or `spectrum/1` is declared by the part before its first `@`
    or `/`, unless it is declared itself.

    Raises ValueError for a value that is not one of those below.

    Args:
        name: As in `metrics.jsonl`.
        title: In tables, charts and messages, within a sentence; by default the name.
        better: None if neither low nor high values are better.
        form: The format of its values, as in `format(value, ".2f")`.
        shown_on: The places where it is shown.
        panel: Title of the chart of `curves.png`, which figures with the same `panel` share; by
            default the title.
        of: What it scores: samples, reconstructions, or "" for neither.
        short: Its name on the progress line; by default the name.
        alarm: The option of the recipe's `alarm` by which a fall of a positive figure is a sign
            of collapse: a value below the share `fall`, or `shrink`, of its largest in the run.
        dead_below: A sign of collapse together with a value below this sounds the alarm at once,
            without waiting for `alarm.window`.
        dead_above: The same of a value above this.
    """

    name: str
    title: str = attrs.field(default=attrs.Factory(lambda f: f.name, takes_self=True))
    better: Better | None = attrs.field(default=None, validator=_BETTER)
    form: str = attrs.field(default=".4g", validator=_is_format)
    shown_on: tuple[Place, ...] = attrs.field(
        default=(),
        validator=validators.deep_iterable(
            validators.in_(("line", "table", "charts")), validators.instance_of(tuple)
        ),
    )
    panel: str = attrs.field(default=attrs.Factory(lambda f: f.title, takes_self=True))
    of: Literal["", "samples", "reconstructions"] = attrs.field(
        default="", validator=validators.in_(("", "samples", "reconstructions"))
    )
    short: str = attrs.field(default=attrs.Factory(lambda f: f.name, takes_self=True))
    alarm: Literal["", "fall", "shrink"] = attrs.field(
        default="", validator=validators.in_(("", "fall", "shrink"))
    )
    dead_below: float | None = None
    dead_above: float | None = None


def find(name: str, figures: Iterable[Figure]) -> Figure | None:
    """Find the figure of this name as declared, or of the part before its `@` or `/`."""
    declared = {figure.name: figure for figure in figures}
    stem = re.split("[@/]", name, maxsplit=1)[0]
    found = declared.get(name) or declared.get(stem)
    if found is None or found.name == name:
        return found
    rest = name[len(stem) :]
    return attrs.evolve(
        found, name=name, title=f"{found.title}{rest}", short=f"{found.short}{rest}"
    )
