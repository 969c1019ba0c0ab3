"""Start several processes of one run with torch's elastic launcher.

`torchrun` exits with code 1 whatever the exit codes of its processes. Here the first process of
each machine leaves its exit code in a file, so that a batch system sees 75.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from e2ediff.distributed.parent import LAUNCHER
from e2ediff.distributed.signals import BEFORE, Stopped
from e2ediff.errors import ResourceError

ENDED = "_E2EDIFF_ENDED"
"""Environment variable: the file for the exit code."""

PATIENCE = 600
"""Seconds that processes have to save after a signal, before they are killed."""


def launch(words: Sequence[str], nproc: int, nnodes: int = 1, rendezvous: str = "") -> int:
    """Run `python -m e2ediff WORDS` in `nproc` processes on each of `nnodes` machines.

    Args:
        words: The command line, without the options of this function.
        nproc: Processes on this machine.
        nnodes: Number of machines; each of them calls this function.
        rendezvous: `HOST:PORT` of one of them, to which all connect; "" for one machine.

    Returns:
        The exit code of the run.

    Raises:
        ResourceError: The processes could not be started, or one was killed.
        Stopped: A signal came before they had begun.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _quiet()
    config = LaunchConfig(
        min_nodes=nnodes,
        max_nodes=nnodes,
        nproc_per_node=nproc,
        # The shared address identifies the run to all machines.
        run_id=f"e2ediff-{rendezvous or uuid.uuid4().hex}",
        rdzv_backend="c10d",
        rdzv_endpoint=rendezvous or "localhost:0",
        rdzv_configs={"join_timeout": join_limit()},
        max_restarts=0,  # a failed run is continued with --resume
        signals_to_handle="SIGTERM,SIGINT,SIGUSR1,SIGHUP",
        local_addr=None if rendezvous else "localhost",
        **_patience(LaunchConfig),
    )
    with tempfile.TemporaryDirectory(prefix="e2ediff-") as folder:
        ended = Path(folder, "code")
        os.environ |= {ENDED: str(ended), LAUNCHER: str(os.getpid())}
        failed: ChildFailedError | None = None
        stopped: int | None = None
        try:
            elastic_launch(config, sys.executable)("-m", "e2ediff", *words)
        except ChildFailedError as error:
            failed = error
        except SignalException as error:
            stopped = error.sigval  # forwarded to the processes, which saved and exited
        except RendezvousError as error:
            raise ResourceError(
                f"this machine cannot meet the other {nnodes - 1} at {rendezvous} within "
                f"{join_limit()} seconds ({str(error).partition(chr(10))[0]}). Check that the "
                "same command runs on all of them, and that each can reach that address: name, "
                "port, firewall"
            ) from error
        except (RuntimeError, OSError, ValueError, TimeoutError) as error:
            what = str(error).partition("\n")[0]
            raise ResourceError(f"the processes could not be started: {what}") from error
        finally:
            del os.environ[ENDED], os.environ[LAUNCHER]
        with contextlib.suppress(OSError, ValueError):
            return int(ended.read_text())
    if failed is None:
        raise Stopped(stopped or signal.SIGTERM, BEFORE)  # no process left an exit code
    _, first = failed.get_first_failure()
    if first.exitcode > 0:
        return int(first.exitcode)
    raise ResourceError(
        f"process {first.local_rank} was killed by signal {-first.exitcode}, perhaps "
        "because memory ran out. What was saved is intact: continue with --resume"
    )


def note_end(code: int, *, always: bool = False) -> None:
    """Leave this process's exit code for the launcher, if there is one.

    The first process of a machine does; `always` is for another that ends it.
    """
    file = os.environ.get(ENDED)
    if file and (always or os.environ.get("LOCAL_RANK", "0") == "0"):
        with contextlib.suppress(OSError):
            Path(file).write_text(str(code))


def same_processes() -> list[str]:
    """Return the options with which the processes of this one were started on one machine.

    Empty for a single process, and where another launcher or several machines are at work.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    ours = ENDED in os.environ and os.environ.get("LOCAL_WORLD_SIZE") == size
    return ["--nproc", size] if ours else []


def join_limit() -> int:
    """Return the seconds that a process waits for the others to come."""
    return int(os.environ.get("_E2EDIFF_JOIN", "120"))  # less in tests


def _patience(config: type) -> dict[str, Any]:
    """Return the shutdown timeout, if this version of the launcher has that option."""
    known = config.__dataclass_fields__  # type: ignore[attr-defined]
    return {"shutdown_timeout": PATIENCE} if "shutdown_timeout" in known else {}


def _quiet() -> None:
    """Silence the launcher, whose long reports repeat what the processes have reported."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
