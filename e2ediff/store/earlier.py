"""Declare the figures of runs and score files from before they declared them themselves.

A run declares its figures in `figures.json`, and a score file has `better`. For older files the
names of e2ediff's own metrics and diagnostics of that time count; a figure of any other name has
no known direction, and is not ranked.
"""

from __future__ import annotations

from e2ediff.figure import Better, Figure, find
from e2ediff.metric import prefixed, score_figure

_METRICS: dict[str, Better] = {
    **dict.fromkeys(("FID", "FD", "sFID", "sFD", "KID", "KD", "CMMD"), "low"),
    **dict.fromkeys(("IS", "precision", "recall", "density", "coverage"), "high"),
}
"""Figures of metrics, without the name of the feature network: `FD-EfficientNetLite0`."""

_SECTIONS: dict[str, Better] = {
    **dict.fromkeys(("LPIPS", "perceptual", "copied"), "low"),
    **dict.fromkeys(("PSNR", "SSIM", "knn", "knn_mean", "probe", "probe_mean"), "high"),
    "nearness": "high",
}
"""Figures of `e2ediff eval` beside metrics."""

# Figures that were shown before diagnostics declared theirs.
_RANK, _VARIANCE = "effective rank of the latents", "variance of the latents"
_DIAGNOSTICS = (
    Figure("rank", "effective rank", "high", ".2f", ("table", "charts"), _RANK),
    Figure("rank_fraction", "rank fraction", "high", ".3f", ("table",)),
    Figure("rank_online", "effective rank before averaging", "high", ".2f", ("charts",), _RANK),
    Figure("rank_channel", "effective rank of images' means", "high", ".2f", ("charts",), _RANK),
    Figure("rank_sample", "effective rank of whole images", "high", ".2f", ("charts",), _RANK),
    Figure(
        "latent_std",
        "standard deviation across images",
        form=".3f",
        shown_on=("table", "charts"),
        panel=_VARIANCE,
    ),
    Figure("positional", "positional share", "low", ".3f", ("table", "charts"), _VARIANCE),
    Figure("psnr", "PSNR (dB)", "high", ".2f", ("table", "charts"), of="reconstructions"),
    Figure("unexplained", better="low"),
)


def earlier_figure(name: str) -> Figure | None:
    """Return the declaration of a figure of `metrics.jsonl` by its name; None if unknown."""
    if found := find(name, _DIAGNOSTICS):
        return found
    for metric, better in _METRICS.items():
        for kind in ("r", "g"):
            if name.partition("-")[0] == prefixed(kind, metric, better):
                return score_figure(kind, name.removeprefix(prefixed(kind, "", better)), better)
    return None


def earlier_direction(score: str) -> Better | None:
    """Return whether low or high values of an `e2ediff eval` score are better; None if unknown."""
    reconstructed = {prefixed("r", name, better): better for name, better in _METRICS.items()}
    return {**_SECTIONS, **_METRICS, **reconstructed}.get(score.partition("-")[0])
