"""A trained model: sampling, encoding, decoding, with nothing of the training left.

Shapes: B batch, C H W image, N latent tokens, D latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from e2ediff.backbone import Backbone
from e2ediff.denoiser import Denoiser, Plain
from e2ediff.errors import DataError, Problem, RecipeError
from e2ediff.host.recipe import Recipe
from e2ediff.latent import LatentContract, Latents
from e2ediff.run.seeds import generator

_CPU = torch.device("cpu")


@attrs.frozen(eq=False)
class Model:
    """One set of weights, in eval mode, with the recipe it was trained by.

    `latent` is the latent contract as its checkpoint has it.
    """

    recipe: Recipe
    net: Backbone
    latent: LatentContract | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(self.net.parameters()).device

    def denoiser(self) -> Denoiser:
        """The denoiser, with the recipe's guidance."""
        plain = Plain(self.net, self.recipe.interpolant, self.recipe.predicts)
        if self.recipe.guidance is None:
            return plain
        return self.recipe.guidance.wrap(plain, self.recipe.data.image.null_label)

    @torch.no_grad()
    def sample(
        self,
        labels: Tensor | Sequence[int],
        *,
        seed: int = 0,
        batch: int = 256,
        first: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Images of these classes.

        Args:
            labels: (M,), class indices; the null label for images of any class.
            seed: With the image's number it decides the image's noise, so that an image does
                not depend on the batch size or on its neighbours (beyond rounding).
            batch: Images made at once.
            first: Number of the first image, to continue a set.
            progress: Called with the number of images finished so far.

        Returns:
            (M, C, H, W) in [-1, 1], clipped, on the CPU.
        """
        labels = torch.as_tensor(labels)
        f, spec, finished = self.denoiser(), self.net.latent, []
        for start in range(0, len(labels), batch):
            own = labels[start : start + batch].to(self.device)
            numbers = range(first + start, first + start + len(own))
            generators = [generator(_CPU, seed, "image", i) for i in numbers]

            def noise(like: Tensor, generators: list[torch.Generator] = generators) -> Tensor:
                rows = [torch.randn(like.shape[1:], generator=g) for g in generators]
                return torch.stack(rows).to(like.device)

            z = noise(torch.empty(len(own), spec.tokens, spec.dim, device=self.device))
            z = self.recipe.sampler.sample(f, z, own, noise)
            finished.append(self.net.decode(z).clamp(-1, 1).cpu())
            if progress is not None:
                progress(start + len(own))
        return torch.cat(finished)

    @property
    def contract(self) -> LatentContract:
        """What this model's latents mean."""
        return self.net.contract() if self.latent is None else self.latent

    @torch.no_grad()
    def encode(self, x: Tensor, *, batch: int = 256) -> Latents:
        """Latents of images (M, C, H, W) in [-1, 1], with their contract, on the CPU."""
        made = [self.net.encode(part.to(self.device)).cpu() for part in torch.split(x, batch)]
        return Latents(torch.cat(made), self.contract)

    @torch.no_grad()
    def decode(self, latents: Latents, *, batch: int = 256) -> Tensor:
        """Images (M, C, H, W) in [-1, 1] of latents, clipped, on the CPU.

        Raises:
            LatentError: Weights encoded them whose latents mean something else.
        """
        parts = torch.split(self.accept(latents), batch)
        return torch.cat([self.net.decode(z.to(self.device)).clamp(-1, 1).cpu() for z in parts])

    @torch.no_grad()
    def denoise(self, latents: Latents, t: float, labels: Tensor | Sequence[int]) -> Latents:
        """Clean estimates of latents (M, N, D) that are noised to time t, by the denoiser.

        Args:
            latents: z_t on the recipe's interpolant, with the contract of the clean latents.
            t: Time in (0, 1); 1 is data.
            labels: (M,), class indices.

        Raises:
            LatentError: Weights encoded them whose latents mean something else.
        """
        z_t, label = self.accept(latents).to(self.device), torch.as_tensor(labels)
        x0 = self.denoiser()(z_t, t, label.to(self.device)).x0
        return Latents(x0.cpu(), self.contract)

    def accept(self, latents: Latents) -> Tensor:
        """The tensor of latents that this model may decode and denoise.

        Raises:
            LatentError: Weights encoded them whose latents mean something else.
        """
        self.contract.accept(latents.contract, "another model")
        return latents.z

    @torch.no_grad()
    def reconstruct(self, x: Tensor, *, batch: int = 256) -> Tensor:
        """Images (M, C, H, W) in [-1, 1] through encoder and decoder, clipped, on the CPU."""
        made = [
            self.net.decode(self.net.encode(part.to(self.device))).clamp(-1, 1).cpu()
            for part in torch.split(x, batch)
        ]
        return torch.cat(made)

    def with_steps(self, steps: int) -> Model:
        """The same model with another number of sampler steps.

        Raises:
            RecipeError: The sampler has no option `steps`, or refuses the number.
        """
        sampler: Any = self.recipe.sampler
        try:
            changed = attrs.evolve(sampler, steps=steps)
        except (TypeError, ValueError) as error:
            raise RecipeError("--steps", [Problem("sampler.steps", str(error))]) from error
        return attrs.evolve(self, recipe=attrs.evolve(self.recipe, sampler=changed))

    def label_of(self, text: str) -> int:
        """The class index that a user's text means: an index, a name, or `none`.

        Raises:
            DataError: There is no such class.
        """
        image = self.recipe.data.image
        if text.isdigit() and int(text) < max(1, image.classes):
            return int(text)
        if text == "none":
            return image.null_label
        if text in image.class_names:
            return image.class_names.index(text)
        import difflib

        close = difflib.get_close_matches(text, image.class_names, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        names = f" or one of {', '.join(image.class_names)}" if image.class_names else ""
        raise DataError(
            f"--label {text}: no such class.{hint} Expected an index from 0 to "
            f"{max(0, image.classes - 1)}{names}, or 'none'."
        )
