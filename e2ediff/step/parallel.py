"""Compute the training step in several processes with DDP or FSDP2, or in one.

A step's gradient is the sum over its micro-shards of grad(loss / micro-shards).
Each process accumulates its own micro-shards in order; then the processes' sums are added.
Two processes with one micro-shard each therefore add the same two numbers as one process with
two micro-shards, and addition of two numbers commutes: every bit is the same.
More terms are added in another order, which changes the last bits.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import attrs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from e2ediff.data import Batch
from e2ediff.distributed.world import World
from e2ediff.errors import PluginError, Problem, RecipeError
from e2ediff.host.recipe import Recipe
from e2ediff.objective import Draw
from e2ediff.step.sharding import shard, sharded
from e2ediff.step.step import Step

Kind = Literal["one", "ddp", "fsdp2"]


def check_shares(recipe: Recipe, world: World, source: str) -> None:
    """Refuse micro-shards that the processes cannot share equally, and a split whole step.

    Raises:
        RecipeError: They cannot, and the error proposes a number that they can; or the step is to
            be one graph although its weights are gathered block by block.
    """
    if world.size > 1 and recipe.parallel == "fsdp2" and recipe.compile == "step":
        what = "step makes one graph, in the middle of which FSDP2 cannot gather blocks' weights."
        hint = "Set compile: blocks, or parallel: ddp."
        raise RecipeError(source, [Problem("compile", what, hint=hint)])
    shards, size = recipe.microshards, world.size
    if shards % size == 0:
        return
    multiples = range(size, recipe.batch + 1, size)
    fits = [n for n in multiples if recipe.batch % n == 0]
    better = next((n for n in fits if n >= shards), fits[-1] if fits else None)
    if better is not None:
        hint = f"Set microshards: {better}, or use a number of processes that divides {shards}."
    else:
        up = -(-recipe.batch // size) * size
        hint = f"Use fewer processes, or set batch: {up} and microshards: {size}."
    what = (
        f"{size} processes cannot share {shards} micro-shard{'s' * (shards > 1)} of a batch of "
        f"{recipe.batch} images equally."
    )
    raise RecipeError(source, [Problem("microshards", what, hint=hint)])


@attrs.frozen(eq=False)
class Piece:
    """Images that are computed at once, a micro-shard or a part of one, and their randomness.

    `divisor` is the number of images of the step divided by theirs.
    `last` means that the processes' gradients are summed after this piece.
    """

    batch: Batch
    draw: Draw
    divisor: float
    last: bool


class Parallel:
    """The step, spread over the processes of a run.

    DDP sums the gradients of the parameters that got one in a rehearsal, if these are the same in
    every step, which is checked. Otherwise it `searches` the graph of every step for unused ones.
    """

    def __init__(self, step: Step, kind: Kind, world: World, device: torch.device) -> None:
        self.step = step
        self.kind = kind
        self.world = world
        self._ddp: DistributedDataParallel | None = None
        self.searches = True
        self._left_out: dict[str, nn.Parameter] = {}
        self._summed = False
        if kind == "fsdp2":
            shard(step, world, device)
        self._trained = {n: p for n, p in step.named_parameters() if p.requires_grad}
        self._rehearsed = dict.fromkeys(self._trained, False)  # whether it got a gradient

    def backward(
        self, piece: Piece, phase: str
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Add the gradients of the loss of some images, divided by their divisor, to those held.

        Under DDP call `wrap` before.

        Returns:
            The weighted loss, the loss terms and further figures of these images, without
            gradients.

        Raises:
            PluginError: Other parameters got gradients than in the rehearsal.
        """
        divisor = piece.divisor
        if self.kind == "fsdp2":
            sharded(self.step).set_requires_gradient_sync(piece.last)
            divisor /= self.world.size  # FSDP2 averages over the processes
        assert (self.kind == "ddp") == (self._ddp is not None), "not wrapped"
        module: nn.Module = self._ddp or self.step
        silent = self._ddp is not None and not piece.last
        self._summed = False
        with self._ddp.no_sync() if silent and self._ddp else contextlib.nullcontext():
            total, losses, info = module(piece.batch, piece.draw, phase)
            part = total if divisor == 1 else total / divisor
            with warnings.catch_warnings() if self._ddp else contextlib.nullcontext():
                # In a phase that uses every parameter, DDP advises against the search for others.
                if self._ddp:
                    warnings.filterwarnings("ignore", message="find_unused_parameters=True was")
                part.backward()
        if piece.last and not self.searches:
            self._check_sums()
        return total.detach(), losses, info

    def rehearse(self, piece: Piece, phase: str) -> None:
        """Run forward and backward on some images to measure memory or time; nothing changes."""
        unwrapped = self.kind == "ddp" and self._ddp is None
        # The buckets in which DDP will hold gradients are in memory during a whole step.
        buckets = [torch.empty_like(p) for p in self._trained.values() if unwrapped]
        with self._kept():
            total, _, _ = self.step(piece.batch, piece.draw, phase)
            total.backward()
            self._rehearsed = {n: p.grad is not None for n, p in self._trained.items()}
        del buckets

    def wrap(self, piece: Piece, phase: str) -> None:
        """Let DDP sum gradients from now on, as a rehearsal has shown it; a collective call.

        Runs forward and backward on some images; nothing changes.
        """
        if self.kind != "ddp" or self._ddp is not None:
            return
        used = self.world.total(torch.tensor([*self._rehearsed.values()]).int()).tolist()
        objective = self.step.objective
        fixed = objective.declares_static_graph and len(objective.phases) == 1
        self.searches = not fixed or not set(used) <= {0, self.world.size}
        if not self.searches:
            pairs = zip(self._trained.items(), used, strict=True)
            self._left_out = dict(pair for pair, count in pairs if not count)
        # Statistics in buffers belong to one set of weights and are calibrated, not averaged.
        known = inspect.signature(DistributedDataParallel).parameters
        buffers = next(k for k in ("forward_sync_buffers", "broadcast_buffers") if k in known)
        options: dict[str, Any] = {buffers: False}  # torch renamed it in 2.14
        for p in self._left_out.values():
            p.requires_grad = False  # DDP waits for the gradients of all others
        self._ddp = DistributedDataParallel(
            self.step,
            find_unused_parameters=self.searches,
            gradient_as_bucket_view=True,
            **options,
        )
        for p in self._left_out.values():
            p.requires_grad = True
        self._ddp.register_comm_hook(None, self._sum)
        if not self.searches:
            # In its first pass DDP finds the order in which gradients come, and sorts its buckets
            # by it: the order of additions, and with it the last bits of more than two processes,
            # would be another one in the first step of a run and of each continuation.
            with self._kept():
                total, _, _ = self._ddp(piece.batch, piece.draw, phase)
                total.backward()

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """Restore randomness and buffers after a pass, and drop its gradients."""
        buffers = [(buffer, buffer.clone()) for buffer in self.step.buffers()]
        try:
            with torch.random.fork_rng():
                yield
        finally:
            self.step.zero_grad(set_to_none=True)
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)

    # Without types: DDP compares annotations with classes, and here they are text.
    def _sum(self, state, bucket):  # type: ignore[no-untyped-def]
        """Add a bucket of gradients over the processes; DDP's own hook divides by their number."""
        self._summed = bucket.is_last()  # they come in order, each when it is full
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        assert work is not None
        return work.get_future().then(lambda done: done.value()[0])

    def _check_sums(self) -> None:
        """Refuse a step of which a gradient was not added over the processes.

        Raises:
            PluginError: There is one. Others of this step may wait for this process; its end
                ends them.
        """
        late = [name for name, p in self._left_out.items() if p.grad is not None]
        if self._summed and not late:
            return
        missed = [
            name
            for name, p in self._trained.items()
            if p.grad is None and name not in self._left_out
        ]
        named = ", ".join((late or missed)[:3]) or "a parameter"
        what = "a gradient, and none" if late else "no gradient, and one"
        kind = type(self.step.objective).__name__
        raise PluginError(
            f"objective {kind}: {named} got {what} when the run began; take `static_graph = True` "
            f"out of the class {kind}, so that DDP looks for unused parameters in every step, or "
            "let every step use the same ones"
        )

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Gather split weights, so that networks may be called in any way; a collective call."""
        if self.kind != "fsdp2":
            yield
            return
        root = sharded(self.step)
        self.step.gather()  # the first forward call makes it the root of all shards
        root.unshard()  # all but the blocks, which gather themselves when they are called
        root.set_reshard_after_backward(False, recurse=False)
        try:
            yield
        finally:
            root.set_reshard_after_backward(True, recurse=False)
            root.reshard()
