"""A trained model in the shape of a diffusers pipeline; diffusers itself is not needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import attrs
import torch
from PIL import Image
from torch import Tensor

from e2ediff.addresses import Address
from e2ediff.data import to_pixels
from e2ediff.model.inference import Model
from e2ediff.sample.load import load_model


@attrs.frozen(eq=False)
class PipelineOutput:
    """`images`: PIL images, or a tensor (M, C, H, W) in [0, 1] where that was asked for."""

    images: list[Image.Image] | Tensor


class Pipeline:
    """Class-conditional images from a run: `Pipeline.from_run(run)(["cat", 3]).images`.

    Arguments are named as those of diffusers' `DiTPipeline`.
    """

    def __init__(self, model: Model) -> None:
        self.model = model

    @classmethod
    def from_run(cls, run: Address, **options: Any) -> Pipeline:
        """Load the pipeline of a run; options and errors are those of `e2ediff.load`."""
        return cls(load_model(run, **options))

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return self.model.device

    @property
    def labels(self) -> dict[str, int]:
        """Return class indices by name; empty for classes without names.

        A name that several classes have stands for none of them.
        """
        names = self.model.image.class_names
        count = Counter(names)
        return {name: i for i, name in enumerate(names) if count[name] == 1}

    def to(self, device: str | torch.device) -> Pipeline:
        """Move the weights, and return this pipeline."""
        self.model.to(device)
        return self

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """Return the class indices of names.

        Raises:
            DataError: There is no such class.
        """
        names = [label] if isinstance(label, str) else label
        return [self.model.label_of(name) for name in names]

    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | Tensor,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        seed: int = 0,
        output_type: Literal["pil", "pt"] = "pil",
    ) -> PipelineOutput:
        """Sample images of these classes.

        Args:
            class_labels: Indices or names.
            num_inference_steps: Steps of the sampler; by default the recipe's.
            guidance_scale: Scale of the recipe's guidance; by default its own.
            generator: Draws the seed, in place of `seed`.
            seed: As for `Model.sample`.
            output_type: `pil`, or `pt` for a tensor.

        Raises:
            DataError: There is no such class.
            RecipeError: The sampler has no steps, or the guidance no scale.
        """
        model = self.model
        if num_inference_steps is not None:
            model = model.with_steps(num_inference_steps)
        if guidance_scale is not None:
            model = model.with_options("guidance", scale=guidance_scale)
        if generator is not None:
            seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        labels = [class_labels] if isinstance(class_labels, int | str) else class_labels
        x = model.sample(labels, seed=seed)
        if output_type == "pt":
            return PipelineOutput((x + 1) / 2)
        pixels = to_pixels(x).permute(0, 2, 3, 1).numpy()
        return PipelineOutput(
            [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]
        )
