"""Make a set of images, or the missing part of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import attrs
import torch

from e2ediff.host.plugins import Host
from e2ediff.sample.request import SampleCost, SampleRequest
from e2ediff.sample.set_record import (
    FOLDERS,
    check_space,
    describe,
    finish,
    own_place,
    prepare,
)
from e2ediff.sample.workers import make_blocks, make_in_processes
from e2ediff.train.progress import duration


def make_set(
    request: SampleRequest,
    host: Host,
    *,
    processes: int = 1,
    threads: int | None = None,
    choose_threads: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None],
    update: Callable[[str], None],
) -> str:
    """Make the missing part of a set of images; return the address of the finished set.

    Args:
        request: The set; without `out` it is stored in a directory of its own inside the run.
        host: Knows the parts.
        processes: Number of processes, each with a copy of the model.
        threads: CPU threads of each; by default the machine's, shared among them.
        choose_threads: Time one thread and all of them, and use whichever is faster.
        overwrite: Replace a different set at that address.
        say: Called with a line for each damaged checkpoint, and with what was found.
        update: Called with progress.

    Raises:
        E2EDiffError: Whatever is wrong with the run, the options, the place or the machine.
            What is stored already stays, and the same command continues from there.
    """
    threads = threads or max(1, torch.get_num_threads() // processes)
    taken: int | None = threads  # None where each of several processes chooses its own number
    model = request.model.load(host, say)
    assert model.origin is not None
    # A run that is still training must not give its processes different checkpoints.
    ref = attrs.evolve(request.model, checkpoint=model.origin.checkpoint)
    request = attrs.evolve(request, model=ref)
    spec = describe(request, model, host)
    if not request.out:
        request = attrs.evolve(request, out=own_place(ref.run, request.seed, spec))
    output = request.output(model)
    prepare(output.store, spec, overwrite=overwrite)
    blocks = request.missing(output)
    todo, n = sum(map(len, blocks)), len(request.labels)
    check_space(output.store, output.bytes_needed(todo))
    if todo < n:
        say(f"{output.store.where()}: {n - todo} of {n} images are there already")
    began, since, cost = time.monotonic(), time.time(), SampleCost()
    workers: AbstractContextManager[Iterator[SampleCost]]
    if processes > 1 and len(blocks) > 1:
        workers = make_in_processes(
            request, blocks, min(processes, len(blocks)), threads, choose=choose_threads
        )
        taken = None if choose_threads else threads
    else:
        report = say if choose_threads else None
        workers = nullcontext(make_blocks(request, model, output, blocks, threads, report))
    with workers as costs:
        for one in costs:
            cost += one
            if processes == 1:
                taken = torch.get_num_threads()
            update(_line(n - todo + cost.images, n, cost.images, time.monotonic() - began))
    for folder in ("", *FOLDERS):
        output.store.sweep(folder, lambda name: True, before=since)
    seconds = time.monotonic() - began
    return finish(request, output, spec, cost, seconds, taken, model.image)


def _line(done: int, total: int, made: int, seconds: float) -> str:
    rate = made / max(seconds, 1e-9)
    return f"{done}/{total} images  {rate:.1f} img/s  left {duration((total - done) / rate)}"
