"""One training step as a module: what is compiled, wrapped for several devices, and counted."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import attrs
import torch
from torch import nn

from e2ediff.data import Batch
from e2ediff.errors import ShapeError
from e2ediff.objective import Draw, Nets, Objective, Terms
from e2ediff.regularizer import Regularizer, names_of


class Step(nn.Module):
    """Calls the objective under the run's precision and checks what it returns.

    `online` and `heads` are its submodules; the target and the frozen networks are not, because
    they are not trained.
    """

    def __init__(
        self,
        objective: Objective,
        nets: Nets,
        precision: torch.dtype,
        regularizers: Sequence[Regularizer] = (),
    ) -> None:
        super().__init__()
        self.objective = objective
        self.regularizers = dict(zip(names_of(regularizers), regularizers, strict=True))
        self.online = nets.online
        self.heads = nets.heads
        self.precision = precision
        self._nets = (nets,)  # a tuple hides the target from the module's own parameters

    @property
    def nets(self) -> Nets:
        """The networks."""
        return self._nets[0]

    def forward(self, batch: Batch, draw: Draw, phase: str) -> Terms:
        """Losses of one micro-shard in one phase.

        Raises:
            ShapeError: A loss is not a scalar, lacks a weight, or has the name of another.
        """
        half = self.precision == torch.bfloat16
        device = batch.x.device.type
        with torch.autocast(device, torch.bfloat16) if half else contextlib.nullcontext():
            terms = self.objective.terms(self.nets, batch, draw, phase)
        name = type(self.objective).__name__
        if terms.z.requires_grad:
            terms = self._regularized(terms, draw)
        for key, loss in terms.losses.items():
            if loss.shape != ():
                raise ShapeError(
                    f"objective {name}: loss '{key}' has shape {tuple(loss.shape)}, expected a "
                    "scalar; take its mean"
                )
        if set(terms.losses) != set(terms.weights):
            odd = sorted(set(terms.losses) ^ set(terms.weights))
            raise ShapeError(
                f"objective {name}: losses and weights must have the same names; only one of "
                f"them has {', '.join(odd)}"
            )
        return terms

    def _regularized(self, terms: Terms, draw: Draw) -> Terms:
        """The objective's terms and the regularisers', which are computed in float32."""
        if not self.regularizers:
            return terms
        if both := sorted(set(self.regularizers) & set(terms.losses)):
            raise ShapeError(
                f"regularizers: objective {type(self.objective).__name__} has a loss named "
                f"{both[0]!r} of its own; leave that regularizer out, or rename its `term`"
            )
        found = {name: r.loss(terms.z, draw) for name, r in self.regularizers.items()}
        weights = {name: r.weight for name, r in self.regularizers.items()}
        return attrs.evolve(
            terms, losses={**terms.losses, **found}, weights={**terms.weights, **weights}
        )

    def named_trained(self, phase: str) -> list[tuple[str, nn.Parameter]]:
        """The parameters that `phase` updates, by name."""
        return [
            (name, p)
            for name, p in self.named_parameters()
            if p.requires_grad and self.objective.trains(phase, name)
        ]
