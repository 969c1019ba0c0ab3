"""The objective: which passes are run, what they are compared with, where gradients stop.

An objective is a frozen value.
`terms` is a function of (nets, batch, draw): all randomness comes from the draw, all weights
from the nets, so the same arguments give the same losses.

Shapes: B batch, C H W image, N latent tokens, D latent channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor, nn

from e2ediff.backbone import Backbone
from e2ediff.condition import Condition
from e2ediff.data import Batch
from e2ediff.interpolant import Interpolant, Kind
from e2ediff.times import TimeSampler


def sg(value: Tensor) -> Tensor:
    """Stop the gradient: return the same numbers, through which no gradient flows."""
    return value.detach()


@attrs.frozen(eq=False)
class Nets:
    """What an objective may compute with.

    `online` is trained; `target` is its exponential moving average, without gradients;
    `heads` are the objective's own trained modules; `frozen` its fixed networks (perceptual
    features), neither trained nor saved.
    """

    online: Backbone
    target: Backbone
    path: Interpolant
    predicts: Kind
    heads: nn.ModuleDict = attrs.field(factory=nn.ModuleDict)
    frozen: nn.ModuleDict = attrs.field(factory=nn.ModuleDict)


@attrs.frozen(eq=False)
class Draw:
    """One step's randomness: times, conditions, and a generator for the rest.

    `progress` is the share of training that is done, in [0, 1), a scalar, on the device of `t`:
    a weight or a noise level that changes in the course of training is a function of it. A scalar
    tensor and no number, so that a compiled step is compiled once.

    `t` is (B,), from the recipe's time sampler.
    `condition` is the batch's, some rows replaced by null ones so that the denoiser also learns
    without a condition; `label_drop` is the probability of that, for each row.
    """

    t: Tensor
    condition: Condition
    generator: torch.Generator | None
    times: TimeSampler
    progress: Tensor = attrs.field(factory=lambda: torch.zeros(()))
    label_drop: float = 0.0

    def noise(self, like: Tensor) -> Tensor:
        """Draw unit normal noise of the shape of `like`, in float32."""
        return torch.randn(like.shape, generator=self.generator, device=like.device)

    def uniform(self, *shape: int) -> Tensor:
        """Draw uniform numbers in [0, 1) of this shape."""
        return torch.rand(shape, generator=self.generator, device=self.t.device)

    def drop(self, condition: Condition) -> Condition:
        """Draw which rows of a condition, one for each image, become null ones, and return it."""
        dropped = self.uniform(len(condition)) < self.label_drop
        return condition.where(dropped, condition.null())

    def again(self, condition: Condition | None = None) -> Draw:
        """Return a further draw for the same images, with other times.

        Args:
            condition: The images' conditions, of which rows are dropped anew; without it, and
                where `label_drop` is 0, conditions stay those of this draw.
        """
        t = self.further_times()
        if condition is None or self.label_drop == 0:
            return attrs.evolve(self, t=t)
        return attrs.evolve(self, t=t, condition=self.drop(condition))

    def further_times(self) -> Tensor:
        """Draw other times (B,), as `again` does first."""
        return self.times.draw(len(self.t), self.generator, self.t.device)


@attrs.frozen(eq=False)
class Terms:
    """A step's losses, each a scalar in float32, with their weights.

    `z` is the online latent (B, N, D), for monitoring and for regularisers: with its graph
    wherever this phase trains the encoder.
    `info` holds further scalars to log.
    `decoded` are the decoded images (B, C, H, W) that the reconstruction loss has compared, with
    their graph, for an objective that wraps this one and judges them; None if there are none.
    A weight is a number, or a scalar without gradient, as a function of `Draw.progress` gives.
    A weight of 0 keeps a loss in the log and out of the gradient.
    """

    losses: Mapping[str, Tensor]
    weights: Mapping[str, float | Tensor]
    z: Tensor
    info: Mapping[str, Tensor] = attrs.field(factory=dict)
    decoded: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """Weighted sum of the losses, a scalar."""
        parts = [self.weights[k] * v for k, v in self.losses.items() if self.counts(k)]
        return torch.stack(parts).sum()

    def counts(self, name: str) -> bool:
        """Return whether a loss is in the total: its weight is not the number 0.

        A scalar counts whatever it is, for a device would have to be waited for.
        """
        weight = self.weights[name]
        return isinstance(weight, Tensor) or weight != 0


class Objective(ABC):
    """How encoder, decoder and denoiser are trained together.

    `phases` names the parts of training.
    Phases whose spans overlap alternate within a step, in order, each with its own optimizer;
    phases whose spans follow one another are stages.
    `own_optimizers` names the phases that need an optimizer of their own in the recipe.
    `trains_averages` declares that the denoiser learns average velocities between two times, on
    the straight path; only then do samplers ask a network with a second time for them.
    `trains_guidance` declares that the denoiser learns guided velocities; guidance in sampling
    would be added to that, and is refused.
    `trains_latents` is False where no loss trains the encoder through the latent `Terms.z`, so
    that regularisers of it would do nothing, and are refused.
    `compares_images` declares that a loss or its weight depends on all images of a micro-shard,
    which is then not computed in parts when memory runs out.
    `needs_whole_weights` declares that a phase uses weights without their gradients, which FSDP2
    cannot keep apart; `parallel: fsdp2` is then refused.
    `static_graph` declares that a phase gives gradients to the same parameters in every step and
    in every process. DDP then looks for unused parameters before the first step alone, which is
    faster; a step that uses others ends the run. A derived class declares it again, as what it
    adds may depend on draws.
    """

    phases: ClassVar[tuple[str, ...]] = ("joint",)
    own_optimizers: ClassVar[tuple[str, ...]] = ()
    trains_averages: ClassVar[bool] = False
    trains_guidance: ClassVar[bool] = False
    trains_latents: ClassVar[bool] = True
    compares_images: ClassVar[bool] = False
    needs_whole_weights: ClassVar[bool] = False
    static_graph: ClassVar[bool] = False

    @property
    def declares_static_graph(self) -> bool:
        """Return whether the class itself declares `static_graph`."""
        return bool(vars(type(self)).get("static_graph", False))

    @abstractmethod
    def terms(self, nets: Nets, batch: Batch, draw: Draw, phase: str) -> Terms:
        """Return the losses of one step in one phase.

        Args:
            nets: The networks.
            batch: x (B, C, H, W) in [-1, 1] and a condition for each.
            draw: The step's randomness; draw nothing from anywhere else.
            phase: One of `phases`.
        """

    def span(self, phase: str) -> tuple[float, float]:
        """Return the part of training, as fractions of its images, in which `phase` is active."""
        return (0.0, 1.0)

    def trained_until(self, path: Interpolant) -> float:
        """Return the last time at which the denoiser is trained; it is not asked at later ones."""
        return 1.0

    def heads(self, backbone: Backbone) -> nn.ModuleDict:
        """Return trained modules of the objective's own: projectors, probes, critics."""
        return nn.ModuleDict()

    def frozen(self, backbone: Backbone) -> nn.ModuleDict:
        """Return fixed networks, not trained or saved: feature networks of perceptual losses."""
        return nn.ModuleDict()

    def trains(self, phase: str, name: str) -> bool:
        """Return whether `phase` updates the parameter `name` (`online.…` or `heads.…`).

        A parameter that gets no gradient in a phase is left alone in any case.
        """
        return True

    def stops(self, phase: str) -> Collection[str]:
        """Return the names of losses that must not train the encoder, whatever the weights.

        A declaration for readers and for `plugins check`, which holds the objective to it:
        neither the latents nor weights of the encoder's alone may get a gradient from them.
        """
        return ()

    def problems(self, nets: Nets) -> Sequence[tuple[str, str]]:
        """List what in the recipe does not fit this objective: (path in it, complaint) pairs.

        `nets` lies on the meta device: shapes, options and the schedule are there, numbers are
        not.
        """
        return ()
