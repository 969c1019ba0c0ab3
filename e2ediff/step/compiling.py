"""Compile parts of a step, and recompute activations of blocks in the backward pass.

Neither changes the names of parameters. With both, each block is one compiled graph, which
includes the recomputation.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import attrs
import torch
from torch import Tensor, nn
from torch.fx import traceback
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from e2ediff.errors import E2EDiffError
from e2ediff.host.recipe import Recipe
from e2ediff.model.compiler import is_compiler_error, said_by
from e2ediff.step.one_graph import Losses, OneGraph, Tracing
from e2ediff.step.step import Step

Extent = Literal["off", "blocks", "step"]
"""How much of a step is compiled."""


class Compilation:
    """What of a step is compiled, which may change between two steps.

    `kind` says what; with `again` the activations of the trained blocks are recomputed, too.
    """

    def __init__(self, step: Step, *, again: bool) -> None:
        self.kind: Extent = "off"
        self._step, self._again = step, again
        self._trained = [*step.nets.online.blocks()]
        self._blocks = [*self._trained, *step.nets.target.blocks()]
        self._before = [(m, vars(m).get("forward")) for m in (step, *self._trained)]
        self.use("off")

    def use(self, kind: Extent) -> None:
        """Compile this when it is next called, and nothing else."""
        for module, forward in self._before:
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward
        for block in self._blocks:
            block._compiled_call_impl = None  # what `compile` sets
        tracing = Tracing()
        if self._again:
            recompute(self._trained, compiled=kind == "blocks", tracing=tracing)
        if kind == "blocks":
            compile_blocks(self._step, self._blocks)
        elif kind == "step":
            compile_step(self._step, tracing)
        self.kind = kind

    def disabled(self) -> contextlib.AbstractContextManager[object]:
        """Disable compilation inside the block, for sizes that no step has."""
        if self.kind == "off":
            return contextlib.nullcontext()  # the line below imports the compiler
        stance: contextlib.AbstractContextManager[object] = torch.compiler.set_stance(
            "force_eager"
        )
        return stance


def recompute(
    blocks: Sequence[nn.Module], *, compiled: bool = False, tracing: Tracing | None = None
) -> None:
    """Recompute the activations of blocks in the backward pass.

    `compiled` means that the blocks are compiled afterwards. The compiler then takes `checkpoint`
    and the block in it as one; a block that it cannot trace as a whole is compiled in pieces, and
    the `checkpoint` around it is not.
    `tracing` says when a whole step is traced; its graph then has marks in place of `checkpoint`.
    """
    tracing = tracing or Tracing()
    for block in blocks:
        forward = block.forward
        block.forward = _again(torch.compile(forward) if compiled else forward, tracing)


def _again(forward: Callable[..., Tensor], tracing: Tracing) -> Callable[..., Tensor]:
    # A function of its own: torch never compiles `checkpoint` by itself, nor a partial of it.
    def again(*args: Any, **options: Any) -> Tensor:
        if tracing.active:
            return _marked(forward, *args, **options)
        out: Tensor = checkpoint(forward, *args, use_reentrant=False, **options)
        return out

    return again


_CALLS = itertools.count()


def _marked(forward: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    """Trace a block with the mark by which the compiler knows what to compute again.

    What `checkpoint` does would be traced as equal operations, of which the compiler keeps one.
    """
    mark = torch.fx.Graph().placeholder("block")
    mark.meta = {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": next(_CALLS)}
    with traceback.preserve_node_meta(), traceback.set_current_meta(mark):
        return forward(*args, **options)


def compile_blocks(step: Step, blocks: Sequence[nn.Module]) -> None:
    """Compile blocks when they are first called, each as a whole, also under DDP."""
    for block in blocks:
        block.compile()
    step.forward = _whole_under_ddp(step.forward)  # type: ignore[method-assign]


def compile_step(step: Step, tracing: Tracing, **options: Any) -> None:
    """Compile a step as one graph for each phase and shape when it is first called.

    `options` are those of `torch.compile`.
    """
    step.forward = _whole_under_ddp(OneGraph(step, tracing, **options))  # type: ignore[method-assign]


def _whole_under_ddp(forward: Callable[..., Losses]) -> Callable[..., Losses]:
    # Under DDP the compiler would cut every graph where a bucket of gradients is full, the first
    # at 1 MB. In a whole network that sends gradients early; within a block it prevents fusion.
    whole: Callable[..., Losses] = torch._dynamo.config.patch(optimize_ddp=False)(forward)
    return whole


def compile_failure(recipe: Recipe, error: BaseException) -> str:
    """Describe an error of the compiler, and what to set; "" for any other error."""
    if recipe.compile == "off" or isinstance(error, E2EDiffError) or not is_compiler_error(error):
        return ""
    other = "blocks" if recipe.compile == "step" else "off"
    return (
        f"compile: {recipe.compile}: the compiler failed: {said_by(error)}. What was saved is "
        f"intact; set `compile: {other}`, or TORCHDYNAMO_VERBOSE=1 to see more"
    )


@attrs.frozen
class Compiled:
    """What the compiler did: graphs, places where it gave up within a function, and seconds.

    `reasons` say why functions were compiled again that had a graph already.
    """

    graphs: int
    breaks: int
    seconds: float
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        """Return it as a sentence."""
        text = f"compiled {self.graphs} graph{'s' * (self.graphs != 1)} in {self.seconds:.1f} s"
        return text + (f", with {self.breaks} breaks" if self.breaks else "")


class CompileLog:
    """Tells what the compiler has done in this process since it was asked last."""

    def __init__(self) -> None:
        self._graphs, self._breaks = _counts()
        self._known = torch._dynamo.utils.get_compilation_metrics()

    def new(self) -> Compiled | None:
        """Return what was compiled since the last call; None if nothing was."""
        graphs, breaks = _counts()
        if (graphs, breaks) == (self._graphs, self._breaks):
            return None
        known, before = torch._dynamo.utils.get_compilation_metrics(), set(map(id, self._known))
        fresh = [m for m in known if id(m) not in before]
        made = Compiled(
            graphs - self._graphs,
            breaks - self._breaks,
            sum((m.duration_us or 0) for m in fresh) / 1e6,
            tuple(filter(None, (getattr(m, "recompile_reason", None) for m in fresh))),
        )
        self._graphs, self._breaks, self._known = graphs, breaks, known
        return made


def _counts() -> tuple[int, int]:
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
