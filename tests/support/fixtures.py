"""What suites share, plugins' too: one thread, repeatable hypothesis, a tiny recipe."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Processes that tests start have one thread as well; it is read when torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Else commands would set it on a machine that is busy at that moment, for all tests after them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from drawing import drawn, leave_blank
from forked import forked_runs
from hypothesis import settings
from tiny_recipe import tiny

from e2ediff.host.plugins import Host, load

__all__ = ["drawn", "forks", "host", "tiny_recipe", "tiny_text"]

# Bit-for-bit claims are for one thread count, and small tensors are fastest on one.
torch.set_num_threads(1)

leave_blank()

# Derandomised: a failure here is a failure everywhere. No deadline: CI machines stall.
settings.register_profile("e2ediff", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("e2ediff")

TINY = tiny(
    steps="12",
    data="{name: synthetic, size: 16, classes: 4, count: 60}",
    backbone="{name: vit, width: 32, depth: 2, heads: 2, patch: 8, latent_dim: 6, "
    "latent_norm: batch}",
    times="logit_normal",
    objective="coupled",
    target="{decay: 0.9}",
    optimizer="{name: adamw, lr: 0.002}",
    sampler="{name: heun, steps: 2}",
    cadence="{log: 1, diagnose: 4, preview: 1000, checkpoint: 1000}",
    probe="{images: 16, times: [0.5], calibration: 16}",
)


@pytest.fixture(scope="session")
def host() -> Host:
    """The built-in parts and, where it is installed, the DSD plugin."""
    return load()


@pytest.fixture(scope="session")
def tiny_text() -> str:
    return TINY


@pytest.fixture
def tiny_recipe(tmp_path) -> str:
    """Path of a recipe that trains in a second on synthetic images of 16 pixels."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return str(path)


@pytest.fixture
def forks() -> Iterator[None]:
    """Start commands as forks of this process."""
    with forked_runs():
        yield
