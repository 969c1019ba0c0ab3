"""What torch.compile works on, and blocks that are computed again in the backward pass.

Both leave the names of parameters as they are, and both together are one graph a block, which
holds what is computed again.
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
    """Have blocks compute their activations again in the backward pass.

    With `compiled` a block, or a step around it, is to be compiled afterwards. The compiler then
    takes `checkpoint` and the block in it as one; a block that it cannot trace as a whole is
    compiled in pieces within a `checkpoint` that is not.
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
    """Have blocks compiled when they are first called, each as a whole, under DDP too."""
    for block in blocks:
        block.compile()
    # Under DDP the compiler would cut every block where a bucket of gradients is full, the first
    # at 1 MB: for a whole network that sends gradients early, within a block it undoes fusion.
    whole = torch._dynamo.config.patch(optimize_ddp=False)
    step.forward = whole(step.forward)  # type: ignore[method-assign]


def compile_step(step: Step) -> None:
    """Have as much of a step compiled as can be traced, when it is first called.

    Values and generators cannot be traced: they run as they are, between compiled pieces.
    """
    step.terms = untraced()(torch.compile(step.terms))  # type: ignore[method-assign]


@contextlib.contextmanager
def untraced(*, allowed: bool = True) -> Iterator[None]:
    """In here, and nowhere else, what cannot be traced runs as it is; or is an error.

    torch._dynamo logs nothing of it here: a step has many such places, all of them known.
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
    """What a recipe compiles runs as it is written in here, at sizes that no step has."""
    if recipe.compile == "off":
        return contextlib.nullcontext()  # the other imports the compiler
    stance: contextlib.AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance
