"""Scores of finished runs by the judge, as figures, tables and grids of images.

Shapes: M images, C H W image, F features.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import Any

import attrs
import torch
from judge import (
    Images,
    Judge,
    accuracy,
    features,
    frechet_distance,
    load_images,
    nearest_distance,
    pixel_components,
    pixel_distance,
)
from torch import Tensor
from torch.nn import functional

from e2ediff.ablate.cost import cost_of
from e2ediff.data import SourceConfig
from e2ediff.parts.diagnostics.latent_health import LatentHealth
from e2ediff.report.statistics import spread
from e2ediff.sample.load import load_model
from e2ediff.store.records import SAVES
from e2ediff.store.run_directory import RunDirectory

HELD_OUT = 1000
"""Held-out images on which the judge's accuracy and reconstructions are measured."""

GRID_ROWS = 3

HEALTH = ("rank", "rank_fraction", "positional", "latent_std")


# What is scored


@attrs.frozen(eq=False)
class Data:
    """The training images and the held-out ones that scores compare with."""

    train: Images
    held_out: Images
    basis: tuple[Tensor, Tensor] = attrs.field(
        default=attrs.Factory(lambda self: pixel_components(self.train.x), takes_self=True)
    )

    @classmethod
    def open(cls, source: SourceConfig) -> Data:
        """Read both."""
        return cls(load_images(source), load_images(source, held_out=True))


def real_figures(judge: Judge, data: Data, count: int) -> dict[str, float]:
    """What real held-out images score, as many as are generated: the floor of every distance."""
    seen, (theirs, right) = data.held_out.first(count), _real(judge, data)
    return {
        "accuracy": right,
        "frechet": frechet_distance(features(judge, seen.x), theirs),
        "frechet_images": len(seen),
        "pixel_frechet": pixel_distance(seen.x, data.train.x, data.basis),
        "nearest": nearest_distance(seen.x, data.train.x),
    }


@functools.lru_cache(maxsize=16)
def _real(judge: Judge, data: Data) -> tuple[Tensor, float]:
    """Features of the training images, and the judge's accuracy on held-out ones."""
    real = data.held_out.first(HELD_OUT)
    return features(judge, data.train.x), accuracy(judge, real.x, real.label)


def balanced_labels(count: int, classes: int) -> Tensor:
    """Labels 0, 1, ..., 0, 1, ... (count,)."""
    return torch.arange(count) % classes


def score_images(x: Tensor, label: Tensor, judges: Sequence[Judge], data: Data) -> dict[str, Any]:
    """Scores of generated images (M, C, H, W) in [-1, 1] that were asked to be of `label`.

    What a judge has to say is the mean over judges, and `by_judge` has each one's word.
    """
    words: dict[str, list[float]] = {"agreement": [], "agreement_to_real": [], "frechet": []}
    for judge in judges:
        agreement, (theirs, right) = accuracy(judge, x, label), _real(judge, data)
        words["agreement"].append(agreement)
        words["agreement_to_real"].append(agreement / right)
        words["frechet"].append(frechet_distance(features(judge, x), theirs))
    return {
        **{name: fmean(values) for name, values in words.items()},
        "by_judge": words,
        "pixel_frechet": pixel_distance(x, data.train.x, data.basis),
        "nearest": nearest_distance(x, data.train.x),
    }


def score_reconstructions(x_hat: Tensor, x: Tensor, judges: Sequence[Judge]) -> dict[str, float]:
    """Scores of reconstructions `x_hat` of held-out images `x`, both (M, C, H, W) in [-1, 1].

    `psnr` is the mean over images of each one's PSNR in dB, as in a run's metrics;
    `reconstruction_frechet` the judges' distance between the two sets, as rFID is for another
    network; `sharpness` the share of the originals' high frequencies that is left, 1 being all.
    """
    error = ((x_hat - x) / 2).square().mean(dim=(1, 2, 3))
    apart = [frechet_distance(features(j, x_hat), features(j, x)) for j in judges]
    return {
        "psnr": float((-10 * error.clamp_min(1e-10).log10()).mean()),
        "reconstruction_frechet": fmean(apart),
        "sharpness": float(high_frequencies(x_hat) / high_frequencies(x)),
    }


def high_frequencies(x: Tensor) -> Tensor:
    """Mean square of the Laplacian of images (M, C, H, W), a number."""
    kernel = x.new_tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    return functional.conv2d(x.flatten(0, 1)[:, None], kernel[None, None]).square().mean()


