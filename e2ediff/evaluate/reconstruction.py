"""Score a run's reconstructions: rFID, and measures of each image against its reconstruction.

Shapes: B batch, C H W image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping

import attrs
import torch
from torch import Tensor
from torch.nn import functional

from e2ediff.data import DataSource, from_pixels
from e2ediff.errors import DataError
from e2ediff.evaluate.images import PixelHash, check_finite
from e2ediff.evaluate.passes import Pass, View
from e2ediff.features import FeatureNetwork
from e2ediff.figure import Better
from e2ediff.metric import FeatureSet, MetricValue
from e2ediff.model.image_features import Collector, network_title, weights_sha256
from e2ediff.model.inference import Model
from e2ediff.store.storage import JSON


def psnr(x_hat: Tensor, x: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio (B,) in dB of bytes (B, C, H, W); at most 148."""
    error = (x_hat.double() - x.double()).square().mean(dim=(1, 2, 3))
    return 10 * (255**2 / error.clamp_min(1e-10)).log10()


def ssim(x_hat: Tensor, x: Tensor) -> Tensor:
    """Return the structural similarity (B,) of bytes (B, C, H, W), averaged over pixels.

    Source: Wang et al. 2004, eq. 13: Gaussian window of 11 pixels and width 1.5, K1 = 0.01,
    K2 = 0.03; windows that cross the border are left out.
    """
    if min(x.shape[2:]) < 11:
        raise DataError(f"ssim: images of {x.shape[3]} x {x.shape[2]} are smaller than its window")
    place = torch.arange(11, dtype=torch.float64, device=x.device) - 5
    window = torch.exp(-place.square() / (2 * 1.5**2))
    window = torch.outer(window, window) / window.sum() ** 2
    a, b = (y.double().flatten(0, 1)[:, None] for y in (x_hat, x))  # (B C, 1, H, W)

    def blur(y: Tensor) -> Tensor:
        return functional.conv2d(y, window[None, None])

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    both = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    light = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    shape = (2 * both + c2) / (var_a + var_b + c2)
    return (light * shape).mean(dim=(1, 2, 3)).reshape(x.shape[:2]).mean(dim=1)


@attrs.frozen(eq=False)
class Perceptual:
    """LPIPS: distances of a network's unit-length maps, weighted by channel and summed.

    `heads` are the published linear weights, one (K,) for each map; without them every channel
    counts 1/K, and the figure is not called LPIPS.

    Source: Zhang et al. 2018 (arXiv 1801.03924), eq. 1.
    """

    network: FeatureNetwork
    heads: tuple[Tensor, ...] = ()

    def __call__(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """Return distances (B,) of images (B, C, H, W) in [-1, 1]."""
        found = torch.zeros(len(x), dtype=torch.float64)
        for i, (f, g) in enumerate(zip(self.network(x_hat), self.network(x), strict=True)):
            f, g = (m / (m.square().sum(1, keepdim=True).sqrt() + 1e-10) for m in (f, g))
            weight = self.heads[i].to(f.device) if self.heads else f.new_ones(f.shape[1])
            weight = weight if self.heads else weight / len(weight)
            apart = (f - g).square() * weight[:, None, None]
            found += apart.sum(1).mean(dim=(1, 2)).double().cpu()
        return found

    @property
    def name(self) -> str:
        """Return the name of the figure."""
        return "LPIPS" if self.heads else f"perceptual-{self.network.title}"

    @property
    def identity(self) -> dict[str, JSON]:
        """Return the network and hashes of all weights, for a passport."""
        content = hashlib.sha256()
        for head in self.heads:
            content.update(head.detach().cpu().float().contiguous().numpy().tobytes())
        return {
            "perceptual_network": network_title(self.network),
            "perceptual_sha256": weights_sha256(self.network),
            "heads_sha256": content.hexdigest() if self.heads else None,
        }


def lpips_heads(state: Mapping[str, Tensor], place: str) -> tuple[Tensor, ...]:
    """Read the linear weights of the released LPIPS file: `lin0.model.1.weight`, ...

    Raises:
        DataError: The file has no such weights.
    """
    heads: list[Tensor] = []
    while (name := f"lin{len(heads)}.model.1.weight") in state:
        heads.append(state[name].flatten())
    if not heads:
        raise DataError(f"{place}: has no lin0.model.1.weight; expected LPIPS's linear weights")
    return tuple(heads)


@attrs.frozen(eq=False)
class Reconstructions:
    """Features of images and of their reconstructions, figures of each pair, and a hash."""

    made: FeatureSet
    real: FeatureSet
    figures: Mapping[str, MetricValue]
    sha256: str


def _pairs(
    model: Model, source: DataSource, count: int, size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images with their reconstructions, at most `size` at once, computed in whole tiles."""
    whole = max(1, size // model.rows) * model.rows
    for first in range(0, count, whole):
        pixels = source.read(range(first, min(first + whole, count)))[0]
        x_hat = model.reconstruct(from_pixels(pixels))
        check_finite(x_hat, "reconstructions of held-out images", first)
        yield from zip(torch.split(pixels, size), torch.split(x_hat, size), strict=True)


@torch.no_grad()
def reconstruct(
    model: Model,
    source: DataSource,
    count: int,
    work: Pass,
    view: View,
    perceptual: Perceptual | None = None,
    progress: Callable[[int], None] | None = None,
) -> Reconstructions:
    """Pass the first `count` images through encoder and decoder, and compare.

    `progress` is called with the number of images so far.
    Both are compared as bytes; reconstructions are rounded as the view says.
    """
    network = work.network.to(work.device)
    sides = [Collector(network, work.moments, work.rows) for _ in range(2)]
    values: dict[str, list[Tensor]] = {}
    content = PixelHash()
    for pixels, x_hat in _pairs(model, source, count, work.batch):
        content.add(pixels)
        x = from_pixels(pixels)
        shown = work.shown(x_hat, attrs.evolve(view, resize="network")).cpu()
        sides[0].add(work.shown(x_hat, view))
        sides[1].add(work.shown(pixels, view))
        values.setdefault("PSNR", []).append(psnr(shown, pixels))
        values.setdefault("SSIM", []).append(ssim(shown, pixels))
        if perceptual is not None:
            distance = perceptual(from_pixels(shown), x)
            values.setdefault(perceptual.name, []).append(distance)
        if progress is not None:
            progress(sum(map(len, values["PSNR"])))
    figures = {}
    for name, parts in values.items():
        each = torch.cat(parts)
        error = float(each.std() / len(each) ** 0.5) if len(each) > 1 else None
        better: Better = "high" if name in ("PSNR", "SSIM") else "low"
        figures[name] = MetricValue(float(each.mean()), error, better=better)
    return Reconstructions(sides[0].features(), sides[1].features(), figures, content.sha256)
