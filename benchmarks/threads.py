"""Trains beside busy processes with one CPU thread, with all, and with `--threads auto`.

    python benchmarks/threads.py
    python benchmarks/threads.py --load 1 --late --set backbone.width=384 --set steps=60
    python benchmarks/threads.py --work sample

Every number is of the real command in a process of its own; a busy process is a Python loop. The
settings take turns, and `lost` is how much slower `auto` was than the better of the other two in
the same round: its median, lowest and highest over the rounds. Choosing, and looking again, count
as training. Prints a table, and the same as one line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import click
import torch

from e2ediff.run.directory import RunDirectory

SETTINGS = ("1", "all", "auto")


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


def command(words: list[str], threads: str) -> subprocess.Popen[bytes]:
    """An `e2ediff` command with this number of threads."""
    number = str(torch.get_num_threads()) if threads == "all" else threads
    words = [sys.executable, "-m", "e2ediff", *words, "--threads", number]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def train(
    recipe: str, changes: list[str], out: Path, threads: str, load: int, late: bool
) -> float:
    """Images a second from the first look to the last checkpoint of a run."""
    words = ["run", recipe, "--out", str(out), *(w for c in changes for w in ("--set", c))]
    with contextlib.ExitStack() as stack:
        if not late:
            stack.enter_context(busy(load))
            time.sleep(0.5)
        process = command(words, threads)
        while late and process.poll() is None:
            if (out / "metrics.jsonl").exists() and len(_lines(out / "metrics.jsonl")) > 3:
                stack.enter_context(busy(load))
                break
            time.sleep(0.02)
        if process.wait():
            raise click.ClickException(f"{' '.join(words)} ended with {process.returncode}")
    events = {e["kind"]: e for e in RunDirectory.open(str(out)).read_events()}
    began, ended = (datetime.fromisoformat(events[k]["time"]) for k in ("kernels", "saved"))
    return float(events["saved"]["images"] / (ended - began).total_seconds())


def sample(run: Path, out: Path, count: int, threads: str, load: int) -> float:
    """Images a second of a set, from its first network call on."""
    words = ["sample", str(run), "--balanced", str(count), "--out", str(out)]
    with busy(load):
        time.sleep(0.5)
        if command(words, threads).wait():
            raise click.ClickException(f"{' '.join(words)} failed")
    return float(json.loads((out / "set.json").read_text())["made"]["images_per_second"])


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
def main(
    recipe: str,
    changes: tuple[str, ...],
    loads: tuple[int, ...],
    late: bool,
    work: str,
    count: int,
    rounds: int,
) -> None:
    """Compare the settings beside each number of busy processes."""
    often = [
        "steps=200",
        "cadence={log: 5, diagnose: 100000, preview: 100000, checkpoint: 100000}",
    ]
    given = [*often, *changes]
    click.echo(f"{os.cpu_count()} cores, torch {torch.__version__}, {work}, {recipe}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        if work == "sample":
            train(recipe, given, run, "1", 0, late=False)
        for load in loads:
            found: dict[str, list[float]] = {name: [] for name in SETTINGS}
            for k in range(rounds):
                for name in SETTINGS:
                    out = Path(folder, f"{load}-{k}-{name}")
                    pace = (
                        train(recipe, given, out, name, load, late)
                        if work == "train"
                        else sample(run, out, count, name, load)
                    )
                    found[name].append(pace)
            one, everything, auto = (found[name] for name in SETTINGS)
            lost = [1 - c / max(a, b) for a, b, c in zip(one, everything, auto, strict=True)]
            rows.append({"load": load, "late": late, "lost": lost, **found})
            paces = "  ".join(f"{n} {statistics.median(found[n]):6.1f}" for n in SETTINGS)
            click.echo(
                f"{load} busy{' later' * late}:  {paces} img/s  lost "
                f"{statistics.median(lost):+.1%} ({min(lost):+.1%} to {max(lost):+.1%})"
            )
    click.echo(json.dumps({"torch": str(torch.__version__), "work": work, "rows": rows}))


if __name__ == "__main__":
    main()
