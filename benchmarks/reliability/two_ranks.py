"""Kill one or both of two processes of a run, by DDP and FSDP2 over gloo, or their launcher.

A survivor must end by itself; the run is then continued by two processes or by one.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import attrs
import numpy as np

from benchmarks.reliability import runs
from benchmarks.reliability.processes import free_port, orphans
from benchmarks.reliability.trials import Suite, Trial, command

PROMISES = {
    "survivor": "the survivor of two processes ends within 15 seconds, with code 8",
    "orphan": "the processes of a killed launcher end within 15 seconds",
    "lost": "a saved checkpoint stays, and at most one interval of steps is lost "
    "(two while a save is in flight)",
    "torn": "no half-written checkpoint has a checkpoint's name",
    "traceback": "no traceback is shown",
    "continued": "the run continues in two processes and in one",
    "identical": "continued, it is the straight run bit for bit (FSDP2 in another number of "
    "processes: within 1e-5)",
}
STEPS = 10
PATIENCE = 15.0
LAUNCHER = 25
"""One trial in so many starts `run --nproc 2` and kills the launcher."""


@attrs.frozen
class Setup:
    """The recipe, the straight run of each kind of parallelism, and their seconds."""

    recipe: Path
    straight: dict[str, Path]
    seconds: dict[str, float]


def prepare(place: Path) -> Setup:
    """Train with two processes, undisturbed, and check DDP against one process."""
    text = runs.recipe(
        {"microshards": "2", "steps": f"{STEPS}", "ema": "[{name: slow, decay: 0.9}]"}
    )
    runs.warm(place, text)
    import torch.distributed
    import torch.distributed.fsdp
    import torch.nn.parallel  # noqa: F401

    file = place / "tiny.yaml"
    file.write_text(text)
    setup = Setup(file, {}, {})
    for kind in ("ddp", "fsdp2"):
        out = place / kind
        since = time.monotonic()
        ended = _both(setup, kind, out, place)
        if [e.code for e in ended] != [0, 0]:
            raise RuntimeError(f"{kind}: {ended}")
        setup.straight[kind], setup.seconds[kind] = out, time.monotonic() - since
    alone = runs.fork(runs.train_words(file, place / "alone"), place / "log", runs.without_drawing)
    if alone.code != 0 or (found := runs.differences(place / "alone", setup.straight["ddp"])):
        raise RuntimeError(f"one process differs from two: {alone.said} {found}")
    return setup


def _begin(setup: Setup, kind: str, out: Path, place: Path) -> list[int]:
    """Start both processes of a run."""
    port = free_port()
    words = runs.train_words(setup.recipe, out, "--set", f"parallel={kind}")

    def act(rank: int) -> int:
        values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in values.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        return runs.command(words)

    return [
        runs.begin(lambda rank=rank: act(rank), place / f"log{rank}", runs.without_drawing)
        for rank in range(2)
    ]


def _both(
    setup: Setup, kind: str, out: Path, place: Path, seconds: float = 90
) -> list[runs.Ended]:
    since = time.monotonic()
    pids = _begin(setup, kind, out, place)
    return [runs.wait(pid, place / f"log{i}", since, seconds) for i, pid in enumerate(pids)]


def trial(setup: Setup, trial: Trial) -> None:
    """Kill the first, the second or both, or the launcher; look at who is left; continue."""
    kind = ("ddp", "fsdp2")[trial.number % 2]
    out = trial.place / "run"
    if trial.number % LAUNCHER == LAUNCHER - 1:
        kind, story = "ddp", _kill_launcher(setup, trial, out)
    else:
        story = _kill_ranks(setup, trial, kind, out)
    for name in runs.names_of(out):
        if what := runs.damage(out / "checkpoints" / name):
            trial.fail("torn", f"{name}: {what} ({story})")
    for what in runs.losses(out, runs.INTERVAL, int(runs.LINES["batch"])):
        trial.fail("lost", f"{what} ({story})")
    number = trial.chance.choice((1, 2))
    story += f", continued by {number}"
    if number == 2:
        ended = _both(setup, kind, out, trial.place)
    else:
        words = runs.train_words(setup.recipe, out, "--set", f"parallel={kind}")
        ended = [runs.fork(words, trial.place / "log", runs.without_drawing)]
    trial.facts[f"{kind}, continued by {number}"] += 1
    if any(e.code != 0 for e in ended):
        told = "; ".join(f"exit {e.code}: {e.last}" for e in ended)
        trial.fail("traceback" if any(e.crashed for e in ended) else "continued",
                   f"{told} ({story})")  # fmt: skip
        return
    straight = setup.straight[kind]
    if kind == "fsdp2" and number == 1:
        found = _far(out, straight)
    else:
        found = runs.differences(out, straight)
    if found:
        trial.fail("identical", f"{'; '.join(found)} ({story})")


def _kill_ranks(setup: Setup, trial: Trial, kind: str, out: Path) -> str:
    chance = trial.chance
    victims = chance.choice(([0], [1], [0], [1], [0, 1]))
    moment = chance.uniform(0, 0.9 * setup.seconds[kind])
    lines = chance.randrange(10)  # 0: at that moment, else soon after so many logged steps
    story = f"{kind}: {victims} killed after {lines} steps or {moment:.3f} s"
    since = time.monotonic()
    pids = _begin(setup, kind, out, trial.place)
    while lines and time.monotonic() < since + 30 and _alive(pids):
        if len(runs.json_lines(out / "metrics.jsonl")) >= lines:
            break
        time.sleep(0.005)
    time.sleep(moment / 50 if lines else moment)
    killed = time.monotonic()
    for rank in victims:
        os.kill(pids[rank], signal.SIGKILL)
    dead = [runs.wait(pids[rank], trial.place / f"log{rank}", since, 5) for rank in victims]
    trial.facts["kills"] += sum(e.code == -signal.SIGKILL for e in dead)
    for rank in {0, 1} - {*victims}:
        left = killed + PATIENCE - time.monotonic()
        ended = runs.wait(pids[rank], trial.place / f"log{rank}", since, left)
        expected = {8} if all(e.code == -signal.SIGKILL for e in dead) else {0, 8}
        if len(runs.json_lines(out / "metrics.jsonl")) >= STEPS - 1:
            expected |= {0}  # it may have been at its end
        trial.facts[f"survivor: exit {ended.code}"] += 1
        if ended.code in expected:
            trial.figures["seconds to the survivor's end"] = time.monotonic() - killed
        if ended.code == 8 and "continue with --resume" not in ended.said:
            trial.fail("survivor", f"does not say what to do: {ended.last} ({story})")
        if ended.crashed:
            trial.fail("traceback", f"survivor: {ended.last} ({story})")
        elif ended.code not in expected:
            what = "was still there" if ended.code is None else f"exit {ended.code}"
            trial.fail("survivor", f"{what}: {ended.last} ({story})")
    return story


def _alive(pids: list[int]) -> bool:
    """Return whether none of these children has ended; they stay to be waited for."""
    options = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return not any(os.waitid(os.P_PID, pid, options) for pid in pids)


def _kill_launcher(setup: Setup, trial: Trial, out: Path) -> str:
    moment = trial.chance.uniform(1, 20)
    words = runs.train_words(setup.recipe, out, "--nproc", "2", "--set", "steps=100000")
    with (trial.place / "log").open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "e2ediff", *words], stdout=file, stderr=file
        )
    limit = time.monotonic() + 60
    if trial.chance.random() < 0.7:  # while it trains
        while not (out / "metrics.jsonl").exists() and time.monotonic() < limit:
            time.sleep(0.05)
        time.sleep(moment / 20)
        story = f"launcher killed {moment / 20:.2f} s after the first step"
    else:
        time.sleep(moment / 4)
        story = f"launcher killed after {moment / 4:.2f} s"
    process.kill()
    process.wait()
    trial.facts["launchers killed"] += 1
    if left := orphans(PATIENCE):
        trial.fail("orphan", f"{len(left)} processes were left: {left[:1]} ({story})")
    if len(runs.json_lines(out / "metrics.jsonl")) > 9:
        shutil.rmtree(out)  # it is beyond the straight run's end
    return story


def _far(out: Path, straight: Path) -> list[str]:
    """Return the tensors that differ by more than rounding."""
    names = [runs.names_of(place)[-1:] for place in (out, straight)]
    if names[0] != names[1]:
        return [f"the newest checkpoint is {names[0]} instead of {names[1]}"]
    ours, theirs = (runs.tensors(p / "checkpoints" / names[0][0]) for p in (out, straight))
    found = []
    for name in ours.keys() | theirs.keys():
        pair = [values.get(name, b"") for values in (ours, theirs)]
        if pair[0] == pair[1]:
            continue
        kinds, data = zip(*(p.partition(b"]")[::2] for p in pair), strict=True)
        if kinds[0] != kinds[1] or not kinds[0].startswith(b"F32"):
            found.append(f"{name} differs")
            continue
        a, b = (np.frombuffer(d, np.float32) for d in data)
        if not np.allclose(a, b, rtol=1e-5, atol=1e-5):
            found.append(f"{name} differs by {np.abs(a - b).max():.2g}")
    return found[:3]


SUITE = Suite(
    "two_ranks", "One or both of two processes killed", PROMISES, prepare, trial, seconds=300
)

if __name__ == "__main__":
    sys.exit(command(SUITE))
