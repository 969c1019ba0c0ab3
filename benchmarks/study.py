"""Train the variants of a study with several seeds, and score what the runs can do.

    python benchmarks/study.py benchmarks/studies/ladder.yaml --out DIR

A study is a YAML file:

    recipe: ../recipes/quickstart.yaml   # below the file's folder
    set: [steps=1200]                    # for every variant
    match_compute: true                  # each variant gets the FLOPs of the recipe's own
    variants:
      dsd: {}
      detached: {objective: detached}    # with every option that it shares with the recipe's
      wide: {set: [backbone.width=128]}
      naive: {recipe: ../recipes/ladder/l1_naive.yaml}

Leaves `results.json`, `table.md`, `grids.png` and `curves.png` in DIR, the runs in DIR/runs.
Runs that are done are not trained again; unfinished ones are resumed.
`--sample-set sampler.spacing=uniform` scores the same runs in another way, and leaves its files
beside the others, with the setting in their names.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import click
import torch
import yaml
from judge import EPOCHS, train_judge
from quickstart_quality import (
    GRID_ROWS,
    Data,
    Job,
    balanced_labels,
    cost,
    draw_grids,
    one_of_each,
    provenance,
    real_figures,
    sample_set,
    score_run,
    shared_objective,
    table,
    train_all,
    train_job,
)

from e2ediff.errors import E2EDiffError
from e2ediff.host.plugins import Host, load
from e2ediff.host.recipe import load_recipe
from e2ediff.sample.load import load_model
from e2ediff.store.run_directory import RunDirectory

CURVES = {
    "rank_fraction": "effective rank / maximum",
    "raw_std": "latent std before the norm",
    "positional": "positional share",
    "psnr": "reconstruction PSNR, dB",
}


@attrs.frozen
class Variant:
    """What a variant changes: options, the objective's name, or the whole recipe."""

    set: Sequence[str] = ()
    objective: str | None = None
    recipe: str | None = None


@attrs.frozen
class Study:
    """A study as its file says; `recipe` and variants' recipes are paths from its folder."""

    recipe: str
    variants: Mapping[str, Variant]
    set: Sequence[str] = ()
    match_compute: bool = False

    @classmethod
    def read(cls, path: Path) -> Study:
        """Read a file; paths in it become paths from here."""
        body = yaml.safe_load(path.read_text())
        named = {name: Variant(**(v or {})) for name, v in body.pop("variants").items()}
        folder = path.parent
        for name, v in named.items():
            if v.recipe:
                named[name] = attrs.evolve(v, recipe=str(folder / v.recipe))
        return cls(str(folder / body.pop("recipe")), named, **body)

    def jobs(self, host: Host, seeds: Sequence[int], sets: Sequence[str]) -> dict[Job, str]:
        """A job for each seed and variant, with the recipe that it changes."""
        base = load_recipe(host, self.recipe, [*self.set, *sets])
        budget = cost(base)["flops_total"] if self.match_compute else 0
        found = {}
        for seed in seeds:
            for name, v in self.variants.items():
                path, changes = v.recipe or self.recipe, [*self.set, *sets, f"seed={seed}"]
                if v.objective:
                    block = shared_objective(host, base, v.objective)
                    changes.append(f"objective={json.dumps(block)}")
                changes += v.set
                steps = [c for c in v.set if c.startswith("steps=")]
                if self.match_compute and not steps:
                    own = load_recipe(host, path, changes)
                    each = cost(own)["flops_per_image"] * own.batch
                    changes.append(f"steps={max(1, round(budget / each))}")
                place = f"runs/{name.replace(' ', '-')}-seed{seed}"
                found[Job(name, seed, tuple(changes), place)] = path
        return found


