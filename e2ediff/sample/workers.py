"""Make the images of one set in several processes, each with its own copy of the model.

They share only the output: an image does not depend on the process that makes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import attrs
import torch

from e2ediff.distributed.children import in_processes
from e2ediff.distributed.threads import quiet, restored_threads, threads_for
from e2ediff.model.inference import Model, denoise_once
from e2ediff.sample.conditions import Conditions
from e2ediff.sample.outputs import ImageOutput
from e2ediff.sample.request import SampleCost, SampleRequest


@contextlib.contextmanager
def make_in_processes(
    request: SampleRequest, blocks: Sequence[range], processes: int, threads: int, *, choose: bool
) -> Iterator[Iterator[SampleCost]]:
    """Yield the costs of tiles as they are made; process k of P makes blocks k, k + P, ...

    Raises, while the costs are read:
        E2EDiffError: The error of one of the processes.
        ResourceError: A process died without an error, for instance for lack of memory.
    """
    shares = [
        (_placed(request, k), list(blocks[k::processes]), threads, choose)
        for k in range(processes)
    ]
    advice = (
        "Finished images are stored, and the same command makes the others. Give fewer "
        "--processes or --rows."
    )
    with in_processes(_make, shares, makes="made images", advice=advice) as costs:
        yield (cost for _, cost in costs)


def _placed(request: SampleRequest, k: int) -> SampleRequest:
    """Assign GPUs to the processes in turn."""
    if request.model.device == "cpu" or not torch.cuda.is_available():
        return request
    device = f"cuda:{k % torch.cuda.device_count()}"
    return attrs.evolve(request, model=attrs.evolve(request.model, device=device))


def make_blocks(
    request: SampleRequest,
    model: Model,
    output: ImageOutput,
    blocks: Sequence[range],
    threads: int,
    report: Callable[[str], None] | None,
) -> Iterator[SampleCost]:
    """Make some blocks, and yield the costs of their tiles as they are made.

    Where `report` is given, one thread or `threads` are chosen by timing, and it is called with
    each choice.
    """
    attempt, fixed = partial(denoise_once, model), report is None or not blocks
    with restored_threads():
        torch.set_num_threads(threads)
        exact = model.recipe.deterministic
        with threads_for(
            attempt, report or quiet, model.device, fixed=fixed, deterministic=exact
        ) as done:
            images, conditions = 0, Conditions(model.recipe, request.labels)
            for block in blocks:
                for cost in request.make(model, conditions, output, block):
                    yield cost
                    images += cost.images
                    done(images)


def _make(
    request: SampleRequest, blocks: Sequence[range], threads: int, choose: bool
) -> Iterator[SampleCost]:
    """Make these blocks in a process of its own."""
    torch.set_num_threads(threads)
    model = request.model.load(warn=quiet)  # the first process has warned
    output = request.output(model)
    yield from make_blocks(request, model, output, blocks, threads, quiet if choose else None)
