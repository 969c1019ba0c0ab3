"""Commands of the project in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import NamedTuple

from look import Look


class Ended(NamedTuple):
    """The exit code of a command, its seconds, and what it wrote."""

    code: int
    seconds: float
    said: str

    @property
    def tail(self) -> str:
        """The end of what it wrote, in one line."""
        return self.said.strip()[-240:].replace("\n", " / ")


def run_command(
    look: Look, *words: object, limit: float = 120, env: Mapping[str, str] | None = None
) -> Ended:
    """Run `python -m WORDS` in the checkout, and kill it at the limit."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, words)], cwd=look.root, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})},
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()  # what it has started follows it
        said, _ = process.communicate()
        said += f"\n(killed after {limit:.0f} s)"
    print(said[-6000:], flush=True)
    return Ended(process.returncode, time.perf_counter() - began, said)
