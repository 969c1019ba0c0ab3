"""Options that several commands share, each defined once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

_MODEL = (
    "run", "weights", "checkpoint", "device", "overrides", "rows", "precision", "compile", "trust",
)  # fmt: skip


weights = click.option(
    "--weights",
    help="online, target, an average's name, or a width as ema:0.08. Default: for sampling.",
)
checkpoint = click.option("--checkpoint", help="Name of a checkpoint. Default: the newest.")
_device = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")


def overrides(help_: str = "As for `run`.") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return the option `--set`, which a command receives as `overrides`."""
    return click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help=help_)


trust = click.option(
    "--trust",
    is_flag=True,
    help="Open the networks that the recipe of a RUN names which you did not make here.",
)


threads_text = functools.partial(
    click.option,
    "--threads",
    default="auto",
    show_default=True,
    metavar="N|auto",
    help="CPU threads of each process; auto: one or all, whichever is faster by timing.",
)
"""The option `--threads` as text, for commands that start further processes."""


def _prepare(context: click.Context, parameter: click.Parameter, value: str) -> int | None:
    from e2ediff.distributed.openmp import prepare_threads

    return prepare_threads(value)


threads = threads_text(callback=_prepare)
"""The option `--threads`, applied before the command imports torch; None is `auto`."""

seed = click.option("--seed", type=click.IntRange(0), default=0, show_default=True)

judge = click.option(
    "--judge",
    metavar="FIGURE",
    help="The verdict's figure, as report.json names it. Default: a distance of samples, or PSNR.",
)


def processes(help_: str | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return the option `--processes`, the number of processes that compute."""
    return click.option(
        "--processes", type=click.IntRange(1), default=1, show_default=True, help=help_
    )


def model(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add options for what is loaded from a run, the command's argument `run`.

    The command receives them and its options `overrides`, `rows`, `precision` and `compile`, if it
    has any, as `ref`, a `ModelRef`.
    """

    @functools.wraps(command)
    def with_reference(**given: Any) -> Any:
        from e2ediff.sample.load import ModelRef

        own = {name: given.pop(name) for name in _MODEL if name in given}
        return command(ref=ModelRef(**own), **given)

    for option in (trust, _device, checkpoint, weights):
        option(with_reference)
    return with_reference
