"""Train a recipe with several objectives and seeds, and score what the runs can do.

    python benchmarks/quickstart_quality.py --out DIR

Leaves `results.json`, `table.md` and `grids.png` in DIR, the runs in DIR/runs.
Runs that are done are not trained again; unfinished ones are resumed.

Shapes: M images, C H W image, F features.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs
import click
import torch
import yaml
from judge import (
    EPOCHS,
    Images,
    Judge,
    accuracy,
    features,
    frechet_distance,
    load_images,
    nearest_distance,
    pixel_components,
    pixel_distance,
    train_judge,
)
from torch import Tensor

from e2ediff.data import SourceConfig
from e2ediff.errors import E2EDiffError
from e2ediff.forecast.count import count as count_cost
from e2ediff.host.plugins import Host, load
from e2ediff.host.recipe import Recipe, dump_recipe, load_recipe, parse_recipe
from e2ediff.model.inference import Model
from e2ediff.parts.diagnostics.latent_health import LatentHealth
from e2ediff.parts.sources import FashionMNIST
from e2ediff.sample.load import load_model
from e2ediff.store.run_directory import RunDirectory

HELD_OUT = 1000
"""Held-out images on which the judge's accuracy and reconstructions are measured."""

GRID_ROWS = 3

HEALTH = ("rank", "rank_fraction", "positional", "latent_std")

_REPOSITORY = Path(__file__).resolve().parents[1]
_STATE = "status.json"


# What is run


@attrs.frozen
class Job:
    """One training run: what to change in the recipe, and where it lies below the output."""

    objective: str
    seed: int
    overrides: tuple[str, ...]
    place: str


def shared_objective(host: Host, recipe: Recipe, name: str) -> dict[str, Any]:
    """The block of the objective `name`, with what it has in common with the recipe's own.

    An option of the recipe's objective that the other has too keeps its value; the others have
    their defaults.
    """
    block = yaml.safe_load(dump_recipe(host, recipe))["objective"]
    block = {"name": block} if isinstance(block, str) else block
    if block["name"] == name:
        return dict(block)
    other = host.registries["objectives"].get(name)
    known = {field.name for field in attrs.fields(other)}
    return {"name": name, **{k: v for k, v in block.items() if k in known}}


def plan(
    host: Host,
    recipe_path: str,
    objectives: Sequence[str],
    seeds: Sequence[int],
    sets: Sequence[str],
    *,
    match_compute: bool = False,
) -> list[Job]:
    """A job for each seed and objective; options they share are equal.

    `two_stage` gets a denoiser with weights of its own, which it needs.
    With `match_compute` every job has as many steps as the FLOPs of the recipe as it is pay for;
    else all have the recipe's steps.
    """
    base = load_recipe(host, recipe_path, sets)
    if not isinstance(base.data, FashionMNIST):
        raise click.UsageError(
            "the judge knows Fashion-MNIST only; give a recipe that trains on it"
        )
    others = [s for s in sets if not re.match(r"objective\b", s)]
    jobs = []
    for seed in seeds:
        for name in objectives:
            block = shared_objective(host, base, name)
            changes = [*others, f"seed={seed}", f"objective={json.dumps(block)}"]
            if name == "two_stage" and getattr(base.backbone, "trunks", "") == "one":
                changes.append("backbone.trunks=denoiser_apart")
            if match_compute:
                own = load_recipe(host, recipe_path, changes)
                each = cost(own)["flops_per_image"] * own.batch
                changes.append(f"steps={max(1, round(cost(base)['flops_total'] / each))}")
            jobs.append(Job(name, seed, tuple(changes), f"runs/{name}-seed{seed}"))
    return jobs


def log_file(place: Path) -> Path:
    """Where a run's output goes: beside it, whatever points its name has."""
    return place.with_name(f"{place.name}.log")


