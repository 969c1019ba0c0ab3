"""Curves of runs are left blank, but where a test looks at them: they take half of a tiny run.

What is drawn is put together all the same; matplotlib does not turn it into pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

_draw = Figure.savefig


def _blank(sheet: Figure, file: IO[bytes], **options: Any) -> None:
    if options.get("format") != "png":  # a chart of a report, which is read
        return _draw(sheet, file, **options)
    size = [round(inches * options["dpi"]) for inches in sheet.get_size_inches()]
    return Image.new("L", size, 255).save(file, "PNG")


def leave_blank() -> None:
    """Do so in this process and its forks."""
    Figure.savefig = _blank  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def drawn() -> Iterator[None]:
    """Curves are drawn in the tests of a module that uses this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", _draw)
        yield
