"""The Inception network of 2015, whose features FID, sFID and the Inception Score are read off.

It differs from torchvision's Inception v3: 1008 classes, average pools that leave the padding
out, a max pool in the last block, and TensorFlow 1's bilinear resize. Modules are named as in
the published PyTorch conversion, so that its file loads by name.

Source: Szegedy et al. 2015 (arXiv 1512.00567) for the network; the differences are those of the
graph `classify_image_graph_def.pb`, which ADM's evaluator runs.

Shapes: B batch, C H W image, K channels of a map.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from e2ediff.data import pixel_values
from e2ediff.features import FeatureNetwork

SIZE = 299
SHA256 = "6726825d"
"""What the sha256 of the published file `pt_inception-2015-12-05-6726825d.pth` begins with."""


def resize_tf1(x: Tensor, size: int = SIZE) -> Tensor:
    """Bilinear resize of (B, C, H, W) to `size` pixels, without half-pixel centres.

    Output pixel i reads input position i H / size, and likewise across; corners are not aligned
    and nothing is filtered before shrinking. Images that are not square are stretched to one.

    Source: TensorFlow 1.x `resize_bilinear` with `align_corners=False`.
    """
    height, width = (_weights(n, size, x) for n in x.shape[2:])
    low, high, part = width
    x = x[..., low] + (x[..., high] - x[..., low]) * part
    low, high, part = height
    top, bottom = x[..., low, :], x[..., high, :]
    return top + (bottom - top) * part[:, None]


def _weights(before: int, after: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = torch.tensor(before / after, dtype=torch.float32, device=x.device)
    place = torch.arange(after, dtype=x.dtype, device=x.device) * scale
    low = place.long()
    return low, (low + 1).clamp_max(before - 1), place - low


class _Conv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self, before: int, after: int, kernel: int | tuple[int, int], stride: int, *, padded: bool
    ) -> None:
        super().__init__()
        high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (high // 2, wide // 2) if padded else 0
        self.conv = nn.Conv2d(before, after, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(after, eps=0.001)

    @override
    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)))


# A step of a branch: (name, channels, kernel) or with stride 2 (name, channels, kernel, 2), a
# pool by name, or several steps side by side whose outputs are joined.
_Step = tuple[object, ...] | str | list[tuple[object, ...]]
_ROW, _COLUMN = (1, 7), (7, 1)


def _block_a(pool: int) -> list[list[_Step]]:
    return [
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        ["average", ("branch_pool", pool, 1)],
    ]


def _block_b() -> list[list[_Step]]:
    return [
        [("branch3x3", 384, 3, 2)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
        ["halve"],
    ]


def _block_c(c: int) -> list[list[_Step]]:
    return [
        [("branch1x1", 192, 1)],
        [("branch7x7_1", c, 1), ("branch7x7_2", c, _ROW), ("branch7x7_3", 192, _COLUMN)],
        [
            ("branch7x7dbl_1", c, 1),
            ("branch7x7dbl_2", c, _COLUMN),
            ("branch7x7dbl_3", c, _ROW),
            ("branch7x7dbl_4", c, _COLUMN),
            ("branch7x7dbl_5", 192, _ROW),
        ],
        ["average", ("branch_pool", 192, 1)],
    ]


def _block_d() -> list[list[_Step]]:
    return [
        [("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
        [
            ("branch7x7x3_1", 192, 1),
            ("branch7x7x3_2", 192, _ROW),
            ("branch7x7x3_3", 192, _COLUMN),
            ("branch7x7x3_4", 192, 3, 2),
        ],
        ["halve"],
    ]


def _block_e(pool: str) -> list[list[_Step]]:
    return [
        [("branch1x1", 320, 1)],
        [
            ("branch3x3_1", 384, 1),
            [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))],
        ],
        [
            ("branch3x3dbl_1", 448, 1),
            ("branch3x3dbl_2", 384, 3),
            [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))],
        ],
        [pool, ("branch_pool", 192, 1)],
    ]


class _Mixed(nn.Module):
    """Branches side by side, whose outputs are joined."""

    def __init__(self, before: int, branches: Sequence[Sequence[_Step]]) -> None:
        super().__init__()
        self.branches = branches
        for branch in branches:
            channels = before
            for step in branch:
                forks = step if isinstance(step, list) else [step]
                for fork in forks:
                    if not isinstance(fork, str):
                        name, after, kernel, *stride = fork
                        conv = _Conv(channels, after, kernel, *(stride or [1]), padded=not stride)  # type: ignore[arg-type]
                        self.add_module(str(name), conv)
                if not isinstance(step, str):
                    channels = sum(int(fork[1]) for fork in forks)  # type: ignore[call-overload]

    @override
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._branch(branch, x) for branch in self.branches], dim=1)

    def _branch(self, branch: Sequence[_Step], x: Tensor) -> Tensor:
        for step in branch:
            if step == "average":
                x = functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
            elif step == "largest":
                x = functional.max_pool2d(x, 3, 1, 1)
            elif step == "halve":
                x = functional.max_pool2d(x, 3, 2)
            elif isinstance(step, list):
                x = torch.cat([getattr(self, str(fork[0]))(x) for fork in step], dim=1)
            else:
                x = getattr(self, str(step[0]))(x)
        return x


_MAPS = ("64", "192", "768", "2048")


class Inception2015(FeatureNetwork):
    """The network; random until a state dict is loaded.

    Taps: `pool` (2048), `logits` (1008, without the bias, as the Inception Score takes them),
    `spatial` (17 x 17 x 7, the first channels of `mixed_6/conv`, for sFID), and `64`, `192`,
    `768`, the means of the maps of that many channels.

    Source: Nash et al. 2021 (arXiv 2103.03841) for sFID; the place and order of its features are
    those of ADM's evaluator.
    """

    title = "Inception2015"
    taps = ("pool", "logits", "spatial", "64", "192", "768")
    size = SIZE

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, 2, padded=False)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, 1, padded=False)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, 1, padded=True)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1, 1, padded=False)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, 1, padded=False)
        self.Mixed_5b = _Mixed(192, _block_a(32))
        self.Mixed_5c = _Mixed(256, _block_a(64))
        self.Mixed_5d = _Mixed(288, _block_a(64))
        self.Mixed_6a = _Mixed(288, _block_b())
        self.Mixed_6b = _Mixed(768, _block_c(128))
        self.Mixed_6c = _Mixed(768, _block_c(160))
        self.Mixed_6d = _Mixed(768, _block_c(160))
        self.Mixed_6e = _Mixed(768, _block_c(192))
        self.Mixed_7a = _Mixed(768, _block_d())
        self.Mixed_7b = _Mixed(1280, _block_e("average"))
        self.Mixed_7c = _Mixed(2048, _block_e("largest"))
        self.fc = nn.Linear(2048, 1008)
        self.requires_grad_(requires_grad=False)
        self.eval()

    def forward(self, x: Tensor) -> list[Tensor]:
        """The maps of 64, 192, 768 and 2048 channels, of images in [-1, 1]."""
        maps = self._maps(pixel_values(x))
        return [maps[name] for name in _MAPS]

    def vectors(self, pixels: Tensor, taps: Collection[str] = ("pool",)) -> dict[str, Tensor]:
        """Vectors of images with values from 0 to 255, by tap."""
        deep = {"pool", "logits"} & {*taps}
        maps = self._maps(pixels, spatial="spatial" in taps, last="2048" if deep else "768")
        found = {tap: maps[tap].mean(dim=(2, 3)) for tap in taps if tap in ("64", "192", "768")}
        if "spatial" in taps:
            found["spatial"] = maps["spatial"].permute(0, 2, 3, 1).flatten(1)
        if deep:
            pool = maps["2048"].mean(dim=(2, 3))  # (B, 2048)
            found["pool"] = pool
            if "logits" in taps:
                found["logits"] = pool @ self.fc.weight.T
        return {tap: found[tap] for tap in taps}

    def _maps(
        self, pixels: Tensor, *, spatial: bool = False, last: str = "2048"
    ) -> dict[str, Tensor]:
        x = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
        x = (resize_tf1(x) - 128) / 128
        found = {}
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        found["64"] = x = functional.max_pool2d(x, 3, 2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        found["192"] = x = functional.max_pool2d(x, 3, 2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        if spatial:
            found["spatial"] = self.Mixed_6d.get_submodule("branch1x1")(x)[:, :7]
        found["768"] = x = self.Mixed_6e(self.Mixed_6d(x))
        if last == "2048":
            found["2048"] = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return found
