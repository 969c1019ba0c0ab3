"""Draw curves as inline SVG, whose colours follow the page's light or dark scheme."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

import attrs

from e2ediff.report.gather import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INCHES = (4.2, 2.5)
_AXES = (0.13, 0.15, 0.84, 0.71)
_POINTS, _POINTS_OF_ALL = 240, 12_000
COLOURS = 8
"""Colours that the page's style defines; further cells repeat them with dashes."""

_PALETTE = tuple(f"#abcde{i}" for i in range(COLOURS))
_INK, _SOFT, _LINE = "#abcdea", "#abcdeb", "#abcdec"
# Placeholders for variables of the page's style, which has a light and a dark scheme.
_VARIABLES = {colour: f"--c{i}" for i, colour in enumerate(_PALETTE)}
_VARIABLES |= {_INK: "--ink", _SOFT: "--soft", _LINE: "--line"}
_STYLE = {
    "svg.fonttype": "none",  # keep text as text
    "font.size": 8,
    "figure.titlesize": 9.5,
    "figure.titleweight": "bold",
    "axes.labelcolor": _SOFT,
    "axes.edgecolor": _SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.xmargin": 0,
    "axes.formatter.useoffset": False,
    "grid.color": _LINE,
    "xtick.bottom": False,
    "ytick.left": False,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
}
# Several charts share one page, so ids inside them would collide.
_NAMES = re.compile(r' (?:id|clip-path)="[^"]*"')

Points = Sequence[tuple[float, float]]


@attrs.frozen
class Line:
    """A cell's curves: one for each seed; `style` is its number."""

    name: str
    style: int
    seeds: Sequence[Points]


def dashes(style: int) -> str:
    """Return the SVG dash pattern of a cell's lines; "" for the first colours."""
    return ("", "6 3", "2 2", "8 3 2 3")[style // COLOURS % 4]


def panels(cells: Mapping[str, Sequence[Run]], *, over: str) -> list[str]:
    """Draw charts of losses and of figures declared as curves, over `images` or over `flops`."""
    runs = [run for found in cells.values() for run in found]
    shown = dict[str, str]()
    for run in runs:
        for key, figure in run.described.items():
            if "charts" in figure.shown_on:
                better = f" ({figure.better} is better)" if figure.better else ""
                shown.setdefault(key, f"{figure.title}{better}")
    keys = {key for run in runs for key in run.curves}
    losses = sorted(key for key in keys if key.startswith("loss/"))
    shown |= {key: f"loss: {key.removeprefix('loss/')}" for key in losses}
    labels = {"images": "images seen", "flops": "training FLOPs"}
    found = []
    for key, title in shown.items():
        lines = [
            Line(name, i, [points(run, key, over) for run in runs])
            for i, (name, runs) in enumerate(cells.items())
        ]
        log = key.startswith("loss/")
        if svg := chart(lines, title, labels[over], log=log):
            found.append(svg)
    return found


def points(run: Run, key: str, over: str) -> Points:
    """Return the finite values of one figure of a run, over images or FLOPs."""
    place: Callable[[float], float] = float
    if over == "flops":
        if run.cost is None:
            return []
        place = run.cost.at
    return [(place(x), y) for x, y in run.curves.get(key, ()) if math.isfinite(y)]


def thinned(line: Points, most: int) -> Points:
    """Reduce to at most `most` points by averaging neighbours, which also reduces noise."""
    if len(line) <= most:
        return line
    found = []
    for i in range(most):
        part = line[i * len(line) // most : (i + 1) * len(line) // most]
        found.append((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)))
    return found


def mean_line(seeds: Sequence[Points]) -> Points:
    """Return the mean over seeds where all of them were measured."""
    shared = set.intersection(*({x for x, _ in line} for line in seeds))
    values = [dict(line) for line in seeds]
    return [(x, sum(v[x] for v in values) / len(values)) for x in sorted(shared)]


def chart(lines: Sequence[Line], title: str, x_label: str, *, log: bool = False) -> str:
    """Draw one chart as SVG, in colours that the page defines; "" if there is no line to draw.

    Args:
        lines: Lines to draw: thin ones for seeds, and a thick one for their mean.
        title: Title, and text alternative.
        x_label: Label of the x axis.
        log: Use a logarithmic scale where all values are positive and span a factor of ten.
    """
    count = sum(len(line.seeds) for line in lines)
    most = max(20, min(_POINTS, _POINTS_OF_ALL // max(1, count)))
    lines = [
        attrs.evolve(line, seeds=[s for p in line.seeds if len(s := thinned(p, most)) > 1])
        for line in lines
    ]
    ys = [y for line in lines for seed in line.seeds for _, y in seed]
    if not ys:
        return ""
    # Imported here: it takes half a second.
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator

    log = log and min(ys) > 0 and max(ys) > 10 * min(ys)
    names = ", ".join(line.name for line in lines if line.seeds)
    alt = f"{title} over {x_label}, from {min(ys):.4g} to {max(ys):.4g}: {names}"
    drawn = io.StringIO()
    with style.context(["default", _STYLE]):  # whatever the user's matplotlibrc says
        axes = (figure := Figure(figsize=_INCHES)).add_axes(_AXES)
        above = f"{title} (log)" if log else title
        # No math mode: names of losses come from plugins.
        figure.suptitle(above, x=_AXES[0], ha="left", color=_INK, parse_math=False)
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        if log:
            axes.set_yscale("log", subs=())
            decades = math.log10(max(ys) / min(ys))
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 4 else (1,)))
            axes.yaxis.set_major_formatter("{x:.4g}")
        for line in lines:
            _draw(axes, line)
        figure.savefig(drawn, format="svg", transparent=True)
    svg = drawn.getvalue()
    body = _NAMES.sub("", svg[svg.index("<g ") :])
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    width, height = (72 * inches for inches in _INCHES)  # matplotlib's points
    return (
        f'<svg role="img" viewBox="0 0 {width:g} {height:g}" aria-label="{escape(alt)}">'
        f"<title>{escape(alt)}</title>{body}"
    )


def _draw(axes: Axes, line: Line) -> None:
    alone = len(line.seeds) == 1
    curves = [(seed, 1.3 if alone else 0.5, 1.0 if alone else 0.6) for seed in line.seeds]
    if not alone and line.seeds and len(mean := mean_line(line.seeds)) > 1:
        curves.append((mean, 1.7, 1.0))
    for curve, width, opacity in curves:
        (drawn,) = axes.plot(
            *zip(*curve, strict=True),
            color=_PALETTE[line.style % COLOURS],
            linewidth=width,
            alpha=opacity,
        )
        if pattern := dashes(line.style):
            drawn.set_dashes([float(length) / width for length in pattern.split()])
