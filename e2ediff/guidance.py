"""Guidance: what wraps a denoiser into a guided one, and the networks that it asks besides.

Shapes: B batch, N latent tokens, D latent channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import attrs

from e2ediff.denoiser import Denoiser
from e2ediff.sampler import Sampler


@attrs.frozen(kw_only=True)
class Reference:
    """Weights outside of the network that is sampled: a run, its checkpoint, one set of weights.

    Empty strings stand for the run that is sampled, its newest checkpoint, and the weights that
    are used for sampling by default.
    """

    run: str = ""
    checkpoint: str = ""
    weights: str = ""


class Guidance(ABC):
    """The recipe's `guidance:` block: wraps a denoiser into a guided one."""

    @property
    def references(self) -> tuple[Reference, ...]:
        """Further networks that it asks, loaded for `with_references` by whoever samples."""
        return ()

    def with_references(self, others: Mapping[Reference, Denoiser]) -> Guidance:
        """This guidance with the denoisers of its `references`."""
        return self

    def problems(self, sampler: Sampler) -> Sequence[tuple[str, str]]:
        """Options that this sampler would make mean something else: (field, what and what to do).

        Asked when a recipe is checked and before anything is sampled.
        """
        return ()

    @abstractmethod
    def wrap(self, inner: Denoiser) -> Denoiser:
        """The guided denoiser; `inner` itself where the guidance changes nothing.

        It is called with conditions, whose `null()` asks for the answer without them.
        """
