"""Choose between one CPU thread and all of them, whichever timing finds faster.

The threads of an operation wait for one another at its end, and spin while they wait. On cores
shared with other processes all threads can be ten times slower than one, and small networks gain
nothing from them even on idle cores.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping

import torch

from e2ediff.distributed.openmp import MOST_THREADS
from e2ediff.distributed.world import World
from e2ediff.store.manifest import MOST
from e2ediff.store.run_directory import EVENTS, METRICS, RunDirectory

GAIN = 1.05
"""How much faster another number of threads must be to be taken."""

PERIOD = 600.0
"""Seconds after which the numbers are timed again, whatever the pace."""

_TRIAL = 0.3  # seconds of a comparison, enough for other processes to have their turns
_CLEAR_AFTER = 0.1  # seconds after which a clear difference ends a comparison
_CLEAR = 1.25  # times slower than the fastest
_SURE = 1.1  # times slower than the fastest: less may be noise, and is timed again soon
_REST = 20  # pause after a comparison, in multiples of its duration
_SOON = 40  # the same, after a comparison that was not sure
_MORE_SELDOM = 4  # factor of that pause from one comparison to the next
_HOPELESS = 1.5  # times slower than the current number in the first round: not timed further
_WINDOW = 1.0  # seconds of work over which the pace is measured
_SLOW_WINDOWS = 2  # consecutive slow windows that count: a single one may be noise
_SHARED_WINDOW = 20  # calls of `done` instead, where several processes measure together


class Threads:
    """Sets torch's number of threads to one or all, and again when the pace drops by half.

    A comparison runs `attempt` with each number in turn. One thread is used unless all are more
    than 5 % faster, and a number stays until another is more than 5 % faster, so that noise does
    not decide. If the fastest gained less than 10 %, or one round was enough, the next comparison
    comes soon, and later ones ever less often, as the machine may have been busy for a moment.
    """

    def __init__(
        self,
        attempt: Callable[[], object],
        report: Callable[[str, int, int], None],
        *,
        world: World | None = None,
        count: int = 0,
        pace: float = 0.0,
        fixed: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Set up the timing; torch's current number of threads counts as all.

        Args:
            attempt: A piece of the work to be timed; has no side effects.
            report: Called with a line, the chosen number of threads, and the number of all.
            world: The processes that compute together, which use the same number.
            count: The initial number, for a resumed run; 0 compares first.
            pace: Pieces per second that the work had with that number.
            fixed: Leave the number as it is.
            clock: Returns seconds, from any origin.
        """
        self.attempt = attempt
        self.report = report
        self.world = world or World()
        # Processes on different machines use what all of them have.
        self.all = self.world.lowest(torch.get_num_threads())
        self.count = count if count <= self.all else 0
        self.fixed = fixed or self.all == 1
        self._pace = pace if self.count else 0.0
        self.clock = clock
        self._soonest, self._next = clock(), clock() + PERIOD
        self._slow = 0
        self._patience = 0.0  # seconds until the next comparison, after one that was not sure
        self._begin_window()

    def begin(self) -> None:
        """Set the initial number."""
        if self.fixed:
            return
        if self.count:
            torch.set_num_threads(self.count)
            self._report("as before")
        else:
            self._compare()

    def done(self, pieces: float, seconds: float) -> None:
        """Count finished work, and compare again if it took more than twice as long as before."""
        if self.fixed:
            return
        self._pieces += pieces
        self._seconds += seconds
        self._calls += 1
        shared = self.world.size > 1
        if self._calls < _SHARED_WINDOW if shared else self._seconds < _WINDOW:
            return
        pace = self._pieces / max(self._seconds, 1e-9)
        self._slow = self._slow + 1 if 2 * pace < self._pace else 0
        self._pace = max(self._pace, pace)
        self._begin_window()
        now = self.clock()
        fell = self._slow >= _SLOW_WINDOWS and now >= self._soonest
        if self.world.highest(int(fell or now >= self._next)):
            self._compare()

    def _begin_window(self) -> None:
        self._pieces = self._seconds = 0.0
        self._calls = 0

    def _compare(self) -> None:
        """Time each number in turns on equal work, and use the fastest."""
        began, before = self.clock(), self.count
        current = before or 1
        numbers = sorted({1, current, self.all})
        seconds, rounds = self._round(numbers), 1  # allocates, and starts threads
        numbers = [n for n in numbers if seconds[n] <= _HOPELESS * seconds[current]]
        if len(numbers) > 1:
            seconds, rounds = dict.fromkeys(numbers, 0.0), 0
            while rounds < 50 and not _is_settled(sorted(seconds.values()), rounds):
                for n, taken in self._round(numbers).items():
                    seconds[n] += taken
                rounds += 1
        best = min(numbers, key=seconds.__getitem__)
        self.count = best if seconds[best] * GAIN < seconds[current] else current
        torch.set_num_threads(self.count)
        if self.count != before:
            times = [f"{1e3 * s / rounds:.3g} ms with {n}" for n, s in seconds.items()]
            self._report(f"by time: {', '.join(times)}")
        # Comparing takes at most a twentieth of the time, and mostly a hundredth.
        now = self.clock()
        cost = now - began
        self._soonest = now + _REST * cost
        later = max(PERIOD, 100 * cost)
        fastest, second, *_ = sorted(seconds.values())
        if len(numbers) > 1 and second > _SURE * fastest:
            self._patience = 0.0
        else:
            self._patience = max(_SOON * cost, min(_MORE_SELDOM * self._patience, later))
        self._next = now + (self._patience or later)
        self._pace, self._slow = 0.0, 0
        self._begin_window()

    def _round(self, numbers: list[int]) -> dict[int, float]:
        """Return the seconds of one attempt with each number."""
        found = {}
        for n in numbers:
            torch.set_num_threads(n)
            start = self.clock()
            self.attempt()
            taken = self.clock() - start
            # Processes that compute together are as fast as the slowest of them.
            found[n] = self.world.highest(round(1e6 * taken)) / 1e6
        return found

    def _report(self, why: str) -> None:
        self.report(f"CPU threads: {self.count} of {self.all}, {why}", self.count, self.all)


