"""Work of a process that takes longer than a test; its module can be imported by a new process."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path


def busy(folder: str) -> Iterator[int]:
    """Leave a file with the number of this process, and be busy for minutes."""
    Path(folder, str(os.getpid())).touch()
    time.sleep(200)
    yield 0
