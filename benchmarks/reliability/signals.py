"""Send signals to commands at random moments, their start included, sometimes two.

`run` (with and without data workers), `sample`, `eval` and `ablate`. Most are forks of a warm
process; one in twelve is a process of its own, in whose start the imports are.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import attrs

from benchmarks.reliability import runs
from benchmarks.reliability.processes import cpu_seconds, handles, orphans
from benchmarks.reliability.trials import Suite, Trial, command

PROMISES = {
    "code": "a command ends with 75 after TERM and USR1, with 130 after INT, or with 0 if it was "
    "done; from the moment on at which its own code runs",
    "told": "a run that is stopped says how to continue it",
    "status": "the run's status.json has the same code",
    "prompt": "it ends within ten seconds",
    "orphan": "no process is left",
    "traceback": "no traceback is shown",
    "identical": "repeated, it makes what the undisturbed command makes, bit for bit",
}
PATIENCE = 10.0
START = {"fork": 0.03, "own": 0.4}
"""CPU seconds before a command's own code runs: the fork's, or the interpreter's start."""
RUNS = ("run", "workers", "own")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
CYCLE = ("run", "sample", "run", "eval", "run", "workers", "run", "sample", "eval", "run",
         "ablate", "own")  # fmt: skip


@attrs.frozen
class Setup:
    """Recipes, a finished run, two sets of images; seconds that each command takes."""

    recipe: Path
    workers: Path
    straight: dict[str, Path]
    seconds: dict[str, float]


def prepare(
    place: Path, kinds: tuple[str, ...] = ("run", "workers", "sample", "eval", "ablate")
) -> Setup:
    """Carry out each command once, undisturbed."""
    place.mkdir(parents=True, exist_ok=True)
    _images(place / "tree")
    changes = {"steps": "20", "diagnostics": "[latent_health]",
               "cadence": "{log: 1, diagnose: 5, preview: 10, checkpoint: 7}"}  # fmt: skip
    folder = f"{{name: image_folder, root: {place / 'tree'}, size: 8, classes: 2, workers: 1}}"
    recipe, workers = place / "tiny.yaml", place / "workers.yaml"
    recipe.write_text(runs.recipe(changes))
    workers.write_text(runs.recipe({**changes, "data": folder}))
    runs.warm(place, recipe.read_text(), workers.read_text())
    setup = Setup(recipe, workers, {}, {})
    for kind in kinds:
        out = place / kind
        setup.straight[kind] = out
        ended = runs.fork(_words(setup, kind, out), place / "log", runs.without_drawing, 180)
        if ended.code != 0:
            raise RuntimeError(f"{kind}: {ended.said}")
        setup.seconds[kind] = ended.seconds
    setup.straight["own"], setup.seconds["own"] = setup.straight["run"], 6.0
    return setup


def _images(folder: Path) -> None:
    from PIL import Image

    for number in range(24):
        path = folder / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number * 10, 255 - number * 10, 7 * number)).save(path)


def _words(setup: Setup, kind: str, out: Path) -> list[str]:
    run = setup.straight["run"]
    match kind:
        case "sample":
            words = ["sample", run, "--count", 60, "--batch", 8, "--rows", 8, "--out", out]
        case "eval":
            words = ["eval", run, "--features", "{name: random_projection, width: 4}"]
            words += ["--count", 16, "--out", out, "--cache", f"{out}.cache"]
        case "ablate":
            words = ["ablate", setup.recipe, "--vary", "optimizer.lr=0.01,0.001", "--seeds", "0"]
            words += ["--out", out] + (["--resume"] if (out / "spec.json").exists() else [])
        case "workers":
            return runs.train_words(setup.workers, out)
        case _:
            return runs.train_words(setup.recipe, out)
    return [*map(str, words), "--threads", "1"]


