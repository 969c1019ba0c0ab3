"""How all tests are run, those of plugins too, and what they share."""

from __future__ import annotations

import gc
import importlib
import os
import shutil
from pathlib import Path

import pytest

# Runs wait for a disk whenever they save. Memory of this size holds what all tests leave.
MEMORY = "/dev/shm"
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 4 * 2**30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", MEMORY)

# Files whose tests take half a minute or more. A process that runs tests takes one file after
# another, and the others would wait for the last of these. First come those that fork runs: forks
# of a process that has compiled have ended in torch, with "std::system_error".
_LONG = (
    "test_signals",
    "test_hangs",
    "test_guarantees",
    "test_killed_beginnings",
    "test_ablation",
    "test_lost_checkpoints",
    "test_gpu_check",
    "test_conditions",
    "test_failing_in_runs",
    "test_new_and_check",
    "test_compiling",
    "test_one_graph",
    "test_forecast",
    "test_tutorial",
    "test_quickstart_quality",
    "test_resume",
    "test_processes",
    "test_alarm_runs",
    "test_sweep",
    "test_collapse_runs",
    "test_samplers",
)


def pytest_configure(config: pytest.Config) -> None:
    """Offer what tests share where tests run; the process that hands them out imports no torch."""
    if config.getoption("dist") == "no":
        gc.disable()  # what is imported stays, and is looked at again and again for cycles
        config.pluginmanager.register(importlib.import_module("fixtures"), "shared")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run all tests in one process more than there are cores, as some wait; a few in this one."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    return (os.cpu_count() or 1) + 1 if whole else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that fork and that take longest."""
    order = {name: place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: order.get(Path(item.path).stem, len(_LONG)))


def pytest_collection_finish() -> None:
    """Leave what was imported so far out of every later search for cycles, and search less."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)  # searches took 8 % of the tests that trace graphs
    gc.enable()
