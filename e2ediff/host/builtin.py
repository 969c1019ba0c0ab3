"""Register the parts that ship with e2ediff, through the same hook as any plugin."""

from __future__ import annotations

from e2ediff import hookimpl
from e2ediff.host.hookspecs import Add

# The name of each part and its class in `e2ediff.parts`, by kind.
PARTS = {
    "backbones": {
        "vit": "backbones:ViTConfig",
    },
    "interpolants": {
        "linear": "interpolants:Linear",
        "cosine": "interpolants:Cosine",
        "ve": "interpolants:VarianceExploding",
    },
    "time_samplers": {
        "uniform": "time_samplers:Uniform",
        "logit_normal": "time_samplers:LogitNormal",
        "shifted": "time_samplers:Shifted",
    },
    "objectives": {
        "coupled": "objectives:Coupled",
        "detached": "objectives:Detached",
        "two_stage": "objectives:TwoStage",
    },
    "regularizers": {
        "vicreg": "regularizers:VICReg",
        "sigreg": "regularizers:SIGReg",
        "variance_expansion": "regularizers:VarianceExpansion",
        "rank_filter": "regularizers:RankFilter",
        "dispersive": "regularizers:Dispersive",
    },
    "guidance": {
        "classifier_free": "guidance:ClassifierFree",
    },
    "samplers": {
        "euler": "samplers:Euler",
        "average_velocity": "samplers:AverageVelocity",
        "heun": "samplers:Heun",
        "midpoint": "samplers:Midpoint",
        "rk4": "samplers:RK4",
    },
    "sources": {
        "fashion_mnist": "sources:FashionMNIST",
        "image_folder": "sources:ImageFolder",
        "synthetic": "sources:Synthetic",
    },
    "optimizers": {
        "adamw": "optimizers.scheduled:AdamW",
        "muon": "optimizers.muon:Muon",
        "sgd": "optimizers.scheduled:SGD",
    },
    "diagnostics": {
        "latent_health": "diagnostics.latent_health:LatentHealth",
        "rank_gap": "diagnostics.latent_health:RankGap",
        "reconstruction": "diagnostics.latent_health:Reconstruction",
        "spectrum": "diagnostics.observatory:Spectrum",
        "spread": "diagnostics.observatory:Spread",
        "wiener": "diagnostics.observatory:Wiener",
        "encoder_gradients": "diagnostics.observatory:EncoderGradients",
        "neighbours": "diagnostics.observatory:Neighbours",
    },
    "trackers": {
        "csv": "trackers:CSV",
        "tensorboard": "trackers:TensorBoard",
    },
    "features": {
        "torchvision": "features.networks:TorchvisionFeatures",
        "efficientnet_lite0": "features.networks:EfficientNetLite0",
        "inception2015": "features.networks:Inception",
        "random_projection": "features.networks:RandomProjection",
    },
    "metrics": {
        "fid": "metrics:FID",
        "sfid": "metrics:SpatialFID",
        "kid": "metrics:KID",
        "inception_score": "metrics:InceptionScore",
        "precision_recall": "metrics:PrecisionRecall",
        "density_coverage": "metrics:DensityCoverage",
        "cmmd": "metrics:CMMD",
    },
    "averages": {
        "constant": "averages:Constant",
        "power": "averages:Power",
    },
}


@hookimpl
def register(add: Add) -> None:
    """Register everything in `e2ediff.parts`; a class is imported when a recipe names it."""
    for kind, parts in PARTS.items():
        for name, where in parts.items():
            add(kind, name, f"e2ediff.parts.{where}")
