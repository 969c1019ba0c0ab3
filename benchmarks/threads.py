"""Trains beside busy processes with one CPU thread, with all, and with `--threads auto`.

    python benchmarks/threads.py
    python benchmarks/threads.py --load 1 --late --set backbone.width=384 --set steps=60
    python benchmarks/threads.py --work sample
    python benchmarks/threads.py --load 4 --beside 1

Every number is of the real command in a process of its own; a busy process is a Python loop. The
settings take turns. `lost` is how much slower the median of `auto` was than the better of the
other medians, and in brackets the same in single rounds, lowest and highest; `took` is what
`auto` chose in each round. Choosing, and looking again, count as work. Prints a table, and the
same as one line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import click
import torch

from e2ediff.store.records import COMMITTED
from e2ediff.store.run_directory import RunDirectory


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """Within it, `count` processes do nothing but compute."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


class Measured(NamedTuple):
    """Images a second, and the numbers of threads that the command said it took."""

    pace: float
    took: list[int]


def command(words: list[str], threads: str, log: Path) -> subprocess.Popen[bytes]:
    """An `e2ediff` command with this number of threads, whose messages go to a file."""
    number = str(torch.get_num_threads()) if threads == "all" else threads
    words = [sys.executable, "-m", "e2ediff", *words, "--threads", number]
    with log.open("wb") as stderr:
        return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=stderr)


def finish(process: subprocess.Popen[bytes], log: Path) -> list[int]:
    """Wait for a command; the numbers of threads that it took."""
    if process.wait():
        raise click.ClickException(f"exit code {process.returncode}:\n{log.read_text()}")
    return [int(n) for n in re.findall(r"CPU threads: (\d+) of", log.read_text())]


def train(
    recipe: str, changes: list[str], out: Path, threads: str, load: int, late: bool
) -> Measured:
    """Train: images a second from the first look to the last checkpoint."""
    log = out.with_suffix(".log")
    words = ["run", recipe, "--out", str(out), *(w for c in changes for w in ("--set", c))]
    with contextlib.ExitStack() as stack:
        if not late:
            stack.enter_context(busy(load))
            time.sleep(0.5)
        process = command(words, threads, log)
        while late and process.poll() is None:
            if (out / "metrics.jsonl").exists() and len(_lines(out / "metrics.jsonl")) > 3:
                stack.enter_context(busy(load))
                break
            time.sleep(0.02)
        took = finish(process, log)
    events = {e["kind"]: e for e in RunDirectory.open(str(out)).read_events()}
    began, ended = (datetime.fromisoformat(events[k]["time"]) for k in ("kernels", COMMITTED))
    return Measured(events[COMMITTED]["images"] / (ended - began).total_seconds(), took)


def sample(run: Path, out: Path, count: int, threads: str, load: int) -> Measured:
    """Sample a set: images a second from its first network call on."""
    log = out.with_suffix(".log")
    words = ["sample", str(run), "--balanced", str(count), "--out", str(out)]
    with busy(load):
        time.sleep(0.5)
        took = finish(command(words, threads, log), log)
    made = json.loads((out / "set.json").read_text())["made"]
    return Measured(made["images_per_second"], took)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


@click.command()
@click.argument("recipe", default="recipes/quickstart.yaml")
@click.option("--set", "changes", multiple=True, help="As of `e2ediff run`; steps=200 by default.")
@click.option("--load", "loads", default=(0, 1, 4), multiple=True, show_default=True)
@click.option("--late", is_flag=True, help="The load begins when a run has begun to train.")
@click.option("--work", default="train", type=click.Choice(["train", "sample"]))
@click.option("--count", default=256, show_default=True, help="Images of a sampled set.")
@click.option("--rounds", default=3, show_default=True)
@click.option(
    "--beside",
    default=("1", "all"),
    multiple=True,
    type=click.Choice(["1", "all"]),
    show_default=True,
    help="What `auto` is compared with.",
)
def main(
    recipe: str,
    changes: tuple[str, ...],
    loads: tuple[int, ...],
    late: bool,
    work: str,
    count: int,
    rounds: int,
    beside: tuple[str, ...],
) -> None:
    """Compare the settings beside each number of busy processes."""
    often = [
        "steps=200",
        "cadence={log: 5, diagnose: 100000, preview: 100000, checkpoint: 100000}",
    ]
    given, settings = [*often, *changes], [*beside, "auto"]
    click.echo(f"{os.cpu_count()} cores, torch {torch.__version__}, {work}, {recipe}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        if work == "sample":
            train(recipe, given, run, "1", 0, late=False)
        for load in loads:
            found: dict[str, list[float]] = {name: [] for name in settings}
            took = []
            for k in range(rounds):
                for name in settings:
                    out = Path(folder, f"{load}-{k}-{name}")
                    measured = (
                        train(recipe, given, out, name, load, late)
                        if work == "train"
                        else sample(run, out, count, name, load)
                    )
                    found[name].append(measured.pace)
                took.append(measured.took)  # of `auto`, the last
            medians = [statistics.median(found[name]) for name in settings]
            lost, *each = (
                1 - paces[-1] / max(paces[:-1])
                for paces in [medians, *zip(*found.values(), strict=True)]
            )
            rows.append({"load": load, "late": late, "lost": lost, "took": took, **found})
            shown = "  ".join(f"{n} {m:6.1f}" for n, m in zip(settings, medians, strict=True))
            chosen = " ".join(" then ".join(map(str, counts)) for counts in took)
            click.echo(
                f"{load} busy{' later' * late}:  {shown} img/s  lost {lost:+.1%} "
                f"({min(each):+.1%} to {max(each):+.1%})  took {chosen}"
            )
    click.echo(json.dumps({"torch": str(torch.__version__), "work": work, "rows": rows}))


if __name__ == "__main__":
    main()
