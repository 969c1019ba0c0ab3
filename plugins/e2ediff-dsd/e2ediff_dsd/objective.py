"""The DSD objective, with every switch of the unified formulation.

Shapes: B batch, C H W image, N latent tokens, D latent channels, W trunk width.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, Literal

import attrs
import torch
from attrs import validators
from torch import Tensor, nn
from torch.nn import functional

from e2ediff.alignment import (
    FEATURES,
    alignment_problems,
    cosine_distance,
    feature_width,
    features_at_tokens,
    fixed_network,
)
from e2ediff.backbone import Backbone, Decode, Encode, Output
from e2ediff.condition import class_labels
from e2ediff.data import Batch
from e2ediff.features import FeatureConfig
from e2ediff.losses import (
    AutoencoderObjective,
    DecodeNoise,
    Noised,
    Space,
    clean_loss,
    direct_loss,
    noise_levels,
    unfit_prediction,
)
from e2ediff.objective import Draw, Nets, Terms, sg
from e2ediff_dsd.augment import Augmentation

_SHARE = [validators.ge(0.0), validators.le(1.0)]
_WEIGHT = validators.ge(0.0)

Teacher = Literal["ema", "features"]


@attrs.frozen(kw_only=True)
class DSD(AutoencoderObjective):
    """Diffusion as self-distillation: the denoiser predicts an EMA encoder's clean latent.

    The unified form: with z1 the online latent of the augmented image and z2 the target latent,

        z_in  = gamma z1 + (1 - gamma) sg(z1)      gamma = `input_gradient`
        z_tar = beta z2 + (1 - beta) sg(z2)        beta  = `target_gradient`
        z_t   = alpha z_in + sigma eps

    and the denoiser's answer is compared with z_tar in the space `regress`.
    DSD is gamma 1, beta 0, `regress` x0, `target` ema.
    Naive training is gamma 1, beta 1, `regress` v, `target` online; UNITE's stop-gradients are
    gamma 0, beta 0.

    Options:
        input_gradient: gamma, the share of gradient into the encoder through the noised latent.
        target_gradient: beta, the share through the target; above 0 only with `target` online.
        regress: `x0` compares clean latents. `v` and `eps` compare velocities and noises; with
            gamma above 0 and beta 0 they drive weak modes of the latent to zero.
        target: Whose latents are the target: the `ema` encoder's or the `online` one's.
        weight: The space whose weight multiplies the clean error; `x0` is unweighted.
        clamp: Largest such weight.
        draws: Noise levels trained on for each reconstruction.
        reconstruction: Compares decoded images with the unaugmented ones.
        decode_noise: Noise on latents before decoding.
        augmentation: The online view.
        denoising_weight, align_weight, repr_weight, class_weight: Weights of the terms beside
            reconstruction; 0 leaves a term out.
        align_student, align_teacher: Blocks (1 is the first; 0 picks a third and two thirds of
            the depth) whose tokens the layer alignment compares; the teacher's is one of the EMA
            encoder.
        align_with, repr_with: Whom `align` and `repr` learn from: the `ema` encoder, or
            `features`, the fixed network of that option.
        features: A network trained before, such as `dinov2`, whose last map is resized to the
            rows and columns of the latent grid.
        feature_dim: The channels of that map; by default those that the network has.

    Source: Wang & Zhang 2025 (arXiv 2511.14716), of which the abstract, the introduction and
    figure 1 could be read, and the rest only in summaries: `terms` cites the names that the
    method's steps have there, without numbers of sections. Ours is every number, and what
    `terms` says is ours.
    That the published method learns from a vision foundation network is said by the authors of
    another paper alone (LDM-is-AE, arXiv 2609.37080, table 1: "Gen.+VFM"); where it enters is
    unknown, and `align_with: features` is the likeliest reading (REPA, arXiv 2410.06940). The
    paper's body or its code would settle it.
    """

    static_graph: ClassVar[bool] = True

    input_gradient: float = attrs.field(default=1.0, validator=_SHARE)
    target_gradient: float = attrs.field(default=0.0, validator=_SHARE)
    regress: Space = "x0"
    target: Literal["ema", "online"] = "ema"
    weight: Space = "x0"
    clamp: float = attrs.field(default=400.0, validator=validators.gt(0))
    draws: int = attrs.field(default=1, validator=validators.ge(1))
    decode_noise: DecodeNoise = attrs.field(factory=DecodeNoise)
    augmentation: Augmentation = attrs.field(factory=Augmentation)
    denoising_weight: float = attrs.field(default=1.0, validator=_WEIGHT)
    align_weight: float = attrs.field(default=0.5, validator=_WEIGHT)
    align_student: int = attrs.field(default=0, validator=validators.ge(0))
    align_teacher: int = attrs.field(default=0, validator=validators.ge(0))
    align_with: Teacher = "ema"
    repr_weight: float = attrs.field(default=0.5, validator=_WEIGHT)
    repr_with: Teacher = "ema"
    class_weight: float = attrs.field(default=0.1, validator=_WEIGHT)
    features: FeatureConfig | None = None
    feature_dim: int | None = attrs.field(
        default=None, validator=validators.optional(validators.ge(1))
    )

    def terms(self, nets: Nets, batch: Batch, draw: Draw, phase: str) -> Terms:
        """Losses of one step; the denoising loss reaches the encoder only through z_t."""
        net = nets.online
        student, teacher = self._blocks(net)
        last = (net.depth,) if self.repr_weight > 0 or self.class_weight > 0 else ()
        blocks = {"align": teacher, "repr": net.depth}
        taps = tuple(blocks[name] for name, who in self._teachers.items() if who == "ema")

        # DSD, as two summaries have it: z1 is the online encoder's latent of an augmented image
        # (figure 1 says so of self-distillation), z2 that of an "EMA target encoder".
        view = self.augmentation.colours(batch.x, draw)
        mask = self.augmentation.mask(net.latent.tokens, draw)
        (online,) = net.outputs(Encode(x=view, mask=mask, taps=last))
        with torch.no_grad():
            (averaged,) = nets.target.outputs(Encode(x=batch.x, taps=taps))
        z1 = online.value  # (B, N, D)
        z2 = self._target_latent(nets, batch, z1, averaged)

        # DSD, figure 1: the predictor is given z1, here noised, and no stop-gradient is named
        # there. Gamma, which can set one, is ours.
        z_in = self.input_gradient * z1 + (1 - self.input_gradient) * sg(z1)
        levels = noise_levels(z_in, draw, nets.path, self.draws)
        z_decode = self.decode_noise(z1, draw, nets.path)  # ours, by default off; as UNITE's
        wanted = (student,) if self.align_weight > 0 else ()
        decoded, *answers = net.outputs(Decode(z=z_decode), *(n.denoise(wanted) for n in levels))

        losses = {
            # Ours: what DSD compares images by is not known.
            "reconstruction": self.reconstruction(decoded.value, batch.x, nets.frozen),
            # DSD, "decoupling" and "loss transformation": see `_target_latent` and `_denoising`.
            "denoising": torch.stack(
                [self._denoising(a, n, z2, nets) for a, n in zip(answers, levels, strict=True)]
            ).mean(),
        }
        weights = {"reconstruction": 1.0, "denoising": self.denoising_weight}
        # That the three auxiliary losses exist is DSD's; their forms are ours.
        goals = self._goals(nets, batch.x, averaged, blocks)
        if (
            self.align_weight > 0
        ):  # "ViT layer alignment": as SRA (2505.02831) or REPA (2410.06940)
            guesses = [nets.heads["align"](a.features[student]) for a in answers]
            losses["align"] = torch.stack(
                [cosine_distance(guess, goals["align"]) for guess in guesses]
            ).mean()
            weights["align"] = self.align_weight
        if self.repr_weight > 0:  # "representation-level self-distillation": as BYOL (2006.07733)
            predicted = nets.heads["repr"](online.features[net.depth])
            losses["repr"] = cosine_distance(predicted, goals["repr"])
            weights["repr"] = self.repr_weight
        if self.class_weight > 0:  # "classification loss": of the mean token
            pooled = online.features[net.depth].float().mean(dim=1)  # (B, W)
            losses["class"] = functional.cross_entropy(
                nets.heads["class"](pooled).float(), class_labels(batch.condition)
            )
            weights["class"] = self.class_weight
        return Terms(losses, weights, z1, decoded=decoded.value)

    @property
    def _teachers(self) -> dict[str, Teacher]:
        """Whom each auxiliary loss that has a teacher, and a weight, learns from."""
        given: tuple[tuple[str, float, Teacher], ...] = (
            ("align", self.align_weight, self.align_with),
            ("repr", self.repr_weight, self.repr_with),
        )
        return {name: who for name, weight, who in given if weight > 0}

    def _goals(
        self, nets: Nets, x: Tensor, averaged: Output, blocks: Mapping[str, int]
    ) -> dict[str, Tensor]:
        """The teachers' tokens (B, N, W or K) by loss; the fixed network is run once."""
        goals = {
            name: averaged.features[blocks[name]]
            for name, who in self._teachers.items()
            if who == "ema"
        }
        fixed = [name for name, who in self._teachers.items() if who == "features"]
        if fixed:
            *_, bias = nets.heads[fixed[0]].parameters()
            goals |= dict.fromkeys(fixed, features_at_tokens(nets, x, len(bias)))
        return goals

    def _target_latent(self, nets: Nets, batch: Batch, z1: Tensor, averaged: Output) -> Tensor:
        """z2 (B, N, D), with the share of gradient that beta leaves it.

        Source: DSD's "decoupling" stops the gradient of the target alone; beta is ours.
        """
        if self.target == "ema":
            return sg(averaged.value)
        if not self.augmentation.changes:
            z2 = z1
        else:
            with torch.set_grad_enabled(self.target_gradient > 0):
                z2 = nets.online.encode(batch.x)
        return self.target_gradient * z2 + (1 - self.target_gradient) * sg(z2)

    def _denoising(self, answer: Output, level: Noised, target: Tensor, nets: Nets) -> Tensor:
        """The denoising loss at one noise level.

        Source: DSD's "loss transformation" compares the clean latent, not the velocity, so that
        the predictor's answer has a lower rank than its target; the other spaces are ours.
        """
        guess, t = level.estimate(answer.value, nets), level.draw.t
        if self.regress == "x0":
            return clean_loss(guess, target, nets.path, t, self.weight, self.clamp)
        return direct_loss(guess, target, level.eps, nets.path, t, self.regress, self.clamp)

    def _blocks(self, net: Backbone) -> tuple[int, int]:
        """Student and teacher block of the layer alignment."""
        student = self.align_student or max(1, round(net.depth / 3))
        teacher = self.align_teacher or max(1, round(2 * net.depth / 3))
        return student, teacher

    def stops(self, phase: str) -> Collection[str]:
        """Return the losses whose gradient must not reach the encoder."""
        if self.input_gradient > 0:
            return ()
        found = [] if self.target_gradient > 0 else ["denoising"]
        return [*found, *(["align"] if self.align_weight > 0 else [])]

    def problems(self, nets: Nets) -> Sequence[tuple[str, str]]:
        """Switches that contradict one another, the latent norm, or the backbone."""
        net, found = nets.online, []
        if self.target_gradient > 0 and self.target == "ema":
            found.append(
                (
                    "objective.target_gradient",
                    "must be 0 with target ema, whose encoder has no gradient; set "
                    "objective.target: online to let gradients into the target",
                )
            )
        inflates = self.input_gradient > 0 and self.target_gradient == 0 and self.regress == "x0"
        if inflates and net.latent.norm in ("none", "affine"):
            found.append(
                (
                    "backbone.latent_norm",
                    f"{net.latent.norm} lets DSD inflate the scale of the latents without bound; "
                    "choose layer, batch or position, of a backbone that has them, such as vit, "
                    "or set objective.input_gradient: 0",
                )
            )
        if self.weight != "x0" and self.regress != "x0":
            found.append(
                (
                    "objective.weight",
                    f"applies to regress x0 only; regress {self.regress} has its own weight",
                )
            )
        if not any(where == "backbone.latent_norm" for where, _ in found):
            found += self.decode_noise.problems(nets)
        if self.regress == "x0":
            found += unfit_prediction(nets, self.weight)
        else:
            found += unfit_prediction(nets, self.regress, "objective.regress")
        if self.augmentation.hides and not net.masks:
            found.append(
                (
                    "objective.augmentation.mask_probability",
                    "needs a backbone that can hide patches; set it to 0",
                )
            )
        blocks = {"student": self.align_student}
        if self.align_with == "ema":
            blocks["teacher"] = self.align_teacher
        for name, block in blocks.items():
            if self.align_weight > 0 and net.depth > 0 and block > net.depth:
                found.append(
                    (f"objective.align_{name}", f"{block} is past the last block, {net.depth}")
                )
        found += self._teacher_problems(net)
        needs = {"align": self.align_weight, "repr": self.repr_weight, "class": self.class_weight}
        wanted = [f"objective.{name}_weight" for name, weight in needs.items() if weight > 0]
        if net.depth == 0:
            found += [(w, "needs a backbone that offers features; set it to 0") for w in wanted]
        if self.class_weight > 0 and net.image.classes == 0:
            found.append(("objective.class_weight", "needs labelled data; set it to 0"))
        return found

    def _teacher_problems(self, net: Backbone) -> list[tuple[str, str]]:
        """A fixed network that is missing, or needed by nothing, or that does not fit."""
        unused = [
            (f"objective.{name}_with", f"has no effect with {name}_weight: 0; leave it out")
            for name, who in (("align", self.align_with), ("repr", self.repr_with))
            if who == "features" and name not in self._teachers
        ]
        if unused:
            return unused
        if self.feature_dim is not None and self.features is None:
            what = "counts the channels of a network that is not there; name it in features"
            return [("objective.feature_dim", what)]
        pupils = [name for name, who in self._teachers.items() if who == "features"]
        if not pupils:
            what = (
                "no loss learns from it; set objective.align_with: features, or leave features out"
            )
            return [] if self.features is None else [("objective.features", what)]
        if self.features is None:
            what = (
                f"{' and '.join(f'{name}_with: features' for name in pupils)} "
                "needs a fixed network; name one, such as `features: efficientnet_lite0`"
            )
            return [("objective.features", what)]
        found = [*alignment_problems(net, self.features, self.feature_dim)]
        if self.align_teacher > 0 and "align" in pupils:
            what = (
                "is a block of the EMA encoder, from which align does not learn; leave it out, or "
                "set objective.align_with: ema"
            )
            found.append(("objective.align_teacher", what))
        return found

    def heads(self, backbone: Backbone) -> nn.ModuleDict:
        """Projectors of the auxiliary losses whose weight is not 0.

        Raises:
            DataError: `feature_dim` is left to the feature network, which is not there.
        """
        w, heads = backbone.width, nn.ModuleDict()
        for name, who in self._teachers.items():
            width = self._feature_width(backbone) if who == "features" else w
            heads[name] = nn.Sequential(nn.Linear(w, w), nn.SiLU(), nn.Linear(w, width))
        if self.class_weight > 0:
            heads["class"] = nn.Linear(w, backbone.image.classes)
        return heads

    def _feature_width(self, backbone: Backbone) -> int:
        if self.features is None:  # as `problems` says
            return backbone.width
        return self.feature_dim or feature_width(self.features, backbone.image)

    def frozen(self, backbone: Backbone) -> nn.ModuleDict:
        """The teacher that was trained before, and the perceptual network where it is named.

        Raises:
            ShapeError: The teacher's last map has not `feature_dim` channels.
        """
        found = super().frozen(backbone)
        if self.features is not None:
            found[FEATURES] = fixed_network(self.features, self.feature_dim, backbone.image)
        return found
