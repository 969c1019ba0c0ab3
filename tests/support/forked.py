"""Commands as forks of this process, which has imported torch: what they import takes seconds."""

from __future__ import annotations

import contextlib
import gc
import importlib
import inspect
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib.figure  # what every run imports, here and once
import pytest
import torch._dynamo
import torch.multiprocessing

import e2ediff.cli

assert matplotlib.figure
assert torch._dynamo
assert e2ediff.cli

ROOT = Path(__file__).parents[2]
_TESTS = str(Path(__file__).parent)
MODULES = ("e2ediff", "e2ediff_testing.parallel", "torch.distributed.run")
_PLACES = inspect.signature(subprocess.Popen._execute_child)  # type: ignore[attr-defined]


class Forked(subprocess.Popen[Any]):
    """`subprocess.Popen`, whose commands of ours and scripts of benchmarks are forks.

    They have a number, an exit code, signals and streams as any process, and the environment and
    folder that they are given; modules stay imported, and what a test has replaced in them too.
    """

    def _execute_child(self, args: Any, *given: Any) -> None:
        program = _program(args)
        if program is None:
            super()._execute_child(args, *given)  # type: ignore[misc]
            return
        at = _PLACES.bind(self, args, *given).arguments
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = _fork()
        if not self.pid:
            for stream in (self.stdin, self.stdout, self.stderr):
                if stream is not None:  # the other end is this one's
                    stream.close()
            _run(program, at)
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(at[end] for end in ends))  # type: ignore[attr-defined]


def _fork(fork: Callable[[], int] = os.fork) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        return fork()


def _program(args: Any) -> tuple[str, list[str], bool] | None:
    """A module or script, its words and whether Python's path begins with its folder; or None."""
    if isinstance(args, str | bytes | os.PathLike):
        return None
    python, *words = map(str, args)
    safe = words[:1] == ["-P"]
    words = words[safe or words[:1] == ["-u"] :]  # as torchrun starts Python
    if python != sys.executable or not words:
        return None
    if words[0] == "-m" and words[1] in MODULES:
        return words[1], words[2:], not safe
    if ROOT / "benchmarks" in Path(words[0]).parents:
        return words[0], words[1:], not safe
    return None


def _run(program: tuple[str, list[str], bool], at: dict[str, Any]) -> None:
    gc.freeze()  # to free what torch left in the other's memory would wait for its threads
    code: object = 1
    try:
        name, words, beside = program
        if at["start_new_session"]:
            os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        _streams(at["p2cread"], at["c2pwrite"], at["errwrite"])
        _warn_as_usual()
        if at["cwd"] is not None:
            os.chdir(at["cwd"])
        if at["env"] is not None:
            os.environ.clear()
            os.environ.update({str(k): os.fspath(v) for k, v in at["env"].items()})
        module = name in MODULES
        path = [os.getcwd() if module else str(Path(name).parent)] * beside
        path += filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        sys.path[:0] = [entry for entry in path if entry not in sys.path]
        importlib.invalidate_caches()
        for known, loaded in [*sys.modules.items()]:  # a script may have modules of these names
            if str(getattr(loaded, "__file__", None) or "").startswith(_TESTS):
                del sys.modules[known]
        sys.argv = [name, *words]
        try:
            if module:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(name, run_name="__main__")
            code = 0
        except SystemExit as ended:
            code = 0 if ended.code is None else ended.code
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code if isinstance(code, int) else 1)


def _streams(*files: int) -> None:
    """Let these be the standard streams, where they are not -1."""
    for number, file in enumerate([os.dup(f) if f >= 0 else -1 for f in files]):
        if file >= 0:
            os.dup2(file, number)
            os.close(file)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115


def _warn_as_usual() -> None:
    """Warn as Python does; in the tests themselves a warning is an error."""
    warnings.resetwarnings()
    for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", kind)
    warnings.showwarning = _show  # which pytest lets collect them


def _show(message: Any, category: Any, name: str, line: int, *_: object) -> None:
    sys.stderr.write(warnings.formatwarning(message, category, name, line))


@contextlib.contextmanager
def forked_runs() -> Iterator[None]:
    """Start commands as forks, those that share work as `ablate` and `--processes` do too."""
    import torch.distributed.run  # what every launcher imports, here and once
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", Forked)
        patch.setattr(subprocess_handler, "Popen", Forked)
        patch.setattr(os, "fork", _fork)
        context = multiprocessing.get_context("fork")
        patch.setattr(torch.multiprocessing, "get_context", lambda method: context)
        yield
