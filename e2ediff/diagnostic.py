"""Diagnostics: figures about the health of the latents, on a fixed probe.

Shapes: P probe images, G of them for gradients, C H W image, N latent tokens, D latent channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import attrs
from torch import Tensor

from e2ediff.interpolant import Interpolant, Kind

Costly = Literal["z_online", "gradients"]
"""Fields of a probe that are filled only for diagnostics that ask for them."""


@attrs.frozen(eq=False)
class Probe:
    """What the networks make of the probe images, in eval mode.

    The images, their noise and the times never change during a run.

    `x` (P, C, H, W) and `label` (P,) are the images; `x_hat` is their reconstruction.
    `z` and `raw` (P, N, D) are the averaged encoder's latents after and before the latent norm;
    `z_online` those of the trained encoder, `None` unless a diagnostic asks for them.
    `denoised` maps times to the averaged denoiser's clean estimates (P, N, D) of `z`, and `path`
    is the interpolant by which `z` was noised.
    `gradients` maps each loss of the objective to the gradient (G, N, D) of its weighted value
    with respect to the trained encoder's latents, as in a training step on the first G images,
    with times and noise that never change; empty unless a diagnostic asks for it.
    """

    x: Tensor
    label: Tensor
    x_hat: Tensor
    z: Tensor
    raw: Tensor
    z_online: Tensor | None
    denoised: Mapping[float, Tensor]
    predicts: Kind
    path: Interpolant | None = None
    gradients: Mapping[str, Tensor] = attrs.field(factory=dict)


class Diagnostic(ABC):
    """Figures measured on the probe, every so many images.

    `asks` names fields of the probe that cost extra passes and that this diagnostic reads.
    """

    asks: ClassVar[frozenset[Costly]] = frozenset()

    @abstractmethod
    def measure(self, probe: Probe) -> Mapping[str, float]:
        """Named figures; a name is the same in the log, in `metrics.jsonl` and in the docs."""

    def verdict(self, values: Mapping[str, float]) -> Sequence[str]:
        """What the figures say of collapse, in words; empty for healthy latents.

        Args:
            values: All figures of this moment, those of other diagnostics included.
        """
        return ()