def final_health(run: str | Path) -> dict[str, float]:
    """Figures of the latents from the last diagnosis in a run's `metrics.jsonl`."""
    lines = [m for m in RunDirectory.open(str(run)).read_metrics() if "rank" in m]
    return {name: lines[-1][name] for name in HEALTH if name in lines[-1]} if lines else {}


def training_seconds(run: str | Path) -> float:
    """Wall seconds from the start of training to its last save, over all sessions of a run.

    Diagnostics, previews and checkpoints are in it; what an interruption lost is not.
    """
    total, started, last = 0.0, None, None
    for event in RunDirectory.open(str(run)).read_events():
        now = datetime.fromisoformat(event["time"])
        if event["kind"] == "kernels":
            total += (last - started).total_seconds() if started and last else 0.0
            started, last = now, None
        elif event["kind"] in SAVES:
            last = now
    return total + ((last - started).total_seconds() if started and last else 0.0)


def score_run(
    run: str | Path,
    judges: Sequence[Judge],
    data: Data,
    *,
    count: int = 1000,
    seed: int = 0,
    sampling: Sequence[str] = (),
) -> dict[str, Any]:
    """All figures of a finished run.

    Args:
        run: Its directory.
        judges: What judge its images.
        data: What they are compared with.
        count: Images generated, of all classes in turn.
        seed: Of their noise.
        sampling: Another sampler or guidance than the run's, as of `e2ediff sample --set`.
    """
    model = load_model(str(run), overrides=sampling)
    recipe, cost = model.recipe, cost_of(model.recipe)
    label = balanced_labels(count, recipe.data.image.classes)
    started = time.perf_counter()
    x = model.sample(label, seed=seed)
    seconds = time.perf_counter() - started
    health, real = final_health(run), data.held_out.first(HELD_OUT).x
    return {
        **score_images(x, label, judges, data),
        **score_reconstructions(model.reconstruct(real), real, judges),
        **health,
        "collapse_signs": list(LatentHealth().verdict(health)),
        "train_seconds": training_seconds(run),
        "sample_seconds": seconds,
        "parameters": cost.parameters,
        "flops_by_phase": dict(cost.flops),
        "flops_per_image": cost.per_image,
        "flops_total": cost.total,
        "images": recipe.total_images,
        "steps": recipe.total_steps,
    }


# What is shown

_COLUMNS: Mapping[str, tuple[str, str, float]] = {
    "agreement": ("label agreement", ".3f", 1),
    "agreement_to_real": ("of real accuracy", ".3f", 1),
    "frechet": ("Fréchet distance", ".1f", 1),
    "pixel_frechet": ("of pixels", ".1f", 1),
    "nearest": ("nearest training image", ".2f", 1),
    "psnr": ("reconstruction PSNR, dB", ".2f", 1),
    "reconstruction_frechet": ("distance of reconstructions", ".2f", 1),
    "sharpness": ("their sharpness", ".2f", 1),
}
_HEALTH_COLUMNS: Mapping[str, tuple[str, str, float]] = {
    "rank": ("effective rank", ".2f", 1),
    "rank_fraction": ("of its maximum", ".2f", 1),
    "positional": ("positional share", ".3f", 1),
    "latent_std": ("latent std", ".3f", 1),
}
_COST_COLUMNS: Mapping[str, tuple[str, str, float]] = {
    "steps": ("steps", ".0f", 1),
    "parameters": ("parameters, M", ".2f", 1e-6),
    "flops_per_image": ("MFLOPs an image", ".1f", 1e-6),
    "flops_total": ("TFLOPs in all", ".2f", 1e-12),
    "train_seconds": ("training, s", ".0f", 1),
}


