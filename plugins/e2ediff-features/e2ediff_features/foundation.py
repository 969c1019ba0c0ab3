"""DINOv2's and CLIP's image encoders, built from the shapes of a state dict and loaded by name.

Shapes: B batch, N tokens, D width, F features.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection
from typing import Literal

import attrs
import torch
from attrs import validators
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from e2ediff import addresses
from e2ediff.data import pixel_values
from e2ediff.errors import DataError
from e2ediff.features import FeatureConfig, FeatureNetwork, load_weights, read_weights

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def resize_bicubic(pixels: Tensor, size: int) -> Tensor:
    """Bicubic with antialiasing to (B, C, size, size), clipped to 0..255; the same size stays."""
    if pixels.shape[2:] == (size, size):
        return pixels
    grown = functional.interpolate(pixels, (size, size), mode="bicubic", antialias=True)
    return grown.clamp(0, 255)


class _Vision(FeatureNetwork):
    """What both encoders share: input scaling, and the class token as the only vector."""

    mean: Tensor
    std: Tensor

    def _set_up(self, title: str, size: int, scaling: tuple[tuple[float, ...], ...]) -> None:
        self.title, self.size = title, size
        mean, std = scaling
        self.register_buffer("mean", torch.tensor(mean).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(3, 1, 1), persistent=False)
        self.requires_grad_(requires_grad=False)
        self.eval()

    def _prepared(self, pixels: Tensor) -> Tensor:
        x = resize_bicubic(pixels, self.size) / 255
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        return (x - self.mean) / self.std

    @abstractmethod
    def _tokens(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D) of prepared images, the class token first and patches last."""

    def forward(self, x: Tensor) -> list[Tensor]:
        """The last block's patch tokens as one map."""
        z = self._tokens(self._prepared(pixel_values(x)))
        side = math.isqrt(z.shape[1] - 1)
        patches = z[:, -side * side :]
        return [patches.transpose(1, 2).reshape(len(z), -1, side, side)]


class _DinoAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, width // 64, 64).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(y.transpose(1, 2).flatten(2))
        return out


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))


class _DinoBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn = _DinoAttention(width)
        self.ls1, self.ls2 = _Scale(width), _Scale(width)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)}
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1.gamma * self.attn(self.norm1(x))
        hidden = functional.gelu(self.mlp["fc1"](self.norm2(x)))
        out: Tensor = x + self.ls2.gamma * self.mlp["fc2"](hidden)
        return out


class DINOv2Network(_Vision):
    """DINOv2's ViT, without SwiGLU; its vector is the class token after the last norm.

    Source: Oquab et al. 2023 (arXiv 2304.07193), released code; the use for Fréchet distances is
    that of Stein et al. 2023 (arXiv 2306.04675).
    """

    def __init__(self, state: dict[str, Tensor], title: str, size: int) -> None:
        super().__init__()
        width, _, patch, _ = state["patch_embed.proj.weight"].shape
        depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
        self.patch = patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        self.pos_embed = nn.Parameter(torch.zeros(state["pos_embed"].shape))
        self.register_tokens: nn.Parameter | None = None
        if "register_tokens" in state:
            self.register_tokens = nn.Parameter(torch.zeros(state["register_tokens"].shape))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.blocks = nn.ModuleList(_DinoBlock(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self._set_up(title, size, _IMAGENET)

    def _positions(self, side: int) -> Tensor:
        """Position codes (1, 1 + side^2, D), resized as the released code does."""
        stored = math.isqrt(self.pos_embed.shape[1] - 1)
        if side == stored:
            return self.pos_embed
        first, rest = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        grid = rest.transpose(1, 2).reshape(1, -1, stored, stored)
        if self.register_tokens is not None:  # those models were released with another rule
            grid = functional.interpolate(grid, (side, side), mode="bicubic", antialias=True)
        else:
            # The offset keeps a rounding error from losing a row.
            factor = (side + 0.1) / stored
            grid = functional.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
        return torch.cat([first, grid.flatten(2).transpose(1, 2)], dim=1)

    def _tokens(self, x: Tensor) -> Tensor:
        z = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)  # (B, N, D)
        first = self.cls_token.expand(len(z), -1, -1)
        z = torch.cat([first, z], dim=1) + self._positions(self.size // self.patch)
        if self.register_tokens is not None:
            extra = self.register_tokens.expand(len(z), -1, -1)
            z = torch.cat([z[:, :1], extra, z[:, 1:]], dim=1)
        for block in self.blocks:
            z = block(z)
        out: Tensor = self.norm(z)
        return out

    @override
    def vectors(self, pixels: Tensor, taps: Collection[str] = ("pool",)) -> dict[str, Tensor]:
        return {"pool": self._tokens(self._prepared(pixels))[:, 0]}


class _ClipBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, width // 64, batch_first=True)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)}
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        hidden = self.mlp["c_fc"](self.ln_2(x))
        # OpenAI's approximation of GELU, with which its weights were trained.
        out: Tensor = x + self.mlp["c_proj"](hidden * torch.sigmoid(1.702 * hidden))
        return out


class CLIPNetwork(_Vision):
    """CLIP's image encoder; its vector is the projected class token, not normalised.

    Source: Radford et al. 2021 (arXiv 2103.00020), released code.
    """

    family = "clip"

    def __init__(self, state: dict[str, Tensor], title: str) -> None:
        super().__init__()
        width, _, patch, _ = state["conv1.weight"].shape
        tokens = len(state["positional_embedding"])
        depth = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("transformer."))
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(tokens, width))
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        blocks = nn.Sequential(*(_ClipBlock(width) for _ in range(depth)))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.proj = nn.Parameter(torch.zeros_like(state["proj"]))
        self._set_up(title, patch * math.isqrt(tokens - 1), _CLIP)

    def _tokens(self, x: Tensor) -> Tensor:
        z = self.conv1(x).flatten(2).transpose(1, 2)  # (B, N, D)
        first = self.class_embedding.expand(len(z), 1, -1)
        z = self.ln_pre(torch.cat([first, z], dim=1) + self.positional_embedding)
        out: Tensor = self.transformer["resblocks"](z)
        return out

    @override
    def vectors(self, pixels: Tensor, taps: Collection[str] = ("pool",)) -> dict[str, Tensor]:
        return {"pool": self.ln_post(self._tokens(self._prepared(pixels))[:, 0]) @ self.proj}


