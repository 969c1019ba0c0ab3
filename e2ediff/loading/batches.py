"""Load batches as a function of the number of images seen.

The k-th image of a run, and whether it is mirrored, depend on the seed and k alone (`order`).
A run therefore resumes in the middle of an epoch with the image it would have seen next, for
any number of worker processes and of devices.

Shapes: B batch, C H W image.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from e2ediff.condition import ClassLabels, Condition, ConditionSpec, concatenate
from e2ediff.data import Batch, DataSource, ImageSpec, Sampling, from_pixels
from e2ediff.distributed.parent import follow, leave_signals_to_parent
from e2ediff.distributed.signals import blocked
from e2ediff.errors import DataError, ResourceError
from e2ediff.loading.bad_images import Skipped, newly_skipped
from e2ediff.loading.order import Order
from e2ediff.loading.shared_memory import divide, remedy, usable
from e2ediff.seeds import generator

__all__ = ["Order", "batches", "check_enough", "fixed_images", "order_of", "to_batch"]

_T = TypeVar("_T")
_CPU = torch.device("cpu")
_ALL = slice(None)
_print_traceback = Queue._on_queue_feeder_error  # type: ignore[attr-defined]


class _Item(NamedTuple):
    """A batch or a part of it, as bytes."""

    x: Tensor
    condition: Condition
    skipped: tuple[Skipped, ...]


class _Parts(Dataset[_Item | str]):
    """Item i is part i mod n of the batch of step i div n; copied to worker processes.

    `parts` are the rows of each of the n. An item that cannot be read is returned as its error
    message, since an exception from a worker process would arrive with a page of traceback.
    """

    def __init__(
        self,
        source: DataSource,
        conditioning: ConditionSpec,
        order: Order,
        batch: int,
        parts: Sequence[slice],
        *,
        flip: bool,
    ) -> None:
        self.source = source
        self.conditioning = conditioning
        self.order = order
        self.batch = batch
        self.parts = parts
        self.flip = flip

    def __getitem__(self, i: int) -> _Item | str:
        step, part = divmod(i, len(self.parts))
        rows = self.parts[part]
        indices, mirrored = self.order.seen(step * self.batch, self.batch)
        try:
            x, given = self.source.read(indices[rows])
            condition = self.conditioning.accept(given, "data")
        except DataError as error:
            return str(error)
        x = _flipped(x, mirrored[rows]) if self.flip else x
        return _Item(x, condition, newly_skipped(self.source))


def _flipped(x: Tensor, mirrored: Tensor) -> Tensor:
    """Flip those images of x (B, C, H, W) horizontally for which `mirrored` (B,), bool, is set."""
    pairs = zip(x, mirrored.tolist(), strict=True)
    return torch.stack([image.flip(-1) if flip else image for image, flip in pairs])


def to_batch(x: Tensor, condition: Condition, device: torch.device) -> Batch:
    """Move bytes (B, C, H, W) to the device, and convert them to a batch in [-1, 1] there."""
    x = x.to(device, non_blocking=True)
    return Batch(x=from_pixels(x), condition=condition.to(device, non_blocking=True))


def check_enough(source: DataSource, batch: int) -> None:
    """Refuse a source smaller than one batch.

    Raises:
        DataError: The source has fewer images than a batch.
    """
    if len(source) < batch:
        raise DataError(
            f"data: {len(source)} images are fewer than one batch of {batch}; lower `batch` or "
            "give more images"
        )


def order_of(source: DataSource, seed: int, sampling: Sampling = "natural") -> Order:
    """Return the order in which a run of this seed sees the images of a source."""
    labels = source.labels() if sampling == "class_balanced" else None
    return Order(len(source), seed, labels)


def batches(
    source: DataSource,
    image: ImageSpec,
    *,
    batch: int,
    seed: int,
    first: int,
    last: int,
    flip: bool,
    workers: int,
    device: torch.device,
    rows: slice = _ALL,
    microshards: int = 1,
    sampling: Sampling = "natural",
    report: Callable[[Sequence[Skipped], int], None] | None = None,
) -> Iterator[Batch]:
    """Yield the batches of the optimizer steps `first` to `last`, or these rows of each.

    Args:
        source: The images.
        image: Their shape, and the kind of their conditions.
        batch: Images in a whole batch.
        seed: The run's seed.
        first: First step.
        last: One past the last step.
        flip: Whether half of the images are flipped horizontally.
        workers: Number of worker processes; 0 reads in this process.
        device: Device of the batches; on CUDA copies overlap with computation.
        rows: Rows to read of each batch.
        microshards: Parts in which a batch is computed, of which workers read at most one at once.
        sampling: How often each class is shown.
        report: Called with images skipped for the first time, separately in each worker
            process, and the number of images in all batches up to theirs.

    Raises:
        DataError: The source is smaller than one batch, an image cannot be read, conditions
            are of another kind, or `sampling` needs classes that the source lacks.
        LostReaderError: A worker process died.
    """
    check_enough(source, batch)
    conditioning = image.conditioning
    if sampling == "class_balanced" and not isinstance(conditioning, ClassLabels):
        raise DataError(
            f"data.sampling: class_balanced needs class labels, and conditions are "
            f"{conditioning.title}; set sampling: natural"
        )
    order, own = order_of(source, seed, sampling), range(batch)[rows]
    division = divide(image, batch, microshards, usable(workers), batch // len(own))
    parts = [own[k : k + division.rows] for k in range(0, len(own), division.rows)]
    items = read(
        _Parts(
            source, conditioning, order, batch, [slice(p.start, p.stop, p.step) for p in parts],
            flip=flip,
        ),
        range(first * len(parts), last * len(parts)),
        workers,
        option="data.workers",
        ahead=division.ahead,
        needed=division.needed,
        pin_memory=device.type == "cuda",
    )  # fmt: skip
    read_so_far = range(batch * (first + 1), batch * (last + 1), batch)
    yield from _ahead(_joined(items, len(parts), len(own), read_so_far, report, device), device)


def _joined(
    items: Generator[_Item | str],
    parts: int,
    rows: int,
    read_so_far: Iterable[int],
    report: Callable[[Sequence[Skipped], int], None] | None,
    device: torch.device,
) -> Iterator[Batch]:
    """Join the parts of each batch, and move it to the device; `items` are closed at the end."""
    with contextlib.closing(items):
        for images in read_so_far:
            item = _join(islice(items, parts), rows, device)
            if item.skipped and report:
                report(item.skipped, images)
            yield to_batch(item.x, item.condition, device)


def _join(parts: Iterable[_Item | str], rows: int, device: torch.device) -> _Item:
    """Copy each part to its rows on the device as it comes, which frees shared memory."""
    whole: Tensor | None = None
    conditions, end = [], 0
    skipped: list[Skipped] = []
    for part in parts:
        if isinstance(part, str):
            raise DataError(part)
        if len(part.x) == rows:
            return part
        if whole is None:
            whole = part.x.new_empty((rows, *part.x.shape[1:]), device=device)
        start, end = end, end + len(part.x)
        whole[start:end].copy_(part.x, non_blocking=True)
        # Of a single condition this is a copy, also on the CPU.
        conditions.append(concatenate([part.condition.to(device, non_blocking=True)]))
        skipped.extend(part.skipped)
    assert whole is not None
    return _Item(whole, concatenate(conditions), tuple(skipped))


def _ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield batches; on CUDA the next one is copied to the device during work on this one."""
    if device.type != "cuda":
        yield from batches
        return
    copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start() -> Batch | None:
        with torch.cuda.stream(copies):
            return next(batches, None)

    batch = start()
    while batch is not None:
        current = torch.cuda.current_stream(device)
        current.wait_stream(copies)
        for tensor in (batch.x, *batch.condition.tensors().values()):
            tensor.record_stream(current)
        given, batch = batch, start()
        yield given


