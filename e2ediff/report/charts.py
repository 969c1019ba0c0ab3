"""Curves as inline SVG, whose colours follow the page's light or dark scheme."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

import attrs

from e2ediff.metric import is_distance
from e2ediff.report.gather import Run
from e2ediff.report.summary import number

_WIDTH, _HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 10, 26, 34
_POINTS, _POINTS_OF_ALL = 240, 12_000
COLOURS = 8
"""Colours that the page's style defines; further cells repeat them with dashes."""

Points = Sequence[tuple[float, float]]


@attrs.frozen
class Line:
    """A cell's curves: one for each seed; `style` is its number."""

    name: str
    style: int
    seeds: Sequence[Points]


@attrs.frozen
class _Scale:
    low: float
    high: float
    start: float
    length: float
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value lies on the paper."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + self.length * (value - low) / (high - low)


def dashes(style: int) -> str:
    """The dash pattern of a cell's lines, as SVG has it; "" for the first colours."""
    return ("", "6 3", "2 2", "8 3 2 3")[style // COLOURS % 4]


def panels(cells: Mapping[str, Sequence[Run]], *, over: str) -> list[str]:
    """Charts of losses, latents, PSNR and distances, over `images` or over `flops`."""
    shown = [
        ("rank", "effective rank of the latents"),
        ("latent_std", "standard deviation of the latents"),
        ("positional", "share of variance that is positional"),
        ("psnr", "reconstruction PSNR, dB"),
    ]
    keys = {k for runs in cells.values() for run in runs for m in run.metrics for k in m}
    losses = sorted(key for key in keys if key.startswith("loss/"))
    shown += [(key, f"loss: {key.removeprefix('loss/')}") for key in losses]
    shown += [(key, key) for key in sorted(keys) if is_distance(key)]
    labels = {"images": "images seen", "flops": "training FLOPs"}
    found = []
    for key, title in shown:
        lines = [
            Line(name, i, [points(run, key, over) for run in runs])
            for i, (name, runs) in enumerate(cells.items())
        ]
        log = key.startswith("loss/")
        if svg := chart(lines, title, labels[over], log=log):
            found.append(svg)
    return found


def points(run: Run, key: str, over: str) -> Points:
    """Finite values of one figure of a run, over images or FLOPs."""
    place: Callable[[float], float] = float
    if over == "flops":
        if run.cost is None:
            return []
        place = run.cost.at
    return [
        (place(line["images"]), line[key])
        for line in run.metrics
        if key in line and "images" in line and math.isfinite(line[key])
    ]


def thinned(line: Points, most: int) -> Points:
    """At most `most` points: means of neighbours, so that the noise of single steps is less."""
    if len(line) <= most:
        return line
    found = []
    for i in range(most):
        part = line[i * len(line) // most : (i + 1) * len(line) // most]
        found.append((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)))
    return found


def mean_line(seeds: Sequence[Points]) -> Points:
    """The mean over seeds where all of them were measured."""
    shared = set.intersection(*({x for x, _ in line} for line in seeds))
    values = [dict(line) for line in seeds]
    return [(x, sum(v[x] for v in values) / len(values)) for x in sorted(shared)]


def chart(lines: Sequence[Line], title: str, x_label: str, *, log: bool = False) -> str:
    """One chart as SVG markup; "" if there is no line to draw.

    Args:
        lines: What to draw: thin lines for seeds, and a thick one for their mean.
        title: Above it, and for those who cannot see it.
        x_label: Below it.
        log: Draw it logarithmically where all values are positive and span a factor of ten.
    """
    count = sum(len(line.seeds) for line in lines)
    most = max(20, min(_POINTS, _POINTS_OF_ALL // max(1, count)))
    lines = [
        attrs.evolve(line, seeds=[s for p in line.seeds if len(s := thinned(p, most)) > 1])
        for line in lines
    ]
    every = [point for line in lines for seed in line.seeds for point in seed]
    if not every:
        return ""
    ys = [y for _, y in every]
    log = log and min(ys) > 0 and max(ys) > 10 * min(ys)
    x = _Scale(*_room([p[0] for p in every]), _LEFT, _WIDTH - _LEFT - _RIGHT)
    low, high = (min(ys), max(ys)) if log else _room(ys, 0.05)
    y = _Scale(low, high, _HEIGHT - _BOTTOM, -(_HEIGHT - _TOP - _BOTTOM), log)
    names = ", ".join(line.name for line in lines if line.seeds)
    alt = f"{title} over {x_label}, from {_tick(low)} to {_tick(high)}: {names}"
    parts = [
        f'<svg role="img" viewBox="0 0 {_WIDTH} {_HEIGHT}" aria-label="{escape(alt)}">',
        f"<title>{escape(alt)}</title>",
        f'<text class="t" x="{_LEFT}" y="16">{escape(title)}{" (log)" if log else ""}</text>',
        *_axes(x, y, x_label),
    ]
    for line in lines:
        parts += _drawn(line, x, y)
    return "".join([*parts, "</svg>"])


def _drawn(line: Line, x: _Scale, y: _Scale) -> list[str]:
    pattern = dashes(line.style)
    style = f'class="c{line.style % COLOURS}"'
    style += f' stroke-dasharray="{pattern}"' if pattern else ""
    alone = len(line.seeds) == 1
    found = [_path(seed, x, y, style, 1.7 if alone else 0.7) for seed in line.seeds]
    if not alone and line.seeds:
        mean = mean_line(line.seeds)
        found += [_path(mean, x, y, style, 2.2)] if len(mean) > 1 else []
    return found


def _path(line: Points, x: _Scale, y: _Scale, style: str, width: float) -> str:
    places = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in line)
    opacity = ' opacity="0.6"' if width < 1 else ""
    return f'<polyline {style} stroke-width="{width}"{opacity} points="{places}"/>'


def _axes(x: _Scale, y: _Scale, x_label: str) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    found = []
    for tick in ticks(y.low, y.high, log=y.log):
        at = y.at(tick)
        found.append(f'<path class="g" d="M{_LEFT} {at:.1f}H{right}"/>')
        found.append(f'<text x="{_LEFT - 5}" y="{at + 4:.1f}" class="e">{_tick(tick)}</text>')
    for tick in ticks(x.low, x.high):
        at = x.at(tick)
        found.append(f'<path class="g" d="M{at:.1f} {bottom}v4"/>')
        found.append(f'<text x="{at:.1f}" y="{bottom + 16}" class="m">{_tick(tick)}</text>')
    middle = (_LEFT + right) / 2
    found.append(f'<text x="{middle:.0f}" y="{_HEIGHT - 3}" class="m">{escape(x_label)}</text>')
    return [*found, f'<path class="a" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>']


def _room(values: Sequence[float], share: float = 0.0) -> tuple[float, float]:
    """Bounds of an axis that leave some space, and are never equal."""
    low, high = min(values), max(values)
    space = (high - low) * share
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        space = abs(high) * 0.1 or 1.0
    return low - space, high + space


def ticks(low: float, high: float, *, log: bool = False) -> list[float]:
    """Round numbers between two bounds: about five, or powers of ten with their 2 and 5."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        digits = (1, 2, 5) if len(powers) <= 4 else (1,)
        found = [digit * 10.0**power for power in powers for digit in digits]
        return [tick for tick in found if low <= tick <= high]
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(d * power for d in (1, 2, 2.5, 5, 10) if d * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _tick(value: float) -> str:
    return number(value, "si" if abs(value) >= 1e4 else ".4g").replace(" ", "")
