"""Split a batch into micro-shards, and compute a micro-shard in parts if memory runs out.

Each part uses its rows of the micro-shard's draw, and the gradients of the parts are added, so
that the step stays the one that the recipe defines. That is valid only for losses that are means
over single images: before a split, the losses are computed both ways and compared.

Shapes: B images of the step that this process has, S images of a micro-shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import attrs
import torch
from torch import Tensor

from e2ediff.condition import Condition
from e2ediff.data import Batch
from e2ediff.distributed.world import World
from e2ediff.errors import ResourceError, ShapeError
from e2ediff.host.recipe import Recipe
from e2ediff.objective import Draw
from e2ediff.step.assembly import Assembly
from e2ediff.step.parallel import Piece

DrawOf = Callable[[Condition, int], Draw]
"""Returns the draw of a micro-shard, given its condition and its number in the step."""

# Relative difference. Losses of single images agree to this; those of a batch differ by percents.
_SAME = 1e-4


class Splitting:
    """Splits a process's share of a batch into pieces, smaller ones whenever memory runs out."""

    def __init__(
        self, recipe: Recipe, parts: Assembly, world: World, report: Callable[..., None]
    ) -> None:
        self.recipe = recipe
        self.parts = parts
        self.world = world
        self.report = report
        self.shards = recipe.microshards // world.size
        self.size = recipe.batch // recipe.microshards
        self._at_once: dict[str, int] = {}
        # In the second rehearsal the optimizer's state is in memory, too.
        self._rehearsals = dict.fromkeys(recipe.objective.phases, 2)

    def tries(self, batch: Batch, phase: str, draw_of: DrawOf) -> Iterator[Iterator[Piece]]:
        """Yield the pieces to compute, and smaller ones each time that memory did not suffice.

        Leave the loop when all pieces of a try have been computed; when one raises
        torch.OutOfMemoryError, start again with the pieces of the next try.

        Args:
            batch: This process's rows of the batch.
            phase: Phase of the objective.
            draw_of: Returns the randomness of a micro-shard, a fresh draw at each call.

        Raises:
            ResourceError: A micro-shard does not fit into memory and cannot be split.
        """
        if self.parts.parallel.kind != "one" and self._rehearsals[phase]:
            self._rehearsals[phase] -= 1
            self._rehearse(batch, phase, draw_of)
        yield self.pieces(batch, phase, draw_of)
        while self.world.size == 1:
            self._split(batch, phase, draw_of)
            yield self.pieces(batch, phase, draw_of)
        raise self._refusal(
            "another process may be in the middle of adding gradients, so the step cannot be "
            "repeated"
        )

    def pieces(self, batch: Batch, phase: str, draw_of: DrawOf) -> Iterator[Piece]:
        """Yield the pieces of all micro-shards of this process, in order."""
        total, at_once = self.recipe.microshards, self._at_once.get(phase, self.size)
        for shard in range(self.shards):
            images = batch.rows(slice(shard * self.size, (shard + 1) * self.size))
            for start in range(0, self.size, at_once):
                draw = draw_of(images.condition, self.world.rank * self.shards + shard)
                part = images
                if at_once < self.size:
                    rows = slice(start, min(start + at_once, self.size))
                    part, draw = images.rows(rows), part_of(draw, rows)
                final = shard + 1 == self.shards and start + at_once >= self.size
                yield Piece(part, draw, total * self.size / len(part.x), final)

    def _rehearse(self, batch: Batch, phase: str, draw_of: DrawOf) -> None:
        """Find what fits before the processes wait for one another in the middle of a step."""
        if self.parts.parallel.kind == "fsdp2":
            return  # in FSDP2 even a forward pass waits for the other processes
        while True:
            fits = 1
            try:
                first = next(self.pieces(batch, phase, draw_of))
                self.parts.parallel.rehearse(first, phase)
            except torch.OutOfMemoryError:
                fits = 0
            if self.world.lowest(fits):
                self.parts.parallel.wrap(next(self.pieces(batch, phase, draw_of)), phase)
                return
            self._split(batch, phase, draw_of)

    def _split(self, batch: Batch, phase: str, draw_of: DrawOf) -> None:
        """Halve the number of images computed at once, in all processes together.

        Raises:
            ResourceError: That would change the losses, or even one image does not fit.
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
                self.report(
                    "memory",
                    f"out of memory with {before} images at once: phase '{phase}' continues "
                    f"with {at_once}, with the same draws and the same mean",
                    phase=phase,
                    images_at_once=at_once,
                    microshard=self.size,
                )
                return
        raise self._refusal(problem or "a single image does not fit")

    def _whole_batches(self) -> str:
        """Name a part that compares images of a micro-shard with one another; "" if none does."""
        norm = self.parts.nets.online.latent_norm
        if norm.has_statistics:
            return f"backbone.latent_norm: {norm.kind} takes its statistics from all of them"
        if self.recipe.objective.compares_images:
            return "the objective weights losses by all of them"
        names = [name for name, r in self.parts.step.regularizers.items() if r.weight]
        return f"the regularizer {names[0]} compares them" if names else ""

    @torch.no_grad()
    def _difference(self, batch: Batch, phase: str, draw_of: DrawOf, at_once: int) -> str:
        """Describe what changes if a micro-shard is computed in parts, in float32; else ""."""
        images, step = batch.rows(slice(self.size)), self.parts.step
        first = self.world.rank * self.shards
        precision, step.precision = step.precision, torch.float32
        try:
            whole = step.terms(images, draw_of(images.condition, first), phase)
            sums, latents = dict.fromkeys(whole.losses, 0.0), []
            for start in range(0, self.size, at_once):
                rows = slice(start, min(start + at_once, self.size))
                part = images.rows(rows)
                terms = step.terms(part, part_of(draw_of(images.condition, first), rows), phase)
                latents.append(terms.z)
                for name, value in terms.losses.items():
                    sums[name] += float(value) * len(part.x) / self.size
        except torch.OutOfMemoryError:
            return "not even a forward pass fits, which is needed to prove that harmless"
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


class UnclearDrawError(ShapeError):
    """A part of a draw was requested in a shape whose axis of images is ambiguous."""


@attrs.frozen(eq=False, kw_only=True)
class PartDraw(Draw):
    """The part of a draw that belongs to some of its images.

    Everything is drawn for all `images` and then cut, so that an image's noise does not depend on
    the number of images computed at once.
    """

    images: int
    rows: slice

    def _shape(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        """Return the shape for all images, and the axis of images, -1 if there is none."""
        axes = [axis for axis, size in enumerate(shape) if size == len(self.t)]
        if len(axes) > 1:
            raise UnclearDrawError(f"a draw of shape {shape}: which axis counts images?")
        if not axes:
            return shape, -1
        whole = tuple(self.images if axis == axes[0] else n for axis, n in enumerate(shape))
        return whole, axes[0]

    def _cut(self, value: Tensor, axis: int) -> Tensor:
        start, stop, _ = self.rows.indices(self.images)
        return value if axis < 0 else value.narrow(axis, start, stop - start)

    def noise(self, like: Tensor) -> Tensor:
        """Draw as `Draw.noise`; the first axis of `like` is that of images."""
        axis = 0 if like.shape[:1] == self.t.shape else -1
        shape = (self.images, *like.shape[1:]) if axis == 0 else tuple(like.shape)
        return self._cut(torch.randn(shape, generator=self.generator, device=like.device), axis)

    def uniform(self, *shape: int) -> Tensor:
        """Draw as `Draw.uniform`; the axis whose length is the number of images is theirs."""
        whole, axis = self._shape(shape)
        return self._cut(torch.rand(whole, generator=self.generator, device=self.t.device), axis)

    def further_times(self) -> Tensor:
        """Draw as `Draw.further_times`."""
        return self._cut(self.times.draw(self.images, self.generator, self.t.device), 0)


def part_of(draw: Draw, rows: slice) -> PartDraw:
    """Return the part of a fresh draw, from which nothing was drawn yet, for some images."""
    return PartDraw(
        t=draw.t[rows],
        condition=draw.condition.rows(rows),
        generator=draw.generator,
        times=draw.times,
        progress=draw.progress,
        label_drop=draw.label_drop,
        images=len(draw.t),
        rows=rows,
    )
