"""REPA-E: the autoencoder learns from an alignment that it sees through the denoiser.

Shapes: B batch, C H W image, N latent tokens, D latent channels, W trunk width, K features.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar

import attrs
from attrs import validators
from torch import Tensor, nn

from e2ediff.alignment import (
    FEATURES,
    alignment_problems,
    cosine_distance,
    feature_width,
    features_at_tokens,
    fixed_network,
)
from e2ediff.backbone import Backbone, Decode
from e2ediff.data import Batch
from e2ediff.features import FeatureConfig
from e2ediff.losses import (
    AutoencoderObjective,
    Noised,
    Space,
    mean_clean_loss,
    noise_levels,
    unfit_prediction,
)
from e2ediff.objective import Draw, Nets, Terms, sg


@attrs.frozen(kw_only=True)
class RepaE(AutoencoderObjective):
    """The denoiser's early tokens are aligned with a fixed network's, and so is the encoder.

        denoising   |v(sg(z_t), t) - v|^2, which does not train the encoder
        align       1 - cos(P h(z_t), phi(x)), h the tokens of block `align_block`

    The second reaches the encoder through z_t, with `encoder_weight`, and the denoiser and the
    projector P with `align_weight`; both use the same times and noise.

    Options:
        features: The fixed network phi, whose last map is resized to the rows and columns of the
            latent grid. A network that stretches images to squares is stretched back by that.
        feature_dim: K, the channels of that map; by default those that the network has.
        align_block: The block (1 is the first) whose tokens are aligned; 0 picks a third of the
            depth.
        projector_width: Width of the projector's two hidden layers; by default that of the trunk.
        align_weight, encoder_weight: Weights of the alignment for the denoiser, and for the
            encoder.
        denoising_weight: Weight of the denoising loss.
        weight: The space whose weight multiplies the clean error; `v` is the velocity loss.
        clamp: Largest such weight.
        reconstruction: Compares decoded images with the originals.

    Source: REPA-E (Leng et al. 2025, arXiv 2504.10483), section 3: the stopped diffusion loss,
    alignment through the denoiser with 1.5 for the encoder and 0.5 for the denoiser, block 8 of
    28, and batch-normalised latents; REPA (arXiv 2410.06940) for the cosine and a three-layer
    projector. Ours: 1 - cos, a third of the depth, no KL and no adversary, and training from
    scratch. Theirs freezes the denoiser in the encoder's update; here one pass serves both,
    with the gradient into z_t scaled by the ratio of the two weights, which is the same.
    The released code has `projector_width: 2048`; in the encoder's update it drops no label and
    normalises latents by the running mean and variance, where ours are those of the denoiser's
    pass, with the batch's own statistics. `adversary` around this objective adds its critic.
    """

    static_graph: ClassVar[bool] = True

    trial: ClassVar[tuple[str, ...]] = ("objective.features={name: random_projection, width: 16}",)

    features: FeatureConfig | None = None
    feature_dim: int | None = attrs.field(
        default=None, validator=validators.optional(validators.ge(1))
    )
    projector_width: int | None = attrs.field(
        default=None, validator=validators.optional(validators.ge(1))
    )
    align_block: int = attrs.field(default=0, validator=validators.ge(0))
    align_weight: float = attrs.field(default=0.5, validator=validators.gt(0))
    encoder_weight: float = attrs.field(default=1.5, validator=validators.ge(0))
    denoising_weight: float = attrs.field(default=1.0, validator=validators.ge(0))
    weight: Space = "v"
    clamp: float = attrs.field(default=400.0, validator=validators.gt(0))

    def terms(self, nets: Nets, batch: Batch, draw: Draw, phase: str) -> Terms:
        """Return the reconstruction, the stopped denoising loss, and the alignment."""
        net = nets.online
        block = self.align_block or max(1, round(net.depth / 3))
        z = net.encode(batch.x)  # (B, N, D)
        (level,) = noise_levels(sg(z), draw, nets.path, 1)
        ratio = self.encoder_weight / self.align_weight
        scaled = sg(z) + ratio * (z - sg(z))  # z, whose gradient is multiplied
        z_t = nets.path.mix(scaled, level.eps, level.draw.t)
        aligned = attrs.evolve(level, z_t=z_t)
        decoded, answer, early = net.outputs(
            Decode(z=z), level.denoise(), aligned.denoise((block,))
        )
        guess = nets.heads["align"](early.features[block]).float()  # (B, N, K)
        losses = {
            "reconstruction": self.reconstruction(decoded.value, batch.x, nets.frozen),
            "denoising": self._denoising(answer.value, level, sg(z), nets),
            "align": cosine_distance(guess, features_at_tokens(nets, batch.x, guess.shape[-1])),
        }
        weights = {"denoising": self.denoising_weight, "align": self.align_weight}
        return Terms(losses, {"reconstruction": 1.0, **weights}, z, decoded=decoded.value)

    def _denoising(self, answer: Tensor, level: Noised, target: Tensor, nets: Nets) -> Tensor:
        return mean_clean_loss([answer], [level], target, nets, self.weight, self.clamp)

    def stops(self, phase: str) -> Collection[str]:
        """Return the denoising loss; the alignment too where it is the denoiser's alone."""
        return ("denoising",) if self.encoder_weight > 0 else ("denoising", "align")

    def problems(self, nets: Nets) -> Sequence[tuple[str, str]]:
        """Find no features to align with, or to align; latents without a norm or a place."""
        net, found = nets.online, unfit_prediction(nets, self.weight)
        if self.features is None:
            what = (
                "repa_e aligns with a fixed network: name one, such as "
                "`features: efficientnet_lite0`"
            )
            found.append(("objective.features", what))
        else:
            found += alignment_problems(net, self.features, self.feature_dim)
        if net.depth == 0:
            what = "repa_e needs a backbone that offers features; choose another, such as vit"
            found.append(("backbone", what))
        elif self.align_block > net.depth:
            what = f"{self.align_block} is past the last block, {net.depth}"
            found.append(("objective.align_block", what))
        if net.latent.norm in ("none", "affine"):
            what = (
                f"{net.latent.norm} lets the encoder outgrow the noise in z_t, which eases "
                "alignment; set backbone.latent_norm: batch, or layer or position, of a backbone "
                "that has it, such as vit"
            )
            found.append(("backbone.latent_norm", what))
        return found

    def heads(self, backbone: Backbone) -> nn.ModuleDict:
        """Return the projector P, of three layers.

        Raises:
            DataError: `feature_dim` is left to the feature network, which is not there.
        """
        w, width = backbone.width, self.feature_dim
        if width is None:
            # Without features `problems` says so.
            width = feature_width(self.features, backbone.image) if self.features else w
        h = self.projector_width or w
        hidden = [nn.Linear(w, h), nn.SiLU(), nn.Linear(h, h), nn.SiLU()]
        return nn.ModuleDict({"align": nn.Sequential(*hidden, nn.Linear(h, width))})

    def frozen(self, backbone: Backbone) -> nn.ModuleDict:
        """Return the feature network, and the perceptual one where it is named.

        Raises:
            ShapeError: The feature network's last map has not `feature_dim` channels.
        """
        found = super().frozen(backbone)
        if self.features is not None:
            found[FEATURES] = fixed_network(self.features, self.feature_dim, backbone.image)
        return found
