"""Read a run's figures in a small, fixed amount of memory, however many lines it logged."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_MOST = 4096  # points of a curve; a run rarely logs as many
_HUGE = 1e308  # of whole numbers in JSON, which a float cannot hold
_SHARE = 10  # the tail of a series is its last tenth


class Curve:
    """The values of one figure over the images seen, in fewer than 4096 points.

    Up to that number they are the values themselves; of more, each point is the mean of 2, 4, 8,
    ... consecutive ones, without those that are not finite.
    """

    def __init__(self) -> None:
        self._xs, self._ys = array("d"), array("d")
        self._stride = 1
        self._pending: list[tuple[float, float]] = []

    def add(self, x: float, y: float) -> None:
        """Add a value."""
        if self._stride > 1:
            self._pending.append((x, y))
            if len(self._pending) < self._stride:
                return
            x, y = _mean(self._pending)
            self._pending.clear()
        self._xs.append(x)
        self._ys.append(y)
        if len(self._xs) == _MOST:
            points = list(self)
            halved = [_mean(points[i : i + 2]) for i in range(0, _MOST, 2)]
            self._xs, self._ys = (array("d", values) for values in zip(*halved, strict=True))
            self._stride *= 2

    def __iter__(self) -> Iterator[tuple[float, float]]:
        yield from zip(self._xs, self._ys, strict=True)
        if self._pending:
            yield _mean(self._pending)


def _mean(points: list[tuple[float, float]]) -> tuple[float, float]:
    if len(points) == 1:
        return points[0]
    finite = [y for _, y in points if math.isfinite(y)]
    y = sum(finite) / len(finite) if finite else math.nan
    return sum(x for x, _ in points) / len(points), y


class Tail:
    """The last tenth of a series, at least its last value."""

    def __init__(self) -> None:
        self._values = array("d")
        self._count = self._start = 0

    def add(self, value: float) -> None:
        """Add a value."""
        self._values.append(value)
        self._count += 1
        self._start = max(0, len(self._values) - max(1, self._count // _SHARE))
        if self._start > _MOST:
            del self._values[: self._start]
            self._start = 0

    @property
    def mean(self) -> float:
        """Return its mean."""
        values = self._values[self._start :]
        return sum(values) / len(values)


class Figures:
    """What reports need of the lines of `metrics.jsonl`, of which only numbers count.

    `curves` maps each figure to its curve over images, in the order in which they were first
    logged; `last` maps it to its last value, and `tails` a loss to its tail.
    `images` and `step` are those of the last line.
    """

    def __init__(self, lines: Iterable[Mapping[str, Any]]) -> None:
        self.curves: dict[str, Curve] = {}
        self.last: dict[str, float] = {}
        self.tails: dict[str, Tail] = {}
        line: Mapping[str, Any] = {}
        for line in lines:
            images = _number(line.get("images"))
            for name, found in line.items():
                if (value := _number(found)) is None:
                    continue
                self.last[name] = value
                if (curve := self.curves.get(name)) is None:
                    curve = self.curves[name] = Curve()
                    if name.startswith("loss/"):
                        self.tails[name] = Tail()
                if images is not None:
                    curve.add(images, value)
                if name in self.tails:
                    self.tails[name].add(value)
        self.images, self.step = _count(line.get("images")), _count(line.get("step"))


def _number(value: object) -> float | None:
    if type(value) is float:
        return value
    if type(value) is not int:
        return None
    return value if -_HUGE < value < _HUGE else math.inf


def _count(value: object) -> int:
    number = _number(value)
    return int(number) if number is not None and math.isfinite(number) else 0
