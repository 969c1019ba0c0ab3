"""Run many numbered trials in a few warm processes, keep a journal, and sum up.

A suite names its promises; a trial reports which of them it saw broken. Everything that a trial
does follows from the seed and its number, but for the moments at which the machine lets a process
run. The journal has one line for each trial, so that an interrupted command continues.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import random
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs

_SUBREAPER = 36
_LISTED = 25
"""Failures that a summary spells out; all of them are in the journal."""


class Skipped(Exception):  # noqa: N818 (it is no error: this machine cannot do it)
    """This machine cannot do a suite, or a kind of trial; the text says why."""


@attrs.define
class Trial:
    """One trial, and what it saw: `broken` promises with what happened, and `facts` to add up."""

    number: int
    chance: random.Random
    place: Path
    broken: list[tuple[str, str]] = attrs.field(factory=list)
    facts: Counter[str] = attrs.field(factory=Counter)
    figures: dict[str, float] = attrs.field(factory=dict)

    def fail(self, promise: str, what: str) -> None:
        """Report that a promise was broken."""
        self.broken.append((promise, what[:600]))


@attrs.frozen
class Suite:
    """A kind of attack: what it promises, how it prepares, and one trial of it.

    `prepare(place)` makes what all trials share, as the straight run, and returns it; it may
    raise `Skipped`. `every` is the number of trials after which all kinds have come once, 0 if
    there is no such number.
    """

    name: str
    title: str
    promises: Mapping[str, str]
    prepare: Callable[[Path], Any]
    trial: Callable[[Any, Trial], None]
    seconds: float = 120.0
    every: Callable[[Any], int] = lambda setup: 0


def chance_of(suite: Suite, seed: int, number: int) -> random.Random:
    """Return the source of all random choices of a trial."""
    return random.Random(f"{suite.name} {seed} {number}")


def one_trial(suite: Suite, setup: Any, seed: int, number: int, place: Path) -> dict[str, Any]:
    """Carry out one trial in an empty directory; return its line of the journal."""
    place.mkdir(parents=True, exist_ok=True)
    trial = Trial(number, chance_of(suite, seed, number), place)
    wall, cpu = time.monotonic(), _cpu()
    try:
        suite.trial(setup, trial)
    except Skipped as why:
        trial.facts[f"skipped: {why}"] += 1
    except Exception:
        trial.fail("trial", traceback.format_exc())
    return {
        "number": number,
        "broken": trial.broken,
        "facts": dict(trial.facts),
        "figures": trial.figures,
        "seconds": round(time.monotonic() - wall, 4),
        "cpu": round(_cpu() - cpu, 4),
    }


def _cpu() -> float:
    found = os.times()
    return found.user + found.system + found.children_user + found.children_system


@contextlib.contextmanager
def scratch(keep: str | None = None) -> Iterator[Path]:
    """Make an empty directory in memory where there is one, and delete it in the end."""
    if keep:
        Path(keep).mkdir(parents=True, exist_ok=True)
        yield Path(keep)
        return
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # fsync costs nothing there
    place = Path(tempfile.mkdtemp(prefix="reliability-", dir=memory))
    owner = os.getpid()
    try:
        yield place
    finally:
        if os.getpid() == owner:
            shutil.rmtree(place, ignore_errors=True)


def carry_out(
    suite: Suite,
    setup: Any,
    numbers: Sequence[int],
    seed: int,
    place: Path,
    jobs: int = 1,
    minutes: float = 0,
    done: Callable[[dict[str, Any]], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Carry out trials in `jobs` forks of this process; return their lines.

    A worker that dies or takes longer than the suite allows breaks the promise `trial`, and
    another takes its place.
    """
    lines: list[dict[str, Any]] = []
    waiting = list(reversed(numbers))
    until = time.monotonic() + 60 * minutes if minutes else float("inf")
    workers = [_Worker(suite, setup, seed, place / f"worker{i}") for i in range(jobs)]
    try:
        with selectors.DefaultSelector() as selector:
            for worker in workers:
                if waiting:
                    worker.begin(waiting.pop(), selector)
            while any(worker.number is not None for worker in workers):
                for key, _ in selector.select(timeout=1.0):
                    key.data.collect(lines, done, selector)
                for worker in workers:
                    worker.check(suite.seconds, lines, done, selector)
                    if worker.number is None and waiting and time.monotonic() < until:
                        worker.begin(waiting.pop(), selector)
    finally:
        for worker in workers:
            worker.end()
    return lines


