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

Says which options a variant's objective takes from the recipe in place of its own defaults.
Leaves `results.json`, `table.md`, `grids.png` and `curves.png` in DIR, which is an ablation's:
`e2ediff report DIR` draws its page.
Runs that are done are not trained again; unfinished ones are resumed.
`--sample-set sampler.spacing=uniform` scores the same runs in another way, and leaves its files
beside the others, with the setting in their names.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs
import click
import torch
import yaml
from judge import EPOCHS, train_judge
from score import (
    GRID_ROWS,
    HELD_OUT,
    Data,
    balanced_labels,
    draw_grids,
    machine,
    one_of_each,
    real_figures,
    score_run,
    table,
)

from e2ediff.ablate.cost import cost_of
from e2ediff.ablate.grid import Assignment, Cell
from e2ediff.ablate.group import SPEC, Group
from e2ediff.ablate.plan import AblationPlan, Job, plan_cells
from e2ediff.ablate.train import exit_code, train_all
from e2ediff.distributed.signals import Stop
from e2ediff.errors import E2EDiffError
from e2ediff.host.plugins import Host, load
from e2ediff.host.recipe import Recipe, dump_recipe, load_recipe
from e2ediff.model.build import check_fits
from e2ediff.sample.load import load_model
from e2ediff.store.environment import describe_environment
from e2ediff.store.run_directory import RunDirectory
from e2ediff.train.progress import Progress

CURVES = {
    "rank_fraction": "effective rank / maximum",
    "raw_std": "latent std before the norm",
    "positional": "positional share",
    "psnr": "held-out reconstruction PSNR, dB",
    "unexplained@0.1": "held-out denoising error, t = 0.1",
    "unexplained@0.5": "held-out denoising error, t = 0.5",
}
LOSSES = ("psnr", "unexplained@0.1", "unexplained@0.5")
LATENTS = ("rank_fraction", "positional", "raw_std")
"""Held-out losses, which `results.json` has over training, so that one sees whether they fall."""


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


def handed_on(host: Host, block: Mapping[str, Any], options: Sequence[str]) -> list[str]:
    """Say which options of an objective's block are the recipe's and not its own defaults.

    `options` are the variant's settings, which replace those of the block.
    """
    cls = host.registries["objectives"].get(block["name"])
    set_here = {option.partition("=")[0] for option in options}
    return [
        f"{field.name}: {block[field.name]} of the recipe, by default {field.default}"
        for field in attrs.fields(cls)
        if field.name in block
        and isinstance(field.default, bool | int | float | str)
        and block[field.name] != field.default
        and f"objective.{field.name}" not in set_here
    ]


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

    def plan(self, host: Host, seeds: Sequence[int], sets: Sequence[str]) -> AblationPlan:
        """The grid of an ablation with a cell for each variant, `a b` as `a-b`."""
        base = load_recipe(host, self.recipe, [*self.set, *sets])
        check_fits(base, self.recipe)  # before its cost is counted
        grid = []
        for name, v in self.variants.items():
            changes = list(v.set)
            if v.objective:
                block = shared_objective(host, base, v.objective)
                for option in handed_on(host, block, v.set):
                    click.echo(f"{name}: objective.{option}", err=True)
                changes.insert(0, f"objective={json.dumps(block)}")
            parts = (change.partition("=") for change in changes)
            given = tuple(Assignment(path, text, f"variant {name}") for path, _, text in parts)
            grid.append(Cell(cell_of(name), given, v.recipe))
        match = "compute" if self.match_compute else "steps"
        return attrs.evolve(
            plan_cells(
                host, self.recipe, grid, seeds, [*self.set, *sets], grid[0].name, match,
                budget=cost_of(base),
            ),
            words=("python", *sys.argv),
        )  # fmt: skip


def cell_of(variant: str) -> str:
    """A variant's name, fit for a directory."""
    return re.sub(r"[^A-Za-z0-9._=-]+", "-", variant)


