"""Several real processes of one run, on this machine and over gloo, as a launcher starts them.

They are forked, so that torch is imported once: two processes take a second and not ten.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{k: str(v) for k, v in values.items()}}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def together(act: Callable[[int], Any], size: int = 2, seconds: float = 120) -> list[Any]:
    """What `act(rank)` returns in each of `size` processes: JSON, or the text of its error.

    A process that ends without a result gives its exit code, as an int.
    """
    context, port = multiprocessing.get_context("fork"), free_port()
    with tempfile.TemporaryDirectory() as folder:

        def work(rank: int) -> None:
            gc.freeze()  # to free what torch left in the other's memory would wait for its threads
            os.environ.update(environment(rank, size, port))
            try:
                found = act(rank)
            except Exception as error:
                traceback.print_exc()
                found = f"{type(error).__name__}: {error}"
            Path(folder, str(rank)).write_text(json.dumps(found))
            sys.stderr.flush()
            os._exit(0)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
            started = [context.Process(target=work, args=(rank,)) for rank in range(size)]
            for process in started:
                process.start()
        for process in started:
            process.join(seconds)
            if process.is_alive():
                process.kill()
                process.join()
        files = [Path(folder, str(rank)) for rank in range(size)]
        return [
            json.loads(file.read_text()) if file.exists() else process.exitcode
            for file, process in zip(files, started, strict=True)
        ]