class _Worker:
    """A fork that carries out one trial after another, as it is told through a pipe."""

    def __init__(self, suite: Suite, setup: Any, seed: int, place: Path) -> None:
        self.suite, self.setup, self.seed, self.place = suite, setup, seed, place
        self.pid = 0
        self.number: int | None = None
        self.since = 0.0
        self.text = b""

    def begin(self, number: int, selector: selectors.BaseSelector) -> None:
        if not self.pid:
            self._start(selector)
        self.number, self.since, self.text = number, time.monotonic(), b""
        os.write(self.orders, number.to_bytes(8, "big"))

    def _start(self, selector: selectors.BaseSelector) -> None:
        told, self.orders = os.pipe()
        self.answers, answer = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                os.close(self.orders)
                adopt_orphans()
                while order := os.read(told, 8):
                    shutil.rmtree(self.place, ignore_errors=True)
                    number = int.from_bytes(order, "big")
                    line = one_trial(self.suite, self.setup, self.seed, number, self.place)
                    os.write(answer, json.dumps(line).encode() + b"\n")
                code = 0
            finally:
                os._exit(code)
        os.close(told)
        os.close(answer)
        selector.register(self.answers, selectors.EVENT_READ, self)

    def collect(
        self,
        lines: list[dict[str, Any]],
        done: Callable[[dict[str, Any]], None],
        selector: selectors.BaseSelector,
    ) -> None:
        data = os.read(self.answers, 1 << 16)
        self.text += data
        if not data:
            self._give_up("the process of the trial died", lines, done, selector)
        elif self.text.endswith(b"\n"):
            self._note(json.loads(self.text), lines, done)

    def check(
        self,
        seconds: float,
        lines: list[dict[str, Any]],
        done: Callable[[dict[str, Any]], None],
        selector: selectors.BaseSelector,
    ) -> None:
        if self.number is not None and time.monotonic() - self.since > seconds:
            self._give_up(f"not finished after {seconds:.0f} s", lines, done, selector)

    def _give_up(
        self,
        why: str,
        lines: list[dict[str, Any]],
        done: Callable[[dict[str, Any]], None],
        selector: selectors.BaseSelector,
    ) -> None:
        selector.unregister(self.answers)
        number, wall = self.number, time.monotonic() - self.since
        self.end()
        broken = [("trial", why)]
        self._note(
            {"number": number, "broken": broken, "facts": {}, "figures": {}, "seconds": wall,
             "cpu": 0.0}, lines, done,
        )  # fmt: skip

    def _note(
        self,
        line: dict[str, Any],
        lines: list[dict[str, Any]],
        done: Callable[[dict[str, Any]], None],
    ) -> None:
        self.number = None
        if line["number"] is not None:
            lines.append(line)
            done(line)

    def end(self) -> None:
        if self.pid:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            os.close(self.orders)
            os.close(self.answers)
            shutil.rmtree(self.place, ignore_errors=True)
            self.pid = 0


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parent is gone (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)


def summary(
    suite: Suite, lines: Iterable[Mapping[str, Any]], asked: int, seed: int, command: str
) -> dict[str, Any]:
    """Add up the lines of a journal: small enough to be kept, and to make a table of."""
    lines = sorted(lines, key=lambda line: int(line["number"]))
    facts: Counter[str] = Counter()
    broken: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    figures: dict[str, list[float]] = {}
    for line in lines:
        facts.update(line["facts"])
        broken.update({promise: 1 for promise, _ in line["broken"]})
        if line["broken"]:
            failures.append({"number": line["number"], "broken": line["broken"]})
        for name, value in line["figures"].items():
            figures.setdefault(name, []).append(value)
    cpu = sorted(float(line["cpu"]) for line in lines)
    return {
        "suite": suite.name,
        "title": suite.title,
        "seed": seed,
        "asked": asked,
        "trials": len(lines),
        "failed": len(failures),
        "promises": {name: [text, broken[name]] for name, text in suite.promises.items()},
        "aborted": broken["trial"],
        "facts": dict(sorted(facts.items())),
        "figures": {name: spread(values) for name, values in sorted(figures.items())},
        "failures": failures[:_LISTED],
        "cpu_seconds": round(sum(cpu), 1),
        "cpu_seconds_median": spread(cpu)["median"] if cpu else 0,
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        "code": code(),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, 99th percentile and largest value."""
    ordered = sorted(values)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 4)

    return {"median": at(0.5), "p99": at(0.99), "largest": at(1.0)}


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    import torch

    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def code() -> str:
    """Return the commit, with `+` if files were changed; "" outside a repository."""
    here = Path(__file__).parent
    words = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def readable(found: Mapping[str, Any]) -> str:
    """Return a summary as text."""
    lines = [f"{found['title']}: {found['trials']:,} trials, {found['failed']:,} failed"]
    for text, count in found["promises"].values():
        lines.append(f"  {count:>6,} x broken: {text}")
    if found["aborted"]:
        lines.append(f"  {found['aborted']:>6,} x the trial itself did not end")
    lines += [f"  {count:>6,} x {name}" for name, count in found["facts"].items()]
    for name, values in found["figures"].items():
        lines.append(f"  {name}: " + ", ".join(f"{k} {v:g}" for k, v in values.items()))
    for failure in found["failures"]:
        for promise, what in failure["broken"]:
            lines.append(f"  --only {failure['number']}: {promise}: {what}")
    lines.append(f"  {found['cpu_seconds']} s of CPU, median {found['cpu_seconds_median']} s")
    return "\n".join(lines)


def options(name: str) -> argparse.ArgumentParser:
    """Return the options that all suites share."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.reliability.{name}")
    parser.add_argument(
        "--count",
        type=int,
        default=100,
        help="trials 0 to COUNT - 1; 0: each kind once, where kinds can be counted",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="repeat this trial, and keep its files")
    parser.add_argument("--jobs", type=int, default=2, help="trials at once")
    parser.add_argument("--minutes", type=float, default=0, help="begin no trial after these")
    parser.add_argument("--json", metavar="FILE", help="the summary; FILE.jsonl is the journal")
    return parser