def draw_curves(
    histories: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], file: Path
) -> None:
    """Draw figures over training: a panel each, a colour each variant, a thin line each seed.

    Args:
        histories: For each variant the metrics of its runs.
        file: A PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained", dpi=110)
    panels = figure.subplots(2, 2)
    styles = ("-", "--", ":")
    for panel, (key, title) in zip(panels.flat, CURVES.items(), strict=True):
        for i, (name, runs) in enumerate(histories.items()):
            for j, metrics in enumerate(runs):
                points = [(m["images"], m[key]) for m in metrics if key in m]
                if points:
                    panel.plot(
                        *zip(*points, strict=True),
                        styles[i // 10 % len(styles)],
                        color=f"C{i % 10}",
                        lw=1.1,
                        label=name if j == 0 else None,
                    )
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("images", fontsize=8)
        panel.grid(alpha=0.3)
        if key == "raw_std":
            panel.set_yscale("log")
    handles, names = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize=8)
    figure.savefig(file, facecolor="white")


def _suffix(sampling: Sequence[str]) -> str:
    """What is put into the names of files that hold scores: nothing, or the settings."""
    return "".join("-" + re.sub(r"[^\w.=]+", "_", setting) for setting in sampling)


@click.command()
@click.argument("study_path", type=click.Path(exists=True, path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Where all goes.")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--only", multiple=True, metavar="NAME", help="This variant; else all.")
@click.option("--jobs", default=1, type=click.IntRange(1), help="Runs trained at once.")
@click.option("--threads", default=1, type=click.IntRange(1), help="CPU threads of each run.")
@click.option("--set", "sets", multiple=True, metavar="PATH=VALUE", help="As of `e2ediff run`.")
@sample_set
@click.option("--count", default=500, type=click.IntRange(2), help="Images generated a run.")
@click.option("--judge-epochs", default=EPOCHS, type=click.IntRange(1))
def main(
    study_path: Path,
    out: Path,
    seeds: str,
    only: tuple[str, ...],
    jobs: int,
    threads: int,
    sets: tuple[str, ...],
    sampling: tuple[str, ...],
    count: int,
    judge_epochs: int,
) -> None:
    """Train and score every variant of a study."""
    host, study = load(), Study.read(study_path)
    if only:
        unknown = [name for name in only if name not in study.variants]
        if unknown:
            raise click.BadParameter(f"the study has no variant {', '.join(map(repr, unknown))}")
        chosen = {name: study.variants[name] for name in only}
        study = attrs.evolve(study, variants=chosen)
    numbers = [int(word) for word in seeds.split(",")]
    torch.set_num_threads(jobs * threads)
    try:
        planned = study.jobs(host, numbers, sets)
        for job, path in planned.items():
            load_recipe(host, path, [*job.overrides, *sampling])  # all fit before one is trained
    except E2EDiffError as error:
        raise click.ClickException(str(error)) from error
    out.mkdir(parents=True, exist_ok=True)
    failed = train_all(
        list(planned), lambda job: train_job(host, planned[job], job, out, threads), jobs
    )
    for job, problem in failed.items():
        click.echo(f"{job.place}: {problem}", err=True)

    base = load_recipe(host, study.recipe, [*study.set, *sets, *sampling])
    data, suffix = Data.open(base.data), _suffix(sampling)
    real, runs, histories = {}, [], dict[str, list[Any]]()
    for seed in numbers:
        judge = train_judge(seed, out / "judges", base.data, epochs=judge_epochs)
        real[str(seed)] = real_figures(judge, data, count)
        click.echo(f"judge {seed}: held-out accuracy {real[str(seed)]['accuracy']:.3f}", err=True)
        for job in (j for j in planned if j.seed == seed):
            entry: dict[str, Any] = attrs.asdict(job)
            if job in failed:
                entry["problem"] = failed[job]
            else:
                place, cache = out / job.place, out / f"{job.place}{suffix}.scores.json"
                if not cache.exists():
                    figures = score_run(
                        place, judge, data, count=count, seed=seed, sampling=sampling
                    )
                    cache.write_text(json.dumps(figures))
                entry["figures"] = json.loads(cache.read_text())
                metrics = RunDirectory.open(str(place)).read_metrics()
                histories.setdefault(job.objective, []).append(metrics)
                click.echo(f"{job.place}: scored", err=True)
            runs.append(entry)
    results = {
        **provenance(host, base),
        "seeds": numbers,
        "count": count,
        "jobs": jobs,
        "threads": threads,
        "match_compute": study.match_compute,
        "judge_epochs": judge_epochs,
        "real": real,
        "runs": runs,
    }
    (out / f"results{suffix}.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / f"table{suffix}.md").write_text(table(results))
    draw_curves(histories, out / "curves.png")
    image, seed = base.data.image, numbers[0]
    label = balanced_labels(GRID_ROWS * image.classes, image.classes)
    samples = {}
    for run in (r for r in runs if r["seed"] == seed and "figures" in r):
        title = f"{run['objective']}: Fréchet distance {run['figures']['frechet']:.0f}"
        model = load_model(str(out / run["place"]), overrides=sampling)
        samples[title] = model.sample(label, seed=seed)
    names = image.class_names or [str(i) for i in range(image.classes)]
    real_images = one_of_each(data.held_out, image.classes, GRID_ROWS)
    draw_grids(samples, real_images, names, out / f"grids{suffix}.png")
    click.echo(table(results))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
