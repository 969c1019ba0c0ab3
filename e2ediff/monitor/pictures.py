"""Encode an image, and curves, as PNG.

Shapes: C H W image.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from e2ediff.data import to_pixels
from e2ediff.figure import Figure, find
from e2ediff.store.curves import Curve, Figures


def png(x: Tensor) -> bytes:
    """Encode one image (C, H, W) in [-1, 1], with 1 or 3 channels, as PNG."""
    pixels = to_pixels(x).permute(1, 2, 0).cpu().numpy()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def curves_png(
    metrics: Iterable[Mapping[str, float]], title: str, declared: Sequence[Figure]
) -> bytes:
    """Plot a run's losses, and the figures declared as curves, over images seen, as PNG.

    Args:
        metrics: Lines of `metrics.jsonl`, each with `images`.
        title: Title of the picture.
        declared: Declarations of the figures; an undeclared figure has no curve.
    """
    # Imported here: it takes half a second and is needed at the end of a run only.
    from matplotlib.figure import Figure as Sheet

    curves = Figures(metrics).curves
    shared: dict[str, list[Figure]] = {}
    for name in curves:
        found = find(name, declared)
        if found is not None and "charts" in found.shown_on:
            shared.setdefault(found.panel, []).append(found)
    columns = -(-(1 + len(shared)) // 2)
    width, height = 5.5 * columns, 6.5  # inches
    sheet = Sheet(figsize=(width, height))
    # A layout engine draws everything a second time, to measure it.
    sheet.subplots_adjust(
        left=0.75 / width, right=1 - 0.15 / width, bottom=0.5 / height, top=1 - 0.7 / height,
        wspace=0.19, hspace=0.38,
    )  # fmt: skip
    panels = list(sheet.subplots(2, columns, squeeze=False).flat)
    losses: list[float] = []
    for name in sorted(name for name in curves if name.startswith("loss/")):
        losses += _curve(panels[0], curves[name], name.removeprefix("loss/"))
    _scale(panels[0], losses)
    panels[0].set_title("losses", y=1.0)
    for axes, (panel, figures) in zip(panels[1:], shared.items(), strict=False):
        values: list[float] = []
        for figure in figures:
            values += _curve(axes, curves[figure.name], figure.title)
        ways = {figure.better for figure in figures}
        better = ways.pop() if len(ways) == 1 else None
        # A title without a place is moved up until it is clear of all labels, which are measured.
        axes.set_title(f"{panel} ({better} is better)" if better else panel, y=1.0)
        _scale(axes, values)
    for axes in panels[1 + len(shared) :]:
        axes.remove()
    for axes in panels[: 1 + len(shared)]:
        axes.set_xlabel("images seen")
        axes.locator_params("x", nbins=4)
        axes.grid(visible=True, alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    sheet.suptitle(title)
    buffer = io.BytesIO()
    sheet.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _curve(axes: Any, curve: Curve, label: str) -> list[float]:
    """Draw a figure's curve; return its finite values."""
    points = list(curve)
    if points:
        axes.plot(*zip(*points, strict=True), label=label)
    return [value for _, value in points if math.isfinite(value)]


def _scale(axes: Any, values: Sequence[float]) -> None:
    """Choose a linear or logarithmic axis for these values, with few labels.

    Most of the time that a picture takes is that of its labels, above all of formulas such as
    powers of ten.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = (min(values), max(values)) if values else (0.0, 0.0)
    if low > 0 and high > 10 * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.locator_params("y", nbins=5)
        if low >= 0:
            axes.set_ylim(0, None)
