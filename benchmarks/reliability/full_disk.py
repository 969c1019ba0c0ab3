"""Train where space runs out: on small tmpfs of all sizes, and under limits of a file's size.

The run must end with code 8 and keep what it had; given space, it continues as if nothing had
happened.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import attrs

from benchmarks.reliability import runs
from benchmarks.reliability.trials import Skipped, Suite, Trial, command

PROMISES = {
    "code": "the command ends with 8 and says the path, what was needed and what is free",
    "torn": "every checkpoint is whole, and every line of figures and events",
    "leftovers": "no temporary file takes up space",
    "traceback": "no traceback is shown",
    "continued": "given space, the run continues",
    "identical": "and it is the straight run, bit for bit",
}


@attrs.frozen
class Setup:
    """The recipe, its straight run, how many KiB that takes, and whether a disk can be mounted."""

    recipe: Path
    straight: Path
    kibibytes: int
    largest: int
    mounts: bool


def prepare(place: Path) -> Setup:
    """Train the straight run."""
    text = runs.recipe({**runs.FULL, "checkpoint": "{keep: 2}"})
    runs.warm(place, text)
    file = place / "tiny.yaml"
    file.write_text(text)
    ended = runs.fork(runs.train_words(file, place / "run"), place / "log", runs.without_drawing)
    if ended.code != 0:
        raise RuntimeError(ended.said)
    sizes = [p.stat().st_size for p in (place / "run").rglob("*") if p.is_file()]
    pages = sum(-(-size // 4096) * 4 for size in sizes)
    disk = place / "disk"
    mounts = os.geteuid() == 0 and _mount(disk, 256)
    if mounts:
        _unmount(disk)
    else:
        print("full_disk: no tmpfs can be mounted here: limits of files only", file=sys.stderr)
    return Setup(file, place / "run", pages, max(sizes), mounts)


def _mount(disk: Path, kibibytes: int, more: str = "") -> bool:
    disk.mkdir(parents=True, exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"{more}size={kibibytes}k", "tmpfs", str(disk)]
    if not shutil.which("mount"):
        return False
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


def _unmount(disk: Path) -> None:
    subprocess.run(["umount", "-l", str(disk)], capture_output=True, check=False)


def trial(setup: Setup, trial: Trial) -> None:
    """Two of three trials fill a disk, the third limits the size of files."""
    if trial.number % 3 < 2:
        if not setup.mounts:
            raise Skipped("no tmpfs can be mounted here")
        _on_disk(setup, trial)
    else:
        _under_limit(setup, trial)


def _on_disk(setup: Setup, trial: Trial) -> None:
    disk = trial.place / "disk"
    turn = trial.number // 3 * 2 + trial.number % 3
    size = 16 + (turn * 52 + trial.chance.randrange(16)) % (setup.kibibytes + 128)
    if not _mount(disk, size):
        raise Skipped("no tmpfs can be mounted here")
    try:
        out = disk / "run"
        words = runs.train_words(setup.recipe, out)
        ended = runs.fork(words, trial.place / "log", runs.without_drawing)
        story = f"a disk of {size} KiB"
        _check(trial, ended, out, disk, story)
        _mount(disk, 1 << 16, "remount,")
        _continue(setup, trial, out, story)
    finally:
        _unmount(disk)


def _under_limit(setup: Setup, trial: Trial) -> None:
    out = trial.place / "run"
    limit = trial.chance.randrange(setup.largest + 500)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

    def first() -> None:
        runs.without_drawing()
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    words = runs.train_words(setup.recipe, out)
    # What it says goes to a file, too, which must not count.
    ended = _fork_saying_more(words, trial.place / "log", first)
    story = f"files of {limit} bytes at most"
    _check(trial, ended, out, trial.place, story)
    _continue(setup, trial, out, story)


def _fork_saying_more(words: list[str], log: Path, first: runs.Act) -> runs.Ended:
    """Run a command whose output goes through a pipe, which has no limit of size."""
    import time

    reader, writer = os.pipe()

    def act() -> int:
        os.close(reader)
        for number in (1, 2):
            os.dup2(writer, number)
        os.close(writer)
        first()
        return runs.command(words)

    since = time.monotonic()
    pid = runs.begin(act, log)
    os.close(writer)
    said = b""
    while data := os.read(reader, 1 << 16):
        said += data
    os.close(reader)
    ended = runs.wait(pid, log, since, 60)
    return runs.Ended(ended.code, said.decode(errors="replace"), ended.seconds)


def _check(trial: Trial, ended: runs.Ended, out: Path, place: Path, story: str) -> None:
    trial.facts[f"exit {ended.code}"] += 1
    if ended.crashed:
        trial.fail("traceback", f"{ended.last} ({story})")
    elif ended.code not in (0, 8):
        trial.fail("code", f"exit {ended.code}: {ended.last} ({story})")
    elif ended.code == 8 and not _told(ended.said, place):
        trial.fail("code", f"does not say it all: {ended.last} ({story})")
    for name in runs.names_of(out):
        if what := runs.damage(out / "checkpoints" / name):
            trial.fail("torn", f"{name}: {what} ({story})")
    for log in ("metrics.jsonl", "events.jsonl"):
        data = (out / log).read_bytes() if (out / log).exists() else b""
        whole = not data or data.endswith(b"\n")
        try:
            [json.loads(line) for line in data.splitlines()]
        except ValueError:
            whole = False
        if not whole:
            trial.fail("torn", f"{log} has a torn line ({story})")
    if left := runs.leftovers(place):
        trial.fail("leftovers", f"{left} ({story})")


def _told(said: str, place: Path) -> bool:
    """Return whether the path, what was needed and what is free are said."""
    return str(place) in said and bool(re.search(r"needed: .*free: ", said))


def _continue(setup: Setup, trial: Trial, out: Path, story: str) -> None:
    words = runs.train_words(setup.recipe, out)
    ended = runs.fork(words, trial.place / "log", runs.without_drawing)
    if ended.code != 0:
        trial.fail("continued", f"exit {ended.code}: {ended.last} ({story})")
    elif found := runs.differences(out, setup.straight):
        trial.fail("identical", f"{'; '.join(found)} ({story})")


SUITE = Suite("full_disk", "Full disks and limits of files", PROMISES, prepare, trial)

if __name__ == "__main__":
    sys.exit(command(SUITE))
