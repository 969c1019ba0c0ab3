"""Sample, encode and decode with a trained model.

Shapes: B batch, C H W image, M images, N latent tokens, D latent channels, R rows of a tile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

from e2ediff import terminal
from e2ediff.backbone import Backbone
from e2ediff.condition import ClassLabels, Condition, concatenate
from e2ediff.data import ImageSpec
from e2ediff.denoiser import Denoiser, Plain
from e2ediff.errors import DataError, KernelError, Problem, RecipeError
from e2ediff.guidance import Guidance
from e2ediff.host.recipe import Recipe
from e2ediff.latent import LatentContract, Latents
from e2ediff.model.labels import class_of, label_of, without_images
from e2ediff.model.repeatable import repeatable
from e2ediff.sampler import Noise
from e2ediff.seeds import generator

Precision = Literal["float32", "bfloat16"]

Given = Tensor | Sequence[int | str] | Condition
"""What images are asked for by: classes, or a condition of any kind, one row an image."""

ROWS = 32
"""Images that are computed at once, unless one asks for another number."""

_CPU = torch.device("cpu")


@attrs.frozen(kw_only=True)
class Origin:
    """Where weights came from: a run, its checkpoint, the set of weights, and their SHA-256.

    `recipe_sha256` is the hash of the run's `resolved.yaml`.
    """

    run: str
    checkpoint: str
    weights: str
    sha256: str
    recipe_sha256: str


@attrs.frozen(eq=False)
class Other:
    """A further network that guidance uses."""

    denoiser: Plain
    origin: Origin


@attrs.frozen(eq=False)
class Tile:
    """Some images of a set: their numbers, x (M, C, H, W) in [-1, 1] on the CPU, and their cost.

    `calls` counts sequential network calls; `passes` the latents passed through a network for each
    image, so that a call with two conditions counts twice.
    """

    numbers: range
    x: Tensor
    calls: int
    passes: float


@attrs.frozen(eq=False)
class Model:
    """One set of weights, in eval mode, with the recipe it was trained by.

    Images are computed in tiles of `rows`: image i of a set is always row i mod `rows` of a batch
    of that size, whatever else is asked for, because matrix products may round differently for
    another number of rows. So an image depends on weights, seed, number and condition alone, to
    the bit. With a sampler that couples images it also depends on the others in its tile.

    `guidance` is the recipe's guidance with the networks that it uses, which are `others`.
    `precision` is that of the networks; samplers and guidance compute in float32.
    `compiled` says that the networks' blocks are compiled when they are called.
    `latent` is the latent contract in its checkpoint.
    `image` is the images' shape and conditioning; `image.class_names` are those of the training
    data.
    """

    recipe: Recipe
    net: Backbone
    guidance: Guidance | None = attrs.field(
        default=attrs.Factory(lambda self: self.recipe.guidance, takes_self=True)
    )
    others: tuple[Other, ...] = ()
    origin: Origin | None = None
    rows: int = attrs.field(default=ROWS, validator=attrs.validators.ge(1))
    precision: Precision = "float32"
    compiled: bool = False
    latent: LatentContract | None = None
    image: ImageSpec = attrs.field(
        default=attrs.Factory(lambda self: self.recipe.data.image, takes_self=True)
    )

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return next(self.net.parameters()).device

    def to(self, device: str | torch.device) -> Model:
        """Return the same model on another device; the weights are moved, not copied."""
        for net in (self.net, *(other.denoiser.net for other in self.others)):
            net.to(device)
            with repeatable(deterministic=self.recipe.deterministic):
                choose_kernels(net, self.device, self.precision)
        return self

    def denoiser(self) -> Denoiser:
        """Return the denoiser, with the model's guidance."""
        return self._guided(self._plain())

    def _plain(self) -> Plain:
        recipe = self.recipe
        averages = recipe.sampler.averages != "unused" and recipe.objective.trains_averages
        until = recipe.objective.trained_until(recipe.interpolant)
        return Plain(self.net, recipe.interpolant, recipe.predicts, averages=averages, until=until)

    def _guided(self, plain: Plain) -> Denoiser:
        if self.guidance is None:
            return plain
        return self.guidance.wrap(plain)

    @torch.no_grad()
    def sample(
        self,
        labels: Given,
        *,
        seed: int = 0,
        first: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Sample images of these classes or conditions.

        Args:
            labels: (M,), class indices or names; the null label for images of any class. In their
                place a condition of M rows, which other kinds of conditioning need.
            seed: Determines the noise, together with the image's number.
            first: Number of the first image, to continue a set.
            progress: Called with the number of images finished so far.

        Returns:
            (M, C, H, W) in [-1, 1], clipped, on the CPU.

        Logs a warning for classes that no training image showed, where the run recorded them.

        Raises:
            DataError: There is no such class, or the run has conditions of another kind.
        """
        if self.image.empty_classes and not isinstance(labels, Condition):
            asked = [class_of(self.image, label) for label in labels]
            if empty := without_images(self.image, asked):
                terminal.warn(empty)
        finished, done = [], 0
        for tile in self.tiles(labels, seed=seed, first=first):
            finished.append(tile.x)
            done += len(tile.x)
            if progress is not None:
                progress(done)
        image = self.image
        return torch.cat([torch.empty(0, image.channels, image.height, image.width), *finished])

    def tiles(self, labels: Given, *, seed: int = 0, first: int = 0) -> Iterator[Tile]:
        """Sample as `sample` does, and yield tile by tile."""
        r = self.rows
        chosen = self._condition(labels)
        last = first + len(chosen)
        for start in range(first - first % r, last, r):
            numbers = range(max(start, first), min(start + r, last))
            # Pad the tile by repeating a requested row; the padding is discarded.
            rows = [i if i in numbers else numbers[0] for i in range(start, start + r)]
            noise = _own_noise(seed, rows)
            index = torch.tensor(rows, device=chosen.device) - first
            x, calls, passes = self._make(chosen.rows(index), noise)
            yield Tile(numbers, x[numbers.start - start : numbers.stop - start], calls, passes)

    @property
    def contract(self) -> LatentContract:
        """Return the contract of this model's latents."""
        return self.net.contract() if self.latent is None else self.latent

    def latents(self, x: Tensor) -> Latents:
        """Encode images, and return latents with their contract."""
        return Latents(self.encode(x), self.contract)

    @torch.no_grad()
    def denoise(self, latents: Latents, t: float, labels: Given) -> Latents:
        """Return clean estimates of latents (M, N, D) that are noised to time t.

        Args:
            latents: z_t on the recipe's interpolant, with the contract of the clean latents.
            t: Time in (0, 1); 1 is data.
            labels: (M,), as for `sample`.

        Raises:
            LatentError: Weights encoded them whose latents mean something else.
            DataError: There is no such class.
        """
        z_t = self.accept(latents).to(self.device)
        x0 = self.denoiser()(z_t, t, self._condition(labels).to(self.device)).x0
        return Latents(x0.cpu(), self.contract)

    def accept(self, latents: Latents) -> Tensor:
        """Check that this model may decode and denoise latents, and return their tensor.

        Raises:
            LatentError: Weights encoded them whose latents mean something else.
        """
        self.contract.accept(latents.contract, "another model")
        return latents.z

    @torch.no_grad()
    def interpolate(
        self,
        seeds: tuple[int, int],
        label: int | str | Condition = "index:none",
        *,
        frames: int = 8,
    ) -> Tensor:
        """Sample between two seeds: images (frames, C, H, W) in [-1, 1], on the CPU.

        All noise is interpolated on the sphere, which keeps its variance, from image 0 of one seed
        to that of the other.
        The ends are the images that `sample` makes with these seeds. `label` is a class or a
        condition of one row; by default none.
        """
        made: list[Tensor] = []
        if label == "index:none" or (label == "none" and "none" not in self.image.class_names):
            label = self.image.conditioning.null(1)
        one = self._condition(label if isinstance(label, Condition) else [label])
        for start in range(0, frames, self.rows):
            shares = [i / max(1, frames - 1) for i in range(start, start + self.rows)]
            pair = [_own_noise(seed, [0]) for seed in seeds]

            def noise(
                like: Tensor, pair: list[Noise] = pair, shares: list[float] = shares
            ) -> Tensor:
                a, b = (one(like[:1])[0] for one in pair)
                return torch.stack([spherical(a, b, min(1.0, share)) for share in shares])

            made.append(self._make(concatenate([one] * self.rows), noise)[0])
        return torch.cat(made)[:frames]

    def _condition(self, given: Given) -> Condition:
        """Convert what the caller gave to a condition.

        Raises:
            DataError: There is no such class, or the run has conditions of another kind.
        """
        conditioning = self.image.conditioning
        if isinstance(given, Condition):
            return conditioning.accept(given, "the caller")
        if not isinstance(conditioning, ClassLabels):
            raise DataError(
                f"labels: the run is conditioned on {conditioning.title}; give a "
                f"{type(conditioning.null(0)).__name__} of `e2ediff.condition` instead"
            )
        labels = [class_of(self.image, k) for k in given]
        return conditioning.accept(torch.tensor(labels, dtype=torch.long), "the caller")

    def _make(self, condition: Condition, noise: Noise) -> tuple[Tensor, int, float]:
        """Make one whole tile: images (R, C, H, W), network calls, and passes per image."""
        plain = self._plain()
        asked, spec = [plain, *(other.denoiser for other in self.others)], self.net.latent
        calls, rows = sum(p.calls for p in asked), sum(p.rows for p in asked)
        with torch.no_grad(), self._computing():
            start = noise(torch.empty(len(condition), spec.tokens, spec.dim, device=self.device))
            condition = condition.to(self.device)
            z = self.recipe.sampler.sample(self._guided(plain), start, condition, noise)
            x = self.net.decode(z).clamp(-1, 1).cpu()
        calls, rows = sum(p.calls for p in asked) - calls, sum(p.rows for p in asked) - rows
        return x, calls, rows / len(condition)

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Compute in the model's precision, and repeatably if its recipe asks for that."""
        half = self.precision != "float32"
        with (
            repeatable(deterministic=self.recipe.deterministic, compiled=self.compiled),
            torch.autocast(self.device.type, torch.bfloat16, enabled=half),
        ):
            yield

    def encode(self, x: Tensor) -> Tensor:
        """Encode images (M, C, H, W) in [-1, 1] to latents (M, N, D), on the CPU."""
        return self._in_tiles(self.net.encode, x)

    def decode(self, z: Tensor | Latents) -> Tensor:
        """Decode latents (M, N, D) to images (M, C, H, W) in [-1, 1], clipped, on the CPU.

        Raises:
            LatentError: Weights encoded them whose latents mean something else; a bare tensor
                has no contract and is not checked.
        """
        found = self.accept(z) if isinstance(z, Latents) else z
        return self._in_tiles(self.net.decode, found).clamp(-1, 1)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Pass images (M, C, H, W) in [-1, 1] through encoder and decoder; clipped, on the CPU."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def _in_tiles(self, mode: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        made = []
        for part in torch.split(x, self.rows):
            missing = self.rows - len(part)
            whole = torch.cat([part, part[:1].expand(missing, *part.shape[1:])])
            with self._computing():
                made.append(mode(whole.to(self.device))[: len(part)].cpu())
        return torch.cat(made)

    def with_options(self, part: Literal["sampler", "guidance"], **options: Any) -> Model:
        """Return the same model with other options of its sampler or its guidance.

        Raises:
            RecipeError: The part has no such option, or refuses the value.
        """
        value: Any = self.recipe.sampler if part == "sampler" else self.guidance
        if value is None:
            hint = "Load it with one: overrides=['guidance={name: classifier_free}']."
            raise RecipeError("sampling", [Problem(part, "this model has none.", hint=hint)])
        try:
            changed = attrs.evolve(value, **options)
        except (TypeError, ValueError) as error:
            known = ", ".join(field.alias for field in attrs.fields(type(value)))
            what = f"{error.args[0]}; its options are {known}."
            raise RecipeError("sampling", [Problem(part, what)]) from error
        if part == "guidance":
            return attrs.evolve(self, guidance=changed)
        return attrs.evolve(self, recipe=attrs.evolve(self.recipe, sampler=changed))

    def with_steps(self, steps: int) -> Model:
        """Return the same model with another number of sampler steps.

        Raises:
            RecipeError: The sampler has no option `steps`, or refuses the number.
        """
        return self.with_options("sampler", steps=steps)

    def label_of(self, text: str) -> int:
        """Return the class index that a user's text means: an index, a name, or `none`.

        Raises:
            DataError: There is no such class.
        """
        return label_of(self.image, text)


@torch.no_grad()
def denoise_once(model: Model) -> None:
    """Call a model's denoiser on a whole tile, to be timed.

    The gain of several threads depends on the size of tensors.
    """
    image, spec = model.recipe.data.image, model.net.latent
    z_t = torch.zeros(model.rows, spec.tokens, spec.dim, device=model.device)
    condition = image.conditioning.null(model.rows, model.device)
    with model._computing():
        model.denoiser()(z_t, 0.5, condition)


@torch.no_grad()
def reconstruct_once(model: Model, x: Tensor) -> None:
    """Pass images (M, C, H, W) through encoder and decoder, to be timed."""
    with model._computing():
        model.net.decode(model.net.encode(x.to(model.device)))


def choose_kernels(
    net: Backbone,
    device: torch.device,
    precision: Precision,
    warn: Callable[[str], None] = terminal.warn,
) -> None:
    """Choose the kernels of a trained network.

    The kernels that the recipe names may not exist on this machine or for this precision; then
    the network keeps the ones it was built with, and `warn` is called.
    """
    try:
        net.prepare(device, getattr(torch, precision))
    except KernelError as error:
        warn(f"{error.what}; the network uses the attention that it was built with")


def _own_noise(seed: int, numbers: Sequence[int]) -> Noise:
    """Return noise whose row i belongs to image `numbers[i]` of this seed, drawn on the CPU."""
    generators = [generator(_CPU, seed, "image", i) for i in numbers]

    def noise(like: Tensor) -> Tensor:
        drawn = torch.empty(like.shape)
        for row, g in zip(drawn, generators, strict=True):
            row.normal_(generator=g)  # one by one, as each image has a generator of its own
        return drawn.to(like.device)

    return noise


def spherical(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Interpolate from a (share 0) to b (share 1) on the arc between them, any shape.

    Source: Shoemake 1985; for noise White 2016 (arXiv 1609.04468), section 2.1.
    """
    if share in (0.0, 1.0):
        return a if share == 0 else b
    cosine = (a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-12)
    angle = torch.acos(cosine.clamp(-1, 1))
    if float(angle.sin()) < 1e-6:
        return a + share * (b - a)
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / angle.sin()
