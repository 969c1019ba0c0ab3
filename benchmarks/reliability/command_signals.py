"""Send signals to commands other than `run`, from their first line on: nothing is half finished.

`sample`, `eval`, `ablate`, `sweep`, `reconstruct` and `data prepare`, of which every second one is
a process of its own, in whose start the imports are. What lies there after the signal is looked at
before the command is repeated.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import attrs

from benchmarks.reliability import runs
from benchmarks.reliability.processes import orphans
from benchmarks.reliability.signals import PATIENCE, SIGNALS, answered
from benchmarks.reliability.trials import Suite, Trial, command

PROMISES = {
    "code": "a command ends with 75 after TERM and USR1, with 130 after INT, or with 0 if it was "
    "done; from its first line on",
    "told": "it says that the same command goes on, once it has begun to work",
    "prompt": "it ends within ten seconds, or thirty where it still imports what saving needs",
    "orphan": "no process is left",
    "traceback": "no traceback is shown",
    "finished": "whatever has the name of a finished file is whole, and what it is undisturbed",
    "again": "the same command, repeated, makes what the undisturbed one makes",
    "leftovers": "no temporary file is left then",
}
COMMANDS = ("sample", "eval", "ablate", "sweep", "reconstruct", "data prepare")
PROJECTION = "{name: random_projection, width: 4}"


@attrs.frozen
class Setup:
    """A recipe, a finished run, images, and what each command makes undisturbed in which time."""

    place: Path
    commands: tuple[str, ...]
    seconds: dict[str, float]
    start: float


def prepare(place: Path, commands: tuple[str, ...] = COMMANDS) -> Setup:
    """Carry out each command once, undisturbed."""
    place.mkdir(parents=True, exist_ok=True)
    needs = {"sweep": "e2ediff_sweep", "data prepare": "e2ediff_data"}
    commands = tuple(name for name in commands if find_spec(needs.get(name, "e2ediff")))
    recipe, log = place / "tiny.yaml", place / "log"
    recipe.write_text(runs.recipe())
    runs.warm(place, recipe.read_text())
    ended = runs.fork(runs.train_words(recipe, place / "run"), log, runs.without_drawing)
    if ended.code != 0:
        raise RuntimeError(ended.said)
    _images(place / "tree")
    setup = Setup(place, commands, {}, 0.0)
    for name in commands:
        ended = runs.fork(_words(setup, name, place / name), log, runs.without_drawing, 180)
        if ended.code != 0:
            raise RuntimeError(f"{name}: {ended.said}")
        setup.seconds[name] = ended.seconds
    since = time.monotonic()
    subprocess.run([sys.executable, "-m", "e2ediff", "sample", "--help"],
                   check=True, capture_output=True)  # fmt: skip
    return attrs.evolve(setup, start=3 * (time.monotonic() - since))  # torch is imported later


def _images(folder: Path) -> None:
    from PIL import Image

    for number in range(48):
        path = folder / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 12), (number * 5, 255 - number * 5, 7 * number % 256)).save(path)


def _words(setup: Setup, name: str, out: Path) -> list[str]:
    run, recipe = setup.place / "run", setup.place / "tiny.yaml"
    words: list[Any] = {
        "sample": ["sample", run, "--count", 60, "--batch", 8, "--rows", 8, "--out", out],
        "eval": ["eval", run, "--features", PROJECTION, "--count", 48, "--batch", 8, "--out", out,
                 "--cache", f"{out}.cache"],
        "ablate": ["ablate", recipe, "--vary", "optimizer.lr=0.01,0.001", "--seeds", "0",
                   "--out", out, *(["--resume"] if (out / "spec.json").exists() else [])],
        "sweep": ["sweep", run, "--vary", "sampler.steps=1,2,3", "--count", 8, "--features",
                  PROJECTION, "--out", out, "--cache", f"{out}.cache"],
        "reconstruct": ["reconstruct", run, "--count", 16, "--out", out],
        "data prepare": ["data", "prepare", setup.place / "tree", out, "--size", 8, "--each", 4,
                         "--workers", 0],
    }[name]  # fmt: skip
    return [*map(str, words), *([] if name == "data prepare" else ["--threads", "1"])]


def trial(setup: Setup, trial: Trial) -> None:
    """One command, one signal or two, a look at what lies there, and the command again."""
    chance, name = trial.chance, setup.commands[trial.number % len(setup.commands)]
    turn = trial.number // len(setup.commands)
    own, first = turn % 2 == 1, SIGNALS[turn // 2 % 3]
    second = chance.choice(SIGNALS) if chance.random() < 0.3 else None
    moment = chance.uniform(0, setup.seconds[name] * 1.05 + setup.start * own)
    how = "own process" if own else "fork"
    story = f"{name}, {how}: {first.name} after {moment:.3f} s"
    out, log = trial.place / "out", trial.place / "log"
    words = _words(setup, name, out)
    if own:
        with log.open("wb") as file:
            call = [sys.executable, "-m", "e2ediff", *words]
            pid = subprocess.Popen(call, stdout=file, stderr=file).pid
    else:
        pid = runs.begin(lambda: runs.command(words), log, runs.without_drawing)
    time.sleep(moment)
    patience = PATIENCE * (3 if own else 1)
    ended, story = answered(trial, name, pid, log, (first, second), story, own, patience)
    if out.exists() and ended.code in (75, 130) and not any(
        text in ended.said for text in ("the same command", "continue with")
    ):  # fmt: skip
        trial.fail("told", f"{ended.last} ({story})")
    straight = setup.place / name
    if found := _unfinished(out, straight, done=ended.code == 0):
        trial.fail("finished", f"{'; '.join(found[:3])} ({story}: exit {ended.code})")
    trial.facts["something lay there"] += out.exists() and ended.code != 0
    again = runs.fork(_words(setup, name, out), log, runs.without_drawing, 180)
    if again.code != 0:
        trial.fail("again", f"exit {again.code}: {again.last} ({story})")
    elif found := _unfinished(out, straight, done=True):
        trial.fail("again", f"{'; '.join(found[:3])} ({story})")
    if left := runs.leftovers(trial.place):
        trial.fail("leftovers", f"{left} ({story})")
    orphans(PATIENCE)


def _unfinished(out: Path, straight: Path, *, done: bool) -> list[str]:
    """Return what is not whole, or not as undisturbed; if `done`, also what is missing."""
    found = []
    for path in sorted(p for p in straight.rglob("*") if p.is_file()):
        name = str(path.relative_to(straight))
        mine = out / name
        if "/." in f"/{name}" or "attempts/" in name:
            continue
        if not mine.exists():
            found += [f"{name} is missing"] * done
        elif what := _differs(mine, path, done=done):
            found.append(f"{name} {what}")
    for folder in out.glob("runs/*/checkpoints/images-*"):
        if (folder / "MANIFEST.json").exists() and (what := runs.damage(folder)):
            found.append(f"{folder.name}: {what}")
    if done:
        for status in straight.glob("runs/*/status.json"):
            run = status.parent
            found += runs.differences(out / run.relative_to(straight), run)
    return found


def _differs(mine: Path, straight: Path, *, done: bool) -> str:
    """Return how a file is no whole one, or differs from the undisturbed one where it may not."""
    data, other = mine.read_bytes(), straight.read_bytes()
    if mine.suffix in (".png", ".tar"):
        return "has other bytes" if data != other and mine.name != "curves.png" else ""
    try:
        if mine.suffix == ".json":
            values = json.loads(data)
            if isinstance(values, dict) and "scores" in values:  # a card of scores
                same = values["scores"] == json.loads(other)["scores"]
                return "" if same else "has other scores"
    except ValueError as error:
        return f"is not whole: {error}"
    if done and mine.suffix == ".html" and not data.rstrip().endswith(b"</html>"):
        return "is not whole"
    return ""


SUITE = Suite(
    "command_signals", "Signals to all long commands", PROMISES, prepare, trial, seconds=500
)

if __name__ == "__main__":
    sys.exit(command(SUITE))