def _is_settled(seconds: list[float], rounds: int) -> bool:
    """Return whether the sorted times of some rounds distinguish the numbers."""
    total = sum(seconds)
    clear = rounds > 1 and total > _CLEAR_AFTER and seconds[1] > _CLEAR * seconds[0]
    return rounds > 0 and (clear or total > _TRIAL)


@contextlib.contextmanager
def threads_for(
    attempt: Callable[[], object],
    report: Callable[[str], None],
    device: torch.device,
    *,
    fixed: bool = False,
    deterministic: bool = False,
) -> Iterator[Callable[[float], None]]:
    """Use the fastest number of CPU threads inside the block, then restore the former one.

    Args:
        attempt: A piece of the work to be timed; has no side effects.
        report: Called with a line whenever a number is chosen.
        device: Device of the work; unless it is the CPU, the number stays as it is.
        fixed: Leave the number as it is.
        deterministic: Use one thread unless `fixed`, as timing would decide about bits.

    Yields:
        A function to call with the number of pieces finished so far.
    """
    with restored_threads():
        fixed = fixed or device.type != "cpu"
        if deterministic and not fixed:
            torch.set_num_threads(1)
            fixed = True
        threads = Threads(attempt, lambda line, count, of: report(line), fixed=fixed)
        threads.begin()
        finished, since = 0.0, time.perf_counter()

        def done(total: float) -> None:
            nonlocal finished, since
            threads.done(total - finished, time.perf_counter() - since)
            finished, since = total, time.perf_counter()

        yield done


def quiet(line: str) -> None:
    """Discard a line, where others report it."""


@contextlib.contextmanager
def restored_threads() -> Iterator[None]:
    """Put torch's number of threads back on leaving."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def former_threads(directory: RunDirectory, images: int) -> tuple[int, float]:
    """Return the number of threads of a run at a checkpoint, and its images per second.

    The number affects the last bits of trained weights, so a resumed run keeps its own. It is 0,
    which chooses anew, on a machine with another number of cores or without a record.

    Args:
        directory: The run's directory; damaged records are ignored.
        images: Images that the checkpoint had seen.
    """
    hardware = directory.environment().get("hardware")
    if not isinstance(hardware, Mapping) or hardware.get("cpus") != os.cpu_count():
        return 0, 0.0
    count = hardware.get("threads")
    for event in directory.store.json_lines(EVENTS):
        seen = event.get("images", 0)
        if event.get("kind") == "threads" and isinstance(seen, int) and seen <= images:
            count = event.get("count", count)
    lines = directory.store.json_lines(METRICS)
    rates = (line.get("wall_images_per_second") for line in lines)
    known = deque(
        (float(r) for r in rates if isinstance(r, int | float) and 0 < r < MOST), maxlen=10
    )
    if type(count) is not int or not 0 < count <= MOST_THREADS:
        count = 0
    return count, statistics.median(known) if known else 0.0
