"""Cut a run of 60 steps at every step, and continue it: per objective, 60 of 60.

All installed objectives are cut, each with what its class says that it needs (`trial`), and
further recipes with micro-shards, averages, snapshots, another optimizer, and diagnoses. Half are
cut again, one in six four times.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace

import attrs

from benchmarks.reliability import runs
from benchmarks.reliability.trials import Suite, Trial, command

PROMISES = {
    "stopped": "a run that is interrupted after a step has saved it, and ends with 130, or with 0 "
    "after the last step",
    "continued": "it continues",
    "identical": "the continued run equals the straight one: all tensors, state and figures",
}
STEPS = 60
BASE = {
    "steps": f"{STEPS}",
    "batch": "4",
    "data": "{name: synthetic, size: 16, classes: 4, count: 60}",
    "backbone": "{name: vit, width: 16, depth: 1, heads: 2, patch: 8, latent_dim: 6, "
    "latent_norm: batch}",
    "times": "logit_normal",
    "target": "{decay: 0.9}",
    "cadence": "{log: 1, diagnose: 1000, preview: 1000, checkpoint: 1000}",
    "probe": "{images: 8, times: [0.5], calibration: 8}",
}
AUGMENTED = "objective={name: dsd, augmentation: {jitter: 0.2}, decode_noise: {probability: 1.0}}"
VARIANTS = {
    "micro-shards and averages": (
        *("objective=coupled", "microshards=2", "optimizer.warmup_images=80"),
        *("ema=[{name: slow, decay: 0.99}, {name: young, decay: 0.5}]", "post_hoc={every: 7}"),
    ),
    "diagnoses and pictures": (
        *("objective=coupled", "diagnostics=[latent_health]"),
        "cadence={log: 3, diagnose: 11, preview: 13, checkpoint: 9}",
    ),
    "muon": (
        "objective=detached",
        "optimizer={name: muon, schedule: wsd, cooldown: 0.5, adamw: {weight_decay: 0.1}}",
    ),
    "several draws": (
        *("objective={name: detached, draws: 2}", "backbone.latent_norm=layer"),
        *("microshards=2", "ema=[{name: slow, decay: 0.99}]", "optimizer.warmup_images=40"),
        "post_hoc={every: 4}",
    ),
    "two optimizers": (
        *("objective=two_stage", "backbone.trunks=denoiser_apart"),
        "optimizers={denoiser: {name: sgd, lr: 0.01, schedule: linear}}",
    ),
}


@attrs.frozen
class Straight:
    """A recipe's name, its changes, and its straight run."""

    name: str
    changes: tuple[str, ...]
    run: Path


@attrs.frozen
class Setup:
    """The recipe that all share, the straight runs, and their steps."""

    recipe: Path
    cases: tuple[Straight, ...]
    steps: int = STEPS


def cases() -> dict[str, tuple[str, ...]]:
    """Return changes of the recipe for every installed objective and every variant."""
    from e2ediff.host.plugins import load

    found = {}
    registry = load().registries["objectives"]
    for name in registry.names():
        needs = getattr(registry.get(name), "trial", ())
        more = ("backbone.trunks=denoiser_apart",) if name == "two_stage" else ()
        found[name] = (f"objective={name}", *more, *needs)
    if "dsd" in found:
        found["dsd with augmentation"] = (AUGMENTED, "optimizer.schedule=cosine")
        found["dsd with augmentation"] += ("backbone.latent_norm=position",)
    return found | VARIANTS


def prepare(place: Path, steps: int = STEPS, only: Collection[str] = ()) -> Setup:
    """Train the straight run of each case, or of `only` these."""
    text = runs.recipe({**BASE, "steps": f"{steps}"})
    runs.warm(place, text)
    file = place / "tiny.yaml"
    file.write_text(text)
    found = []
    for number, (name, changes) in enumerate(cases().items()):
        if only and name not in only:
            continue
        out = place / f"straight{number}"
        ended = _train(file, changes, out, place / "log")
        if ended.code != 0:
            raise RuntimeError(f"{name}: the straight run failed: {ended.said}")
        found.append(Straight(name, changes, out))
    return Setup(file, tuple(found), steps)


def _train(
    file: Path, changes: tuple[str, ...], out: Path, log: Path, cut: int = 0, seconds: float = 90
) -> runs.Ended:
    """Train or continue in a fork, which interrupts itself after step `cut`."""
    resume = out.exists()

    def act() -> int:
        from e2ediff import hookimpl
        from e2ediff.host.plugins import load
        from e2ediff.train.session import train

        @hookimpl
        def step_ended(run: object, step: int) -> None:
            if step == cut:
                signal.raise_signal(signal.SIGINT)

        runs.without_drawing()
        host = load(SimpleNamespace(__name__="cutter", step_ended=step_ended))
        return train(host, str(file), changes, str(out), resume=resume).exit_code

    since = time.monotonic()
    return runs.wait(runs.begin(act, log), log, since, seconds)


def trial(setup: Setup, trial: Trial) -> None:
    """Cut one case at one step; numbers go through the cases, and then through the cuts."""
    case = setup.cases[trial.number % len(setup.cases)]
    turn = trial.number // len(setup.cases)
    cut = 1 + (turn * 37 + trial.number % len(setup.cases) * 11) % setup.steps
    cuts = [cut]
    more = trial.chance.choice((0, 0, 0, 1, 1, 3)) if cut < setup.steps - 4 else 0
    cuts += sorted(trial.chance.sample(range(cut + 1, setup.steps), more))
    out, log = trial.place / "run", trial.place / "log"
    story = f"{case.name} cut after {cuts}"
    for step in cuts:
        ended = _train(setup.recipe, case.changes, out, log, step)
        newest = runs.names_of(out)[-1:]
        if ended.code != (130 if step < setup.steps else 0) or newest != [
            f"images-{4 * step:012d}"
        ]:
            trial.fail("stopped", f"exit {ended.code}, {newest}: {ended.last} ({story})")
            return
    ended = _train(setup.recipe, case.changes, out, log)
    if not went_on(trial, ended, story):
        return
    compare(trial, case.name, out, case.run, story)
    trial.facts["cut more than once"] += len(cuts) > 1


def went_on(trial: Trial, ended: runs.Ended, story: str) -> bool:
    """Return whether the continued run came to its end, which is promised."""
    if ended.code != 0:
        trial.fail("continued", f"exit {ended.code}: {ended.last} ({story})")
    return ended.code == 0


def compare(trial: Trial, name: str, out: Path, straight: Path, story: str) -> None:
    """Check that a continued run equals the straight one."""
    if found := runs.differences(out, straight):
        trial.fail("identical", f"{'; '.join(found)} ({story})")
    else:
        trial.facts[f"{name}: identical"] += 1


SUITE = Suite(
    "resume_cuts",
    "Runs cut at every step",
    PROMISES,
    prepare,
    trial,
    every=lambda setup: setup.steps * len(setup.cases),
)

if __name__ == "__main__":
    sys.exit(command(SUITE))
