"""Find the process that hangs when all processes of a run stand still.

Each process tells the others, through the store in which they met, how long its main thread has
shown no sign of life. Signs are steps, collectives, and any change of the Python code that the
main thread is executing, which a thread looks at; a process whose main thread hangs therefore
shows none, although that thread still runs. A run hangs when *no* process has shown a sign for
`LIMIT` seconds: a process that waits for another one's long work never ends the run.
What takes long and may stay within one call (saves, diagnoses, scores) has `LONG` times the limit.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from e2ediff.distributed.launch import note_end
from e2ediff.errors import ResourceError
from e2ediff.store.environment import machine

LIMIT = 300.0
"""Seconds without a sign of life in any process after which a run hangs."""

LONG = 12
"""How many times longer saves, diagnoses and scores may show none."""

_TICKS = 20  # beats in the limit
_WORDS = 3.0  # seconds for the process that reports to be the first that ends
_VERDICT = "verdict"
_WAITS = (os.path.join("torch", "distributed"), os.path.join("torch", "autograd"))


@dataclass
class _Seen:
    """The last beat of another process, and when this one first saw it."""

    beat: dict[str, Any]
    since: float

    def quiet(self, now: float) -> float:
        """Return the seconds without a sign of life."""
        return float(self.beat["still"]) + now - self.since

    def hangs(self, now: float, limit: float) -> bool:
        return self.quiet(now) >= limit * (LONG if self.beat["long"] else 1)


class Heartbeat:
    """The signs of life of one process, and a thread that ends it when the run hangs.

    `folder` gets the stacks of all processes (`rank-0.txt`), once it is known, and `failed` is
    called with the error's text in the process that reports it. `step` returns the last step.
    """

    def __init__(self, store: TCPStore, prefix: str, rank: int, size: int, limit: float) -> None:
        self.rank, self.size, self.limit = rank, size, limit
        self.folder: str | None = None
        self.failed: Callable[[str], None] = lambda text: None
        self.step: Callable[[], int] = lambda: 0
        # A client of its own: in the first one, calls of the main thread block those of others.
        client = TCPStore(store.host, store.port, is_master=False, wait_for_workers=False)
        self._store: Store = PrefixStore(f"{prefix}/beats", client)
        self._run: Store = PrefixStore(prefix, client)
        self._long = 0
        self._moved, self._at = time.monotonic(), datetime.now(UTC)
        self._exchanged = self._moved
        self._count = 0
        self._code: list[tuple[int, int]] = []
        self._seen: dict[int, _Seen] = {}  # while this process stands still
        self._known: dict[int, dict[str, Any]] = {}  # the last beat of each
        self._main = threading.main_thread().ident or 0
        self._ended, self._lock = threading.Event(), threading.Lock()
        self._stacks = os.memfd_create("stacks") if hasattr(os, "memfd_create") else None
        if self._stacks is not None:  # written without the interpreter, at the request of others
            faulthandler.register(signal.SIGUSR2, self._stacks, all_threads=True)
        self._tell()

    def start(self) -> None:
        """Begin to watch, once all processes have told a first beat."""
        self._known = {k: json.loads(self._store.get(str(k))) for k in range(self.size)}
        for act in (self._exchange, self._watch_exchange):
            threading.Thread(target=act, daemon=True).start()

    def stop(self) -> None:
        """Stop watching."""
        self._ended.set()

    def beat(self) -> None:
        """Show a sign of life; called from the main thread's work."""
        self._moved, self._at = time.monotonic(), datetime.now(UTC)

    @contextlib.contextmanager
    def long(self) -> Iterator[None]:
        """Allow more time for what is done inside."""
        self.beat()
        self._long += 1
        try:
            yield
        finally:
            self._long -= 1
            self.beat()

    # In threads of its own

    def _exchange(self) -> None:
        last = time.monotonic()
        with contextlib.suppress(RuntimeError):  # the store is gone: collectives report that
            while not self._ended.wait(self.limit / _TICKS):
                now = time.monotonic()
                if now - last > self.limit / 2:  # this process was suspended itself
                    self.beat()
                    self._seen.clear()
                last = now
                self._tell()
                if said := self._store.get(_VERDICT).decode():
                    self._end(json.loads(said)["text"], first=False)
                if now - self._moved > 2 * self.limit / _TICKS:
                    self._look(now)
                else:
                    self._seen.clear()
                self._exchanged = time.monotonic()

    def _watch_exchange(self) -> None:
        """End this process if the one that holds the store is stopped, which blocks the calls."""
        last = time.monotonic()
        while not self._ended.wait(self.limit / _TICKS):
            now = time.monotonic()
            if now - last > self.limit / 2:
                self._exchanged = now
            last = now
            waited = min(now - self._moved, now - self._exchanged)
            if waited > self.limit * (LONG if self._long else 1):
                self._end(self._words([0], silent=True), first=True, stopped=[0])

    def _tell(self) -> None:
        frame = sys._current_frames().get(self._main)
        code, place, waits = _position(frame)
        if code != self._code:
            self.beat()
        self._code = code
        self._count += 1
        beat = {
            "count": self._count,
            "still": time.monotonic() - self._moved,
            "long": self._long > 0,
            "step": self.step(),
            "at": f"{self._at:%Y-%m-%d %H:%M:%S}",
            "place": place,
            "waits": waits,
            "pid": os.getpid(),
            "machine": machine(),
            "stacks": self._stacks,
        }
        self._store.set(str(self.rank), json.dumps(beat))
        if self.rank == 0 and self._count == 1:
            self._store.set(_VERDICT, "")

    def _look(self, now: float) -> None:
        """Read the others' beats; end the run if none shows a sign of life."""
        for rank in range(self.size):
            beat = json.loads(self._store.get(str(rank)))
            seen = self._seen.get(rank)
            if seen is None or seen.beat["count"] != beat["count"]:
                self._seen[rank] = _Seen(beat, now)
            self._known[rank] = beat
        if not all(seen.hangs(now, self.limit) for seen in self._seen.values()):
            return
        stopped = [r for r, s in self._seen.items() if now - s.since > self.limit / 2]
        busy = [r for r, s in self._seen.items() if not s.beat["waits"]]
        text = self._words(stopped or busy, silent=bool(stopped))
        mine = json.dumps({"rank": self.rank, "text": text})
        said = json.loads(self._store.compare_set(_VERDICT, "", mine).decode())
        # In a process whose collective breaks when another one ends, this is its error.
        failed = {"rank": self.rank, "code": ResourceError.exit_code, "text": text}
        self._run.compare_set("failed", "", json.dumps(failed))
        self._end(said["text"], first=said["rank"] == self.rank, stopped=stopped)

    def _words(self, ranks: list[int], *, silent: bool) -> str:
        """Name the processes that hang; none means that all wait for one another."""
        how = "it is stopped or its machine is gone" if silent else "it does nothing"
        told = []
        for rank in ranks:
            b = self._known[rank]
            told.append(
                f"process {rank} of {self.size} (pid {b['pid']} on {b['machine']}) hangs: {how}, "
                f"last seen at {b['at']} UTC after step {b['step']} in {b['place']}"
            )
        what = "; ".join(told) or f"all {self.size} processes wait for one another"
        stacks = f"Stacks of the processes are in {self.folder}. " if self.folder else ""
        return f"{what}. {stacks}What was saved is intact: continue with --resume"

    def _end(self, text: str, *, first: bool, stopped: Sequence[int] = ()) -> None:
        """Write stacks, report if this process is the one to do so, and leave with exit code 8."""
        with self._lock:
            if self._ended.is_set():  # by the other thread, or the run ended by itself
                return
            self._ended.set()
        self._write_own_stacks()
        if first:
            with contextlib.suppress(Exception):  # nothing may keep this process from ending
                self.failed(text)
            note_end(ResourceError.exit_code, always=True)
            self._end_stopped(stopped)
        # The first one leaves first, once the others have had the time to write their stacks.
        time.sleep(self.limit / _TICKS + (1.0 if first else _WORDS))
        sys.stderr.flush()
        os._exit(ResourceError.exit_code)

    def _write_own_stacks(self) -> None:
        with contextlib.suppress(OSError), self._file(self.rank).open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)

    def _end_stopped(self, stopped: Sequence[int]) -> None:
        """Have the processes of this machine that have stopped write stacks, and kill them.

        Otherwise they would hold the run's lock, and the launcher would wait for them.
        """
        for rank in stopped:
            pid, stacks = self._known[rank]["pid"], self._known[rank]["stacks"]
            if self._known[rank]["machine"] != machine() or rank == self.rank:
                continue
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGUSR2)
                time.sleep(0.5)
                if stacks is not None and (found := Path(f"/proc/{pid}/fd/{stacks}").read_bytes()):
                    self._file(rank).write_bytes(found)
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def _file(self, rank: int) -> Path:
        if self.folder is None:
            return Path(os.devnull)
        folder = Path(self.folder)
        folder.mkdir(exist_ok=True)
        file = folder / f"rank-{rank}.txt"
        file.unlink(missing_ok=True)  # of an earlier attempt, or a link that a stranger packed
        return file


def _position(frame: FrameType | None) -> tuple[list[tuple[int, int]], str, bool]:
    """Return what a thread executes: a mark of its stack, the place, and whether it waits there.

    The place is the innermost one in this package or a plugin's, outside of torch.
    """
    stack, place, waits = [], "", False
    while frame is not None:
        file = frame.f_code.co_filename
        stack.append((id(frame.f_code), frame.f_lasti))
        waits = waits or any(part in file for part in _WAITS)
        if not place and os.path.join("site-packages", "torch", "") not in file:
            short = os.path.join(*file.split(os.sep)[-3:])
            place = f"{short}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return stack, place or "the interpreter", waits
