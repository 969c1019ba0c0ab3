"""What a command costs before it does anything: whole processes, with all installed plugins.

    python benchmarks/speed/startup.py
    python benchmarks/speed/startup.py --recipe recipes/quickstart.yaml --rounds 3 --json

Commands take turns. Beside them runs `import torch`, below which no command that needs it can
come; the CPU time is that of user and system together.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys

import click
from measuring import Report, Times, benchmark

from e2ediff.host.plugins import load
from e2ediff.host.recipe import load_recipe

# A small process starts the command: the peak of a child is never below that of its parent.
_LAUNCHER = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
said = done.stderr.decode(errors="replace")
print(json.dumps([done.returncode, used.ru_utime + used.ru_stime, used.ru_maxrss, said]))
"""


def run(words: list[str], threads: int) -> tuple[float, float]:
    """Run a Python process; return its CPU seconds and its peak in MiB.

    Raises:
        click.ClickException: It failed; with what it said, and its exit code.
    """
    command = [sys.executable, "-S", "-c", _LAUNCHER, sys.executable, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    code, seconds, peak, said = json.loads(done.stdout)
    found = words[-1] == "doctor" and code == 8  # what it found is not the point
    if code and not found:
        failed = click.ClickException(f"{' '.join(words)} ended with code {code}: {said.strip()}")
        failed.exit_code = code if code > 0 else 1
        raise failed
    return seconds, peak / (2**20 if sys.platform == "darwin" else 2**10)


@benchmark(rounds=5)
@click.option("--recipe", default="recipes/dsd_in256.yaml", show_default=True)
def main(report: Report, rounds: int, recipe: str) -> None:
    """Run every command once in each round, in another order each time."""
    load_recipe(load(), recipe)
    ours = {
        "help": ["--help"],
        "parts": ["parts"],
        "check": ["check", recipe],
        "plan": ["plan", recipe],
        "doctor": ["doctor"],
    }
    commands = {name: ["-m", "e2ediff", *words] for name, words in ours.items()}
    commands["import torch"] = ["-c", "import torch"]
    names = [*commands]
    found: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):  # the first one reads files into the cache
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds, peak = run(commands[name], report.threads)
            if number:
                found[name].append(seconds)
                peaks[name].append(peak)
    times = Times(found)
    for name in names:
        peak = statistics.median(peaks[name])
        report.row(
            f"{name:<12} {times.median(name):6.2f} s of CPU, {peak:4.0f} MiB, "
            f"{times.against(name, 'import torch')}",
            what=name, seconds=times.median(name), mebibytes=peak,
            of_torch=times.ratio(name, "import torch"),
        )  # fmt: skip


if __name__ == "__main__":
    main()
