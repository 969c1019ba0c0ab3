"""What figures are of runs and score files that do not say it themselves.

A run keeps what its figures are in `figures.json`, and a score file has `better`. What was
written before they did is judged by the names that e2ediff's own metrics and diagnostics had; a
figure of any other name has no known direction, and is not ranked.
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

# Those that were shown before diagnostics declared their own.
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
    """What a figure of `metrics.jsonl` is, by its name; None if it is none of ours."""
    if found := find(name, _DIAGNOSTICS):
        return found
    for metric, better in _METRICS.items():
        for kind in ("r", "g"):
            if name.partition("-")[0] == prefixed(kind, metric, better):
                return score_figure(kind, name.removeprefix(prefixed(kind, "", better)), better)
    return None


def earlier_direction(score: str) -> Better | None:
    """Whether low or high values of a score of `e2ediff eval` are better; None if unknown."""
    reconstructed = {prefixed("r", name, better): better for name, better in _METRICS.items()}
    return {**_SECTIONS, **_METRICS, **reconstructed}.get(score.partition("-")[0])
