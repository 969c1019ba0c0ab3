"""The judge: a small classifier of real images, and the scores that are read off it.

Its features are of this benchmark alone: distances in them compare runs that were scored by
the same judge, and are not FIDs.

Shapes: M images, C H W image, F features.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import attrs
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from e2ediff.data import SourceConfig, from_pixels
from e2ediff.distances import frechet
from e2ediff.metric import moments_of
from e2ediff.parts.sources import FashionMNIST

FEATURES = 64
"""F, the width of the penultimate layer."""

EPOCHS = 16
"""Passes over the training images; more do not raise the held-out accuracy."""

_BATCH = 64
_VERSION = 1  # of the network and its training, so that a cache of another one is not used


class Judge(nn.Module):
    """Three convolutions and a layer of 64 features."""

    def __init__(self, channels: int = 1, size: int = 32, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((channels, 16), (16, 32), (32, 64)):
            layers += [
                nn.Conv2d(before, after, 3, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        flat = 64 * (size // 8) ** 2
        self.body = nn.Sequential(
            *layers, nn.Flatten(), nn.Dropout(0.4), nn.Linear(flat, FEATURES), nn.ReLU()
        )
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (M, F) and class scores of images (M, C, H, W) in [-1, 1]."""
        f = self.body(x)
        return f, self.head(f)


@attrs.frozen(eq=False)
class Images:
    """Images `x` (M, C, H, W) in [-1, 1] and their labels (M,)."""

    x: Tensor
    label: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def first(self, count: int) -> Images:
        """The first `count` of them; all, if there are fewer."""
        return Images(self.x[:count], self.label[:count])

    def mixed(self) -> Images:
        """The same in another order, the same for every call."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(0))
        return Images(self.x[order], self.label[order])


def load_images(source: SourceConfig, *, held_out: bool = False) -> Images:
    """All images of a source that fits into memory.

    Held-out images that come class after class are mixed, always in the same way: the first of
    them, which scores are taken on, are to be of all classes.
    """
    opened = source.open(held_out=held_out)
    x, label = opened.read(range(len(opened)))
    found = Images(from_pixels(x), label)
    sorted_ = bool((label.diff() >= 0).all())
    return found.mixed() if held_out and sorted_ else found


def train_judge(
    seed: int,
    cache: str | Path,
    source: SourceConfig | None = None,
    *,
    epochs: int = EPOCHS,
) -> Judge:
    """A judge trained on the source's training images, in eval mode.

    The seed decides weights, order and shifts.
    The weights are kept in `cache` under a name that has the seed and a digest of the images,
    and are read from there the next time.

    Args:
        seed: Of all randomness.
        cache: Folder of the weights; created if need be.
        source: By default the bundled Fashion-MNIST, padded to 32 pixels.
        epochs: Passes over the images.
    """
    source = source or FashionMNIST(size=32)
    images, spec = load_images(source), source.image
    file = Path(cache) / f"judge-{seed}-{_digest(images, epochs)}.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge(spec.channels, spec.width, spec.classes)
        if file.exists():
            judge.load_state_dict(load_file(file))
            return judge.eval()
        _fit(judge, images, epochs)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".part")
    save_file(judge.state_dict(), partial)
    partial.replace(file)
    return judge.eval()


def _fit(judge: Judge, images: Images, epochs: int) -> None:
    """Train in place, with shifts of up to a pixel; randomness from torch's generator."""
    steps = math.ceil(len(images) / _BATCH)
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * steps)
    judge.train()
    for epoch in range(epochs):
        for rows in torch.split(torch.randperm(len(images)), _BATCH):
            x = images.x[rows]
            if epoch % 2:
                x = torch.roll(x, torch.randint(-1, 2, (2,)).tolist(), (2, 3))
            loss = functional.cross_entropy(judge(x)[1], images.label[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()


def _digest(images: Images, epochs: int) -> str:
    content = hashlib.sha256(f"{_VERSION} {epochs} {tuple(images.x.shape)}".encode())
    content.update(images.x.numpy().tobytes())
    content.update(images.label.numpy().tobytes())
    return content.hexdigest()[:12]


@torch.no_grad()
def features(judge: Judge, x: Tensor) -> Tensor:
    """Features (M, F) of images (M, C, H, W) in [-1, 1]."""
    return torch.cat([judge(part)[0] for part in torch.split(x, 500)])


@torch.no_grad()
def accuracy(judge: Judge, x: Tensor, label: Tensor) -> float:
    """Share of images that the judge takes for what their label says."""
    guesses = torch.cat([judge(part)[1].argmax(dim=1) for part in torch.split(x, 500)])
    return float((guesses == label).double().mean())


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Fréchet distance of the Gaussians fitted to rows a (M, F) and b (K, F)."""
    return frechet(moments_of(a), moments_of(b))


def pixel_components(images: Tensor, count: int = FEATURES) -> tuple[Tensor, Tensor]:
    """Mean (P,) and first `count` principal axes (P, count) of images (M, C, H, W).

    Coordinates in them are features that no classifier chose: they see brightness and contrast,
    to which a judge may be blind.
    """
    rows = images.flatten(1).double()  # (M, P)
    mean = rows.mean(dim=0)
    content = rows - mean
    axes = torch.linalg.eigh(content.T @ content)[1].flip(1)  # by falling variance
    return mean, axes[:, :count]


def pixel_distance(x: Tensor, train: Tensor, basis: tuple[Tensor, Tensor]) -> float:
    """Squared Fréchet distance of images (M, C, H, W) to `train`, in `pixel_components`."""
    mean, axes = basis
    a, b = ((one.flatten(1).double() - mean) @ axes for one in (x, train))
    return frechet_distance(a, b)


def nearest_distance(x: Tensor, train: Tensor) -> float:
    """Mean L2 distance of images (M, C, H, W) in [-1, 1] to the nearest image of `train`.

    Copies of training images have 0; held-out images say what is usual.
    """
    rows, others = x.flatten(1), train.flatten(1)
    nearest = [torch.cdist(part, others).amin(dim=1) for part in torch.split(rows, 500)]
    return float(torch.cat(nearest).double().mean())


class _Grey(nn.Module):
    """The judge's features of images (M, 3, H, W) in [-1, 1] whose channels are equal."""

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.body = judge.body

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.body(x[:, :1])
        return features


def export_judge(judge: Judge, file: Path, size: int = 32) -> str:
    """Write a grey judge as a feature network of `e2ediff eval`; the block that names it."""
    example = (torch.zeros(2, 3, size, size),)
    shapes = ({0: torch.export.Dim("batch")},)
    with torch.no_grad():
        program = torch.export.export(_Grey(judge).eval(), example, dynamic_shapes=shapes)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, str(file))
    half = "[0.5, 0.5, 0.5]"
    return f"{{name: exported, weights: {file}, size: {size}, mean: {half}, std: {half}}}"
