"""What transformer backbones share that cut an image into square patches.

Shapes: B batch, C H W image, N latent tokens, D latent channels, P patches, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import torch
from attrs import validators
from torch import nn

from e2ediff.backbone import Backbone, BackboneConfig, LatentSpec, patch_problems
from e2ediff.data import ImageSpec
from e2ediff.latent import LatentNorm
from e2ediff.nn.attention import Backend, use_attention
from e2ediff.nn.layers import SelfAttention


@attrs.frozen(kw_only=True)
class PatchConfig(BackboneConfig):
    """Options of every backbone of patches.

    `width`, `depth` and `heads` shape the transformer; `patch` is the side of a patch in pixels.
    `attention` names a kernel, as `e2ediff.nn.attention.choose_attention` takes it.
    """

    width: int = attrs.field(validator=validators.gt(0))
    depth: int = attrs.field(validator=validators.gt(0))
    heads: int = attrs.field(validator=validators.gt(0))
    patch: int = attrs.field(validator=validators.gt(0))
    attention: Backend = "auto"

    def problems(self, image: ImageSpec) -> list[tuple[str, str]]:
        """Patches that do not tile the images."""
        return patch_problems(image, self.patch)

    def grid(self, image: ImageSpec) -> tuple[int, int]:
        """Rows and columns of patches."""
        return image.height // self.patch, image.width // self.patch


class PatchBackbone(Backbone):
    """A backbone of patches, without its layers: the latent, its norm, blocks and kernels.

    `grid` has the rows and columns of patches.

    Args:
        config: The options; a subclass that reads more of them declares their class.
        image: The images.
        latent: The latent's shape and norm.
        context: The number of tokens that join those of the latent in attention.
    """

    config: PatchConfig

    def __init__(
        self, config: PatchConfig, image: ImageSpec, latent: LatentSpec, context: int = 0
    ) -> None:
        super().__init__()
        self.config, self.image, self.latent = config, image, latent
        self.grid = config.grid(image)
        self.latent_norm = LatentNorm(latent.norm, latent.tokens, latent.dim)
        self._attended = latent.tokens + context

    def blocks(self) -> Sequence[nn.Module]:
        """Every module that attends, with what surrounds its attention."""
        return [
            block
            for block in self.modules()
            if any(isinstance(child, SelfAttention) for child in block.children())
        ]

    def prepare(self, device: torch.device, dtype: torch.dtype) -> Mapping[str, str]:
        """Choose the attention kernel and give it to every block."""
        return use_attention(self, self.config.attention, device, dtype, self._attended)
