"""A command that computes keeps what it frees: it gets each page of memory once."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="needs glibc, whose allocator this is about"
)

BLOCK = 48 << 20  # bytes; above 32 MB glibc always gives them back
FEW = BLOCK // os.sysconf("SC_PAGESIZE") // 10
COUNT = f"""
import resource
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        block = b"x" * {BLOCK}
        block = None
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""


def counted(code: str, **environment: str) -> list[int]:
    """What a new process prints; torch is not loaded, and nothing else has been freed."""
    kept = {k: v for k, v in os.environ.items() if "MALLOC" not in k and k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", COUNT + code], text=True, capture_output=True, check=True,
        env={**kept, **environment},
    )  # fmt: skip
    return [int(line) for line in done.stdout.split()]


KEEP = "from e2ediff.distributed.allocator import keep_freed_memory\nkept = keep_freed_memory()\n"


def test_freed_memory_is_given_again_without_the_system() -> None:
    before, kept, _, after = counted(
        f"print(faults())\n{KEEP}print(int(kept)); print(faults()); print(faults())"
    )
    assert kept == 1
    assert before > 2 * 10 * FEW, "else this machine shows nothing"
    assert after < FEW


@pytest.mark.parametrize(
    "environment",
    [{"MALLOC_ARENA_MAX": "2"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"},
     {"LD_PRELOAD": "libjemalloc-that-is-not-there.so"}],
    ids=["variable", "tunable", "other allocator"],
)  # fmt: skip
def test_what_the_user_set_of_the_allocator_stays(environment: dict[str, str]) -> None:
    kept, _, after = counted(f"{KEEP}print(int(kept)); print(faults()); print(faults())",
                             **environment)  # fmt: skip
    assert kept == 0
    assert after > 10 * FEW


def test_every_command_that_computes_does_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = tmp_path / "faults.py"
    plugin.write_text(
        f"import click\nfrom e2ediff import hookimpl\n{COUNT}"
        "@click.command()\ndef command():\n    faults(); print(faults())\n"
        "@hookimpl\ndef register(add):\n    add('commands', 'faults', command)\n"
    )
    monkeypatch.setenv("E2EDIFF_PLUGIN_FILES", str(plugin))
    words = [sys.executable, "-m", "e2ediff", "faults"]
    done = subprocess.run(words, text=True, capture_output=True, check=True)
    assert int(done.stdout) < FEW
