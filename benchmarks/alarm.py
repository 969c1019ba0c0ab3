"""Does the alarm detect collapses, without false alarms?

    python benchmarks/alarm.py --out alarms

Trains reduced quickstarts, healthy ones and ones that must collapse, with the alarm's policy
`warn`, and counts. What counts as collapsed is decided from the figures, not by the alarm: a
rank below a quarter of the latents' channels, or below a quarter of the run's largest, or an std
across images below a tenth, of the averaged network or of the trained one.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import click
import torch

from e2ediff.host.plugins import Host, load
from e2ediff.store.run_directory import RunDirectory
from e2ediff.train.progress import Progress
from e2ediff.train.session import train

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
WINDOW = 25
REDUCED = (
    "batch=16",
    "backbone.width=48",
    "backbone.depth=3",
    "optimizer.warmup_images=640",
    "sampler.steps=2",
    f"cadence={{log: {WINDOW}, diagnose: {WINDOW}, preview: 1000000, checkpoint: 1000000}}",
    "probe={images: 128, calibration: 256, times: [0.3, 0.7]}",
    "preview.rows=1",
    "alarm.policy=warn",
)
_FULL = "objective.denoising_weight=1"
COLLAPSING = {
    "coupled": ("objective=coupled",),
    "stop-gradient alone": ("objective.regress=v", "objective.target=online", _FULL),
    "clean prediction alone": ("objective.target_gradient=1", "objective.target=online", _FULL),
    "wrong form (v regressed, EMA target)": ("objective.regress=v", _FULL),
    "genfirst without entropy": (
        "objective={name: genfirst, reconstruction: {kind: l2}, prior_weight: 1, "
        "entropy_weight: 0, first_phase: 1}",
        "backbone.latent_norm=none",
    ),
}
HEALTHY = {  # with their values of docs/results/shootout.md and rivals.md
    "dsd": (),
    "detached": ("objective={name: detached, reconstruction: {kind: l2}, denoising_weight: 0.1}",),
    "two_stage": (
        "objective={name: two_stage, reconstruction: {kind: l2}}",
        "backbone.trunks=denoiser_apart",
    ),
    "unite": (
        "objective={name: unite, reconstruction: {kind: l2}, denoising_weight: 0.1, weight: x0, "
        "draws: 3}",
    ),
    "genfirst": (
        "objective={name: genfirst, reconstruction: {kind: l2}}",
        "backbone.latent_norm=none",
    ),
}

NETWORKS = ("", "_online")
"""How the figures of the averaged and of the trained network end."""


@attrs.frozen
class AlarmRecord:
    """One run: the steps at which it collapsed and at which the alarm went on, if they did.

    `rank_fraction`, `latent_std` and `relative` (the rank over the run's largest so far) are the
    smallest of the run and of both networks, `positional` the largest.
    """

    variant: str
    seed: int
    collapsed: int | None
    alarmed: int | None
    rank_fraction: float
    latent_std: float
    relative: float
    positional: float
    seconds: float


def judge(
    metrics: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What a run's figures and events say, as fields of `AlarmRecord`."""
    looks = [m for m in metrics if "rank_fraction" in m and m["step"] > 0]
    best, relative = dict.fromkeys(NETWORKS, 0.0), [1.0]
    lost = []
    for look in looks:
        for of in NETWORKS:
            best[of] = max(best[of], look[f"rank{of}"])
            relative.append(look[f"rank{of}"] / best[of])
            low = look[f"rank_fraction{of}"] < 0.25 or relative[-1] < 0.25
            if low or look[f"latent_std{of}"] < 0.1:
                lost.append(look["step"])
    alarms = [e["step"] for e in events if e["kind"] == "collapse"]
    return {
        "collapsed": min(lost, default=None),
        "alarmed": alarms[0] if alarms else None,
        "rank_fraction": min(m[f"rank_fraction{of}"] for m in looks for of in NETWORKS),
        "latent_std": min(m[f"latent_std{of}"] for m in looks for of in NETWORKS),
        "relative": min(relative),
        "positional": max(m["positional"] for m in looks),
    }


def examine(
    host: Host, out: Path, variant: str, changes: Sequence[str], seed: int, steps: int
) -> AlarmRecord:
    """Train one run, unless it lies there finished, and judge it."""
    place = out / f"{variant.partition(' (')[0].replace(' ', '-')}-seed{seed}"
    began = time.perf_counter()
    done = place.exists() and RunDirectory.open(str(place)).status().get("state") == "done"
    if not done:
        wanted = [*REDUCED, *changes, f"steps={steps}", f"seed={seed}"]
        quiet = Progress(io.StringIO())
        train(host, str(QUICKSTART), wanted, str(place), resume=place.exists(), progress=quiet)
    run = RunDirectory.open(str(place))
    found = judge(run.read_metrics(), run.read_events())
    return AlarmRecord(variant, seed, seconds=round(time.perf_counter() - began, 1), **found)


def table(records: Sequence[AlarmRecord]) -> str:
    """One row for each variant, in Markdown."""
    lines = [
        "| variant | runs | collapsed | alarms | windows from collapse to alarm, at most "
        "| smallest rank fraction | smallest rank over own largest | largest positional |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for variant in dict.fromkeys(h.variant for h in records):
        runs = [h for h in records if h.variant == variant]
        both = [
            h.alarmed - h.collapsed
            for h in runs
            if h.alarmed is not None and h.collapsed is not None
        ]
        cells = (
            variant,
            len(runs),
            sum(h.collapsed is not None for h in runs),
            sum(h.alarmed is not None for h in runs),
            f"{max(both) / WINDOW:g}" if both else "-",
            f"{min(h.rank_fraction for h in runs):.2f}",
            f"{min(h.relative for h in runs):.2f}",
            f"{max(h.positional for h in runs):.2f}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Where runs go.")
@click.option("--steps", default=250, show_default=True)
@click.option("--seeds", default=5, show_default=True, help="Of each variant that collapses.")
@click.option("--healthy-seeds", default=20, show_default=True, help="Of each healthy variant.")
@click.option("--threads", default=1, show_default=True)
def main(out: Path, steps: int, seeds: int, healthy_seeds: int, threads: int) -> None:
    """Count the alarms of runs that collapse and of runs that do not."""
    torch.set_num_threads(threads)
    host, records = load(), []
    out.mkdir(parents=True, exist_ok=True)
    counts = {**dict.fromkeys(COLLAPSING, seeds), **dict.fromkeys(HEALTHY, healthy_seeds)}
    for variant, changes in {**COLLAPSING, **HEALTHY}.items():
        for seed in range(counts[variant]):
            one = examine(host, out, variant, changes, seed, steps)
            records.append(one)
            click.echo(f"{variant} seed {seed}: {attrs.asdict(one)}", err=True)
    (out / "results.json").write_text(json.dumps([attrs.asdict(h) for h in records], indent=1))
    (out / "table.md").write_text(table(records) + "\n")
    false = [h for h in records if h.alarmed is not None and h.variant in HEALTHY]
    missed = [h for h in records if h.alarmed is None and h.collapsed is not None]
    click.echo(table(records))
    click.echo(f"\nfalse alarms: {len(false)}; collapses without an alarm: {len(missed)}")


if __name__ == "__main__":
    main()
