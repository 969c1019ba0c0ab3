"""Make the images of one set in several processes, each with its own copy of the model.

They share only the output: an image does not depend on the process that makes it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import attrs
import torch

from e2ediff.distributed.threads import quiet, restored_threads, threads_for
from e2ediff.errors import E2EDiffError, ResourceError
from e2ediff.model.inference import Model, denoise_once
from e2ediff.sample.conditions import Conditions
from e2ediff.sample.outputs import ImageOutput
from e2ediff.sample.request import SampleCost, SampleRequest


@contextlib.contextmanager
def in_processes(
    request: SampleRequest, blocks: Sequence[range], processes: int, threads: int, *, choose: bool
) -> Iterator[Iterator[SampleCost]]:
    """Yield the costs of tiles as they are made; process k of P makes blocks k, k + P, ...

    Raises, while the costs are read:
        E2EDiffError: The error of one of the processes.
        ResourceError: A process died without an error, for instance for lack of memory.
    """
    context = multiprocessing.get_context("spawn")
    started: dict[Connection, BaseProcess] = {}
    for k in range(processes):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=work,
            args=(_placed(request, k), list(blocks[k::processes]), threads, choose, theirs),
            daemon=True,
        )
        process.start()
        theirs.close()  # keep no copy, so that the pipe closes when the process ends
        started[ours] = process
    try:
        yield _costs(started, sum(map(len, blocks)))
    finally:
        for child in started.values():
            child.terminate()
            child.join()


def _placed(request: SampleRequest, k: int) -> SampleRequest:
    """Assign GPUs to the processes in turn."""
    if request.model.device == "cpu" or not torch.cuda.is_available():
        return request
    device = f"cuda:{k % torch.cuda.device_count()}"
    return attrs.evolve(request, model=attrs.evolve(request.model, device=device))


def _costs(started: dict[Connection, BaseProcess], images: int) -> Iterator[SampleCost]:
    while images > 0:
        for ready in wait(list(started)):
            assert isinstance(ready, Connection)
            try:
                found = ready.recv()
            except EOFError:
                child = started.pop(ready)
                child.join()
                if child.exitcode:
                    raise ResourceError(
                        f"a process that made images ended with code {child.exitcode}, perhaps "
                        "because memory ran out. Finished images are stored, and the same command "
                        "makes the others. Give fewer --processes or --rows."
                    ) from None
                continue
            if isinstance(found, E2EDiffError):
                raise found
            images -= found.images
            yield found


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
        with threads_for(attempt, report or quiet, model.device, fixed=fixed) as done:
            images, conditions = 0, Conditions(model.recipe, request.labels)
            for block in blocks:
                for cost in request.make(model, conditions, output, block):
                    yield cost
                    images += cost.images
                    done(images)


def work(
    request: SampleRequest, blocks: Sequence[range], threads: int, choose: bool, report: Connection
) -> None:
    """Make these blocks and report the cost of each, or what went wrong; runs in a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it and ends this one
    torch.set_num_threads(threads)
    with contextlib.suppress(BrokenPipeError):  # the parent process is gone
        try:
            model = request.model.load(warn=quiet)  # the first process has warned
            output = request.output(model)
            say = quiet if choose else None
            for cost in make_blocks(request, model, output, blocks, threads, say):
                report.send(cost)
        except E2EDiffError as error:
            report.send(error)