def read(
    items: Dataset[_T],
    indices: Sequence[int],
    workers: int,
    *,
    option: str,
    ahead: int = 2,
    needed: int = 0,
    pin_memory: bool = False,
) -> Generator[_T]:
    """Read these items in order, with at most as many worker processes as there are cores.

    Their number affects only the speed; with 0 items are read in this process, on demand.

    Args:
        items: What is read.
        indices: Which of them.
        workers: The number of processes.
        option: The option that sets it, for messages.
        ahead: Items that each process reads ahead.
        needed: Bytes of shared memory that they need, for messages; 0 if that is unknown.
        pin_memory: Whether the items are pinned, for copies to a GPU.

    Raises:
        LostReaderError: A worker process died, which is noticed within five seconds.
    """
    processes = min(usable(workers), len(indices))
    others = multiprocessing.active_children()
    handler = signal.getsignal(signal.SIGCHLD)
    started: list[BaseProcess] = []

    def order() -> Iterator[int]:
        # torch draws the first index once all workers are started and idle. By then
        # it has set a handler of SIGCHLD that raises wherever the main thread is when a worker
        # dies. Inside a queue that leaves a lock held, and the iterator's finalizer waits for it
        # for ever. Without the handler, the wait for the next item reports the worker.
        if processes:
            started.extend(p for p in multiprocessing.active_children() if p not in others)
        in_main = threading.current_thread() is threading.main_thread()
        if started and in_main and handler is not None:
            signal.signal(signal.SIGCHLD, handler)
        yield from indices

    loader: DataLoader[_T] = DataLoader(
        items,
        sampler=order(),
        batch_size=None,
        num_workers=processes,
        collate_fn=_as_it_is,  # torch's would look into every list and tuple for arrays
        prefetch_factor=ahead if processes else None,
        pin_memory=pin_memory,
        worker_init_fn=partial(
            _begin, os.getpid(), threading.current_thread() is threading.main_thread()
        ),
        # Drawing the workers' seed would advance the global generator.
        generator=torch.Generator(),
    )
    try:
        # A Ctrl-C that reaches a worker before `_begin` would end the worker, and the run with it.
        with blocked():
            reading = iter(loader)
        yield from reading
    except (RuntimeError, EOFError, OSError) as error:
        # Torch says so, or the memory of an item is fetched from a worker that is gone by now.
        told = str(error).startswith("DataLoader worker (pid")
        what = _cause(started, wait=not told) or (str(error) if told else "")
        _kill(started)
        if not what:
            raise
        raise _lost(what, option, needed) from error
    except GeneratorExit:
        raise  # the iterator is dropped, which ends them
    except BaseException:
        _kill(started)
        raise


