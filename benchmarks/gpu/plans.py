"""The parts of the check, the seconds that each may take, and the plans that they make up."""

from __future__ import annotations

import attrs


@attrs.frozen
class Part:
    """What a part finds out, and the seconds after which it is cut off."""

    limit: int
    about: str


PARTS = {
    "environment": Part(50, "versions, plugins, rates of products and of copies"),
    "traps": Part(115, "small runs as a user starts them: every kernel, precision and switch"),
    "use": Part(75, "sample, reconstruct and eval in both types, of runs in both types"),
    "agreement": Part(60, "a step's losses and gradients on the CPU and on the device"),
    "memory": Part(60, "steps that the device has no memory for: split, or refused"),
    "nccl": Part(45, "one process in a process group: collectives, DDP, FSDP2"),
    "attention": Part(75, "every kernel by type and length: error, time, the same bits or not"),
    "throughput": Part(75, "images a second of a recipe's step, its peak, and where it waits"),
    "profile": Part(50, "the kernels of a step that take the time"),
    "resume": Part(90, "a run twice, and once with a stop in the middle: the same bits or not"),
    "precision": Part(60, "the same steps in bfloat16 and in float32"),
    "sampling": Part(60, "images a second of the sampler, eager, compiled and as a CUDA graph"),
    "loader": Part(60, "images a second of the loader, alone and with the step"),
    "training": Part(260, "three objectives side by side on equal steps: sheets and scores"),
    "quickstart": Part(130, "the quickstart from the command line to a sheet of samples"),
    "tests": Part(110, "the tests that need a GPU"),
    "suite": Part(240, "ordinary tests on a machine with a GPU"),
    "peer": Part(80, "another implementation's step beside ours"),
    "forecast": Part(600, "the peaks that `plan` forecasts, for `throughput`; needs no GPU"),
}

PLANS = {
    "first": (
        "environment",
        "traps",
        "throughput:dsd_in256:off",
        "use",
        "agreement",
        "memory",
        "nccl",
        "throughput:dsd_in256:blocks",
        "profile:dsd_in256:off",
    ),
    "second": (
        "tests",
        "attention",
        "resume",
        "training:40",
        "sampling",
        "precision",
    ),
    "further": (
        "throughput:dsd_in256_s:off",
        "throughput:dsd_in256_s:blocks",
        "loader",
        "quickstart",
        "throughput:dsd_in256_m:blocks",
        "throughput:dsd_in256_s:step",
        "profile:dsd_in256:blocks",
        "suite",
        "peer",
    ),
}
