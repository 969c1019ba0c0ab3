"""One picture of latent collapse, from a collapsed run and a healthy one.

    python benchmarks/collapse_picture.py RUN_COLLAPSED RUN_HEALTHY OUT.png

Shapes: M images, C H W image, N latent tokens, D latent channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import attrs
import click
import torch
import yaml
from judge import Images, load_images
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor
from torchvision.utils import make_grid

from e2ediff.errors import E2EDiffError
from e2ediff.sample.load import load_model
from e2ediff.store.run_directory import RunDirectory

_COLUMNS = 8
_PROBED = 256  # held-out images from whose tokens the principal components are taken
_COLOURS = {"collapsed": "#c8442e", "healthy": "#1f6fb2"}


@attrs.frozen(eq=False)
class Shown:
    """What the picture shows of a run.

    `latents` (M, 3, rows, columns) in [0, 1] are the tokens of the images `x`, coloured by their
    first three principal components on one scale; `explained` is those components' share of the
    variance.
    `decoded` (M, C, H, W) are the images' reconstructions, `samples` new images of the same
    classes.
    """

    objective: str
    metrics: Sequence[Mapping[str, Any]]
    rank_limit: int
    x: Tensor
    latents: Tensor
    explained: Sequence[float]
    decoded: Tensor
    samples: Tensor


def principal_colours(z: Tensor, count: int, grid: tuple[int, int]) -> tuple[Tensor, list[float]]:
    """The tokens of the first `count` latents as colours, and the components' shares.

    All three components have one scale, that of the first, so that an idle one stays grey.

    Args:
        z: Latents, (M, N, D).
        count: Latents drawn.
        grid: Rows and columns of the tokens.

    Returns:
        (count, 3, rows, columns) in [0, 1], and each component's share of the variance.
    """
    rows = z.flatten(0, 1).double()
    centred = rows - rows.mean(dim=0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(rows))
    values, vectors = values.flip(0)[:3].clamp_min(0), vectors.flip(1)[:, :3]
    # The sign of a component is arbitrary: its largest weight is made positive.
    largest = vectors.abs().argmax(dim=0)
    vectors = vectors * vectors[largest, range(3)].sign()
    projected = centred @ vectors / (4 * values[0].clamp_min(1e-12).sqrt()) + 0.5
    colours = projected.clamp(0, 1).reshape(len(z), *grid, 3)[:count].permute(0, 3, 1, 2)
    total = centred.square().sum(dim=1).mean().clamp_min(1e-12)
    return colours.float(), (values / total).tolist()


@torch.no_grad()
def read(run: str, seed: int) -> Shown:
    """Read a run's figures, and let its model encode, decode and sample.

    Raises:
        E2EDiffError: There is no finished run there, or its latents have no places.
    """
    directory, model = RunDirectory.open(run), load_model(run)
    spec, classes = model.net.latent, model.recipe.data.image.classes
    if spec.grid is None:
        raise E2EDiffError(f"{run}: its latent tokens have no place on the image to draw them at")
    held_out = load_images(model.recipe.data, held_out=True)
    shown = _columns(held_out, classes)
    x = torch.cat([shown.x, held_out.first(_PROBED).x])
    z = model.net.encode(x.to(model.device)).cpu()
    colours, explained = principal_colours(z, len(shown), spec.grid)
    labels = shown.label.repeat(2)
    return Shown(
        objective=_objective(directory),
        metrics=directory.read_metrics(),
        rank_limit=spec.dim,
        x=shown.x,
        latents=colours,
        explained=explained,
        decoded=model.reconstruct(shown.x),
        samples=model.sample(labels, seed=seed),
    )


def _objective(directory: RunDirectory) -> str:
    """The name of a run's objective, as its recipe has it."""
    block = yaml.safe_load(directory.resolved())["objective"]
    return block if isinstance(block, str) else str(block["name"])