def trained(
    host: Host,
    plan: AblationPlan,
    out: Path,
    jobs: Sequence[Job],
    at_once: int,
    threads: int,
) -> dict[str, str]:
    """Train these runs of an ablation in `out`; what went wrong, by the run's name."""
    if (out / SPEC).exists():
        group = Group.open(out)
        group.refuse_other(plan)
    else:
        plugins = {p.distribution or p.name: p.version for p in host.used}
        group = Group.create(out, plan, describe_environment(plugins=plugins, argv=plan.words))
    with Stop() as stop, group, Progress() as progress:
        stop.write = progress.interject
        group.extend(plan)
        ended = train_all(
            group,
            jobs,
            at_once=at_once,
            threads=threads,
            share=threads,
            progress=progress,
            stop=stop,
        )
    if stop.asked:
        sys.exit(exit_code(ended, stop))
    return {e.job.place: f"exit {e.exit_code}: {e.error}" for e in ended if e.exit_code}


def history(
    metrics: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]
) -> dict[str, list[float]]:
    """Return figures over training, to four digits, and the images seen at each.

    `LOSSES` are of the surveys, after `images` images, `LATENTS` of the diagnoses, after
    `diagnosed`, and `collapse` says when the alarm was raised.
    """
    found: dict[str, list[float]] = {}
    for seen, keys in (("images", LOSSES), ("diagnosed", LATENTS)):
        those = [m for m in metrics if all(key in m for key in keys)]
        found[seen] = [m["images"] for m in those]
        found |= {key: [float(f"{m[key]:.4g}") for m in those] for key in keys}
    raised = [event["images"] for event in events if event["kind"] == "collapse"]
    return {**found, "collapse": raised}


