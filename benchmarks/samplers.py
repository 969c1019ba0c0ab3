"""Sample one run by every sampler at equal network calls, by every guidance, and with all weights.

    python benchmarks/samplers.py RUN --out DIR --jobs 2

Leaves `results.json` and `table.md` in DIR, the sets of images in DIR/sets and their scores in
DIR/scores; what is there is not made again, and an unfinished set is continued.
Scores are those of the quickstart's judge, so RUN must be one on Fashion-MNIST.

Shapes: M images, C H W image, F features.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import attrs
import click
import numpy as np
import torch
from judge import accuracy, features, frechet_distance, load_images, train_judge

from e2ediff.data import from_pixels
from e2ediff.host.plugins import load
from e2ediff.sample.load import ModelRef, load_model
from e2ediff.sample.request import SampleRequest
from e2ediff.sample.sample_set import make_set

# Network calls of a step, and how many fewer the whole has for its last one.
CALLS_OF_A_STEP: Mapping[str, tuple[int, int]] = {
    "euler": (1, 0),
    "heun": (2, 1),
    "midpoint": (2, 1),
    "rk4": (4, 3),
    "dpmpp_2m": (1, 0),
    "unipc": (1, 0),
    "sde": (1, 0),
}

GUIDANCE = (
    "null",
    "{name: classifier_free, scale: 1.25}",
    "{name: classifier_free, scale: 1.5}",
    "{name: classifier_free, scale: 2.0}",
    "{name: classifier_free, scale: 2.0, t_min: 0.2, t_max: 0.8}",
    "{name: cfg_zero_star, scale: 1.5}",
    "{name: cfg_plus_plus, strength: 0.3}",
    "{name: cfg_plus_plus, strength: 0.6}",
    "{name: apg, scale: 1.5}",
    "{name: autoguidance, scale: 1.5, weights: online}",
)


# Of an average's profile over the training time, as in `ema:0.08`.
WIDTHS = (0.03, 0.05, 0.1, 0.2, 0.25)

# A case's scores, by name.
Row = dict[str, Any]


@attrs.frozen(kw_only=True)
class Case:
    """One way to sample: its row's title, where its images lie, and what it changes."""

    title: str
    place: str
    overrides: tuple[str, ...] = ()
    weights: str | None = None


def steps_for(name: str, calls: int) -> int:
    """The most steps of a sampler that cost at most so many network calls.

    Raises:
        ValueError: Not even one step fits.
    """
    each, saved = CALLS_OF_A_STEP[name]
    steps = (calls + saved) // each
    if steps < 1:
        raise ValueError(f"{name} needs {each - saved} network calls, and {calls} are given")
    return steps


def sampler_cases(calls: int) -> list[Case]:
    """Every sampler with as many steps as the calls pay for, on two grids; and dopri5."""
    cases = []
    for name in CALLS_OF_A_STEP:
        for spacing in ("uniform", "karras"):
            block = f"{{name: {name}, steps: {steps_for(name, calls)}, spacing: {spacing}}}"
            place = f"{name}-{spacing}-{calls}"
            cases.append(Case(title=block, place=place, overrides=(f"sampler={block}",)))
    for tolerance in (1e-1, 1e-2):
        block = f"{{name: dopri5, rtol: {tolerance}, atol: {tolerance}}}"
        place = f"dopri5-{tolerance:g}"
        cases.append(Case(title=block, place=place, overrides=(f"sampler={block}",)))
    return cases


def guidance_cases() -> list[Case]:
    """Every guidance with the recipe's own sampler."""
    return [
        Case(title=text, place=f"guidance-{i}", overrides=(f"guidance={text}",))
        for i, text in enumerate(GUIDANCE)
    ]


def weights_cases(stored: Sequence[str], widths: Sequence[float]) -> list[Case]:
    """The recipe's sampling with each set of weights, and each width of a post-hoc average."""
    names = [*stored, *(f"ema:{width:g}" for width in widths)]
    return [Case(title=name, place=name.replace(":", "-"), weights=name) for name in names]