def train_job(host: Host, recipe_path: str, job: Job, out: Path, threads: int) -> str:
    """Bring one run to its end in a process of its own; returns "" or what went wrong."""
    place = out / job.place
    command = [sys.executable, "-m", "e2ediff", "run", recipe_path, "--out", str(place)]
    for change in job.overrides:
        command += ["--set", change]
    command += ["--threads", str(threads)]
    if (place / "run.json").exists():
        directory = RunDirectory.open(str(place))
        there = parse_recipe(host, directory.resolved(), str(place / "resolved.yaml"))
        if there != load_recipe(host, recipe_path, job.overrides):
            return f"{place} holds a run of another recipe; choose another --out"
        if directory.status().get("state") == "done":
            click.echo(f"{job.place}: done before", err=True)
            return ""
        if any((place / "checkpoints").glob("*/MANIFEST.json")):
            command.append("--resume")
        else:
            with directory:  # refused while another process trains in it
                directory.lock()
                shutil.rmtree(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with log_file(place).open("a") as log:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        code = subprocess.run(command, stdout=log, stderr=log, env=environment).returncode
    seconds = time.perf_counter() - started
    click.echo(f"{job.place}: exit {code} after {seconds:.0f} s", err=True)
    if code:
        lines = log_file(place).read_text().strip().splitlines()
        return f"exit {code}: {lines[-1] if lines else 'no output'}"
    return ""


def train_all(jobs: Sequence[Job], train: Callable[[Job], str], at_once: int) -> dict[Job, str]:
    """Run `train` for every job, `at_once` at a time; returns the problems of the failed ones."""
    with ThreadPoolExecutor(at_once) as pool:
        futures = {job: pool.submit(_guarded, train, job) for job in jobs}
        try:
            found = {job: future.result() for job, future in futures.items()}
        except KeyboardInterrupt:
            # The running ones got the signal too: they save and end.
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return {job: problem for job, problem in found.items() if problem}


def _guarded(train: Callable[[Job], str], job: Job) -> str:
    try:
        return train(job)
    except E2EDiffError as error:
        return str(error)


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
    real, seen = data.held_out.first(HELD_OUT), data.held_out.first(count)
    theirs = features(judge, data.train.x)
    return {
        "accuracy": accuracy(judge, real.x, real.label),
        "frechet": frechet_distance(features(judge, seen.x), theirs),
        "frechet_images": len(seen),
        "pixel_frechet": pixel_distance(seen.x, data.train.x, data.basis),
        "nearest": nearest_distance(seen.x, data.train.x),
    }


def balanced_labels(count: int, classes: int) -> Tensor:
    """Labels 0, 1, ..., 0, 1, ... (count,)."""
    return torch.arange(count) % classes


def score_images(x: Tensor, label: Tensor, judge: Judge, data: Data) -> dict[str, float]:
    """Scores of generated images (M, C, H, W) in [-1, 1] that were asked to be of `label`."""
    real = data.held_out.first(HELD_OUT)
    agreement = accuracy(judge, x, label)
    return {
        "agreement": agreement,
        "agreement_to_real": agreement / accuracy(judge, real.x, real.label),
        "frechet": frechet_distance(features(judge, x), features(judge, data.train.x)),
        "pixel_frechet": pixel_distance(x, data.train.x, data.basis),
        "nearest": nearest_distance(x, data.train.x),
    }


def reconstruction_psnr(model: Model, x: Tensor) -> float:
    """Mean over images (M, C, H, W) of each one's PSNR in dB, as `psnr` in a run's metrics."""
    error = ((model.reconstruct(x) - x) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * error.clamp_min(1e-10).log10()).mean())


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
        elif event["kind"] == "saved":
            last = now
    return total + ((last - started).total_seconds() if started and last else 0.0)


def cost(recipe: Recipe) -> dict[str, Any]:
    """Parameters, and FLOPs forward and backward, by phase, for a mean image, and in all.

    Every pass of the step is in it, a target encoder's too; the averages' updates are not.
    """
    counted = count_cost(recipe)
    shares = {p: recipe.objective.span(p) for p in recipe.objective.phases}
    mean = sum(counted.flops[p] * (end - start) for p, (start, end) in shares.items())
    return {
        "parameters": counted.parameters,
        "flops_by_phase": dict(counted.flops),
        "flops_per_image": mean,
        "flops_total": mean * recipe.total_images,
        "images": recipe.total_images,
        "steps": recipe.total_steps,
    }