def _kill(workers: Iterable[BaseProcess]) -> None:
    """End processes that may be at a long piece of work, and ignore SIGTERM.

    Whoever keeps an error keeps the iterator that would end them otherwise, and Python would wait
    for them for ever as it ends.
    """
    for process in workers:
        process.kill()


def _as_it_is(item: _T) -> _T:
    return item


def _begin(parent: int, by_kernel: bool, worker: int) -> None:
    """Use one thread in a worker, leave signals to the main process, and end with it."""
    torch.set_num_threads(1)
    # Python's own, which prints alone, drops the item; the main process would wait for ever.
    Queue._on_queue_feeder_error = staticmethod(_not_handed_over)  # type: ignore[attr-defined]
    leave_signals_to_parent()
    follow(parent, by_kernel=by_kernel)


def _not_handed_over(error: Exception, item: object) -> None:
    """End a worker that cannot hand over an item, with a code that says whether memory lacks."""
    if f"({errno.ENOSPC})" in str(error):  # torch gives the number in its text alone
        os._exit(errno.ENOSPC)
    _print_traceback(error, item)
    os._exit(1)


def _cause(workers: Sequence[BaseProcess], *, wait: bool) -> str:
    """Name the worker that died and of what; empty if there is none.

    `wait` gives one that is just ending a second for it.
    """
    if wait:
        ending = connection.wait([worker.sentinel for worker in workers], timeout=1.0)
        for worker in workers:
            if worker.sentinel in ending:
                worker.join()  # its files are closed, and in a moment it has an exit code
    for worker in workers:
        code, name = worker.exitcode or 0, f"DataLoader worker (pid {worker.pid})"
        if code == errno.ENOSPC:
            return f"{name}: {os.strerror(code)}"
        if code < 0:
            return f"{name} is killed by signal: {signal.strsignal(-code) or -code}"
        if code:
            return f"{name} exited with code {code}"
    return ""


class LostReaderError(ResourceError):
    """A worker process that reads images died."""


def _lost(what: str, option: str, needed: int) -> LostReaderError:
    """Return the error for a worker that died of `what`; `option` sets their number."""
    what = " ".join(what.split()).rstrip(".")
    if "Bus error" in what or os.strerror(errno.ENOSPC) in what:
        up_to = f"up to {needed / 1e6:,.0f} MB are needed; " if needed else ""
        why = (
            "the shared memory through which images are passed is full: "
            f"{up_to}{remedy(needed, option)}"
        )
    elif "Segmentation fault" in what or "Aborted" in what:
        why = f"with {option} 0 this process reads the images itself, which shows the bad one"
    else:
        why = (
            "the system kills processes when memory runs out, and each of these holds images: "
            f"lower {option}, or provide more memory"
        )
    return LostReaderError(f"a process that reads images died ({what}): {why}")


def fixed_images(
    source: DataSource,
    conditioning: ConditionSpec,
    count: int,
    seed: int,
    purpose: str,
    device: torch.device,
) -> Batch:
    """Return the same `count` images at every call, chosen by (seed, purpose); all if fewer."""
    g = generator(_CPU, seed, purpose)
    chosen: Sequence[int] = torch.randperm(len(source), generator=g)[:count].tolist()
    x, given = source.read(chosen)
    return to_batch(x, conditioning.accept(given, "data"), device)