def summary(values: Sequence[float], form: str, *, deviation: bool = True) -> str:
    """Mean, sample standard deviation and range of one figure over seeds, as text."""
    found, low, high = spread(values), min(values), max(values)
    mean = f"{found.mean:{form}}"
    if found.std is None or high - low <= 1e-12 * max(abs(low), abs(high)):
        return mean
    text = f"{mean} ± {found.std:{form}}"
    return f"{text} ({low:{form}}..{high:{form}})" if deviation else text


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown: quality, health of the latents, cost."""
    runs = [r for r in results["runs"] if "figures" in r]
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        by_name.setdefault(run["objective"], []).append(run["figures"])
    real = list(results["real"].values())
    seeds = ", ".join(str(s) for s in results["seeds"])
    judges = f"{len(real)} judges, the same for every run"
    if any("judges" in run for run in runs):  # of parts with judges of their own
        judges = f"judges that are the same for every run of a seed, {len(real)} in all"
    lines = [
        f"Seeds {seeds}; {results['count']} images a run, sampled with {results['sampler']}, "
        f"and {judges}. "
        "Mean ± standard deviation over seeds (range).",
        "",
        _row(["objective", *(title for title, _, _ in _COLUMNS.values())]),
        _row(["---"] * (1 + len(_COLUMNS))),
    ]
    for name, figures in by_name.items():
        lines.append(_row([name, *_cells(figures, _COLUMNS)]))
    floor = {
        "agreement": summary([r["accuracy"] for r in real], ".3f"),
        "agreement_to_real": "1",
        "frechet": summary([r["frechet"] for r in real], ".1f"),
        "pixel_frechet": summary([r["pixel_frechet"] for r in real], ".1f"),
        "nearest": summary([r["nearest"] for r in real], ".2f"),
    }
    lines.append(_row(["*held-out images*", *(floor.get(key, "") for key in _COLUMNS)]))
    lines += [
        "",
        _row(["objective", *(title for title, _, _ in _HEALTH_COLUMNS.values()), "collapsed"]),
        _row(["---"] * (2 + len(_HEALTH_COLUMNS))),
    ]
    for name, figures in by_name.items():
        collapsed = sum(bool(f["collapse_signs"]) for f in figures)
        cells = _cells(figures, _HEALTH_COLUMNS)
        lines.append(_row([name, *cells, f"{collapsed} of {len(figures)}"]))
    lines += [
        "",
        _row(["objective", *(title for title, _, _ in _COST_COLUMNS.values())]),
        _row(["---"] * (1 + len(_COST_COLUMNS))),
    ]
    for name, figures in by_name.items():
        lines.append(_row([name, *_cells(figures, _COST_COLUMNS, deviation=False)]))
    machine = results["machine"]
    lines += [
        "",
        f"{results['date'][:10]}, {machine['cpu']}, {machine['cores']} cores; runs on "
        f"{machine['device']}, {results['jobs']} at once, {results['threads']} thread(s) each.",
    ]
    for run in results["runs"]:
        if "problem" in run:
            lines += ["", f"{run['objective']}, seed {run['seed']}, failed: {run['problem']}"]
    return "\n".join(lines) + "\n"


def _cells(
    figures: Sequence[Mapping[str, Any]],
    columns: Mapping[str, tuple[str, str, float]],
    *,
    deviation: bool = True,
) -> list[str]:
    cells = []
    for key, (_, form, scale) in columns.items():
        values = [f[key] * scale for f in figures if key in f]
        cells.append(summary(values, form, deviation=deviation) if values else "")
    return cells


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw_grids(
    samples: Mapping[str, Tensor], real: Tensor, names: Sequence[str], file: Path
) -> None:
    """Draw samples of each objective side by side, a class a column, and real images.

    Args:
        samples: For each title images (rows * classes, C, H, W), class by class.
        real: The same of held-out images.
        names: Of the classes.
        file: A PNG.
    """
    from matplotlib.figure import Figure
    from torchvision.utils import make_grid

    panels = {**samples, "real (held out)": real}
    columns = 2 if len(panels) > 1 else 1
    rows = -(-len(panels) // columns)
    panel_rows = len(real) / len(names)
    height = 5.2 / len(names) * panel_rows + 0.75
    figure = Figure(figsize=(5.4 * columns, height * rows), layout="constrained", dpi=150)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax, (title, x) in zip(axes, panels.items(), strict=False):
        grid = make_grid((x.clamp(-1, 1) + 1) / 2, nrow=len(names), padding=2, pad_value=0.25)
        ax.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
        cell = x.shape[-1] + 2
        ax.set_xticks([cell * (i + 0.5) for i in range(len(names))], names, fontsize=7)
        ax.tick_params(axis="x", length=0, rotation=30)
        ax.set_yticks([])
        ax.set_title(title, fontsize=10)
        ax.spines[:].set_visible(False)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    figure.savefig(file, facecolor="white")


def one_of_each(images: Images, classes: int, rows: int) -> Tensor:
    """The first `rows` images of each class, (rows * classes, C, H, W), class by class."""
    columns = [images.x[images.label == c][:rows] for c in range(classes)]
    return torch.stack(columns, dim=1).flatten(0, 1)


def machine() -> dict[str, Any]:
    """Processor, cores and device, without the machine's name."""
    cpu, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        cpu = found[1].strip() if found else cpu
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    return {"cpu": cpu, "cores": os.cpu_count(), "device": device, **gpu}
