"""Copy a run's tensors to host memory, so that training can go on while they are written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from e2ediff.distributed.tensors import whole

_SPARE = 1.2  # times the size of a copy that must be free before it is made

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
        self._held: dict[tuple[str, str], Tensor] = {}
        self._done: torch.cuda.Event | None = None
        self.fits = True
        self.size = 0

    def copy(self, files: Files, *, keep: bool) -> dict[str, dict[str, Tensor]]:
        """Return copies of all tensors, gathered where they are split.

        Tensors that are the same memory, such as tied weights, are so in the copy too.
        A collective call; processes without `keep` get no tensors.
        """
        self.size = sum(map(_bytes, files.values()))
        free = self._free()
        kept = sum(t.nbytes for t in self._held.values())
        self.fits = free is None or free + kept >= _SPARE * self.size
        if not self.fits:
            self._held.clear()
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
                    same[place] = self._copied(file, name, full)
                copies[file][name] = same[place]
        self._done = None
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()
        return copies

    def _copied(self, file: str, name: str, tensor: Tensor) -> Tensor:
        """Copy a tensor into the memory that it had in the last save."""
        held = self._held.get((file, name))
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            pinned = tensor.device.type == "cuda"
            held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            self._held[file, name] = held
        return held.copy_(tensor.detach(), non_blocking=True)

    def wait(self) -> None:
        """Wait until the device has made the copies."""
        if self._done is not None:
            self._done.synchronize()

    def release(self) -> None:
        """Free the memory once the copy is written, unless as much again is free."""
        free = self._free()
        if free is not None and free < self.size:
            self._held.clear()


def _is_dense(tensor: object) -> bool:
    return isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_meta


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values() if _is_dense(t))
