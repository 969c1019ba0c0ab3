"""Guidance: what wraps a denoiser into a guided one, and the networks that it asks besides.

Shapes: B batch, N latent tokens, D latent channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

from e2ediff import addresses
from e2ediff.condition import Condition, concatenate
from e2ediff.denoiser import Denoiser
from e2ediff.interpolant import Estimate
from e2ediff.sampler import Sampler


@attrs.frozen(kw_only=True)
class Reference:
    """Weights outside of the network that is sampled: a run, its checkpoint, one set of weights.

    Empty strings stand for the run that is sampled, its newest checkpoint, and the weights that
    are used for sampling by default.
    """

    run: str = attrs.field(default="", converter=addresses.plain)
    checkpoint: str = ""
    weights: str = ""


class Guidance(ABC):
    """The recipe's `guidance:` block: wraps a denoiser into a guided one."""

    @property
    def references(self) -> tuple[Reference, ...]:
        """Other networks that it evaluates, which the caller loads for `with_references`."""
        return ()

    @property
    def asks_null(self) -> bool:
        """Whether it needs the answer without a condition, which `label_drop` teaches."""
        return False

    def with_references(self, others: Mapping[Reference, Denoiser]) -> Guidance:
        """Return this guidance with the denoisers of its `references`."""
        return self

    def problems(self, sampler: Sampler) -> Sequence[tuple[str, str]]:
        """List options that do not work with this sampler: (field, what and what to do).

        Asked when a recipe is checked and before anything is sampled.
        """
        return ()

    @abstractmethod
    def wrap(self, inner: Denoiser) -> Denoiser:
        """Return the guided denoiser; `inner` itself where the guidance changes nothing.

        It is called with conditions, whose `null()` asks for the answer without them.
        """


class GuidedDenoiser(Denoiser):
    """A denoiser on the interpolant of the one that it evaluates, `inner`.

    A subclass defines `__call__`, and `for_step` too, which must wrap `inner.for_step`, as inner
    guidance may depend on the step.
    """

    def __init__(self, inner: Denoiser) -> None:
        self.inner = inner
        self.path = inner.path

    def clean(self, x0: Tensor, z_t: Tensor, t: float) -> Estimate:
        """Return the estimate whose clean latent is x0 (B, N, D)."""
        return self.path.estimate(x0, z_t, t, "x0")


def in_interval(t: float, t_min: float, t_max: float, *, exclusive: bool) -> bool:
    """Return whether t lies between the two times; `exclusive` leaves them out, but for 0.

    Grids of round numbers of steps have times exactly at round ends, so that an end counts for a
    step in 50 or so.

    Source: `exclusive` is the rule of JiT's and UNITE's released code.
    """
    if not exclusive:
        return t_min <= t <= t_max
    return (t_min < t or t_min == 0) and t < t_max


def check_interval(t_min: float, t_max: float, *, exclusive: bool) -> None:
    """Refuse an interval that holds no time, by the rule of `in_interval`.

    Raises:
        ValueError: `t_max` is too small; the text is fit for a part's validator.
    """
    if t_max < t_min or (exclusive and t_max == t_min):
        least = f"{'>' if exclusive else '>='} t_min, {t_min:g}"
        raise ValueError(f"'t_max' must be {least}, or no time is guided: {t_max:g}")


def conditional_and_unconditional(
    inner: Denoiser, z_t: Tensor, t: float, condition: Condition
) -> Estimate:
    """Return estimates (2 B, N, D) with the condition, then without it; from one batch."""
    return inner(torch.cat([z_t, z_t]), t, concatenate([condition, condition.null()]))
