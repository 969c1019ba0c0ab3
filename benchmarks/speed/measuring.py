"""Time contestants by turns in one process, and report what was found.

CPU time is that of the whole process and of the processes that it started and waited for, so with
one thread it is what the work itself costs, whatever other processes do. On CUDA
the wall time until the device is done counts.
Freed memory is kept for what is allocated next, as the project's commands keep it: page faults
would otherwise take 3 to 8 % of a step on a CPU, and scatter. Where the environment says something
of the allocator, that holds instead.
"""

from __future__ import annotations

import ctypes
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

from e2ediff.distributed.allocator import keep_freed_memory
from e2ediff.errors import E2EDiffError

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


def give_back_freed_memory() -> None:
    """Give freed memory back to the system, so that what work needs next shows as its own."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def seconds_of(
    work: Callable[[], object],
    device: torch.device,
    calls: int = 1,
    before: Callable[[], object] | None = None,
) -> float:
    """Return the mean seconds of a call: CPU time on a CPU, else wall time with the device's.

    `before` is called before each of them, outside the clock, which is then read for each call;
    that adds some two microseconds to it.
    """
    if before is None:
        began = clock(device)
        for _ in range(calls):
            work()
        return (clock(device) - began) / calls
    total = 0.0
    for _ in range(calls):
        before()
        began = clock(device)
        work()
        total += clock(device) - began
    return total / calls


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
    before: Callable[[], object] | None = None,
) -> Times:
    """Time functions by turns, in another order each round.

    Args:
        contestants: Functions by name; each is called `warm` times before.
        device: Where they work.
        rounds: How often each is measured; a measurement takes 20 ms at least.
        warm: Calls that are not measured.
        before: Called before every call of each, outside the clock.
    """
    calls = {}
    for name, work in contestants.items():
        for _ in range(warm):
            seconds_of(work, device, before=before)
        once = seconds_of(work, device, before=before)
        calls[name] = max(1, round(_LEAST / max(once, 1e-7)))
    found: dict[str, list[float]] = {name: [] for name in contestants}
    names = [*contestants]
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            found[name].append(seconds_of(contestants[name], device, calls[name], before))
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
        self._ceilings: dict[torch.dtype, list[float]] = {}
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
        """Measure the ceiling of a type once more; return its best so far, in FLOP/s."""
        found = self._ceilings.setdefault(dtype, [])
        found.append(matmul(self.device, dtype))
        return max(found)

    def row(self, text: str, **fields: Any) -> None:
        """Note a row, and print `text`."""
        self._rows.append(fields)
        self.say(text)

    def end(self) -> None:
        """Say how steady the machine was, and write the JSON."""
        for found in self._ceilings.values():
            if len(found) < 2:
                continue
            spread = 1 - min(found) / max(found)
            self._machine |= {"ceiling_gflops": max(found) / 1e9, "spread": spread}
            noise = ", noisy: read the ratios only" if spread > NOISY else ""
            self.say(f"ceiling {max(found) / 1e9:.1f} GFLOP/s, spread {spread:.0%}{noise}")
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


def device_named(name: str) -> torch.device:
    """Return the device of this name.

    Raises:
        click.UsageError: There is no such device here.
    """
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise click.UsageError(f"--device {name}: is cpu, cuda, or a GPU by number as cuda:0.")
    if kind == "cuda" and int(number or 0) >= (count := torch.cuda.device_count()):
        here = f"only {count}" if count else "none"
        raise click.UsageError(f"--device {name}: torch sees {here} on this machine. Use cpu.")
    return torch.device(name)


def check_writable(path: str) -> None:
    """Refuse a file that could not be written after measuring.

    Raises:
        click.UsageError: It is a folder, or its own folder is missing or may not be written.
    """
    file = Path(path)
    if file.is_dir():
        raise click.UsageError(f"--json {path}: is a folder; name a file in it.")
    if not file.parent.is_dir():
        raise click.UsageError(f"--json {path}: there is no folder {file.parent}; make it first.")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise click.UsageError(f"--json {path}: may not be written; name another file.")


def benchmark(rounds: int) -> Callable[[Callable[..., None]], click.Command]:
    """Make a command of a function that takes a report and a number of rounds.

    It has `--device`, `--threads`, `--rounds` (by default `rounds`) and `--json [FILE]`. Further
    options go below this decorator. An error of e2ediff ends it with its message and exit code.
    """

    def made(work: Callable[..., None]) -> click.Command:
        def command(device: str, threads: int, json_out: str | None, **options: Any) -> None:
            keep_freed_memory()
            place = device_named(device)
            if json_out not in (None, "-"):
                check_writable(json_out)
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            name = Path(work.__code__.co_filename).stem
            report = Report(name, place, threads, json_out)
            try:
                work(report, **options)
            except E2EDiffError as error:
                refused = click.ClickException(str(error))
                refused.exit_code = error.exit_code
                raise refused from error
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