def command(suite: Suite, words: Sequence[str] | None = None) -> int:
    """Carry out a suite as a command; 1 if a promise was broken, else 0."""
    given = options(suite.name).parse_args(words)
    if given.only is not None:
        kept = tempfile.mkdtemp(prefix=f"reliability-{suite.name}-")
        adopt_orphans()
        setup = suite.prepare(Path(kept, "shared"))
        line = one_trial(suite, setup, given.seed, given.only, Path(kept, "trial"))
        print(json.dumps(line, indent=1))
        print(f"its files are in {kept}", file=sys.stderr)
        return int(bool(line["broken"]))
    try:
        found = run_suite(
            suite, given.count, given.seed, given.jobs, given.minutes,
            Path(given.json) if given.json else None,
        )  # fmt: skip
    except Skipped as why:
        print(f"{suite.name}: skipped: {why}", file=sys.stderr)
        if given.json:
            words = _command(suite, given.count, given.seed)
            found = {**summary(suite, (), given.count, given.seed, words), "skipped": str(why)}
            _write(Path(given.json), found)
        return 0
    print(readable(found), file=sys.stderr)
    return int(found["failed"] > 0)


def run_suite(
    suite: Suite, count: int, seed: int, jobs: int, minutes: float, result: Path | None
) -> dict[str, Any]:
    """Carry out the trials that a journal lacks, and write the summary of all of them."""
    with scratch() as place:
        setup = suite.prepare(place / "shared")
        return _summed(suite, setup, place, count, seed, jobs, minutes, result)


def _summed(
    suite: Suite,
    setup: Any,
    place: Path,
    count: int,
    seed: int,
    jobs: int,
    minutes: float,
    result: Path | None,
) -> dict[str, Any]:
    count = count or suite.every(setup) or 100
    journal = result and result.with_name(f"{result.name}l")
    before = _read(journal, seed) if journal else {}
    numbers = [n for n in range(count) if n not in before]
    shown = time.monotonic()

    def done(line: dict[str, Any]) -> None:
        nonlocal shown
        before[line["number"]] = line
        if journal:
            with journal.open("a") as file:
                file.write(json.dumps({"seed": seed, **line}) + "\n")
        if time.monotonic() - shown > 10:
            shown = time.monotonic()
            failed = sum(bool(found["broken"]) for found in before.values())
            text = f"{suite.name}: {len(before):,} of {count:,} trials, {failed:,} failed"
            print(text, file=sys.stderr)

    if journal:
        journal.parent.mkdir(parents=True, exist_ok=True)
    carry_out(suite, setup, numbers, seed, place, jobs, minutes, done)
    lines = [line for number, line in before.items() if number < count]
    found = summary(suite, lines, count, seed, _command(suite, count, seed))
    if result:
        _write(result, found)
    return found


def _command(suite: Suite, count: int, seed: int) -> str:
    return f"python -m benchmarks.reliability.{suite.name} --count {count} --seed {seed}"


def _write(result: Path, found: dict[str, Any]) -> None:
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps(found, indent=1) + "\n")


def _read(journal: Path, seed: int) -> dict[int, dict[str, Any]]:
    """Return the trials that are in a journal; a line that was cut short is none."""
    found = {}
    for text in journal.read_text().splitlines() if journal.exists() else ():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if line.pop("seed") != seed:
                raise SystemExit(f"{journal} is of another seed: choose another --json")
            found[line["number"]] = line
    return found
