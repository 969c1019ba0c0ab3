"""Time contestants by turns in one process, and report what was found.

CPU time is that of the whole process and of the processes that it started and waited for, so with
one thread it is what the work itself costs, whatever other processes do. On CUDA
the wall time until the device is done counts.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import attrs
import click
import torch

NOISY = 0.15  # spread of the ceiling above which only ratios are worth reading
_LEAST = 0.02  # seconds of one measurement: several calls are timed as one if a call takes less


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cpu_seconds() -> float:
    """Return the CPU time of this process so far, and of those that it started and waited for."""
    others = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + others.ru_utime + others.ru_stime


def seconds_of(work: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Return the mean seconds of a call: CPU time on a CPU, else wall time with the device's."""
    began = clock(device)
    for _ in range(calls):
        work()
    return (clock(device) - began) / calls


def clock(device: torch.device) -> float:
    """Return the seconds that count: CPU time on a CPU, else wall time when the device is done."""
    synchronize(device)
    return time.perf_counter() if device.type == "cuda" else cpu_seconds()


@attrs.frozen
class Times:
    """Seconds of each contestant in each round."""

    seconds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        """Return the median over rounds."""
        return statistics.median(self.seconds[name])

    def ratios(self, name: str, other: str) -> list[float]:
        """Return the time of `name` over that of `other` in each round, sorted."""
        pairs = zip(self.seconds[name], self.seconds[other], strict=True)
        return sorted(mine / theirs for mine, theirs in pairs)

    def ratio(self, name: str, other: str) -> float:
        """Return the median of the rounds' ratios."""
        return statistics.median(self.ratios(name, other))

    def against(self, name: str, other: str) -> str:
        """Say how `name` compares with `other`: the median ratio, and the range over rounds."""
        found = self.ratios(name, other)
        return f"{self.ratio(name, other):.3f}x {other} ({found[0]:.3f} to {found[-1]:.3f})"


def contest(
    contestants: Mapping[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    *,
    warm: int = 2,
) -> Times:
    """Time functions by turns, in another order each round.

    Args:
        contestants: Functions by name; each is called `warm` times before.
        device: Where they work.
        rounds: How often each is measured; a measurement takes 20 ms at least.
        warm: Calls that are not measured.
    """
    calls = {}
    for name, work in contestants.items():
        for _ in range(warm):
            work()
        once = seconds_of(work, device)
        calls[name] = max(1, round(_LEAST / max(once, 1e-7)))
    found: dict[str, list[float]] = {name: [] for name in contestants}
    names = [*contestants]
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            found[name].append(seconds_of(contestants[name], device, calls[name]))
    return Times(found)


def matmul(device: torch.device, dtype: torch.dtype = torch.float32, side: int = 0) -> float:
    """Return the FLOP/s of the best of three products of two random square matrices.

    `side` is 8192 by default on CUDA and 1024 on a CPU.
    """
    side = side or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    a @ b
    return 2 * side**3 / min(seconds_of(lambda: a @ b, device) for _ in range(3))


def copying(device: torch.device, size: int = 2**28) -> float:
    """Return the bytes a second, read and written, of the best of three copies of `size` bytes."""
    a, b = (torch.ones(size // 4, device=device) for _ in range(2))
    return 2 * size / min(seconds_of(lambda: a.copy_(b), device) for _ in range(3))


class Report:
    """Prints rows as they are found, and in the end, if asked, all of them as JSON."""

    def __init__(self, name: str, device: torch.device, threads: int, out: str | None) -> None:
        self.device = device
        self.threads = threads
        self._out = out
        self._rows: list[dict[str, Any]] = []
        self._ceilings: list[float] = []
        self._machine = {
            "benchmark": name,
            "device": device_name(device),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "threads": threads,
            "cores": os.cpu_count(),
            "load": [round(one, 2) for one in os.getloadavg()],
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        }
        self.say(", ".join(f"{key} {value}" for key, value in self._machine.items()))

    def say(self, text: str) -> None:
        """Print a line for people; to stderr where JSON goes to stdout."""
        click.echo(text, err=self._out == "-")

    def probe(self, dtype: torch.dtype = torch.float32) -> float:
        """Measure the ceiling once more; return the best so far, in FLOP/s."""
        self._ceilings.append(matmul(self.device, dtype))
        return max(self._ceilings)

    def row(self, text: str, **fields: Any) -> None:
        """Note a row, and print `text`."""
        self._rows.append(fields)
        self.say(text)

    def end(self) -> None:
        """Say how steady the machine was, and write the JSON."""
        if len(self._ceilings) > 1:
            spread = 1 - min(self._ceilings) / max(self._ceilings)
            self._machine |= {"ceiling_gflops": max(self._ceilings) / 1e9, "spread": spread}
            noise = ", noisy: read the ratios only" if spread > NOISY else ""
            best = f"{max(self._ceilings) / 1e9:.1f} GFLOP/s"
            self.say(f"ceiling {best}, spread {spread:.0%}{noise}")
        if self._out is None:
            return
        text = json.dumps({**self._machine, "rows": self._rows})
        if self._out == "-":
            click.echo(text)
        else:
            Path(self._out).write_text(text + "\n", encoding="utf-8")


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def benchmark(rounds: int) -> Callable[[Callable[..., None]], click.Command]:
    """Make a command of a function that takes a report and a number of rounds.

    It has `--device`, `--threads`, `--rounds` (by default `rounds`) and `--json [FILE]`. Further
    options go below this decorator.
    """

    def made(work: Callable[..., None]) -> click.Command:
        def command(device: str, threads: int, json_out: str | None, **options: Any) -> None:
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            place = torch.device(device)
            name = Path(work.__code__.co_filename).stem
            report = Report(name, place, threads, json_out)
            work(report, **options)
            report.end()

        # Click would fill the examples as prose.
        said = (sys.modules[work.__module__].__doc__ or "").replace("\n\n", "\n\n\b\n")
        command.__doc__ = said
        command.__click_params__ = getattr(work, "__click_params__", [])  # type: ignore[attr-defined]
        for option in (
            click.option(
                "--json", "json_out", is_flag=False, flag_value="-", metavar="[FILE]",
                help="Also as one line of JSON; without FILE it alone goes to stdout.",
            ),
            click.option("--rounds", default=rounds, show_default=True, type=click.IntRange(1)),
            click.option("--threads", default=1, show_default=True, type=click.IntRange(1)),
            click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda"),
        ):  # fmt: skip
            command = option(command)
        return click.command(context_settings={"max_content_width": 100})(command)

    return made
