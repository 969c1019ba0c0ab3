"""Read a run's figures in a small, fixed amount of memory, however many lines it logged."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from operator import add
from typing import Any

_MOST = 4096  # points of a curve; a run rarely logs as many
_HUGE = 1e308  # of whole numbers in JSON, which a float cannot hold
_BATCH = 512  # lines
_SHARE = 10  # the tail of a series is its last tenth


class Curve:
    """The values of one figure over the images seen, in fewer than 4096 points.

    Up to that number they are the values themselves; of more, each point is the mean of 2, 4, 8,
    ... consecutive ones, without those that are not finite.
    """

    def __init__(self) -> None:
        self._xs, self._ys = array("d"), array("d")
        self._stride = 1
        self._pending: tuple[list[float], list[float]] = [], []

    def add(self, x: float, y: float) -> None:
        """Add a value."""
        self.extend((x,), (y,))

    def extend(self, xs: Sequence[float], ys: Sequence[float]) -> None:
        """Add values."""
        waiting, start = self._pending, 0
        while start < len(xs):
            if self._stride == 1:
                stop = start + _MOST - len(self._xs)
                self._xs.extend(xs[start:stop])
                self._ys.extend(ys[start:stop])
            else:
                stop = start + self._stride - len(waiting[0])
                waiting[0].extend(xs[start:stop])
                waiting[1].extend(ys[start:stop])
                if len(waiting[0]) == self._stride:
                    self._append(*_mean(*waiting))
                    waiting[0].clear()
                    waiting[1].clear()
            start = stop
            if len(self._xs) == _MOST:
                self._halve()

    def _halve(self) -> None:
        """Put the mean of each two points in their place."""
        xs, ys = self._xs, self._ys
        sums = array("d", map(add, ys[::2], ys[1::2]))
        self._stride *= 2
        if math.isfinite(sum(sums)):
            self._xs = array("d", (x / 2 for x in map(add, xs[::2], xs[1::2])))
            self._ys = array("d", (y / 2 for y in sums))
            return
        self._xs, self._ys = array("d"), array("d")
        for i in range(0, _MOST, 2):
            self._append(*_mean(xs[i : i + 2], ys[i : i + 2]))

    def _append(self, x: float, y: float) -> None:
        self._xs.append(x)
        self._ys.append(y)

    def __iter__(self) -> Iterator[tuple[float, float]]:
        yield from zip(self._xs, self._ys, strict=True)
        if self._pending[0]:
            yield _mean(*self._pending)


def _mean(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    if len(xs) == 1:
        return xs[0], ys[0]
    total, count = sum(ys), len(ys)
    if not math.isfinite(total):
        finite = [y for y in ys if math.isfinite(y)]
        total, count = (sum(finite), len(finite)) if finite else (math.nan, 1)
    return sum(xs) / len(xs), total / count


class Tail:
    """The last tenth of a series, at least its last value."""

    def __init__(self) -> None:
        self._values = array("d")
        self._count = self._start = 0

    def extend(self, values: Sequence[float]) -> None:
        """Add values."""
        self._values.extend(values)
        self._count += len(values)
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
        rest = iter(lines)
        while batch := [*islice(rest, _BATCH)]:
            line = batch[-1]
            for names, alike in groupby(batch, tuple):
                self._add(names, [*alike])
        self.images, self.step = _count(line.get("images")), _count(line.get("step"))

    def _add(self, names: tuple[str, ...], lines: Sequence[Mapping[str, Any]]) -> None:
        """Add lines of the same names: column by column, if all that they hold is numbers."""
        columns = dict(
            zip(names, zip(*(line.values() for line in lines), strict=True), strict=True)
        )
        if all(map(_are_numbers, columns.values())):
            for name, column in columns.items():
                self._take(name, column, columns.get("images", ()))
        elif len(lines) > 1:
            for line in lines:
                self._add(names, [line])
        else:
            numbers = {n: (value,) for n in names if (value := _number(lines[0][n])) is not None}
            for name, column in numbers.items():
                self._take(name, column, numbers.get("images", ()))

    def _take(self, name: str, values: Sequence[float], images: Sequence[float]) -> None:
        self.last[name] = values[-1]
        if name not in self.curves:
            self.curves[name] = Curve()
            if name.startswith("loss/"):
                self.tails[name] = Tail()
        if images:
            self.curves[name].extend(images, values)
        if name in self.tails:
            self.tails[name].extend(values)


def _are_numbers(column: Sequence[object]) -> bool:
    kinds = {*map(type, column)}
    if int not in kinds:
        return kinds <= {float}
    whole: list[Any] = [value for value in column if type(value) is int]
    return kinds <= {float, int} and min(whole) > -_HUGE and max(whole) < _HUGE


def _number(value: object) -> float | None:
    if type(value) is float:
        return value
    if type(value) is not int:
        return None
    return value if -_HUGE < value < _HUGE else math.inf


def _count(value: object) -> int:
    number = _number(value)
    return int(number) if number is not None and math.isfinite(number) else 0
