"""Cut and kill runs that go back: by their alarm's rollback, by `guards: rewind`, and by both.

What sends them back follows from the weights alone: a diagnostic that calls a tenth of all latents
a collapse, images that are not a number, and a bound on losses so low that some exceed it. Each
run is stopped after one of the steps it takes, or after one of its saves, of which a return has
one; or it is killed there. Numbers go through all of these.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import torch

from benchmarks.reliability import runs
from benchmarks.reliability.resume_cuts import BASE, compare, went_on
from benchmarks.reliability.trials import Suite, Trial, command
from e2ediff.data import DataSource, ImageSpec, SourceConfig
from e2ediff.diagnostic import Diagnostic, Probe
from e2ediff.parts.sources.synthetic import Synthetic

PROMISES = {
    "stopped": "a run that is interrupted ends with 130 and has saved where it stands, be it "
    "after a return",
    "continued": "it continues, and so does one that is killed, also in a return",
    "identical": "the continued run equals the straight one: all tensors, state and figures",
    "returns": "it goes back as often, from the same steps and to the same checkpoints",
    "leftovers": "no temporary file is left when the run is done",
}
STEPS = 30
IMAGES = 60
BASIS = {
    **BASE,
    "steps": f"{STEPS}",
    "objective": "detached",
    "data": "{name: synthetic, size: 16, classes: 4, count: 60}",
    "cadence": "{log: 1, diagnose: 2, preview: 1000, checkpoint: 5}",
}
ROLLBACK = ("diagnostics=[odd_latents]", "alarm={policy: rollback, window: 1, attempts: 99}")
MORE = ("objective=coupled", "microshards=2", "ema=[{name: slow, decay: 0.9}]",
        "post_hoc={every: 3}", "checkpoint.keep=1")  # fmt: skip
CASES = {
    "rollback": ROLLBACK,
    "rollback, window of three": (
        *("diagnostics=[{name: odd_latents, share: 0.5}]", "cadence.diagnose=1"),
        *("alarm={policy: rollback, window: 3, attempts: 99}", "checkpoint.keep=1"),
    ),
    "rewind, not finite": ("data=poisoned", "guards={non_finite: rewind, limit: 99}"),
    "rewind, spikes": ("guards={spike: rewind, factor: 1.3, window: 4, limit: 99, share: 1.0}",),
    "both, with averages": (
        *ROLLBACK,
        *MORE,
        *("data=poisoned", "guards={non_finite: rewind, limit: 99}"),
    ),
}
MOMENTS = ("step", "save")


@attrs.frozen(kw_only=True)
class OddLatents(Diagnostic):
    """Call a share of all latents a collapse, whichever these are: it depends on nothing else."""

    share: float = 0.1

    def measure(self, probe: Probe) -> dict[str, float]:
        """Return a number from 0 to 1 that any change of the latents changes."""
        found = hashlib.sha256(probe.z.detach().float().cpu().numpy().tobytes()).digest()
        return {"odd": int.from_bytes(found[:4], "big") / 2**32}

    def verdict(self, values: Any) -> list[str]:
        """Find fault with it now and then."""
        return ["the latents are odd"] * (values.get("odd", 1.0) < self.share)


@attrs.frozen(kw_only=True)
class Poisoned(SourceConfig):
    """The synthetic images, of which one is not a number."""

    image_number: int = 29

    @property
    def image(self) -> ImageSpec:
        """Those of the synthetic images."""
        return self._clean.image

    @property
    def _clean(self) -> Synthetic:
        return Synthetic(size=16, classes=4, count=IMAGES)

    def open(self, *, held_out: bool = False) -> DataSource:
        """Open them; those that are held out are whole."""
        clean = self._clean.open(held_out=held_out)
        return clean if held_out else _Poisoned(clean, self.image_number)


class _Poisoned(DataSource):
    def __init__(self, clean: DataSource, bad: int) -> None:
        self.clean, self.bad = clean, bad

    def __len__(self) -> int:
        return len(self.clean)

    def read(self, indices: Any) -> Any:
        x, labels = self.clean.read(indices)
        x = x.float()
        for row, index in enumerate(indices):
            if index == self.bad:
                x[row, 0, 3, 3] = torch.nan
        return x, labels


@attrs.frozen
class Case:
    """A recipe's changes, its straight run, how it went back, and its steps and saves."""

    name: str
    changes: tuple[str, ...]
    run: Path
    returns: list[tuple[object, ...]]
    counts: dict[str, int]


@attrs.frozen
class Setup:
    """The recipe that all share, and the straight runs."""

    recipe: Path
    cases: tuple[Case, ...]


def prepare(place: Path, only: Collection[str] = ()) -> Setup:
    """Train the straight run of each case, or of `only` these; each must go back."""
    text = runs.recipe(BASIS)
    runs.warm(place, text)
    file, log = place / "tiny.yaml", place / "log"
    file.write_text(text)
    found = []
    for number, (name, changes) in enumerate(CASES.items()):
        if only and name not in only:
            continue
        out, count = place / f"straight{number}", place / f"count{number}"
        ended = _train(file, changes, out, log, count=count)
        if ended.code != 0:
            raise RuntimeError(f"{name}: the straight run failed: {ended.said}")
        steps, saves = map(int, count.read_text().split())
        case = Case(name, changes, out, _returns(out), {"step": steps, "save": saves})
        if not case.returns:
            raise RuntimeError(f"{name}: the straight run does not go back")
        found.append(case)
    return Setup(file, tuple(found))


