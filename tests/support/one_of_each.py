"""A plugin with one small part for every registry, by public modules alone.

Each does something, keeps its contract, and trains; none is good for anything else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import attrs
import torch
from e2ediff_testing import TinyBackbone
from torch import Tensor, nn
from torch.nn import functional

from e2ediff import hookimpl
from e2ediff.averaging import Averaging
from e2ediff.condition import Condition
from e2ediff.data import DataSource, ImageSpec, SourceConfig
from e2ediff.denoiser import Denoiser
from e2ediff.diagnostic import Diagnostic, Probe
from e2ediff.features import FeatureConfig, FeatureNetwork
from e2ediff.figure import Better
from e2ediff.guidance import Guidance
from e2ediff.interpolant import Estimate, Interpolant
from e2ediff.losses import mean_clean_loss, noise_levels
from e2ediff.metric import FeatureSet, Metric, MetricValue
from e2ediff.objective import Objective, Terms, sg
from e2ediff.optimizer import OptimizerConfig
from e2ediff.regularizer import Regularizer
from e2ediff.sampler import Sampler
from e2ediff.times import TimeSampler
from e2ediff.tracker import Tracker, TrackerConfig


@attrs.frozen(kw_only=True)
class Quadratic(Interpolant):
    """z_t = t^2 x0 + (1 - t) eps."""

    def alpha(self, t: Tensor) -> Tensor:
        return t**2

    def sigma(self, t: Tensor) -> Tensor:
        return 1 - t

    def alpha_dot(self, t: Tensor) -> Tensor:
        return 2 * t

    def sigma_dot(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)


@attrs.frozen(kw_only=True)
class Arcsine(TimeSampler):
    """Times that crowd at both ends."""

    def quantile(self, u: Tensor) -> Tensor:
        return torch.sin(torch.pi / 2 * u).square()


@attrs.frozen(kw_only=True)
class DecodeClean(Objective):
    """Decode what was denoised: the reconstruction is of the clean estimate."""

    def terms(self, nets, batch, draw, phase):
        z = nets.online.encode(batch.x)  # (B, N, D)
        levels = noise_levels(sg(z), draw, nets.path, 1)
        outs = nets.online.run(*(n.denoise() for n in levels))
        clean = levels[0].estimate(outs[0], nets).x0
        losses = {
            "reconstruction": functional.mse_loss(nets.online.decode(z), batch.x),
            "guess": functional.mse_loss(nets.online.decode(clean), batch.x),
            "denoising": mean_clean_loss(outs, levels, sg(z), nets, "x0", 1.0),
        }
        return Terms(losses, {"reconstruction": 1.0, "guess": 0.1, "denoising": 1.0}, z)


@attrs.frozen(kw_only=True)
class SquaredMean(Regularizer):
    """Pull every channel's mean to zero; `weight` multiplies it."""

    weight: float = 0.1

    def loss(self, z, draw):
        return z.mean(dim=(0, 1)).square().mean()


@attrs.frozen(kw_only=True)
class Blend(Guidance):
    """The mean of the answers with the condition and without it."""

    @property
    def asks_null(self) -> bool:
        return True

    def wrap(self, inner: Denoiser) -> Denoiser:
        return _Blended(inner)


class _Blended(Denoiser):
    def __init__(self, inner: Denoiser) -> None:
        self.inner = inner

    @property
    def path(self) -> Interpolant:
        return self.inner.path

    def __call__(self, z_t: Tensor, t: float, condition: Condition) -> Estimate:
        answers = [self.inner(z_t, t, own) for own in (condition, condition.null())]
        x0 = (answers[0].x0 + answers[1].x0) / 2
        return self.path.estimate(x0, z_t, torch.full((len(z_t),), t), "x0")


@attrs.frozen(kw_only=True)
class HalfWay(Sampler):
    """Euler steps by the velocity in the middle of each interval."""

    steps: int = 8

    def step(self, f, z, t, s, condition, noise):
        middle = z + (s - t) / 2 * f(z, t, condition).v
        return z + (s - t) * f(middle, (t + s) / 2, condition).v


