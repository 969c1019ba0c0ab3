"""Runs of an ablation as forks of this process, which has imported torch: a second, not six."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import IO

import matplotlib.figure  # what every run imports, here and once
import pytest
import torch._dynamo

from e2ediff.cli import main

assert matplotlib.figure
assert torch._dynamo


class Forked:
    """What `subprocess.Popen` is for `python -m e2ediff WORDS`, in a session of its own."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdin: int,
        stdout: IO[bytes],
        stderr: IO[bytes],
        env: Mapping[str, str],
        start_new_session: bool,
    ) -> None:
        assert (*command[:3], stdin) == (sys.executable, "-m", "e2ediff", subprocess.DEVNULL)
        assert start_new_session
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
            self.pid = os.fork()
        if not self.pid:
            _run(command[3:], stdout, stderr, env)
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        until = time.monotonic() + (300 if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("a fork", timeout or 300)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(
    words: Sequence[str], stdout: IO[bytes], stderr: IO[bytes], env: Mapping[str, str]
) -> None:
    code = 1
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(env)
        os.dup2(stdout.fileno(), 1)
        os.dup2(stderr.fileno(), 2)
        sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(n, "wb", 0)) for n in (1, 2))
        try:
            main(words)
        except SystemExit as ended:
            code = int(ended.code or 0)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


@contextlib.contextmanager
def forked_runs() -> Iterator[None]:
    """Start the runs of ablations as forks."""
    forks = SimpleNamespace(
        Popen=Forked, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("e2ediff.ablate.train.subprocess", forks)
        yield