def _columns(images: Images, classes: int) -> Images:
    """The first image of each of the first classes, up to the picture's columns."""
    chosen = [int((images.label == c).nonzero()[0]) for c in range(min(classes, _COLUMNS))]
    return Images(images.x[chosen], images.label[chosen])


def draw(collapsed: Shown, healthy: Shown, file: str | Path) -> None:
    """Curves of both in shared axes above; below, images, latents and samples of each."""
    both = {"collapsed": collapsed, "healthy": healthy}
    figure = Figure(
        figsize=(9, 7), dpi=200, layout=ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.02)
    )
    above, below = cast("Sequence[SubFigure]", figure.subfigures(2, 1, height_ratios=(2.45, 4.55)))
    halves = cast("Sequence[SubFigure]", below.subfigures(1, 2))
    _curves(above, both)
    for part, (name, shown) in zip(halves, both.items(), strict=True):
        share = ", ".join(f"{s:.0%}" for s in shown.explained)
        rows = {
            "held-out images": shown.x,
            f"their latents: principal components 1-3 as RGB ({share})": shown.latents,
            "their reconstructions": shown.decoded,
            "samples": shown.samples,
        }
        heights = [1.0, 1.0, 1.0, 2.0]
        axes = part.subplots(len(rows), 1, height_ratios=heights)
        title = f"{name} (objective: {shown.objective})"
        part.suptitle(title, fontsize=12, fontweight="bold", color=_COLOURS[name])
        for ax, (title, x) in zip(axes, rows.items(), strict=True):
            _strip(ax, x, len(shown.x), shown.x.shape[-1])
            ax.set_title(title, fontsize=9.5, loc="left", pad=3)
    figure.savefig(file, facecolor="white")


def _curves(figure: Any, both: Mapping[str, Shown]) -> None:
    panels = {
        "rank": "effective rank of the tokens",
        "positional": "share of variance fixed by position",
        "latent_std": "latent std across images",
    }
    for ax, (key, title) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for name, shown in both.items():
            points = [(m["step"], m[key]) for m in shown.metrics if key in m]
            ax.plot(*zip(*points, strict=True), color=_COLOURS[name], label=name, linewidth=2)
        ax.set_title(title, fontsize=10)
        ax.set_xlabel("step", fontsize=9)
        ax.set_ylim(0, None)
        ax.tick_params(labelsize=8.5)
        ax.grid(visible=True, alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        if key == "latent_std":
            ax.legend(fontsize=10, frameon=False, loc="lower center")
        if key == "rank":
            limit = min(shown.rank_limit for shown in both.values())
            ax.axhline(limit, color="0.5", linestyle=":", linewidth=1)
            ax.set_ylim(0, limit * 1.08)
            ax.text(
                0.99,
                limit,
                "most",
                transform=ax.get_yaxis_transform(),
                fontsize=8,
                ha="right",
                va="top",
                color="0.4",
            )


def _strip(ax: Axes, x: Tensor, columns: int, side: int) -> None:
    """Rows of images; coloured tokens are enlarged to the images' side, gray ones to three."""
    if x.shape[1] == 3 and x.shape[-1] != side:
        times = side // x.shape[-1]
        x = x.repeat_interleave(times, dim=-1).repeat_interleave(times, dim=-2)
    else:
        x = (x.clamp(-1, 1) + 1) / 2
    grid = make_grid(x, nrow=columns, padding=2, pad_value=1.0)
    ax.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
    ax.set_axis_off()


@click.command()
@click.argument("run_collapsed")
@click.argument("run_healthy")
@click.argument("out", type=click.Path(dir_okay=False))
@click.option("--seed", default=0, show_default=True, help="Of the samples' noise.")
def main(run_collapsed: str, run_healthy: str, out: str, seed: int) -> None:
    """Draw a collapsed and a healthy run side by side into OUT, a PNG."""
    try:
        draw(read(run_collapsed, seed), read(run_healthy, seed), out)
    except E2EDiffError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