def score_run(
    run: str | Path,
    judge: Judge,
    data: Data,
    *,
    count: int = 1000,
    seed: int = 0,
    sampling: Sequence[str] = (),
) -> dict[str, Any]:
    """All figures of a finished run.

    Args:
        run: Its directory.
        judge: What judges its images.
        data: What they are compared with.
        count: Images generated, of all classes in turn.
        seed: Of their noise.
        sampling: Another sampler or guidance than the run's, as of `e2ediff sample --set`.
    """
    model = load_model(str(run), overrides=sampling)
    label = balanced_labels(count, model.recipe.data.image.classes)
    started = time.perf_counter()
    x = model.sample(label, seed=seed)
    seconds = time.perf_counter() - started
    health = final_health(run)
    return {
        **score_images(x, label, judge, data),
        "psnr": reconstruction_psnr(model, data.held_out.first(HELD_OUT).x),
        **health,
        "collapse_signs": list(LatentHealth().verdict(health)),
        "train_seconds": training_seconds(run),
        "sample_seconds": seconds,
        **cost(model.recipe),
    }


# What is shown

_COLUMNS: Mapping[str, tuple[str, str, float]] = {
    "agreement": ("label agreement", ".3f", 1),
    "agreement_to_real": ("of real accuracy", ".3f", 1),
    "frechet": ("Fréchet distance", ".1f", 1),
    "pixel_frechet": ("of pixels", ".1f", 1),
    "nearest": ("nearest training image", ".2f", 1),
    "psnr": ("reconstruction PSNR, dB", ".2f", 1),
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


def summary(values: Sequence[float], form: str, *, spread: bool = True) -> str:
    """Mean, sample standard deviation and range of one figure over seeds, as text."""
    x = torch.tensor(values, dtype=torch.float64)
    mean = f"{float(x.mean()):{form}}"
    if len(x) < 2 or float(x.max() - x.min()) <= 1e-12 * float(x.abs().max()):
        return mean
    text = f"{mean} ± {float(x.std()):{form}}"
    return f"{text} ({float(x.min()):{form}}..{float(x.max()):{form}})" if spread else text


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown: quality, health of the latents, cost."""
    runs = [r for r in results["runs"] if "figures" in r]
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        by_name.setdefault(run["objective"], []).append(run["figures"])
    real = list(results["real"].values())
    seeds = ", ".join(str(s) for s in results["seeds"])
    lines = [
        f"Seeds {seeds}; {results['count']} images a run, sampled with {results['sampler']}. "
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
        lines.append(_row([name, *_cells(figures, _COST_COLUMNS, spread=False)]))
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
    spread: bool = True,
) -> list[str]:
    cells = []
    for key, (_, form, scale) in columns.items():
        values = [f[key] * scale for f in figures if key in f]
        cells.append(summary(values, form, spread=spread) if values else "")
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


def provenance(host: Host, base: Recipe) -> dict[str, Any]:
    """How a file of results was made: command, date, machine, versions, recipe and sampler."""
    text = dump_recipe(host, base)
    sampler = yaml.safe_load(text)["sampler"]
    return {
        "command": ["python", *sys.argv],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {name: metadata.version(name) for name in ("e2ediff", "torch", "numpy")}
        | {"python": platform.python_version()},
        "plugins": {p.distribution or p.name: p.version for p in host.used},
        "recipe": text,
        "sampler": sampler if isinstance(sampler, str) else " ".join(map(str, sampler.values())),
    }


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r}: expected numbers such as 0,1,2") from None


sample_set = click.option(
    "--sample-set",
    "sampling",
    multiple=True,
    metavar="PATH=VALUE",
    help="Of scores alone, as of `e2ediff sample --set`.",
)


@click.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Where all goes.")
@click.option(
    "--recipe", default=str(_REPOSITORY / "recipes" / "quickstart.yaml"), show_default="quickstart"
)
@click.option("--objectives", default="dsd,coupled,detached,two_stage", show_default=True)
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--jobs", default=1, type=click.IntRange(1), help="Runs trained at once.")
@click.option("--threads", default=1, type=click.IntRange(1), help="CPU threads of each run.")
@click.option("--set", "sets", multiple=True, metavar="PATH=VALUE", help="As of `e2ediff run`.")
@sample_set
@click.option("--count", default=1000, type=click.IntRange(2), help="Images generated a run.")
@click.option(
    "--match-compute",
    is_flag=True,
    help="Give every objective the FLOPs of the recipe's own, instead of its steps.",
)
@click.option(
    "--judge-epochs", default=EPOCHS, type=click.IntRange(1), help="Shorter for a quick try."
)
def main(
    out: Path,
    recipe: str,
    objectives: str,
    seeds: str,
    jobs: int,
    threads: int,
    sets: tuple[str, ...],
    sampling: tuple[str, ...],
    count: int,
    match_compute: bool,
    judge_epochs: int,
) -> None:
    """Train by a recipe with each objective and seed, score the runs, write a table."""
    host, names, numbers = load(), objectives.split(","), _numbers(seeds)
    torch.set_num_threads(jobs * threads)
    try:
        planned = plan(host, recipe, names, numbers, sets, match_compute=match_compute)
        for job in planned:
            load_recipe(host, recipe, [*job.overrides, *sampling])  # all fit before one trains
    except E2EDiffError as error:
        raise click.ClickException(str(error)) from error
    out.mkdir(parents=True, exist_ok=True)
    failed = train_all(planned, lambda job: train_job(host, recipe, job, out, threads), jobs)
    for job, problem in failed.items():
        click.echo(f"{job.place}: {problem}", err=True)

    base = load_recipe(host, recipe, [*sets, *sampling])
    assert isinstance(base.data, FashionMNIST)  # says plan
    data = Data.open(base.data)
    real, runs = {}, []
    for seed in numbers:
        judge = train_judge(seed, out / "judges", base.data, epochs=judge_epochs)
        real[str(seed)] = real_figures(judge, data, count)
        click.echo(f"judge {seed}: held-out accuracy {real[str(seed)]['accuracy']:.3f}", err=True)
        for job in (j for j in planned if j.seed == seed):
            entry: dict[str, Any] = attrs.asdict(job)
            if job in failed:
                entry["problem"] = failed[job]
            else:
                entry["environment"] = RunDirectory.open(str(out / job.place)).environment()
                entry["figures"] = score_run(
                    out / job.place, judge, data, count=count, seed=seed, sampling=sampling
                )
                click.echo(f"{job.place}: scored", err=True)
            runs.append(entry)
    results = {
        **provenance(host, base),
        "seeds": numbers,
        "count": count,
        "jobs": jobs,
        "threads": threads,
        "match_compute": match_compute,
        "judge_epochs": judge_epochs,
        "train_images": len(data.train),
        "held_out_images": min(HELD_OUT, len(data.held_out)),
        "real": real,
        "runs": runs,
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "table.md").write_text(table(results))
    _draw(planned, failed, out, data, numbers[0], base, runs, sampling)
    click.echo(table(results))
    if failed:
        sys.exit(1)


def _draw(
    planned: Sequence[Job],
    failed: Mapping[Job, str],
    out: Path,
    data: Data,
    seed: int,
    recipe: Recipe,
    runs: Sequence[Mapping[str, Any]],
    sampling: Sequence[str],
) -> None:
    """Samples of the first seed; the images are the first ones that were scored."""
    image = recipe.data.image
    label = balanced_labels(GRID_ROWS * image.classes, image.classes)
    samples = {}
    for job, run in zip(planned, sorted(runs, key=_order(planned)), strict=True):
        if job.seed == seed and job not in failed:
            figures = run["figures"]
            title = (
                f"{job.objective}: label agreement {figures['agreement']:.2f}, "
                f"Fréchet distance {figures['frechet']:.0f}"
            )
            model = load_model(str(out / job.place), overrides=sampling)
            samples[title] = model.sample(label, seed=seed)
    real = one_of_each(data.held_out, image.classes, GRID_ROWS)
    draw_grids(samples, real, image.class_names, out / "grids.png")


def _order(planned: Sequence[Job]) -> Callable[[Mapping[str, Any]], int]:
    places = [job.place for job in planned]
    return lambda run: places.index(run["place"])


if __name__ == "__main__":
    main()
