"""Schedule and measure diagnostics, previews and scores of a run, with the right weights.

Shapes: B images, C H W image.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import attrs
import torch
from torch import Tensor

from e2ediff.backbone import Backbone
from e2ediff.condition import Condition, Labels
from e2ediff.data import DataSource, ImageSpec
from e2ediff.distributed.world import World
from e2ediff.figure import Figure
from e2ediff.guidance import Guidance
from e2ediff.host.plugins import Host
from e2ediff.host.recipe import Recipe
from e2ediff.host.structure import unstructure
from e2ediff.model.calibration import in_use
from e2ediff.monitor.grids import Group, by_class, grid_png, sampling_words
from e2ediff.monitor.isolation import Isolated
from e2ediff.monitor.probe import Observer, chosen_diagnostics
from e2ediff.monitor.scores import Scorer
from e2ediff.sampler import Sampler
from e2ediff.step.assembly import Assembly


@attrs.frozen
class PreviewSheet:
    """Samples x (B, C, H, W) with their conditions, and pairs of images and reconstructions.

    `samples` and `reconstructions` are the grids of them, encoded as PNG.
    """

    x: Tensor
    condition: Condition
    pairs: Tensor
    samples: bytes
    reconstructions: bytes


@attrs.frozen(eq=False)
class Monitor:
    """Measures a run's current networks; all processes take part.

    `image` has the class names of the training images, and `sampling` says how previews are
    sampled.
    """

    recipe: Recipe
    parts: Assembly
    world: World
    observer: Observer
    scorer: Scorer | None
    image: ImageSpec
    sampling: str

    @classmethod
    def open(
        cls,
        host: Host,
        recipe: Recipe,
        parts: Assembly,
        world: World,
        sources: tuple[DataSource, DataSource],
        device: torch.device,
    ) -> Monitor:
        """Read the fixed images from the training and the held-out ones.

        Raises:
            DataError: A feature network's weights are missing, or the images too few.
        """
        training, held_out = sources
        isolated = Isolated()
        chosen = chosen_diagnostics(host, recipe, isolated)
        observer = Observer.open(recipe, chosen, training, held_out, device, isolated)
        scorer = Scorer.open(recipe, held_out, device, isolated)
        image = recipe.data.image
        image = attrs.evolve(image, class_names=training.class_names or image.class_names)
        sampling = sampling_words(
            recipe.default_weights,
            recipe.seed,
            unstructure(host, recipe.sampler, Sampler),
            unstructure(host, recipe.guidance, Guidance) if recipe.guidance else None,
        )
        return cls(recipe, parts, world, observer, scorer, image, sampling)

    def due(self, step: int) -> bool:
        """Return whether diagnostics are due after this step."""
        return step % self.recipe.cadence.diagnose == 0 or self._survey_due(step)

    def preview_due(self, step: int) -> bool:
        """Return whether a preview is due after this step."""
        return step % self.recipe.cadence.preview == 0 or step == self.recipe.total_steps

    def scores_due(self, step: int) -> bool:
        """Return whether scores are due after this step."""
        return self.scorer is not None and self.scorer.due(step)

    def _survey_due(self, step: int) -> bool:
        """Return whether a survey is due: at the first and last step, and by the cadence."""
        every = self.recipe.cadence.survey_every
        return step % every == 0 or step == self.recipe.total_steps

    def diagnose(self, step: int, phases: Sequence[str]) -> dict[str, float]:
        """Measure the figures due at this step; return the same ones in all processes.

        Args:
            step: The last step taken.
            phases: Phases of the objective whose losses' gradients are measured.

        Raises:
            DivergedError: Outputs of the networks on the probe are not finite.
        """
        with self._whole():
            found = self.observer.measure(
                self.parts.step,
                phases,
                survey=self._survey_due(step),
                progress=step / self.recipe.total_steps,
            )
        # Every process must measure, since gathering split weights is a collective; the values of
        # the first process are used.
        return self.world.share(found)

    def preview(self, title: str) -> PreviewSheet:
        """Make samples with fixed noise, and reconstructions of probe images.

        Args:
            title: What the pictures belong to, for their captions.
        """
        with self._whole(), in_use(self._shown(), self.observer.calibration) as ready:
            x, condition = self.observer.samples(ready)
            pairs = self.observer.reconstructions(ready, 20)
        labels = condition.label.tolist() if isinstance(condition, Labels) else []
        samples = grid_png(by_class(x, labels, self.image), f"{title}; samples: {self.sampling}")
        both = f"{title}; held-out images, each followed by its reconstruction"
        reconstructions = grid_png(
            [Group(pairs[i : i + 2]) for i in range(0, len(pairs), 2)], both
        )
        return PreviewSheet(x, condition, pairs, samples, reconstructions)

    def score(self) -> dict[str, float]:
        """Measure the recipe's `scores` on the weights of previews; empty without `scores`."""
        if self.scorer is None:
            return {}
        with self._whole(), in_use(self._shown(), self.observer.calibration) as ready:
            found = self.scorer.measure(ready)
        return self.world.share(found)

    @property
    def figures(self) -> list[Figure]:
        """Return the declarations of the diagnostics, and of the scores measured so far."""
        return [*self.observer.figures, *(self.scorer.figures.values() if self.scorer else ())]

    def _shown(self) -> Backbone:
        """Return the weights that previews and `sample` use: the first of `ema`, or the target."""
        return self.parts.averages[self.recipe.default_weights].net

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """Gather split weights, and disable compilation, which is for the sizes of a step."""
        with self.parts.parallel.whole(), self.parts.compilation.disabled():
            yield
