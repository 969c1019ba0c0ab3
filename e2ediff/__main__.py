"""`python -m e2ediff`, and the script `e2ediff`."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
import threading

from e2ediff.distributed.allocator import keep_freed_memory
from e2ediff.distributed.signals import SIGNALS, Stop, Stopped, write_now

# They end within seconds, and their garbage with them. Looking for it takes a fifth of the time of
# importing torch.
_BRIEF = {"check", "plan", "parts", "plugins", "doctor", "compare", "report"}


def program() -> None:
    """Run the command line as the whole of a process, which ends as soon as it is done."""
    try:
        main()
    except SystemExit as ended:
        _leave(ended.code)
        raise


def main() -> None:
    """Answer signals, then import and run the command line.

    Raises:
        SystemExit: Always; with the exit code.
    """
    # Torch reads it at the first product on a GPU, and `deterministic: true` needs this value. Its
    # own default differs in size alone, and on an H100 in nothing.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if {*sys.argv[1:2]} <= _BRIEF:
        gc.disable()
    else:
        keep_freed_memory()
    try:
        with Stop(at_once=True, when="", quiet=True):
            from e2ediff.cli import main as command_line

            command_line()
    except Stopped as error:  # during that import
        write_now(sys.stderr, f"{error.repeat(sys.argv[1:])}\n")
        sys.exit(error.exit_code)
    finally:
        _ignore_signals()


def _ignore_signals() -> None:
    for number in SIGNALS:  # the exit code is decided
        signal.signal(number, signal.SIG_IGN)


def _leave(code: object) -> None:
    """End the process at once, unless something is left to wait for or to report.

    To take down the interpreter piece by piece, and with it what torch has registered, would take
    0.4 seconds, and memory that the command itself did not need.
    """
    # Python waits for no daemon, such as the watch over a plugin that was called off just now.
    waited_for = [thread for thread in threading.enumerate() if not thread.daemon]
    if len(waited_for) > 1 or not isinstance(code, int) or _observed():
        return
    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except Exception:
        return
    os._exit(code)


def _observed() -> bool:
    """Return whether a profiler or tracer watches, which writes what it saw at the very end."""
    if sys.getprofile() is not None or sys.gettrace() is not None:
        return True
    monitoring = getattr(sys, "monitoring", None)  # from Python 3.12 on
    return monitoring is not None and any(monitoring.get_tool(i) is not None for i in range(6))


if __name__ == "__main__":
    program()
