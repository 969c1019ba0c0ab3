"""Kill runs: at every file operation and at random moments, up to five times in a row.

Each trial is a chain: a run is killed, is taken up and perhaps killed again, and is then
finished. It must be the straight run, bit for bit.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import attrs

from benchmarks.reliability import runs
from benchmarks.reliability.faults import MOMENTS, Faults
from benchmarks.reliability.trials import Suite, Trial, command

PROMISES = {
    "lost": "a saved checkpoint stays, and at most one interval of steps is lost "
    "(two while a save is in flight)",
    "torn": "no half-written checkpoint has a checkpoint's name",
    "traceback": "a run that is taken up shows no traceback",
    "wedged": "whatever a kill leaves can be taken up",
    "identical": "the finished run equals the straight one: all tensors, state and figures",
    "leftovers": "no temporary file is left when the run is done",
}
MOST = 5
"""Kills in a row."""


@attrs.frozen
class Variant:
    """A recipe, its straight run, and how many file operations and seconds that takes."""

    name: str
    recipe: Path
    straight: Path
    operations: int
    seconds: float


def prepare(place: Path, variants: tuple[str, ...] = ("lean", "full")) -> list[Variant]:
    """Train the straight run of each variant, and count its operations."""
    texts = {"lean": runs.recipe(), "full": runs.recipe(runs.FULL)}
    runs.warm(place, *(texts[name] for name in variants))
    return [straight_run(place, name, texts[name]) for name in variants]


def straight_run(place: Path, name: str, text: str) -> Variant:
    """Train a recipe without disturbance."""
    file = place / f"{name}.yaml"
    file.write_text(text)
    count = place / f"{name}.count"
    out, log = place / name, place / f"{name}.log"

    def act() -> int:
        runs.without_drawing()
        faults = Faults().install()
        code = runs.command(runs.train_words(file, out))
        count.write_text(str(faults.count))
        return code

    since = time.monotonic()
    ended = runs.wait(runs.begin(act, log), log, since, 120)
    if ended.code != 0:
        raise RuntimeError(f"the straight run failed: {ended.said}")
    return Variant(name, file, out, int(count.read_text()), ended.seconds)


def trial(variants: list[Variant], trial: Trial) -> None:
    """Odd numbers kill at random moments, even ones at one file operation after the other."""
    chance = trial.chance
    variant = variants[0] if trial.number % 8 else variants[-1]
    out, log = trial.place / "run", trial.place / "log"
    kills = chance.choice((1, 1, 1, 1, 1, 1, 2, 2, 3, MOST))
    happened = []
    for kill in range(kills):
        words = runs.train_words(variant.recipe, out)
        if kill == 0 and trial.number % 2 == 0:
            point = trial.number // 2 * _stride(variant.operations)
            how = _at_operation(words, log, 1 + point % variant.operations, _moment(trial.number))
        elif chance.random() < 0.5:
            at = chance.randint(1, variant.operations)
            how = _at_operation(words, log, at, chance.choice(MOMENTS))
        else:
            how = _at_moment(words, log, chance.uniform(0, 1.05 * variant.seconds))
        happened.append(f"{how[0]} -> {how[1].code}")
        trial.facts["kills"] += how[1].code == -signal.SIGKILL
        story = f"{variant.name}; " + ", ".join(happened)
        if how[1].code not in (0, -signal.SIGKILL):
            _report(trial, how[1], story)
            return
        for name in runs.names_of(out):
            if what := runs.damage(out / "checkpoints" / name):
                trial.fail("torn", f"{name}: {what} ({story})")
        for what in runs.losses(out, runs.INTERVAL, int(runs.LINES["batch"])):
            trial.fail("lost", f"{what} ({story})")
    words = runs.train_words(variant.recipe, out)
    ended = runs.fork(words, log, runs.without_drawing)
    if ended.code != 0:
        _report(trial, ended, story)
        return
    trial.facts["finished"] += 1
    if found := runs.differences(out, variant.straight):
        trial.fail("identical", f"{'; '.join(found)} ({story})")
    if left := runs.leftovers(trial.place):
        trial.fail("leftovers", f"{left} ({story})")


def _moment(number: int) -> str:
    """Return one of the moments, so that each comes with every operation in turn."""
    return MOMENTS[number // 2 % len(MOMENTS)]


def _stride(operations: int) -> int:
    """Return a step that visits all operations, and far ones one after the other."""
    stride = int(operations * 0.382) | 1
    while operations % stride == 0 and stride > 1:
        stride += 2
    return stride


def _at_operation(words: list[str], log: Path, number: int, moment: str) -> tuple[str, runs.Ended]:
    def first() -> None:
        runs.without_drawing()
        Faults(number, moment).install()

    return f"{moment} operation {number}", runs.fork(words, log, first)


def _at_moment(words: list[str], log: Path, seconds: float) -> tuple[str, runs.Ended]:
    since = time.monotonic()
    pid = runs.begin(lambda: runs.command(words), log, runs.without_drawing)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return f"after {seconds:.3f} s", runs.wait(pid, log, since, 10)


def _report(trial: Trial, ended: runs.Ended, story: str) -> None:
    what = "hung" if ended.code is None else f"exit {ended.code}"
    trial.fail("traceback" if ended.crashed else "wedged", f"{what}: {ended.last} ({story})")


SUITE = Suite("kills", "Runs killed with SIGKILL", PROMISES, prepare, trial)

if __name__ == "__main__":
    sys.exit(command(SUITE))
