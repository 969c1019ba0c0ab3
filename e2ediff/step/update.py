"""One optimizer step of one phase: micro-shards, their memory, the gradient's norm.

Shapes: B images of the step that this process has, S images of a micro-shard.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from e2ediff.data import Batch
from e2ediff.distributed.tensors import clip_gradients
from e2ediff.distributed.world import World
from e2ediff.errors import Problem, RecipeError, ResourceError
from e2ediff.host.recipe import Recipe
from e2ediff.objective import Draw, Terms
from e2ediff.step.assembly import Assembly
from e2ediff.step.compiling import uncompiled
from e2ediff.step.draws import UnclearDrawError, part_of

DrawOf = Callable[[Tensor, int], Draw]
"""The draw of a micro-shard, from the labels of its images and its number in the step."""

Record = dict[str, Tensor | float]

# Losses that agree to this are computed image by image; those of a batch differ by percents.
_SAME = 1e-4


def check_shares(recipe: Recipe, world: World, source: str) -> None:
    """Refuse micro-shards that the processes cannot share equally.

    Raises:
        RecipeError: They cannot; proposes a number that they can.
    """
    shards, size = recipe.microshards, world.size
    if shards % size == 0:
        return
    multiples = range(size, recipe.batch + 1, size)
    fits = [n for n in multiples if recipe.batch % n == 0]
    better = next((n for n in fits if n >= shards), fits[-1] if fits else None)
    if better is not None:
        hint = f"Set microshards: {better}, or use a number of processes that divides {shards}."
    else:
        up = -(-recipe.batch // size) * size
        hint = f"Use fewer processes, or set batch: {up} and microshards: {size}."
    what = (
        f"{size} processes cannot share {shards} micro-shard{'s' * (shards > 1)} of a batch of "
        f"{recipe.batch} images equally."
    )
    raise RecipeError(source, [Problem("microshards", what, hint=hint)])


class Update:
    """Computes gradients over the micro-shards of this process, and steps the optimizer.

    Where memory does not suffice, a micro-shard is computed in parts: with the same draw, and
    their gradients added up, so that the step stays what the recipe says. Only losses that are
    means over single images allow that, which is proved by computing them both ways.
    """

    def __init__(
        self,
        recipe: Recipe,
        parts: Assembly,
        world: World,
        tell: Callable[..., None],
    ) -> None:
        self.recipe = recipe
        self.parts = parts
        self.world = world
        self.tell = tell
        self.shards = recipe.microshards // world.size
        self.size = recipe.batch // recipe.microshards
        self._at_once: dict[str, int] = {}
        # The second one finds the optimizer's state in memory, too.
        self._rehearsals = dict.fromkeys(recipe.objective.phases, 2)

    @property
    def rows(self) -> slice:
        """The rows of every batch that this process computes."""
        start = self.world.rank * self.shards * self.size
        return slice(start, start + self.shards * self.size)

    def __call__(self, batch: Batch, phase: str, draw_of: DrawOf, images: int) -> Record:
        """One step; figures stay on the device.

        Args:
            batch: The rows of the batch that are this process's.
            phase: The objective's.
            draw_of: Gives the randomness of a micro-shard, anew at each call.
            images: Images seen before, for the schedule.

        Raises:
            ResourceError: A micro-shard does not fit into memory and cannot be split.
        """
        r, optimizer = self.recipe, self.parts.optimizers[phase]
        config = r.optimizers.get(phase, r.optimizer)
        start, end = (share * r.total_images for share in r.objective.span(phase))
        factor = config.factor(round(images - start), round(end - start))
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        record: Record = {"lr": optimizer.param_groups[0]["lr"]}
        record.update(self._gradients(batch, phase, draw_of))
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        if config.clip > 0:
            record["grad_norm"] = clip_gradients(trained, config.clip, self.world)
        optimizer.step()
        return record

    def _gradients(self, batch: Batch, phase: str, draw_of: DrawOf) -> Record:
        """Fill the gradients; returns the sums of this process's shares of all figures."""
        if self.world.size > 1 and self._rehearsals[phase]:
            self._rehearsals[phase] -= 1
            self._rehearse(batch, phase, draw_of)
        while True:
            try:
                return self._accumulate(batch, phase, draw_of)
            except torch.OutOfMemoryError as error:
                if self.world.size > 1:
                    raise self._refusal(
                        "another process may be in the middle of adding gradients, so the step "
                        "cannot be repeated"
                    ) from error
            self._split(batch, phase, draw_of)

    def _accumulate(self, batch: Batch, phase: str, draw_of: DrawOf) -> Record:
        # Of all parameters, not only this phase's: another phase's gradients must not linger.
        self.parts.step.zero_grad(set_to_none=True)
        total, at_once = self.recipe.microshards, self._at_once.get(phase, self.size)
        record: Record = {}
        for shard in range(self.shards):
            images = _rows(batch, shard * self.size, self.size)
            for start in range(0, self.size, at_once):
                part, draw = self._part(images, start, at_once, shard, draw_of)
                divisor = total * self.size / len(part.x)
                final = shard + 1 == self.shards and start + at_once >= self.size
                losses, info = self.parts.parallel.backward(
                    part, draw, phase, divisor=divisor, last=final
                )
                for name, value in [*losses.items(), *info.items()]:
                    key = f"loss/{name}" if name in losses else name
                    record[key] = record.get(key, 0.0) + value / divisor
        return record

    def _part(
        self, images: Batch, start: int, count: int, shard: int, draw_of: DrawOf
    ) -> tuple[Batch, Draw]:
        """Some images of a micro-shard, with their part of its draw."""
        draw = draw_of(images.label, self.world.rank * self.shards + shard)
        if count >= self.size:
            return images, draw
        part = _rows(images, start, count)
        return part, part_of(draw, slice(start, start + len(part.x)))

    def attempt(self, batch: Batch, phase: str, draw_of: DrawOf) -> None:
        """Compute the gradients of a micro-shard for their time alone: nothing changes.

        Blocks are not compiled for it: a compiled one is made for a number of threads.
        """
        images = _rows(batch, 0, self.size)
        part, draw = self._part(images, 0, self._at_once.get(phase, self.size), 0, draw_of)
        with uncompiled(self.recipe):
            self.parts.parallel.rehearse(part, draw, phase)

    # Memory

    def _rehearse(self, batch: Batch, phase: str, draw_of: DrawOf) -> None:
        """Find what fits before the processes depend on one another in the middle of a step."""
        if self.parts.parallel.kind == "fsdp2":
            return  # a forward pass alone makes them depend on one another
        while True:
            fits = 1
            try:
                images = _rows(batch, 0, self.size)
                at_once = self._at_once.get(phase, self.size)
                part, draw = self._part(images, 0, at_once, 0, draw_of)
                self.parts.parallel.rehearse(part, draw, phase)
            except torch.OutOfMemoryError:
                fits = 0
            if self.world.lowest(fits):
                return
            self._split(batch, phase, draw_of)

    def _split(self, batch: Batch, phase: str, draw_of: DrawOf) -> None:
        """Halve the images computed at once; all processes do so together.

        Raises:
            ResourceError: That would change the losses, or one image is too many.
        """
        self.parts.step.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        before = at_once = self._at_once.get(phase, self.size)
        problem = self._whole_batches()
        while not problem and at_once > 1:
            at_once, unclear = -(-at_once // 2), False
            try:
                problem = self._difference(batch, phase, draw_of, at_once)
            except UnclearDrawError:
                unclear = True
            if self.world.highest(int(bool(problem))):
                raise self._refusal(problem or "another process found that it changes the losses")
            if not self.world.highest(int(unclear)):
                self._at_once[phase] = at_once
                self.tell(
                    "memory",
                    f"out of memory with {before} images at once: phase '{phase}' goes on with "
                    f"{at_once}, with the same draws and the same mean",
                    phase=phase,
                    images_at_once=at_once,
                    microshard=self.size,
                )
                return
        raise self._refusal(problem or "a single image does not fit")

    def _whole_batches(self) -> str:
        """What is known to compare the images of a micro-shard with one another."""
        norm = self.parts.nets.online.latent_norm
        if norm.has_statistics:
            return f"backbone.latent_norm: {norm.kind} takes its statistics from all of them"
        names = [name for name, r in self.parts.step.regularizers.items() if r.weight]
        return f"the regularizer {names[0]} compares them" if names else ""

    @torch.no_grad()
    def _difference(self, batch: Batch, phase: str, draw_of: DrawOf, at_once: int) -> str:
        """What changes if a micro-shard is computed in parts, in float32; empty if nothing."""
        images, step = _rows(batch, 0, self.size), self.parts.step
        precision, step.precision = step.precision, torch.float32
        try:
            whole = step.terms(images, draw_of(images.label, self.world.rank * self.shards), phase)
            sums, latents = dict.fromkeys(whole.losses, 0.0), []
            for start in range(0, self.size, at_once):
                part, draw = self._part(images, start, at_once, 0, draw_of)
                terms: Terms = step.terms(part, draw, phase)
                latents.append(terms.z)
                for name, value in terms.losses.items():
                    sums[name] += float(value) * len(part.x) / self.size
        except torch.OutOfMemoryError:
            return "not even a forward pass of it fits, by which that could be proved harmless"
        finally:
            step.precision = precision
        for name, value in whole.losses.items():
            wanted = float(value)
            if abs(sums[name] - wanted) > _SAME * max(abs(wanted), 1e-3):
                return f"the loss '{name}' would be {sums[name]:.5g} instead of {wanted:.5g}"
        gap = (torch.cat(latents) - whole.z).abs().max()
        if gap > 100 * _SAME * whole.z.abs().max():
            return "an image's latents depend on the others"
        return ""

    def _refusal(self, why: str) -> ResourceError:
        r = self.recipe
        larger = [n for n in range(r.microshards + 1, r.batch + 1) if r.batch % n == 0]
        larger = [n for n in larger if n % self.world.size == 0]
        more = f"microshards: {larger[0]} (another run: it changes the draws), " if larger else ""
        return ResourceError(
            f"out of memory: a micro-shard of {self.size} images does not fit, and computing it "
            f"in parts is not possible: {why}. Set {more}checkpoint_activations: true, "
            "precision: bfloat16 or a smaller network."
        )


def _rows(batch: Batch, start: int, count: int) -> Batch:
    return Batch(x=batch.x[start : start + count], label=batch.label[start : start + count])
