"""What `e2ediff plan` prints, and how it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from command_line import e2ediff
from e2ediff_plan.text import duration

PLUGIN = """
from e2ediff import hookimpl

@hookimpl
def register(add):
    add("objectives", "mine", "e2ediff.parts.objectives:Detached")
"""


def test_a_plan_prints_its_bill_and_every_assumption(tiny_recipe: str) -> None:
    """All ceilings with their source; the share and the reserve as what they are."""
    done = e2ediff("plan", tiny_recipe, "--device", "a100", "--gpus", 2, "--fraction", 0.4,
                   "--set", "microshards=2", "--set", "precision=bfloat16")  # fmt: skip
    assert done.code == 0, done.err
    shown = "parameters, trunks.all, GFLOP an image, encode, saved for backward, speed, diagnose"
    for part in f"{shown}, largest micro-shard, sampling, evaluation  50,000, disk".split(", "):
        assert part in done.out
    said = done.out.partition("assumptions")[2]
    assert "312 TFLOP/s in bfloat16: NVIDIA's data sheet, dense" in said
    assert "40% of it is assumed to be reached (--fraction)" in said
    assert "8% of 80 GB are left to the context, libraries and fragmentation: our choice" in said
    assert "2 devices are 2 times as fast" in said


def test_a_plan_says_how_much_shared_memory_the_data_workers_of_all_devices_need(
    tiny_recipe: str,
) -> None:
    """An item of 2 images of 256 pixels, five times for each of two devices with two workers."""
    data = "data={name: image_folder, root: x, size: 256, classes: 2, workers: 2}"
    words = ("plan", tiny_recipe, "--device", "cpu", "--gpus", 2, "--set", data)
    words += ("--set", "microshards=4", "--set", "batch=48", "--set", "backbone.patch=64")
    words += ("--set", "backbone.depth=1")
    needed = 2 * (2 * 2 + 1) * (12 * 3 * 256**2 + 4096)  # pixels and labels
    done = e2ediff(*words)
    assert done.code == 0, done.err
    assert "workers     2 for each of 2 devices, which need up to 0.02 GB of shared m" in done.out
    assert json.loads(e2ediff(*words, "--json").out)["shared_memory_bytes"] == needed


def test_a_plan_in_json_is_made_of_numbers(tiny_recipe: str) -> None:
    done = e2ediff("plan", tiny_recipe, "--device", "cpu", "--json")
    found = json.loads(done.out)
    passes = found["flops_per_image"]["joint"]
    total = passes.pop("all")
    for way in ("forward", "backward"):
        assert sum(one[way] for one in passes.values()) == pytest.approx(total[way])
    assert found["images_per_second"] == pytest.approx(
        found["fraction"] * found["flops_ceiling"] / sum(total.values())
    )
    assert found["peak_bytes"] > sum(found["state_bytes"].values())
    assert found["disk_bytes"] == 3 * found["checkpoint_bytes"]  # two kept, one being written
    assert "--device measured" in found["assumptions"][0]


def test_devices_that_the_shards_do_not_divide_over_are_refused(tiny_recipe: str) -> None:
    done = e2ediff("plan", tiny_recipe, "--gpus", 3, "--set", "microshards=4")
    assert done.code == 3
    assert done.err.splitlines() == [
        f"error: {tiny_recipe}: 1 problem",
        "  microshards: 4 do not divide over 3 devices; choose a multiple of 3 that divides the "
        "batch of 8",
    ]


def test_the_command_has_these_options_and_devices(tmp_path: Path, tiny_recipe: str) -> None:
    """They are public; one is removed by a decision, with a line in the changelog."""
    shown = e2ediff("plan", "--help").out
    assert {*re.findall(r"--[a-z]+", shown)} == {
        "--set", "--device", "--gpus", "--fraction", "--json", "--plugin", "--help"
    }  # fmt: skip
    assert "[h200|h100|a100|l40s|4090|cpu|measured]" in shown
    (tmp_path / "mine.py").write_text(PLUGIN)
    words = ("plan", tiny_recipe, "--set", "objective=mine")
    assert e2ediff(*words).code == 3
    assert e2ediff(*words, "--plugin", tmp_path / "mine.py").code == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12, "12.0 s"), (90, "1.5 min"), (3600, "60.0 min"), (7200, "2.0 h"), (864000, "10.0 days")],
)
def test_a_duration_has_the_unit_that_people_use(seconds: float, text: str) -> None:
    assert duration(seconds) == text