@attrs.frozen(kw_only=True)
class Ramps(SourceConfig):
    """Grey ramps, from left to right or from top to bottom."""

    @property
    def image(self) -> ImageSpec:
        return ImageSpec(3, 16, 16, 2, ("across", "down"))

    def open(self, *, held_out: bool = False) -> DataSource:
        return _Ramps(24)


@attrs.frozen
class _Ramps(DataSource):
    count: int

    def __len__(self) -> int:
        return self.count

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        across = (torch.arange(16, dtype=torch.uint8) * 10).expand(3, 16, 16)
        images = [(across if i % 2 == 0 else across.mT) + i for i in indices]
        return torch.stack(images), torch.tensor(indices) % 2


@attrs.frozen(kw_only=True)
class RMSProp(OptimizerConfig):
    """torch's RMSprop at a constant rate, `lr`."""

    lr: float = 1e-3

    def build(self, named: Sequence[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return torch.optim.RMSprop([p for _, p in named], lr=self.lr)

    def factor(self, images: int, total: int) -> float:
        return 1.0


@attrs.frozen(kw_only=True)
class LargestLatent(Diagnostic):
    """The largest number in any latent."""

    def measure(self, probe: Probe) -> Mapping[str, float]:
        return {"largest": float(probe.z.abs().max())}


@attrs.frozen(kw_only=True)
class Notebook(TrackerConfig):
    """Figures as lines of text, in `notebook.txt` of the run's directory."""

    def open(self, directory: str) -> Tracker:
        return _Notebook(Path(directory) / "notebook.txt")


class _Notebook(Tracker):
    def __init__(self, path: Path) -> None:
        self.path = path

    def _write(self, line: str) -> None:
        with self.path.open("a") as file:
            file.write(f"{line}\n")

    def log(self, images: int, values: Mapping[str, float]) -> None:
        self._write(f"{images} {sorted(values)}")

    def picture(self, images: int, name: str, x: Tensor) -> None:
        self._write(f"{images} {name} {tuple(x.shape)}")

    def close(self) -> None:
        self._write("closed")


@attrs.frozen(kw_only=True)
class Blurs(FeatureConfig):
    """The image, and the image at half and quarter size."""

    def build(self) -> FeatureNetwork:
        return _Blurs().eval()


class _Blurs(FeatureNetwork):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [x, functional.avg_pool2d(x, 2), functional.avg_pool2d(x, 4)]


@attrs.frozen(kw_only=True)
class MeanGap(Metric):
    """Squared distance of the features' means."""

    better: ClassVar[Better] = "low"
    moments: ClassVar[tuple[str, ...]] = ("pool",)

    def measure(self, made: FeatureSet, real: FeatureSet) -> Mapping[str, MetricValue]:
        gap = made.moments["pool"].mean - real.moments["pool"].mean
        return {"mean_gap": MetricValue(float(gap.square().sum()))}


@attrs.frozen(kw_only=True)
class LastFew(Averaging):
    """Roughly the mean of the last `window` updates' weights."""

    window: int = 3

    def decay_at(self, update: int) -> float:
        return 1 - 1 / min(update, self.window)


@hookimpl
def register(add):
    add("backbones", "tiny", TinyBackbone)
    add("interpolants", "quadratic", Quadratic)
    add("time_samplers", "arcsine", Arcsine)
    add("objectives", "decode_clean", DecodeClean)
    add("regularizers", "squared_mean", SquaredMean)
    add("guidance", "blend", Blend)
    add("samplers", "half_way", HalfWay)
    add("sources", "ramps", Ramps)
    add("optimizers", "rmsprop", RMSProp)
    add("diagnostics", "largest_latent", LargestLatent)
    add("trackers", "notebook", Notebook)
    add("metrics", "mean_gap", MeanGap)
    add("features", "blurs", Blurs)
    add("averages", "last_few", LastFew)
