"""The processes of one run: who they are, how they agree, and who reports when one fails.

A single process opens no process group, and every function here returns its argument.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from e2ediff.distributed.heartbeat import LIMIT, Heartbeat
from e2ediff.distributed.launch import join_limit
from e2ediff.distributed.signals import SIGNALS, exit_code_of
from e2ediff.errors import E2EDiffError, ResourceError
from e2ediff.store.storage import JSON

T = TypeVar("T", bound=JSON)

# Of a collective: `Heartbeat` ends a run that hangs long before, and never one that is alive.
_COLLECTIVE = timedelta(hours=24)
_ASKED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LAST = 2.0  # seconds for which the first process holds the store after it gave up
_GRACE = timedelta(seconds=10)  # for the process that reports a failure to finish


class ElsewhereError(E2EDiffError):
    """Another process of the run failed first and reports it; this one exits with its code."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.exit_code = code  # type: ignore[misc]


class World:
    """One process's view of all that train together.

    `rank` counts the `size` processes from 0, `local` those of this machine.
    Collectives run over gloo on the CPU, so that agreement never waits for a GPU.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, local: int = 0, store: Store | None = None
    ) -> None:
        self.rank = rank
        self.size = size
        self.local = local
        self._store = store
        self._reports = True
        self._heartbeat: Heartbeat | None = None

    @classmethod
    def join(cls) -> World:
        """Join the world described by the environment of `torchrun`; without it, a single process.

        Raises:
            ResourceError: The other processes cannot be reached, or did not come in two minutes.
        """
        if any(not os.environ.get(name) for name in _ASKED) or os.environ["WORLD_SIZE"] == "1":
            return cls()
        local = int(os.environ.get("LOCAL_RANK", "0"))
        cuda = torch.cuda.is_available() and local < torch.cuda.device_count()
        if cuda:
            torch.cuda.set_device(local)
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        try:
            world = cls._meet(rank, size, local)
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            dist.init_process_group(
                backend, store=world._store, rank=rank, world_size=size, timeout=_COLLECTIVE
            )
        except (RuntimeError, ValueError, OSError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise ResourceError(
                f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} cannot join the "
                f"others at {where}: {_first_line(error)}; check that address, or run without a "
                "launcher"
            ) from error
        return world

    @classmethod
    def _meet(cls, rank: int, size: int, local: int) -> World:
        """Wait until all processes have come, and begin to watch them."""
        limit, agent = timedelta(seconds=join_limit()), "TORCHELASTIC_USE_AGENT_STORE"
        held = os.environ.get(agent) == "True"  # by the launcher, otherwise by the first process
        tcp = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            size,
            is_master=rank == 0 and not held,
            timeout=limit,
            wait_for_workers=False,
            multi_tenant=True,
        )
        prefix = f"e2ediff/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        store = PrefixStore(prefix, tcp)
        limit_of_life = float(os.environ.get("_E2EDIFF_LIMIT", LIMIT))  # less in tests
        heartbeat = Heartbeat(tcp, prefix, rank, size, limit_of_life)
        store.set(f"came/{rank}", "")
        try:
            store.wait([f"came/{k}" for k in range(size)], limit)
        except RuntimeError as error:
            came = [k for k in range(size) if store.check([f"came/{k}"])]
            if rank == 0:
                time.sleep(_LAST)  # the others find out the same with its store
            lost = ", ".join(str(k) for k in range(size) if k not in came)
            raise ResourceError(
                f"of {size} processes {', '.join(map(str, came))} came within "
                f"{limit.seconds} seconds, and {lost} did not; see the output of those, and check "
                "that the same command runs on all machines"
            ) from error
        heartbeat.start()
        world = cls(rank, size, local, store)
        world._heartbeat = heartbeat
        return world

    def watch(self, folder: str | None, step: Callable[[], int]) -> None:
        """Say where stacks are written if the run hangs, and what returns the last step."""
        if self._heartbeat is not None:
            self._heartbeat.folder, self._heartbeat.step = folder, step

    def on_hang(self, report: Callable[[str], None]) -> None:
        """Have this called, in one process, with the error's text if the run hangs."""
        if self._heartbeat is not None:
            self._heartbeat.failed = report

    def long(self) -> contextlib.AbstractContextManager[None]:
        """Allow more time inside before this process is taken for one that hangs."""
        return self._heartbeat.long() if self._heartbeat else contextlib.nullcontext()

    def _beat(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.beat()

    @property
    def is_leader(self) -> bool:
        """Whether this is the first process: the one that writes files and reports progress."""
        return self.rank == 0

    # Agreeing

    def share(self, value: T) -> T:
        """Return the first process's value, in every process."""
        if self.size == 1:
            return value
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = torch.tensor([len(data)])
        self._beat()
        dist.broadcast(length, 0)
        data = data if self.is_leader else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, 0)
        self._beat()
        found: T = json.loads(bytes(data.tolist()))
        return found

    def on_leader(self, act: Callable[[], T]) -> T:
        """Run `act` in the first process alone; return its value, or raise its error, in all.

        Raises:
            E2EDiffError: What `act` raised.
        """
        if self.size == 1:
            return act()
        said: dict[str, Any] = {}
        error = None
        if self.is_leader:
            try:
                with self.long():
                    said = {"value": act()}
            except E2EDiffError as caught:
                error, said = caught, {"error": str(caught), "code": caught.exit_code}
        said = self.share(said)
        if error is not None:
            raise error
        if "error" in said:
            raise ElsewhereError(said["error"], said["code"])
        value: T = said["value"]
        return value

    def highest(self, value: int) -> int:
        """The largest of all processes' values."""
        return self._reduced(value, dist.ReduceOp.MAX)

    def lowest(self, value: int) -> int:
        """The smallest of all processes' values."""
        return self._reduced(value, dist.ReduceOp.MIN)

    def _reduced(self, value: int, how: dist.ReduceOp.RedOpType) -> int:
        if self.size == 1:
            return value
        held = torch.tensor([value])
        self._beat()
        dist.all_reduce(held, how)
        self._beat()
        return int(held)

    def total(self, value: Tensor) -> Tensor:
        """The sum of all processes' tensors, on the device that they lie on."""
        if self.size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    # Ending

    def attribute_error(self, error: BaseException) -> BaseException:
        """Return the error that a failed run reports: this one, or another process's behind it.

        The first process to fail publishes its error. In the others a collective then fails with
        an error that explains nothing, which is replaced by the published one.
        """
        if self.size == 1 or self._store is None or isinstance(error, ElsewhereError):
            self._reports = not isinstance(error, ElsewhereError)
            return error
        lost = is_broken_collective(error)
        if lost:
            with contextlib.suppress(RuntimeError):  # no process published an error
                self._store.wait(["failed"], timedelta(seconds=2))
            error = ResourceError(
                f"process {self.rank} of {self.size} lost another process of the run, which was "
                f"killed or ran out of memory ({_first_line(error)}). What was saved is intact: "
                "continue with --resume"
            )
        said = {"rank": self.rank, "code": exit_code_of(error), "text": str(error)}
        mine = json.dumps(said)
        try:
            first = self._store.compare_set("failed", "", mine).decode()
        except RuntimeError:
            return error  # the store died with its process: each process reports its own error
        if first == mine:
            return error
        said = json.loads(first)  # of another process, or of this one's heartbeat
        self._reports = False
        return ElsewhereError(said["text"], said["code"])

    def report_once(self, report: Callable[[], None]) -> None:
        """Call `report` in one process of a failed run; the others wait until it is done."""
        if self.size == 1 or self._store is None:
            report()
            return
        with contextlib.suppress(RuntimeError):  # its store is gone, or it has been waited for
            if not self._reports:
                self._store.wait(["said"], _GRACE)
        if self._reports:
            report()
            with contextlib.suppress(RuntimeError):
                self._store.set("said", "yes")

    def shutdown(self) -> None:
        """Wait for all and end the group; called by every process of a run that did not fail.

        A launcher terminates the others when one exits with a code other than 0; everything is
        written by now, and that signal would only replace the exit code.
        """
        if self.size > 1:
            self.share(None)
            if self._heartbeat is not None:
                self._heartbeat.stop()
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            dist.destroy_process_group()


def is_broken_collective(error: BaseException) -> bool:
    """Return whether a collective failed, which means that another process is gone."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error).lower()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
