"""`python -m e2ediff`, and the script `e2ediff`."""

from __future__ import annotations

import os
import signal
import sys

from e2ediff.distributed.signals import SIGNALS, Stop, Stopped, write_now


def main() -> None:
    """Answer signals, then import and run the command line."""
    # Torch reads it at the first product on a GPU, and `deterministic: true` needs this value. Its
    # own default differs in size alone, and on an H100 in nothing.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        with Stop(at_once=True, when="", quiet=True):
            from e2ediff.cli import main as command_line

            command_line()
    except Stopped as error:  # during that import
        write_now(sys.stderr, f"{error.repeat(sys.argv[1:])}\n")
        sys.exit(error.exit_code)
    finally:
        for number in SIGNALS:  # the exit code is decided
            signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    main()