Model = Literal["vit_s14", "vit_b14", "vit_l14"]
_SIZES: dict[Model, tuple[int, int]] = {  # width and number of blocks
    "vit_s14": (384, 12),
    "vit_b14": (768, 12),
    "vit_l14": (1024, 24),
}


def _shapes(model: Model) -> dict[str, Tensor]:
    """Tensors without numbers, of the shapes from which a network of this name is built."""
    width, depth = _SIZES[model]
    shapes = {
        "patch_embed.proj.weight": (width, 3, 14, 14),
        "pos_embed": (1, 1 + 37**2, width),  # of 518 pixels
        f"blocks.{depth - 1}.norm1.weight": (width,),
    }
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@attrs.frozen(kw_only=True)
class DINOv2(FeatureConfig):
    """DINOv2's ViT-S, B or L, for FD-DINOv2.

    `weights` is the path or URL of the released state dict (`dinov2_vitl14_pretrain.pth`) or of a
    safetensors file with its names; `sha256` its hash, checked before it is parsed.
    `size` is the height and width that images are brought to, with antialiased bicubic filter.
    `model` is the ViT whose weights these are; where it is named, shapes and cost are known on a
    machine without the file. Weights of another are refused.
    `title` names it in scores.

    Source: Oquab et al. 2023 (arXiv 2304.07193); FD-DINOv2 of Stein et al. 2023 (arXiv
    2306.04675) uses ViT-L/14 at 224 pixels.
    """

    weights: str = attrs.field(converter=addresses.plain, validator=addresses.allowed)
    sha256: str | None = None
    model: Model | None = None
    size: int = attrs.field(default=224, validator=validators.ge(14))
    title: str = "DINOv2"

    @override
    def blank(self) -> FeatureNetwork:
        return self.build() if self.model is None else self._shaped(_shapes(self.model))

    @override
    def build(self) -> FeatureNetwork:
        state, _ = read_weights(self.weights, self.sha256)
        missing = {"patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"} - {*state}
        if missing:
            raise DataError(
                f"feature network: {self.weights} does not fit {self.title}: it has no "
                f"{', '.join(sorted(missing))}. Give the released state dict of ViT-S/14, B/14 or "
                "L/14; the giant has another MLP and is not offered."
            )
        network = self._shaped(state if self.model is None else {**state, **_shapes(self.model)})
        load_weights(network, state, self.weights, self.model or self.title)
        return network

    def _shaped(self, state: dict[str, Tensor]) -> DINOv2Network:
        return DINOv2Network(state, self.title, self.size)


@attrs.frozen(kw_only=True)
class CLIP(FeatureConfig):
    """CLIP's image encoder, for CMMD.

    `weights` is the path or URL of a state dict with OpenAI's names (`visual.conv1.weight`, ...),
    as a `.pt` file of tensors or safetensors; OpenAI's own files are TorchScript programs and are
    refused. `sha256` is its hash, checked before it is parsed.
    `title` names it in scores; CMMD was published with ViT-L/14 at 336 pixels.
    Images are brought to the network's size with antialiased bicubic filter.

    Source: Radford et al. 2021 (arXiv 2103.00020); Jayasumana et al. 2024 (CMMD, arXiv
    2401.09603).
    """

    weights: str = attrs.field(converter=addresses.plain, validator=addresses.allowed)
    sha256: str | None = None
    title: str = "CLIP"

    @override
    def build(self) -> FeatureNetwork:
        state, _ = read_weights(self.weights, self.sha256)
        prefix = "visual."
        own = {k.removeprefix(prefix): v.float() for k, v in state.items() if k.startswith(prefix)}
        missing = {"conv1.weight", "positional_embedding", "proj", "class_embedding"} - {*own}
        if missing:
            raise DataError(
                f"feature network: {self.weights} does not fit {self.title}: it has no "
                f"{', '.join(sorted(prefix + name for name in missing))}"
            )
        network = CLIPNetwork(own, self.title)
        load_weights(network, own, self.weights, self.title)
        return network
