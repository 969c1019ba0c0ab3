"""Take a training step: gradients and optimizer of every active phase, then the averages."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from e2ediff.data import Batch
from e2ediff.distributed.tensors import clip_gradients
from e2ediff.distributed.world import World
from e2ediff.host.recipe import Recipe
from e2ediff.model.averages import update_all
from e2ediff.step.assembly import Assembly
from e2ediff.step.draws import training_draw
from e2ediff.step.guard import Guard, Share
from e2ediff.step.parallel import Piece
from e2ediff.step.splitting import Splitting

Record = dict[str, Tensor | float]


def active_phases(recipe: Recipe, images: int) -> list[str]:
    """Return the phases of a recipe's objective that are active after this many images."""
    objective, done = recipe.objective, images / recipe.total_images
    spans = {phase: objective.span(phase) for phase in objective.phases}
    return [phase for phase, (start, end) in spans.items() if start <= done < end]


def learning_rates(
    recipe: Recipe, phase: str, optimizer: torch.optim.Optimizer, images: int
) -> list[float]:
    """Return the learning rate of each parameter group in the step after this many images."""
    config = recipe.optimizers.get(phase, recipe.optimizer)
    start, end = (share * recipe.total_images for share in recipe.objective.span(phase))
    done = (round(images - start), round(end - start))
    return [
        group["initial_lr"] * config.group_factor(group.get("name", ""), *done)
        for group in optimizer.param_groups
    ]


def rate_name(group: Mapping[str, Any], phase: str = "") -> str:
    """Return the figure of a parameter group's learning rate: `lr`, or `lr/PATTERN`.

    `phase` names a phase after the first of a step: `lr/PHASE`, or `lr/PHASE/PATTERN`.
    """
    return "/".join(word for word in ("lr", phase, group.get("name", "")) if word)


class Sums:
    """Adds up the figures of a step's pieces, each divided by the piece's divisor."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], piece: Piece) -> None:
        """Add the figures of a piece; of equal names in one operation."""
        if piece.divisor != 1:
            shares = torch._foreach_div([*values.values()], piece.divisor)
            values = dict(zip(values, shares, strict=True))
        if values.keys() == self._sums.keys():
            torch._foreach_add_([self._sums[name] for name in values], [*values.values()])
        else:
            known = self._sums
            self._sums = known | {n: known[n] + v if n in known else v for n, v in values.items()}

    def named(self) -> Mapping[str, Tensor]:
        """Return the sums by name."""
        return self._sums


class Update:
    """Takes training steps on the micro-shards of this process.

    `report` is called with the kind of an event, its text and further fields; `on_error` with an
    error of a step that may be computed again from its start, and returns whether to do so.
    """

    def __init__(
        self,
        recipe: Recipe,
        parts: Assembly,
        world: World,
        report: Callable[..., None],
        on_error: Callable[[Exception], bool] = lambda error: False,
    ) -> None:
        self.on_error = on_error
        self.recipe = recipe
        self.parts = parts
        self.world = world
        self.splitting = Splitting(recipe, parts, world, report)
        self.guard = Guard(recipe, world, next(parts.step.parameters()).device)

    @property
    def rows(self) -> slice:
        """Return the rows of every batch that this process computes."""
        each = self.recipe.batch // self.world.size
        return slice(self.world.rank * each, (self.world.rank + 1) * each)

    def __call__(
        self, batch: Batch, images: int, attempt: int = 0, *, skip: bool = False
    ) -> Record:
        """Take one step; its losses and figures stay on the device.

        Phases whose loss or gradient is bad, by the recipe's `guards`, make no update.

        Args:
            batch: This process's rows of the batch.
            images: Images seen before, which determine phases, learning rates and draws.
            attempt: Number of rollbacks so far; each changes all later draws.
            skip: Make no update whatever the numbers are.

        Returns:
            This process's shares of the means of all losses (`loss/...`) and figures; the
            learning rate and the gradient norm before clipping, which are the same in all.

        Raises:
            ResourceError: A micro-shard does not fit into memory and cannot be split.
        """
        r, record = self.recipe, Record()
        for number, phase in enumerate(self.phases(images)):
            which = phase if number else ""  # of the optimizers that make this step
            optimizer, config = self.parts.optimizers[phase], r.optimizers.get(phase, r.optimizer)
            for group, rate in zip(
                optimizer.param_groups, learning_rates(r, phase, optimizer, images), strict=True
            ):
                group["lr"] = rate
                record[rate_name(group, which)] = rate

            draw_of = partial(training_draw, r, phase, images, attempt)
            buffers = [(buffer, buffer.clone()) for buffer in self._buffers]
            tries, again = self.splitting.tries(batch, phase, draw_of), None
            while True:  # once, if memory suffices
                pieces, again = again or next(tries), None
                with contextlib.suppress(torch.OutOfMemoryError):
                    try:
                        for p in self._parameters:  # gradients of another phase must not remain
                            p.grad = None
                        sums, shares = Sums(), list[Share]()
                        for piece in pieces:
                            total, losses, info = self.parts.parallel.backward(piece, phase)
                            sums.add({f"loss/{n}": v for n, v in losses.items()} | info, piece)
                            part = total if piece.divisor == 1 else total / piece.divisor
                            shares.append(Share(len(piece.batch.x), part, losses))
                        break
                    except Exception as error:
                        if not self.on_error(error):
                            raise
                        with torch.no_grad():  # a part of the step was computed
                            for buffer, before in buffers:
                                buffer.copy_(before)
                        again = self.splitting.pieces(batch, phase, draw_of)
            record |= sums.named()

            trained = [p for group in optimizer.param_groups for p in group["params"]]
            norm = clip_gradients(trained, config.clip, self.world, wait=self.guard.waits)
            record["/".join(word for word in ("grad_norm", which) if word)] = norm
            bad = self.guard.update(optimizer, phase, images, shares, norm, skip=skip)
            if bad is not self.guard.sound:
                with torch.no_grad():
                    for buffer, before in buffers:
                        buffer.copy_(torch.where(bad > 0, before, buffer))
        update_all(self.parts.averages.values())
        return record

    @cached_property
    def _parameters(self) -> list[nn.Parameter]:
        """Return all parameters; which ones get gradients may change from step to step."""
        return [*self.parts.step.parameters()]

    @cached_property
    def _buffers(self) -> list[Tensor]:
        """Return the buffers that are saved with the trained networks.

        A forward pass may update statistics there, which a bad step would ruin.
        """
        nets = (self.parts.step.online, self.parts.step.heads)
        found = [value for net in nets for value in net.state_dict(keep_vars=True).values()]
        return [value for value in found if not isinstance(value, nn.Parameter)]

    def phases(self, images: int) -> list[str]:
        """Return the objective's phases that are active after this many images, in order."""
        return active_phases(self.recipe, images)

    def rehearse(
        self, batch: Batch, images: int, attempt: int = 0, *, compiled: bool = False
    ) -> float:
        """Compute the gradients of the first piece in each active phase to time them.

        Nothing changes. Unless `compiled`, it runs uncompiled: what is compiled is for one number
        of threads.

        Returns:
            The share of this process's step that was computed; the smallest, if phases differ.
        """
        share = 1.0
        for phase in self.phases(images):
            draw_of = partial(training_draw, self.recipe, phase, images, attempt)
            first = next(self.splitting.pieces(batch, phase, draw_of))
            with contextlib.nullcontext() if compiled else self.parts.compilation.disabled():
                self.parts.parallel.rehearse(first, phase)
            share = min(share, len(first.batch.x) / len(batch.x))
        return share
