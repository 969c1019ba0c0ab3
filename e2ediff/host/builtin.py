"""The parts that ship with e2ediff, registered through the same hooks as a stranger's."""

from __future__ import annotations

from collections.abc import Callable

from e2ediff import hookimpl
from e2ediff.parts import (
    adaptive,
    collapse,
    combined,
    exported,
    features,
    foundation,
    guidance,
    interpolants,
    kl,
    metrics,
    multistep,
    muon,
    objectives,
    observatory,
    optim,
    regularizers,
    samplers,
    sde,
    sources,
    times,
    trackers,
    vit,
)

Add = Callable[[str, type], None]


@hookimpl
def register_backbones(add: Add) -> None:
    """The ViT with three modes."""
    add("vit", vit.ViTConfig)


@hookimpl
def register_interpolants(add: Add) -> None:
    """Noise schedules."""
    add("linear", interpolants.Linear)
    add("cosine", interpolants.Cosine)
    add("ve", interpolants.VarianceExploding)


@hookimpl
def register_time_samplers(add: Add) -> None:
    """Laws of training times."""
    add("uniform", times.Uniform)
    add("logit_normal", times.LogitNormal)
    add("shifted", times.Shifted)


@hookimpl
def register_objectives(add: Add) -> None:
    """The controls."""
    add("coupled", objectives.Coupled)
    add("detached", objectives.Detached)
    add("two_stage", objectives.TwoStage)
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
    add("classifier_free", guidance.ClassifierFree)
    add("cfg_plus_plus", guidance.CFGPlusPlus)
    add("cfg_zero_star", guidance.CFGZeroStar)
    add("apg", guidance.APG)
    add("autoguidance", combined.Autoguidance)
    add("interval", combined.Interval)
    add("chain", combined.Chain)


@hookimpl
def register_samplers(add: Add) -> None:
    """Solvers of the probability-flow ODE, and of the SDE with the same marginals."""
    add("euler", samplers.Euler)
    add("heun", samplers.Heun)
    add("midpoint", samplers.Midpoint)
    add("rk4", samplers.RK4)
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
    add("adamw", optim.AdamW)
    add("muon", muon.Muon)
    add("sgd", optim.SGD)


@hookimpl
def register_diagnostics(add: Add) -> None:
    """Health of the latents, and what trains them."""
    add("latent_health", collapse.LatentHealth)
    add("rank_gap", collapse.RankGap)
    add("reconstruction", collapse.Reconstruction)
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
    add("torchvision", features.TorchvisionFeatures)
    add("efficientnet_lite0", features.EfficientNetLite0)
    add("inception2015", features.Inception)
    add("dinov2", foundation.DINOv2)
    add("clip", foundation.CLIP)
    add("exported", exported.Exported)
    add("random_projection", features.RandomProjection)


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
