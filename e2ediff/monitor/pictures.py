"""Images and curves as PNG.

Shapes: M images, C H W image.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from e2ediff.metric import is_distance


def to_bytes(x: Tensor) -> Tensor:
    """Images in [-1, 1], (..., C, H, W), to uint8, rounded to the nearest of 256 values."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def png(x: Tensor) -> bytes:
    """PNG of one image (C, H, W) in [-1, 1], with 1 or 3 channels."""
    pixels = to_bytes(x).permute(1, 2, 0).cpu().numpy()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def grid_png(x: Tensor, columns: int, enlarge: int = 0) -> bytes:
    """PNG of images (M, C, H, W) in [-1, 1], row by row in `columns` columns.

    `enlarge` repeats pixels; 0 chooses so that an image is about 64 pixels wide or larger.
    """
    from torchvision.utils import make_grid  # imports in a second, and is not needed by `check`

    times = enlarge or max(1, round(64 / x.shape[-1]))
    x = x.cpu().clamp(-1, 1)
    x = x.repeat_interleave(times, dim=-1).repeat_interleave(times, dim=-2)
    return png(make_grid(x, nrow=columns, padding=2, pad_value=-0.4))


def curves_png(metrics: Sequence[Mapping[str, float]], title: str) -> bytes:
    """PNG of a run's losses, effective rank, latent std, PSNR and distances over images seen."""
    # Imported here: it takes half a second and is needed at the end of a run only.
    from matplotlib.figure import Figure

    distances = sorted({k for m in metrics for k in m if is_distance(k)})
    columns = 3 if distances else 2
    figure = Figure(figsize=(5.5 * columns, 6.5), layout="constrained")
    panels = figure.subplots(2, columns)
    losses, rank, std, psnr = panels[:, :2].flat
    names = sorted({k for m in metrics for k in m if k.startswith("loss/")})
    for name in names:
        _curve(losses, metrics, name, name.removeprefix("loss/"))
    losses.set(title="losses", yscale="log")
    _curve(rank, metrics, "rank", "tokens")
    _curve(rank, metrics, "rank_online", "tokens, before averaging")
    _curve(rank, metrics, "rank_channel", "images' means")
    _curve(rank, metrics, "rank_sample", "whole images")
    rank.set(title="effective rank of the latents")
    if any(m.get("rank", 0) > 0 for m in metrics):  # latents may be no one's work, or all alike
        rank.set_yscale("log")
    for name, label in (
        ("latent_std", "std across images"),
        ("positional", "share constant per position"),
    ):
        _curve(std, metrics, name, label)
    std.set(title="variance of the latents", ylim=(0, None))
    _curve(psnr, metrics, "psnr", "held-out images")
    psnr.set(title="reconstruction PSNR (dB)")
    for axes, kernel in zip(panels[:, 2:].flat, (False, True), strict=False):
        for name in distances:
            if ("K" in name.partition("-")[0]) is kernel:
                _curve(axes, metrics, name, name)
        axes.set(title="kernel distances" if kernel else "Fréchet distances", ylim=(0, None))
    for axes in panels.flat:
        axes.set_xlabel("images seen")
        axes.grid(visible=True, alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.suptitle(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _curve(axes: object, metrics: Sequence[Mapping[str, float]], name: str, label: str) -> None:
    points = [(m["images"], m[name]) for m in metrics if name in m]
    if points:
        axes.plot(*zip(*points, strict=True), label=label)  # type: ignore[attr-defined]