def trial(setup: Setup, trial: Trial) -> None:
    """One command, one signal or two, and the command again."""
    chance, kind = trial.chance, CYCLE[trial.number % len(CYCLE)]
    first = SIGNALS[trial.number // len(CYCLE) % 3]
    second = chance.choice(SIGNALS) if chance.random() < 0.3 else None
    moment = chance.uniform(0, 1.1 * setup.seconds[kind])
    if chance.random() < 0.25:
        moment *= 0.1  # in the start
    story = f"{kind}: {first.name} after {moment:.3f} s"
    out, log = trial.place / "out", trial.place / "log"
    words = _words(setup, kind, out)
    if kind == "own":
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "e2ediff", *words], stdout=file, stderr=file
            )
        pid = process.pid
    else:
        pid = runs.begin(lambda: runs.command(words), log, runs.without_drawing)
    if lines := chance.choice((0, 0, 1, 2, 4, 8)) if kind in RUNS else 0:
        story = f"{kind}: {first.name} after {lines} logged steps"
        limit = time.monotonic() + 30
        while len(runs.json_lines(out / "metrics.jsonl")) < lines and time.monotonic() < limit:
            time.sleep(0.002)
    else:
        time.sleep(moment)
    signals, own = (first, second), kind == "own"
    ended, story = answered(trial, kind, pid, log, signals, story, own, PATIENCE)
    saved = f"continue with: e2ediff run --resume {out}\n"
    if kind in RUNS and ended.code in (75, 130) and not second and " saved" in ended.said:
        trial.facts["stopped and saved"] += 1
        if saved not in ended.said:
            trial.fail("told", f"{ended.last} ({story})")
    if kind in RUNS and (out / "status.json").exists():
        status = json.loads((out / "status.json").read_text())
        states = {0: "done", 75: "preempted", 130: "interrupted"}
        if (status["exit_code"], status["state"]) != (ended.code, states.get(ended.code or 0)):
            trial.fail("status", f"{status} after exit {ended.code} ({story})")
    if kind != "eval" or trial.number % 2:
        again = runs.fork(_words(setup, kind, out), log, runs.without_drawing, 120)
        if again.code != 0:
            trial.fail("identical", f"repeated: exit {again.code}: {again.last} ({story})")
        elif found := _differences(setup, kind, out):
            trial.fail("identical", f"{'; '.join(found)} ({story})")
    orphans(PATIENCE)


def answered(
    trial: Trial,
    name: str,
    pid: int,
    log: Path,
    signals: tuple[signal.Signals, signal.Signals | None],
    story: str,
    own: bool,
    patience: float,
) -> tuple[runs.Ended, str]:
    """Send one signal or two, wait for the end, and check its time and its exit code.

    Returns:
        The end, and the story so far.
    """
    first, second = signals
    ready = cpu_seconds(pid) > START["own" if own else "fork"] or handles(pid, signal.SIGTERM)
    sent = time.monotonic()
    os.kill(pid, first)
    if second:
        pause = trial.chance.uniform(0, 0.3)
        time.sleep(pause)
        os.kill(pid, second)  # not yet waited for, so the number is still its own
        story += f", {second.name} {pause:.3f} s later"
    ended = runs.wait(pid, log, sent, 4 * patience)
    took = time.monotonic() - sent
    trial.facts[f"{name}: exit {ended.code}" + ("" if ready else " before its code ran")] += 1
    trial.figures["seconds to the end"] = round(took, 3)
    if took > patience:
        trial.fail("prompt", f"{took:.1f} s ({story})")
    expected = {0, 130 if first == signal.SIGINT else 75}
    if not ready:
        expected |= {-first, -(second or first), 1}
    if ended.code not in expected:
        trial.fail("code", f"exit {ended.code}: {ended.last} ({story})")
    if ended.crashed and ready:
        trial.fail("traceback", f"{ended.last} ({story})")
    if left := orphans(PATIENCE):
        trial.fail("orphan", f"{left} ({story})")
    return ended, story


def _differences(setup: Setup, kind: str, out: Path) -> list[str]:
    straight = setup.straight[kind]
    if kind in RUNS:
        return runs.differences(out, straight)
    if kind == "ablate":
        names = sorted(path.parent.name for path in straight.glob("runs/*/run.json"))
        return [
            f"{name}: {what}"
            for name in names
            for what in runs.differences(out / "runs" / name, straight / "runs" / name)
        ]
    patterns = ("**/*.png", "**/*.json") if kind == "sample" else ()
    found = []
    for pattern in patterns:
        for path in straight.glob(pattern):
            mine = out / path.relative_to(straight)
            same = mine.exists() and (
                mine.read_bytes() == path.read_bytes() or mine.name == "set.json"
            )
            found += [] if same else [f"{path.name} differs"]
    return found[:3]


SUITE = Suite("signals", "Signals at random moments", PROMISES, prepare, trial, seconds=400)

if __name__ == "__main__":
    sys.exit(command(SUITE))
