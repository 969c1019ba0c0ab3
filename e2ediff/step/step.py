"""Compute a micro-shard's losses in one module, which is compiled, wrapped and counted."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor, nn

from e2ediff.backbone import Backbone
from e2ediff.data import Batch
from e2ediff.errors import ShapeError
from e2ediff.objective import Draw, Nets, Objective, Terms
from e2ediff.regularizer import Regularizer, names_of


class Step(nn.Module):
    """Computes one micro-shard's losses; it is what is compiled, and what DDP and FSDP2 wrap.

    `online`, `heads` and the averaged networks are submodules, because DDP and FSDP2 look for
    parameters there: DDP sends the gradients of trained ones, FSDP2 splits all of them.
    `nets` is a plain value, in which nothing is registered. The frozen networks are only there,
    so each process has them whole.
    """

    def __init__(
        self,
        objective: Objective,
        nets: Nets,
        precision: torch.dtype,
        regularizers: Sequence[Regularizer] = (),
        averages: Mapping[str, Backbone] | None = None,
    ) -> None:
        super().__init__()
        self.objective = objective
        self.nets = nets
        self.precision = precision
        self.regularizers = dict(zip(names_of(regularizers), regularizers, strict=True))
        self.online = nets.online
        self.heads = nets.heads
        copies = {name.replace(".", "_"): net for name, net in (averages or {}).items()}
        self.averages = nn.ModuleDict(copies)  # a module's name has no dot

    def forward(
        self, batch: Batch, draw: Draw, phase: str
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Return the weighted loss of a micro-shard, and its losses and figures without gradients.

        DDP and FSDP2 look for tensors in what `forward` returns, in tuples and dicts, but not in
        `Terms`.
        """
        terms = self.terms(batch, draw, phase)
        losses = {name: value.detach() for name, value in terms.losses.items()}
        return terms.total, losses, {name: value.detach() for name, value in terms.info.items()}

    def terms(self, batch: Batch, draw: Draw, phase: str) -> Terms:
        """Compute the losses of one micro-shard in one phase, in the run's precision.

        Under FSDP2 call it inside `Parallel.whole`, where the parameters are gathered.

        Raises:
            ShapeError: A loss is not a scalar, has no weight, or has the name of another one.
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
        """Add the regularisers' losses, computed in float32, to the objective's terms."""
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
        """Return the parameters that `phase` updates, with their names."""
        return [
            (name, p)
            for name, p in self.named_parameters()
            if p.requires_grad and self.objective.trains(phase, name)
        ]

    def gather(self) -> None:
        """Do nothing; under FSDP2 the call gathers the parameters first."""
