"""The smallest networks and batches, on which parts are checked.

Shapes: B batch, C H W image, N latent tokens, D latent channels, W width.
"""

from __future__ import annotations

import copy

import attrs
import torch
from torch import Tensor, nn

from e2ediff.backbone import (
    Backbone,
    BackboneConfig,
    Decode,
    Denoise,
    Encode,
    FusedBackbone,
    LatentSpec,
    Output,
)
from e2ediff.condition import Condition
from e2ediff.data import Batch, ImageSpec
from e2ediff.denoiser import Denoiser
from e2ediff.interpolant import Estimate, Interpolant, Kind, spread
from e2ediff.latent import LatentNorm, NormKind
from e2ediff.objective import Draw, Nets, Objective
from e2ediff.parts.interpolants import Linear
from e2ediff.parts.time_samplers import Uniform
from e2ediff.times import TimeSampler

IMAGE = ImageSpec(3, 16, 16, 4)
"""The images of `TinyBackbone` and `make_batch`."""


@attrs.frozen(kw_only=True)
class TinyBackbone(BackboneConfig):
    """Linear maps of single patches: the smallest network with masks, features and conditions."""

    patch: int = 8
    latent_dim: int = 6
    latent_norm: NormKind = "layer"

    def build(self, image: ImageSpec) -> Backbone:
        """Build the network."""
        return _Tiny(self, image)


class _Tiny(FusedBackbone):
    def __init__(self, config: TinyBackbone, image: ImageSpec) -> None:
        super().__init__()
        p, dim, width = config.patch, config.latent_dim, 12
        self.image, self.depth, self.width, self.denoiser_apart = image, 1, width, True
        self.decoder_apart = self.masks = True
        grid = (image.height // p, image.width // p)
        tokens = grid[0] * grid[1]
        self.latent = LatentSpec(tokens=tokens, dim=dim, norm=config.latent_norm, grid=grid)
        self.latent_norm = LatentNorm(config.latent_norm, tokens, dim)
        self.patches = nn.Conv2d(image.channels, width, p, p)
        self.to_latent, self.from_latent = nn.Linear(width, dim), nn.Linear(dim, width)
        self.pixels = nn.ConvTranspose2d(width, image.channels, p, p)
        self.noised, self.label = nn.Linear(dim, width), image.conditioning.embedding(width)
        self.answer = nn.Linear(width, dim)

    def outputs(self, *passes: Encode | Decode | Denoise) -> list[Output]:
        """Run passes one by one."""
        return [self._one(p) for p in passes]

    def _one(self, p: Encode | Decode | Denoise) -> Output:
        if isinstance(p, Encode):
            h = self.patches(p.x).flatten(2).mT  # (B, N, W)
            h = h if p.mask is None else h * ~p.mask[..., None]
            y = self.to_latent(h).float()
            return Output(self.latent_norm(y), dict.fromkeys(p.taps, h), y)
        if isinstance(p, Denoise):
            self.accept_times(p)
            h = self.noised(p.z_t) * (1 + p.t[:, None, None]) + self.label(p.condition)[:, None]
            return Output(self.answer(h).float(), dict.fromkeys(p.taps, h))
        self.accept_image(p)
        h = self.from_latent(p.z)
        y = self.pixels(h.mT.unflatten(2, self.latent.grid)).float()
        return Output(y, dict.fromkeys(p.taps, h))


class GaussianDenoiser(Denoiser):
    """The exact denoiser of latents from N(mean, std^2), for any condition, in z_t's own type."""

    def __init__(self, path: Interpolant, mean: float = 0.0, std: float = 1.0) -> None:
        self.path, self.mean, self.std = path, mean, std

    def __call__(self, z_t: Tensor, t: float, condition: Condition) -> Estimate:
        """Return the posterior mean, mean + a std^2 / (a^2 std^2 + s^2) (z_t - a mean)."""
        times = torch.full((len(z_t),), t, dtype=z_t.dtype, device=z_t.device)
        a, s = spread(self.path.alpha(times), z_t), spread(self.path.sigma(times), z_t)
        gain = a * self.std**2 / (a**2 * self.std**2 + s**2)
        return self.path.estimate(self.mean + gain * (z_t - a * self.mean), z_t, times, "x0")


def make_nets(
    backbone: BackboneConfig | None = None,
    objective: Objective | None = None,
    *,
    path: Interpolant | None = None,
    predicts: Kind = "x0",
    image: ImageSpec = IMAGE,
    device: str = "cpu",
) -> Nets:
    """Make networks, always the same for the same arguments; the target starts equal."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        online = (backbone or TinyBackbone()).build(image).train()
        heads = objective.heads(online) if objective else nn.ModuleDict()
        frozen = objective.frozen(online) if objective else nn.ModuleDict()
    target = copy.deepcopy(online).requires_grad_(requires_grad=False).eval()
    target.latent_norm.train()
    return Nets(online, target, path or Linear(), predicts, heads, frozen)


def make_batch(image: ImageSpec = IMAGE, size: int = 6) -> Batch:
    """Make random images in [-1, 1] and conditions, always the same."""
    g = torch.Generator().manual_seed(1)
    x = torch.rand(size, image.channels, image.height, image.width, generator=g) * 2 - 1
    return Batch(x=x, condition=image.conditioning.example(size))


def make_draw(batch: Batch, times: TimeSampler | None = None, seed: int = 2) -> Draw:
    """Make a step's randomness for this batch, the same for the same seed."""
    g, times = torch.Generator().manual_seed(seed), times or Uniform()
    t = times.draw(len(batch.x), g, torch.device("cpu"))
    return Draw(t=t, condition=batch.condition, generator=g, times=times)