def _returns(out: Path) -> list[tuple[object, ...]]:
    events = [e for e in runs.json_lines(out / "events.jsonl") if e["kind"] == "rewound"]
    return [(e["step"], e["to"], e["attempt"]) for e in events]


def _train(
    file: Path,
    changes: tuple[str, ...],
    out: Path,
    log: Path,
    moment: str = "",
    at: int = 0,
    number: int = signal.SIGINT,
    count: Path | None = None,
) -> runs.Ended:
    """Train or continue in a fork, which sends itself a signal at its `at`-th step or save."""
    begun = out.exists() and any(out.iterdir())

    def act() -> int:
        from e2ediff import hookimpl
        from e2ediff.errors import E2EDiffError
        from e2ediff.host.plugins import load
        from e2ediff.train.session import train

        seen = dict.fromkeys(MOMENTS, 0)

        def met(kind: str) -> None:
            seen[kind] += 1
            if kind == moment and seen[kind] == at:
                os.kill(os.getpid(), number)

        @hookimpl
        def register(add: Callable[..., object]) -> None:
            add("diagnostics", "odd_latents", OddLatents)
            add("sources", "poisoned", Poisoned)

        @hookimpl
        def step_ended(run: object, step: int) -> None:
            met("step")

        @hookimpl
        def checkpoint_saved(run: object, path: str) -> None:
            met("save")

        runs.without_drawing()
        hooks = {"register": register, "step_ended": step_ended}
        hooks["checkpoint_saved"] = checkpoint_saved
        host = load(SimpleNamespace(__name__="cutter", **hooks))
        try:
            code = train(host, str(file), changes, str(out), resume=begun).exit_code
        except E2EDiffError as error:
            print(error, file=sys.stderr)
            return error.exit_code
        if count:
            count.write_text(f"{seen['step']} {seen['save']}")
        return code

    since = time.monotonic()
    return runs.wait(runs.begin(act, log), log, since, 90)


def trial(setup: Setup, trial: Trial) -> None:
    """Cut one case at one of its steps or saves; numbers go through the cases, then the cuts."""
    cases, chance = setup.cases, trial.chance
    case, turn = cases[trial.number % len(cases)], trial.number // len(cases)
    points = [(kind, at + 1) for kind in MOMENTS for at in range(case.counts[kind])]
    cuts = [points[(turn * 37 + trial.number % len(cases) * 11) % len(points)]]
    for _ in range(chance.choice((0, 0, 1, 3))):
        cuts.append(("step", chance.randint(1, 8)))
    out, log = trial.place / "run", trial.place / "log"
    happened = [case.name]
    for kind, at in cuts:
        number = signal.SIGKILL if chance.random() < 0.4 else signal.SIGINT
        ended = _train(setup.recipe, case.changes, out, log, kind, at, number)
        happened.append(f"{number.name} at {kind} {at}: exit {ended.code}")
        story = ", ".join(happened)
        trial.facts[f"{number.name} at a {kind}"] += 1
        if ended.code not in (0, -9 if number == signal.SIGKILL else 130):
            promise = "stopped" if number == signal.SIGINT else "continued"
            trial.fail(promise, f"{ended.last} ({story})")
            return
        if ended.code == 130 and (what := _unsaved(out)):
            trial.fail("stopped", f"{what} ({story})")
    ended = _train(setup.recipe, case.changes, out, log)
    if not went_on(trial, ended, story):
        return
    compare(trial, case.name, out, case.run, story)
    if (mine := _returns(out)) != case.returns:
        trial.fail("returns", f"{mine} instead of {case.returns} ({story})")
    if left := runs.leftovers(trial.place):
        trial.fail("leftovers", f"{left} ({story})")
    trial.facts["returns"] += len(case.returns)


def _unsaved(out: Path) -> str:
    """Return what is wrong if a stopped run's newest checkpoint is not of its last step."""
    names = runs.names_of(out)
    status = runs.json_lines(out / "metrics.jsonl")
    step = max((int(line["step"]) for line in status), default=0)
    saved = int(names[-1].split("-")[1]) // int(BASIS["batch"]) if names else -1
    return "" if saved >= step else f"step {step} was reached, and {saved} is saved"


SUITE = Suite(
    "returns",
    "Runs that go back, cut at every step",
    PROMISES,
    prepare,
    trial,
    every=lambda setup: len(setup.cases) * max(sum(c.counts.values()) for c in setup.cases),
)

if __name__ == "__main__":
    # Under its own name: a recipe's parts must be the classes of one module.
    from benchmarks.reliability.returns import SUITE as _SUITE

    sys.exit(command(_SUITE))
