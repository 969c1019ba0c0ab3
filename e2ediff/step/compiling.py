"""Compile parts of a step, and recompute activations of blocks in the backward pass.

Neither changes the names of parameters. With both, each block is one compiled graph, which
includes the recomputation.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from e2ediff.host.recipe import Recipe
from e2ediff.step.step import Step


def recompute(blocks: Sequence[nn.Module], *, compiled: bool = False) -> None:
    """Recompute the activations of blocks in the backward pass.

    `compiled` means that the blocks, or a step around them, are compiled afterwards. The compiler
    then takes `checkpoint` and the block in it as one; a block that it cannot trace as a whole is
    compiled in pieces, and the `checkpoint` around it is not.
    """
    for block in blocks:
        forward = block.forward
        block.forward = _again(torch.compile(forward) if compiled else forward)


def _again(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # A function of its own: torch never compiles `checkpoint` by itself, nor a partial of it.
    def again(*args: Any, **options: Any) -> Tensor:
        out: Tensor = checkpoint(forward, *args, use_reentrant=False, **options)
        return out

    return again


def compile_blocks(step: Step, blocks: Sequence[nn.Module]) -> None:
    """Compile blocks when they are first called, each as a whole, also under DDP."""
    for block in blocks:
        block.compile()
    # Under DDP the compiler would cut every block where a bucket of gradients is full, the first
    # at 1 MB. In a whole network that sends gradients early; within a block it prevents fusion.
    whole = torch._dynamo.config.patch(optimize_ddp=False)
    step.forward = whole(step.forward)  # type: ignore[method-assign]


def compile_step(step: Step) -> None:
    """Compile what can be traced of a step when it is first called.

    Code that reads values or uses generators cannot be traced; it runs uncompiled in between.
    """
    step.terms = untraced()(torch.compile(step.terms))  # type: ignore[method-assign]


@contextlib.contextmanager
def untraced(*, allowed: bool = True) -> Iterator[None]:
    """Run code that cannot be traced uncompiled inside the block; unless `allowed`, raise.

    torch._dynamo logs none of it, as a step has many such places, all of them known.
    """
    logger = logging.getLogger("torch._dynamo")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with torch._dynamo.config.patch(suppress_errors=allowed):
            yield
    finally:
        logger.setLevel(level)


def uncompiled(recipe: Recipe) -> contextlib.AbstractContextManager[object]:
    """Disable a recipe's compilation inside the block, for sizes that no step has."""
    if recipe.compile == "off":
        return contextlib.nullcontext()  # the line below imports the compiler
    stance: contextlib.AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance
