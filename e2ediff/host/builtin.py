"""The parts that ship with e2ediff, registered through the same hooks as a stranger's."""

from __future__ import annotations

from collections.abc import Callable

from e2ediff import hookimpl
from e2ediff.parts import (
    backbones,
    interpolants,
    metrics,
    regularizers,
    sources,
    time_samplers,
    trackers,
)
from e2ediff.parts.diagnostics import latent_health, observatory
from e2ediff.parts.features import exported, foundation, networks
from e2ediff.parts.guidance import classifier_free, combined
from e2ediff.parts.objectives import controls, kl
from e2ediff.parts.optimizers import muon, scheduled
from e2ediff.parts.samplers import adaptive, multistep, ode, sde

Add = Callable[[str, type], None]


@hookimpl
def register_backbones(add: Add) -> None:
    """The ViT with three modes."""
    add("vit", backbones.ViTConfig)


@hookimpl
def register_interpolants(add: Add) -> None:
    """Noise schedules."""
    add("linear", interpolants.Linear)
    add("cosine", interpolants.Cosine)
    add("ve", interpolants.VarianceExploding)


@hookimpl
def register_time_samplers(add: Add) -> None:
    """Laws of training times."""
    add("uniform", time_samplers.Uniform)
    add("logit_normal", time_samplers.LogitNormal)
    add("shifted", time_samplers.Shifted)


@hookimpl
def register_objectives(add: Add) -> None:
    """The controls."""
    add("coupled", controls.Coupled)
    add("detached", controls.Detached)
    add("two_stage", controls.TwoStage)
    add("kl", kl.KL)


@hookimpl
def register_regularizers(add: Add) -> None:
    """Losses of the latents alone."""
    add("vicreg", regularizers.VICReg)
    add("sigreg", regularizers.SIGReg)
    add("variance_expansion", regularizers.VarianceExpansion)
    add("rank_filter", regularizers.RankFilter)
    add("dispersive", regularizers.Dispersive)


@hookimpl
def register_guidance(add: Add) -> None:
    """Guidance at sampling."""
    add("classifier_free", classifier_free.ClassifierFree)
    add("cfg_plus_plus", classifier_free.CFGPlusPlus)
    add("cfg_zero_star", classifier_free.CFGZeroStar)
    add("apg", classifier_free.APG)
    add("autoguidance", combined.Autoguidance)
    add("interval", combined.Interval)
    add("chain", combined.Chain)


@hookimpl
def register_samplers(add: Add) -> None:
    """Solvers of the probability-flow ODE, and of the SDE with the same marginals."""
    add("euler", ode.Euler)
    add("heun", ode.Heun)
    add("midpoint", ode.Midpoint)
    add("rk4", ode.RK4)
    add("dopri5", adaptive.Dopri5)
    add("dpmpp_2m", multistep.DPMSolverPP2M)
    add("unipc", multistep.UniPC)
    add("sde", sde.SDE)


@hookimpl
def register_sources(add: Add) -> None:
    """Where images come from."""
    add("fashion_mnist", sources.FashionMNIST)
    add("image_folder", sources.ImageFolder)
    add("archive", sources.Archive)
    add("class_tars", sources.ClassTars)
    add("tar_shards", sources.TarShards)
    add("parquet", sources.Parquet)
    add("arrays", sources.Arrays)
    add("shards", sources.Shards)
    add("synthetic", sources.Synthetic)


@hookimpl
def register_optimizers(add: Add) -> None:
    """Optimizers with their schedules."""
    add("adamw", scheduled.AdamW)
    add("muon", muon.Muon)
    add("sgd", scheduled.SGD)


@hookimpl
def register_diagnostics(add: Add) -> None:
    """Health of the latents, and what trains them."""
    add("latent_health", latent_health.LatentHealth)
    add("rank_gap", latent_health.RankGap)
    add("reconstruction", latent_health.Reconstruction)
    add("spectrum", observatory.Spectrum)
    add("spread", observatory.Spread)
    add("wiener", observatory.Wiener)
    add("encoder_gradients", observatory.EncoderGradients)
    add("neighbours", observatory.Neighbours)


@hookimpl
def register_trackers(add: Add) -> None:
    """Sinks beside the run directory."""
    add("csv", trackers.CSV)
    add("tensorboard", trackers.TensorBoard)


@hookimpl
def register_features(add: Add) -> None:
    """Feature networks of losses and scores."""
    add("torchvision", networks.TorchvisionFeatures)
    add("efficientnet_lite0", networks.EfficientNetLite0)
    add("inception2015", networks.Inception)
    add("dinov2", foundation.DINOv2)
    add("clip", foundation.CLIP)
    add("exported", exported.Exported)
    add("random_projection", networks.RandomProjection)


@hookimpl
def register_metrics(add: Add) -> None:
    """Scores of sets of images."""
    add("fid", metrics.FID)
    add("sfid", metrics.SpatialFID)
    add("kid", metrics.KID)
    add("inception_score", metrics.InceptionScore)
    add("precision_recall", metrics.PrecisionRecall)
    add("density_coverage", metrics.DensityCoverage)
    add("cmmd", metrics.CMMD)
