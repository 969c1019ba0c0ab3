"""Copy a run's tensors to host memory, so that training can go on while they are written."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from e2ediff.distributed.background import Background
from e2ediff.distributed.tensors import whole

_SPARE = 1.2  # times the size of a copy that must be free before it is made
_CHUNK = 1 << 28  # bytes
_ALIGNED = 64  # bytes
_PIECE = 1 << 24  # bytes that are asked of the system before it is seen whether to stop

Files = Mapping[str, Mapping[str, Tensor]]


def free_memory() -> int | None:
    """Return the bytes of memory that this process may still use; None if unknown."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = Path("/proc/meminfo").read_text()
        found.append(int(text.partition("MemAvailable:")[2].split()[0]) * 1024)
    with contextlib.suppress(OSError, ValueError, IndexError):  # the limit of a container
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        text = (group / "memory.stat").read_text()
        cached = int(text.partition("inactive_file ")[2].split()[0])
        found.append(limit - used + cached)
    return min(found, default=None)


class _Room:
    """Host memory for many tensors, in chunks that are kept.

    Torch rounds each piece of pinned memory up to a power of two, which for tensors of their own
    would be a third more than they need, and asks the driver for each.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._chunks: list[Tensor] = []
        self._chunk = self._used = self.given = self._most = 0

    def begin(self, total: int) -> None:
        """Give out all of it again, from the beginning, to tensors of so many bytes together."""
        self._chunk = self._used = self.given = 0
        self._most = min(_CHUNK, total)

    def clear(self) -> None:
        """Free it; what was given out stays until it is dropped."""
        self._chunks.clear()
        self.begin(0)

    def touch(self, pulse: Callable[[], None]) -> None:
        """Write into every page, so that the system provides it now; call `pulse` often."""
        for chunk in [*self._chunks]:
            for start in range(0, len(chunk), _PIECE):
                pulse()
                chunk[start : start + _PIECE : mmap.PAGESIZE].zero_()

    def like(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the host of the type and shape of another one.

        `given` is the number of bytes that were given out since the beginning.
        """
        size = _bytes(tensor)
        if not size:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        while self._chunk < len(self._chunks):
            chunk = self._chunks[self._chunk]
            if self._used + size <= len(chunk):
                start, self._used = self._used, self._used + _aligned(size)
                self.given += size
                return chunk[start : start + size].view(tensor.dtype).view(tensor.shape)
            self._chunk, self._used = self._chunk + 1, 0
        needed = max(size, self._most)
        self._chunks.append(torch.empty(needed, dtype=torch.uint8, pin_memory=self._pinned))
        return self.like(tensor)


class Staging:
    """Host memory for one copy of a checkpoint, which later steps cannot change.

    On CUDA the memory is pinned and copies are asynchronous: call `wait` before reading them, in
    any thread.
    The memory is kept for the next save if as much again is free; `release` decides. Where the
    copy would not fit into free memory there is none (`fits` is False): tensors are returned as
    they are, and must be written before the next step.
    """

    def __init__(self, free: Callable[[], int | None] = free_memory) -> None:
        self._free = free
        self._rooms = {pinned: _Room(pinned=pinned) for pinned in (False, True)}
        self._done: torch.cuda.Event | None = None
        self._touching: Background[None] | None = None
        self.fits = True
        self.size = 0

    def prepare(self, files: Files) -> None:
        """Ask the system for the memory of a copy of what lies on the CPU, in a thread.

        At 4 GB that takes seconds, which the first copy would take otherwise. Does nothing for
        little memory, and where not as much again would be free.
        """
        held = [t for tensors in files.values() for t in _dense(tensors) if t.device.type == "cpu"]
        given = {(t.data_ptr(), t.shape) if type(t) is Tensor else id(t): t for t in held}
        sizes = [_bytes(t) for t in given.values()]
        free = self._free()
        if sum(sizes) < _CHUNK or (free is not None and free < 2 * sum(sizes)):
            return
        room = self._rooms[False]
        room.begin(sum(map(_aligned, sizes)))
        for tensor in given.values():
            room.like(tensor)
        self._touching = Background()
        self._touching.start(room.touch)

    @property
    def touching(self) -> bool:
        """Return whether a thread is asking for memory."""
        return self._touching is not None and not self._touching.ended

    def settle(self) -> None:
        """Wait until the memory that was asked for is there."""
        if self._touching is not None:
            self._touching.result()
            self._touching = None

    def abandon(self) -> None:
        """Ask for no more memory, as the run ends."""
        if self._touching is not None:
            self._touching.abandon()
            self._touching = None
            self._rooms[False].clear()  # the thread may still write to what it has

    def copy(self, files: Files, *, keep: bool) -> dict[str, dict[str, Tensor]]:
        """Return copies of all tensors, gathered where they are split.

        Tensors that are the same memory, such as tied weights, are so in the copy too.
        A collective call; processes without `keep` get no tensors.
        """
        self.settle()
        sizes = [_bytes(t) for tensors in files.values() for t in _dense(tensors)]
        self.size, aligned = sum(sizes), sum(map(_aligned, sizes))
        free = self._free()
        kept = sum(room.given for room in self._rooms.values())
        self.fits = free is None or free + kept >= _SPARE * self.size
        for room in self._rooms.values():
            room.begin(aligned) if self.fits else room.clear()
        copies: dict[str, dict[str, Tensor]] = {}
        same: dict[object, Tensor] = {}
        for file, tensors in files.items():
            copies[file] = {}
            for name, tensor in tensors.items():
                full = whole(tensor)
                if not keep:
                    continue
                if not self.fits or not _is_dense(full):  # the latter are refused by the save
                    copies[file][name] = full if full is tensor else full.cpu()
                    continue
                place: object = (file, name)
                if full is tensor and full.numel():  # gathered ones lie at one place in turn
                    place = (full.data_ptr(), full.device, full.dtype, full.shape, full.stride())
                if place not in same:
                    held = self._rooms[full.device.type == "cuda"].like(full)
                    same[place] = held.copy_(full.detach(), non_blocking=True)
                copies[file][name] = same[place]
        self._done = None
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()
        return copies

    def wait(self) -> None:
        """Wait until the device has made the copies."""
        if self._done is not None:
            self._done.synchronize()

    def release(self) -> None:
        """Free the memory once the copy is written, unless as much again is free."""
        free = self._free()
        if free is not None and free < self.size:
            for room in self._rooms.values():
                room.clear()


def _is_dense(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta


def _dense(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    return [tensor for tensor in tensors.values() if _is_dense(tensor)]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _aligned(size: int) -> int:
    return size + -size % _ALIGNED
