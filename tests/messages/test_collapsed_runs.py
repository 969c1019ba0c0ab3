"""A run whose latents collapsed says so wherever its weights are used."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from command_line import e2ediff
from pictures import write_tree
from tiny_recipe import tiny

import e2ediff as package

STRICT = "[{name: latent_health, rank_fraction: 1.0}]"
"""Every rank of these latents counts as a collapse."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with a run that collapsed, `bad`, one that did not, `good`, and images."""
    place = tmp_path_factory.mktemp("runs")
    for name, more in (("bad", {"diagnostics": STRICT}), ("good", {"diagnostics": "[]"})):
        (place / f"{name}.yaml").write_text(tiny(**more))
        done = e2ediff("run", place / f"{name}.yaml", "--out", place / name, "--threads", 1)
        assert done.code == 0, done.err
        assert ("LATENT COLLAPSE" in done.err.splitlines()[-2]) == (name == "bad")
    write_tree(place / "images", [2], size=(16, 16))
    return place


COMMANDS = {
    "sample": ("--count", 1, "--label", 0, "--steps", 1),
    "reconstruct": ("--count", 2),
    "interpolate": ("--seeds", 0, 1, "--frames", 2),
    "eval": ("--count", 8, "--features", "random_projection", "--metrics", "fid"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_that_use_it_say_so_once(command, runs) -> None:
    done = e2ediff(command, runs / "bad", *COMMANDS[command])
    assert done.code == 0, done.err
    (line,) = [line for line in done.err.splitlines() if "collapsed" in line]
    assert line.startswith(f"{runs / 'bad'}/checkpoints/images-")
    assert line.endswith(
        ": the latents have been collapsed since step 4. Do not trust its samples or scores"
    )


def test_the_python_api_says_so(runs, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        package.load(runs / "bad")
        assert "the latents have been collapsed since step 4" in caplog.text
        caplog.clear()
        package.load(runs / "good")
        assert "collapsed" not in caplog.text


def test_a_sound_run_and_an_earlier_checkpoint_say_nothing(runs) -> None:
    for words in (("good",), ("bad", "--checkpoint", "images-000000000016")):
        done = e2ediff("sample", runs / words[0], *COMMANDS["sample"], *words[1:], "--overwrite")
        assert (done.code, "collapse" in done.err) == (0, False), done.err
