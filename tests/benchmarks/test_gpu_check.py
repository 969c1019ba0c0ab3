"""Every part of the check for GPUs ends whole at tiny size on a CPU, and finds something."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from command_line import needs

ROOT = Path(__file__).resolve().parents[2]
CHECK = ROOT / "benchmarks" / "gpu" / "check.py"
PARTS = [
    *("environment", "traps", "use", "agreement", "memory", "nccl", "attention"),
    *("throughput:dsd_in256:off", "throughput:dsd_in256:blocks", "profile:dsd_in256:off"),
    *("resume", "precision", "sampling", "loader", "training", "quickstart", "tests", "suite"),
    *("peer", "forecast"),
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("forks"),
    needs("e2ediff-dsd", "e2ediff-unite", "e2ediff-jit", "e2ediff-plan"),
]


def check(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CHECK), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=290)


@pytest.fixture(autouse=True)
def pytest_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that a part runs are a fork as well."""
    monkeypatch.setattr(forked, "MODULES", (*forked.MODULES, "pytest"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all parts work, so that what one compiles or writes serves the next.

    What they import is imported here and once.
    """
    for name in ("e2ediff.train.session", "torch._inductor.pattern_matcher"):
        importlib.import_module(name)
    return tmp_path_factory.mktemp("look")


@pytest.mark.parametrize("part", PARTS)
def test_a_part_ends_whole_on_a_cpu_and_writes_what_it_found(part, place) -> None:
    out = place / part.replace(":", "-")
    done = check("--out", out, "--work", out / "work", "--kit", place / "kit", "--device", "cpu",
                 "--tiny", "--budget", 280, "--parts", part)  # fmt: skip
    log = (out / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + log[-3000:]
    (entry,) = json.loads((out / "results.json").read_text())
    assert (entry["part"], entry["end"]) == (part, "whole")
    assert entry["rows"]
    lacking = {"attention": "kernel", "environment": "package"}  # what a CPU need not have
    failed = [row for row in entry["rows"] if row.get("ok") is False or "error" in row]
    assert not [row for row in failed if lacking.get(part) not in row], log[-3000:]
    assert f"| {part} | whole |" in (out / "results.md").read_text()


def test_the_test_names_every_part_and_plans_name_parts_alone() -> None:
    said = check("--list").stdout.splitlines()
    plans = [line.partition(": ")[2].split(", ") for line in said if line.startswith("plan ")]
    names = {line.split()[0] for line in said if not line.startswith("plan ")}
    assert names == {part.partition(":")[0] for part in PARTS}
    assert len(plans) == 3
    assert {part.partition(":")[0] for plan in plans for part in plan} <= names


def test_the_budget_cuts_parts_off_and_leaves_later_ones_out(place) -> None:
    out = place / "cut"
    long = "throughput:quickstart:off"  # its ceiling is made for a GPU: a minute on a CPU
    done = check("--out", out, "--device", "cpu", "--budget", 8.5,
                 "--work", out / "work", "--parts", f"{long},environment")  # fmt: skip
    assert done.returncode == 1
    first, second = json.loads((out / "results.json").read_text())
    assert first["end"].startswith("cut off after")
    assert second["end"] == "left out: no time"
    assert "| environment | left out: no time |" in (out / "results.md").read_text()
