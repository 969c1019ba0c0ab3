"""Sample one run by every sampler at equal network calls, and by every guidance, and score them.

    python benchmarks/samplers.py RUN --out DIR

Leaves `results.json` and `table.md` in DIR, and the sets of images in DIR/sets; a set that is
there is not made again, and an unfinished one is continued.
Scores are those of the quickstart's judge, so RUN must be one on Fashion-MNIST.

Shapes: M images, C H W image, F features.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import click
import numpy as np
import torch
from judge import Judge, accuracy, features, frechet_distance, load_images, train_judge
from torch import Tensor

from e2ediff.host.plugins import Host, load
from e2ediff.run.load import load_model
from e2ediff.run.sample_set import make_set
from e2ediff.run.wish import Wish

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


@attrs.frozen(kw_only=True)
class Case:
    """One way to sample: its row's title, where its images lie, and what it overrides."""

    title: str
    place: str
    overrides: tuple[str, ...]


@attrs.frozen(eq=False)
class Reference:
    """What images are compared with."""

    judge: Judge
    features: Tensor


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


def measure(
    host: Host, run: str, case: Case, images: int, seed: int, out: Path, reference: Reference
) -> dict[str, Any]:
    """Make the set, and score it: distance, label agreement, network calls, and time."""
    classes = load_model(run, host=host).recipe.data.image.classes
    place = out / "sets" / case.place
    wish = Wish(
        run=run,
        device="cpu",
        overrides=case.overrides,
        seed=seed,
        law="balanced",
        labels=tuple(i % classes for i in range(images)),
        format="npz",
        out=str(place),
    )
    path = make_set(
        wish, host, threads=1, say=lambda line: click.echo(line, err=True), update=lambda _: None
    )
    with np.load(path) as found:
        x = torch.from_numpy(found["arr_0"]).permute(0, 3, 1, 2).float() / 127.5 - 1
        label = torch.from_numpy(found["arr_1"])
    made = json.loads((place / "set.json").read_text())["made"]
    return {
        "title": case.title,
        "frechet": frechet_distance(features(reference.judge, x), reference.features),
        "agreement": accuracy(reference.judge, x, label),
        "calls": made["calls_per_image"],
        "passes": made["passes_per_image"],
        "milliseconds": 1000 / made["images_per_second"],
    }


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
def main(
    run: str, out: Path, images: int, budgets: tuple[int, ...], seed: int, judge_seed: int
) -> None:
    """Score every sampler and every guidance on RUN."""
    torch.set_num_threads(1)
    host, began = load(), time.monotonic()
    judge = train_judge(judge_seed, out / "judges")
    source = load_model(run, host=host).recipe.data
    reference = Reference(judge, features(judge, load_images(source).x))
    sections: dict[str, list[Case]] = {
        f"Samplers at {calls} network calls": sampler_cases(calls) for calls in budgets
    }
    sections["Guidance"] = guidance_cases()
    results: dict[str, list[dict[str, Any]]] = {}
    for title, cases in sections.items():
        results[title] = []
        for case in cases:
            results[title].append(measure(host, run, case, images, seed, out, reference))
            click.echo(f"{time.monotonic() - began:6.0f} s  {results[title][-1]}", err=True)
            (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    text = "\n".join(f"## {title}\n\n{table(rows)}" for title, rows in results.items())
    (out / "table.md").write_text(text)
    click.echo(out / "table.md")


if __name__ == "__main__":
    main()
