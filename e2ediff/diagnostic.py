"""Diagnostics: figures about the health of the latents, on a fixed probe.

Shapes: P probe images, G and O the first of them, C H W image, N latent tokens, D latent channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import attrs
from torch import Tensor

from e2ediff.condition import Condition
from e2ediff.figure import Figure
from e2ediff.interpolant import Interpolant, Kind

Costly = Literal["x_hat", "denoised", "many", "gradients"]
"""What of a probe is there only for diagnostics that ask for it, and only at surveys."""


@attrs.frozen(eq=False)
class Probe:
    """What the networks make of the probe images, in eval mode.

    The images, their noise and the times never change during a run.

    `x` (P, C, H, W) are the images and `condition` what is known of each; P is the recipe's
    `probe.glance`, or `probe.images` for a diagnostic that asks for `many`.
    `z` and `raw` (P, N, D) are the averaged encoder's latents after and before the latent norm,
    whose statistics are those of the probe itself.
    `z_online` (O, N, D) are the trained encoder's latents of the first O images, normalised among
    themselves: what the average, which follows slowly, does not show yet. O is a quarter of
    `probe.glance`, at least 16 if there are as many.
    `learned` is that of the latent contract: where it is False there is nothing to collapse, and
    no `z_online`.

    What follows is there only for diagnostics that ask for it:
    `x_hat` (G, C, H, W) is the reconstruction of the first G images, G being `probe.glance`.
    `denoised` maps times to the averaged denoiser's clean estimates (G, N, D) of `z[:G]`, and
    `path` is the interpolant by which it was noised.
    `gradients` maps each loss of the objective to the gradient (K, N, D) of its weighted value
    with respect to the trained encoder's latents, as in a training step on the first K images,
    with times and noise that never change.
    """

    x: Tensor
    condition: Condition
    z: Tensor
    raw: Tensor
    predicts: Kind
    path: Interpolant | None = None
    x_hat: Tensor | None = None
    denoised: Mapping[float, Tensor] = attrs.field(factory=dict)
    z_online: Tensor | None = None
    gradients: Mapping[str, Tensor] = attrs.field(factory=dict)
    learned: bool = True


class Diagnostic(ABC):
    """Figures measured on the probe.

    Without `asks` at every diagnosis (`cadence.diagnose`), on latents alone.
    `asks` names what costs more and what this diagnostic reads; it is then measured at surveys
    (`cadence.survey`) only.
    `figures` declares those of its figures that are shown beside the log or that the alarm takes;
    any other stands in `metrics.jsonl` and in the further figures of a report.
    """

    asks: ClassVar[frozenset[Costly]] = frozenset()
    figures: ClassVar[tuple[Figure, ...]] = ()

    @abstractmethod
    def measure(self, probe: Probe) -> Mapping[str, float]:
        """Return figures by name, the same in the log, in `metrics.jsonl` and in the docs."""

    def verdict(self, values: Mapping[str, float]) -> Sequence[str]:
        """Return signs of collapse in the figures, a sentence each; none for healthy latents.

        Args:
            values: All figures of this moment, those of other diagnostics included.
        """
        return ()