def measure(run: str, case: Case, images: int, seed: int, out: Path, judge_seed: int) -> Row:
    """Make the set, and score it: distance, label agreement, network calls, and time."""
    torch.set_num_threads(1)
    kept = out / "scores" / f"{case.place}.json"
    if kept.exists():
        row: Row = json.loads(kept.read_text())
        return row
    host = load()
    judge = train_judge(judge_seed, out / "judges")
    data = load_model(run, host=host).recipe.data
    classes = data.image.classes
    place = out / "sets" / case.place
    request = SampleRequest(
        model=ModelRef(
            run=run, weights=case.weights, device="cpu", overrides=tuple(case.overrides)
        ),
        seed=seed,
        law="balanced",
        labels=tuple(i % classes for i in range(images)),
        format="npz",
        out=str(place),
    )
    path = make_set(
        request,
        host,
        threads=1,
        say=lambda line: click.echo(line, err=True),
        update=lambda _: None,
    )
    with np.load(path) as found:
        x = from_pixels(torch.from_numpy(found["arr_0"]).permute(0, 3, 1, 2))
        label = torch.from_numpy(found["arr_1"])
    made = json.loads((place / "set.json").read_text())["made"]
    real = features(judge, load_images(data).x)
    row = {
        "title": case.title,
        "frechet": frechet_distance(features(judge, x), real),
        "agreement": accuracy(judge, x, label),
        "calls": made["calls_per_image"],
        "passes": made["passes_per_image"],
        "milliseconds": 1000 / made["images_per_second"],
    }
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(row) + "\n")
    return row


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, the nearest first."""
    lines = [
        "| options | Fréchet distance | label agreement | network calls | passes | ms an image |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: float(r["frechet"])):
        figures = (
            f"{row['frechet']:.2f}",
            f"{row['agreement']:.3f}",
            f"{row['calls']:.1f}",
            f"{row['passes']:.1f}",
            f"{row['milliseconds']:.1f}",
        )
        lines.append(f"| `{row['title']}` | {' | '.join(figures)} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.argument("run")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Where to write.")
@click.option("--images", default=10_000, show_default=True, help="Images a set.")
@click.option("--calls", "budgets", multiple=True, type=int, default=(13, 25), show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--judge-seed", default=0, show_default=True)
@click.option("--jobs", default=1, show_default=True, help="Sets that are made at once.")
def main(
    run: str,
    out: Path,
    images: int,
    budgets: tuple[int, ...],
    seed: int,
    judge_seed: int,
    jobs: int,
) -> None:
    """Score every sampler, every guidance and all weights of RUN."""
    host, began = load(), time.monotonic()
    recipe = load_model(run, host=host).recipe
    train_judge(judge_seed, out / "judges")
    stored = ["online", "target", *(average.name for average in recipe.ema)]
    sections: dict[str, list[Case]] = {
        f"Samplers at {calls} network calls": sampler_cases(calls) for calls in budgets
    }
    sections["Guidance"] = guidance_cases()
    sections["Weights"] = weights_cases(stored, WIDTHS if recipe.post_hoc else ())
    found: dict[str, Row] = {}
    cases = {case.place: case for section in sections.values() for case in section}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        tasks = {
            pool.submit(measure, run, case, images, seed, out, judge_seed): place
            for place, case in cases.items()
        }
        for task in as_completed(tasks):
            found[tasks[task]] = task.result()
            click.echo(f"{time.monotonic() - began:6.0f} s  {task.result()}", err=True)
    results = {title: [found[c.place] for c in section] for title, section in sections.items()}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    text = "\n".join(f"## {title}\n\n{table(rows)}" for title, rows in results.items())
    (out / "table.md").write_text(text)
    click.echo(out / "table.md")


if __name__ == "__main__":
    main()