def draw_curves(
    histories: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], file: Path
) -> None:
    """Draw figures over training: a panel each, a colour each variant, a thin line each seed.

    Args:
        histories: For each variant the metrics of its runs.
        file: A PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8), layout="constrained", dpi=110)
    panels = figure.subplots(2, 3)
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
        if key == "raw_std" or key.startswith("unexplained"):
            panel.set_yscale("log")
    handles, names = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize=8)
    figure.savefig(file, facecolor="white")


def _suffix(sampling: Sequence[str]) -> str:
    """What is put into the names of files that hold scores: nothing, or the settings."""
    return "".join("-" + re.sub(r"[^\w.=]+", "_", setting) for setting in sampling)


def _numbers(context: click.Context, option: click.Parameter, text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r}: expected numbers such as 0,1,2") from None


_SOME = click.IntRange(1)
_OPTIONS = (
    click.option("--out", required=True, type=click.Path(path_type=Path), help="Where all goes."),
    click.option("--seeds", default="0,1,2", show_default=True, callback=_numbers),
    click.option("--jobs", default=1, type=_SOME, help="Runs trained at once."),
    click.option("--threads", default=1, type=_SOME, help="CPU threads of each run."),
    click.option("--set", "sets", multiple=True, metavar="PATH=VALUE", help="As of `run`."),
    click.option(
        "--sample-set",
        "sampling",
        multiple=True,
        metavar="PATH=VALUE",
        help="Of scores alone, as of `e2ediff sample --set`.",
    ),
    click.option("--judges", "judge_count", default=3, type=_SOME, help="All judge every run."),
    click.option("--judge-epochs", "epochs", default=EPOCHS, type=_SOME, help="Of its training."),
)


def options(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take what every study is asked."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def run(
    study: Study,
    out: Path,
    *,
    seeds: Sequence[int],
    count: int,
    only: Sequence[str] = (),
    jobs: int = 1,
    threads: int = 1,
    sets: Sequence[str] = (),
    sampling: Sequence[str] = (),
    judge_count: int = 3,
    epochs: int = EPOCHS,
) -> None:
    """Train and score a study; exits with 1 if a run failed."""
    host, cells = load(), {cell_of(name): name for name in only or study.variants}
    torch.set_num_threads(jobs * threads)
    try:
        before = Group.open(out).spec["seeds"] if (out / SPEC).exists() else []
        plan = study.plan(host, [*before, *(s for s in seeds if s not in before)], sets)
        for job in plan.jobs:  # all fit before one is trained
            load_recipe(host, job.recipe or plan.recipe, [*job.overrides, *sampling])
        chosen = [job for job in plan.jobs if job.cell in cells and job.seed in seeds]
        failed = trained(host, plan, out, chosen, jobs, threads)
    except E2EDiffError as error:
        raise click.ClickException(str(error)) from error
    for place, problem in failed.items():
        click.echo(f"{place}: {problem}", err=True)

    base = load_recipe(host, study.recipe, [*study.set, *sets, *sampling])
    data, suffix = Data.open(base.data), _suffix(sampling)
    real, runs, histories = {}, [], dict[str, list[Any]]()
    judges = []
    for number in range(judge_count):
        judges.append(train_judge(number, out / "judges", base.data, epochs=epochs))
        real[str(number)] = found = real_figures(judges[-1], data, count)
        click.echo(f"judge {number}: held-out accuracy {found['accuracy']:.3f}", err=True)
    for seed in seeds:
        for job in (j for j in chosen if j.seed == seed):
            name, place = cells[job.cell], out / "runs" / job.place
            entry: dict[str, Any] = {"objective": name, "seed": seed, "place": f"runs/{job.place}"}
            entry["overrides"] = job.overrides
            if job.place in failed:
                entry["problem"] = failed[job.place]
            else:
                directory = RunDirectory.open(str(place))
                entry["environment"] = directory.environment()
                cache = out / "scores" / f"{job.place}{suffix}-{count}-{judge_count}-{epochs}.json"
                if not cache.exists():
                    figures = score_run(
                        place, judges, data, count=count, seed=seed, sampling=sampling
                    )
                    cache.parent.mkdir(exist_ok=True)
                    cache.write_text(json.dumps(figures))
                entry["figures"] = json.loads(cache.read_text())
                metrics = directory.read_metrics()
                entry["history"] = history(metrics, directory.read_events())
                histories.setdefault(name, []).append(metrics)
                click.echo(f"{job.place}: scored", err=True)
            runs.append(entry)
    sampler = yaml.safe_load(dump_recipe(host, base))["sampler"]
    results = {
        "command": plan.words,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "recipe": dump_recipe(host, base),
        "sampler": sampler if isinstance(sampler, str) else " ".join(map(str, sampler.values())),
        "seeds": seeds,
        "count": count,
        "jobs": jobs,
        "threads": threads,
        "match_compute": study.match_compute,
        "judge_epochs": epochs,
        "train_images": len(data.train),
        "held_out_images": min(HELD_OUT, len(data.held_out)),
        "real": real,
        "runs": runs,
    }
    (out / f"results{suffix}.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / f"table{suffix}.md").write_text(table(results))
    draw_curves(histories, out / "curves.png")
    image, first = base.data.image, seeds[0]
    label = balanced_labels(GRID_ROWS * image.classes, image.classes)
    samples = {}
    for entry in (r for r in runs if r["seed"] == first and "figures" in r):
        figures = entry["figures"]
        title = (
            f"{entry['objective']}: label agreement {figures['agreement']:.2f}, "
            f"Fréchet distance {figures['frechet']:.0f}"
        )
        model = load_model(str(out / entry["place"]), overrides=sampling)
        samples[title] = model.sample(label, seed=first)
    names = image.class_names or [str(i) for i in range(image.classes)]
    real_images = one_of_each(data.held_out, image.classes, GRID_ROWS)
    draw_grids(samples, real_images, names, out / f"grids{suffix}.png")
    click.echo(table(results))
    if failed:
        sys.exit(1)


@click.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--only", multiple=True, metavar="NAME", help="This variant; else all.")
@click.option("--count", default=500, type=click.IntRange(2), help="Images generated a run.")
@click.option("--equal-images", is_flag=True, help="Match images, whatever the file matches.")
@options
def main(path: Path, only: tuple[str, ...], equal_images: bool, **given: Any) -> None:
    """Train and score every variant of a study."""
    study = Study.read(path)
    if equal_images:
        study = attrs.evolve(study, match_compute=False)
    if unknown := [name for name in only if name not in study.variants]:
        raise click.BadParameter(f"the study has no variant {', '.join(map(repr, unknown))}")
    run(study, only=only, **given)


if __name__ == "__main__":
    main()
