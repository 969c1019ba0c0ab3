"""Training all runs of an ablation, each in a process of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence

import attrs

from e2ediff import addresses
from e2ediff.ablate.group import RECIPE, Group
from e2ediff.ablate.plan import Job
from e2ediff.distributed.parent import LAUNCHER
from e2ediff.distributed.signals import Stop
from e2ediff.errors import E2EDiffError, RunDirectoryError
from e2ediff.store.run_directory import RunDirectory
from e2ediff.train.progress import Progress, duration

_POLL_SECONDS = 0.2
_LEAVING_SECONDS = 5.0  # for a run to note that it ends without saving
STOPPED = (75, 130, -signal.SIGTERM)
"""Exit codes of a run that saved, or had begun nothing yet, when it was asked to stop."""


@attrs.frozen
class Ended:
    """How a run's process ended: 0 is done, 75 and 130 are interrupted, others failed."""

    job: Job
    exit_code: int
    error: str


@attrs.define(eq=False)
class _Active:
    job: Job
    process: subprocess.Popen[bytes]
    started: float


def train_all(
    group: Group,
    jobs: Sequence[Job],
    *,
    at_once: int,
    threads: int | None,
    share: int,
    progress: Progress,
    stop: Stop,
) -> list[Ended]:
    """Bring every run to its end; those that are done are left as they are.

    A run that fails is noted and does not hold up the others.
    When `stop` is asked, the runs that are training save and end, and none is started.

    Args:
        group: Where they lie.
        jobs: The runs, in the order in which they start.
        at_once: Processes at a time.
        threads: CPU threads of each; None leaves the choice of one or `share` to it.
        share: How many it may have.
        progress: Where to say how it goes.
        stop: Whether to stop.

    Returns:
        How those ended that were not done before, in the order of their end.
    """
    pending = deque(job for job in jobs if not _skip(group, job, progress))
    active: list[_Active] = []
    ended: list[Ended] = []
    total, waiting = len(pending), set[str]()
    try:
        while active or (pending and not stop.asked):
            while pending and len(active) < at_once and not stop.asked:
                holder = _holder(group, pending[0])
                if holder:
                    # The runs of an ablation that was killed are still saving.
                    if holder not in waiting:
                        waiting.add(holder)
                        progress.say(f"waiting: {holder}")
                    break
                job = pending.popleft()
                if _skip(group, job, progress):
                    total -= 1
                    continue
                active.append(_start(group, job, threads, share))
                progress.say(f"{job.place}: training ({total - len(pending)}/{total})")
            if stop.asked and active:
                _stop_all(active)
            for one in [a for a in active if a.process.poll() is not None]:
                active.remove(one)
                ended.append(_end(group, one, progress))
            names = ", ".join(one.job.place for one in active) or "nothing"
            progress.update(f"{len(ended)} of {total} runs ended; training {names}")
            time.sleep(_POLL_SECONDS)
    except BaseException:
        _end_all(group, active)
        raise
    return ended


def _skip(group: Group, job: Job, progress: Progress) -> bool:
    if not group.is_done(job):
        return False
    progress.say(f"{job.place}: done before")
    return True


def _holder(group: Group, job: Job) -> str:
    """Who trains in a run's directory, in words; "" if nobody does."""
    if not group.store.exists(f"runs/{job.place}/run.json"):
        return ""
    try:
        directory = RunDirectory.open(group.run(job.place))
    except RunDirectoryError:
        return ""  # damaged: the run says so itself
    try:
        with directory:
            directory.lock()
    except RunDirectoryError as error:
        return str(error)
    return ""


def _start(group: Group, job: Job, threads: int | None, share: int) -> _Active:
    recipe = addresses.plain(job.recipe or f"{group.path}/{RECIPE}")
    command = [sys.executable, "-m", "e2ediff", "run", recipe]
    for change in job.overrides:
        command += ["--set", change]
    command += ["--out", group.run(job.place), "--threads", str(threads or "auto")]
    command.append("--resume=auto")
    log = group.log(job.place)
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads or share),
        LAUNCHER: str(os.getpid()),  # if this process is killed, the run saves and ends
    }
    with open(log, "ab", opener=addresses.own_file) as file:
        process = subprocess.Popen(  # noqa: S603 - our own command
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,  # a terminal's Ctrl-C comes once, through us
        )
    return _Active(job, process, time.monotonic())


def _stop_all(active: Sequence[_Active]) -> None:
    """Ask all to save and end, and wait for it."""
    for one in active:
        if one.process.poll() is None:
            one.process.send_signal(signal.SIGTERM)
    for one in active:
        one.process.wait()


def _end_all(group: Group, active: Sequence[_Active]) -> None:
    """End all at once, without saving, as after a second Ctrl-C; their status says so."""
    for again in (False, True):  # the first request may not have been sent yet
        for one in active:
            if one.process.poll() is None:
                one.process.send_signal(signal.SIGTERM)
        if not again:
            time.sleep(_POLL_SECONDS)
    until = time.monotonic() + _LEAVING_SECONDS
    for one in active:
        try:
            one.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            one.process.kill()
            one.process.wait()
            with contextlib.suppress(E2EDiffError):  # it had no directory yet
                directory = RunDirectory.open(group.run(one.job.place))
                directory.set_status("interrupted", 130, "killed, without saving")


def _end(group: Group, one: _Active, progress: Progress) -> Ended:
    code = one.process.returncode
    job, seconds = one.job, duration(time.monotonic() - one.started)
    error = ""
    if code:
        error = _last_line(group, job)
        if code < 0:
            error = f"killed by signal {-code}: {error}"
    group.record(job.place, code, error)
    if code == 0:
        found = RunDirectory.open(group.run(job.place)).status().get("collapsed")
        progress.say(f"{job.place}: done after {seconds}" + (f", but {found}" if found else ""))
    elif code in STOPPED:
        progress.say(f"{job.place}: saved after {seconds}")
    else:
        progress.say(f"{job.place}: FAILED (exit code {code}) after {seconds}: {error}")
    return Ended(job, code, error)


def _last_line(group: Group, job: Job) -> str:
    """The last line that a run printed, which names the error of a run that failed."""
    with group.log(job.place).open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 4000))
        lines = file.read().decode(errors="replace").split("\n")
    words = [line.strip() for line in lines if line.strip()]
    return words[-1].removeprefix("error: ") if words else "it printed nothing"


def exit_code(ended: Sequence[Ended], stop: Stop) -> int:
    """Of the whole ablation: 0 if all runs are done, else that of the first that failed.

    Args:
        ended: How runs ended.
        stop: Whether it was asked to stop; then 130 or 75, as of a run.
    """
    if stop.asked:
        return 130 if stop.signal == signal.SIGINT else 75
    failed = [e.exit_code for e in ended if e.exit_code not in (0, *STOPPED)]
    if failed:
        return failed[0] if failed[0] > 0 else 8  # killed, most often for its memory
    return 75 if any(e.exit_code for e in ended) else 0
