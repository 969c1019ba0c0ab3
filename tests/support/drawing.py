"""Curves are left blank, but where a test looks at them: they take half of a tiny run or report.

What is drawn is put together all the same, that of runs on axes that serve again and again, as
making them takes most of that time; matplotlib does not turn it into pixels or SVG.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import IO, Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

_draw, _subplots = Figure.savefig, Figure.subplots


def _blank(sheet: Figure, file: IO[Any], **options: Any) -> None:
    if options.get("format") == "svg":  # a chart of a report
        file.write('<svg><g class="blank"></g></svg>')
        return
    dots = options.get("dpi", sheet.dpi)
    size = [round(inches * dots) for inches in sheet.get_size_inches()]
    Image.new("L", size, 255).save(file, "PNG", compress_level=1)


class _Used(Axes):
    """Axes of a sheet that is never drawn, which stay whole when they are removed."""

    def remove(self) -> None:
        """Stay: the next sheet has them too."""


@functools.cache
def _used(rows: int, columns: int) -> Any:
    return _subplots(Figure(), rows, columns, squeeze=False, subplot_kw={"axes_class": _Used})


def _again(sheet: Figure, rows: int, columns: int, *, squeeze: bool = True, **options: Any) -> Any:
    """Return axes that an earlier sheet had, without its lines, for the curves of a run."""
    if squeeze or options:
        return _subplots(sheet, rows, columns, squeeze=squeeze, **options)
    panels = _used(rows, columns)
    for axes in panels.flat:
        for line in [*axes.lines]:
            line.remove()
        if axes.get_yscale() != "linear":
            axes.set_yscale("linear")
    return panels


def leave_blank() -> None:
    """Do so in this process and its forks."""
    Figure.savefig, Figure.subplots = _blank, _again  # type: ignore[method-assign, assignment]
    for columns in (1, 2, 3, 4):
        _used(2, columns)  # here, so that forks have them


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Draw curves meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", _draw)
        patch.setattr(Figure, "subplots", _subplots)
        yield


@pytest.fixture(scope="module")
def drawn() -> Iterator[None]:
    """Curves are drawn in the tests of a module that uses this."""
    with drawing():
        yield
