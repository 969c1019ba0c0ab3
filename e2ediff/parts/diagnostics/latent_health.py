"""Figures of latent collapse, and what they say in words.

Scale-free ranks miss a latent whose variance has died, and a variance misses a latent whose
rank has: both are always reported, with the share of variance that is constant for each
position, through which a batch norm can be satisfied without any content.

Shapes: P probe images, O the first of them, N latent tokens, D latent channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import attrs
import torch
from attrs import validators
from torch import Tensor
from typing_extensions import override

from e2ediff.diagnostic import Costly, Diagnostic, Probe
from e2ediff.figure import Figure

_SHARE = [validators.ge(0.0), validators.le(1.0)]
# Beyond the bounds nothing is left to wait for; healthy latents are far from them from step 1 on.
_RANK = Figure(
    "rank",
    "effective rank",
    "high",
    ".2f",
    ("line", "table", "charts"),
    "effective rank of the latents",
    alarm="fall",
    dead_below=1.05,
)
_STD = Figure(
    "latent_std",
    "standard deviation across images",
    None,
    ".3f",
    ("line", "table", "charts"),
    "variance of the latents",
    short="std",
    alarm="shrink",
    dead_below=0.01,
)


def effective_rank(rows: Tensor) -> float:
    """Exp of the entropy of the normalised singular values of centred rows (n, d).

    Between 1 and min(n - 1, d); k for k equal orthogonal directions; 0 for constant rows.

    Source: Roy & Vetterli 2007, "The effective rank", definition 1, after centring.
    """
    s = singular_values(rows)
    if s.sum() == 0:
        return 0.0
    return float(torch.exp(torch.special.entr(s / s.sum()).sum()))


def participation_ratio(rows: Tensor) -> float:
    """(sum l)^2 / sum l^2 of the covariance eigenvalues l of rows (n, d); 0 for constant rows."""
    eigenvalues = singular_values(rows).square()
    if eigenvalues.sum() == 0:
        return 0.0
    return float(eigenvalues.sum().square() / eigenvalues.square().sum())


def singular_values(rows: Tensor) -> Tensor:
    """Singular values of centred rows (n, d), exactly 0 where only rounding differs."""
    rows = rows.double()
    s = torch.linalg.svdvals(rows - rows.mean(dim=0))
    rounding = 1e-12 * max(1.0, float(rows.abs().max())) * len(rows)
    return s if s.sum() > rounding else torch.zeros_like(s)


def content_std(z: Tensor) -> float:
    """Root mean variance across images at a fixed position and channel, of z (P, N, D).

    What differs between images; constants of a position do not count.
    """
    return float(z.double().var(dim=0, correction=0).mean().sqrt())


def positional_fraction(z: Tensor) -> float:
    """Share of the variance of z (P, N, D) that is constant for each position, in [0, 1].

    The variance of the tokens' means over images, over the total variance of each channel.
    """
    z = z.double()
    total = z.flatten(0, 1).var(dim=0, correction=0).sum()
    between = z.mean(dim=0).var(dim=0, correction=0).sum()
    return float(between / total) if total > 0 else 1.0


def _content(z: Tensor) -> Tensor:
    """Tokens (P N, D) of z (P, N, D), the mean of each position taken out."""
    return (z - z.mean(dim=0)).flatten(0, 1)


def _vital(z: Tensor) -> dict[str, float]:
    """The figures without which latents (P, N, D) are dead."""
    tokens = _content(z)
    rank = effective_rank(tokens)
    share = rank / min(len(tokens) - 1, tokens.shape[1])
    return {"rank": rank, "rank_fraction": share, "latent_std": content_std(z)}


@attrs.frozen(kw_only=True)
class LatentHealth(Diagnostic):
    """Rank and variance of the averaged and of the trained encoder's latents.

    Latents that are not learned have no such figures.

    `rank` is the effective rank of tokens (P N rows, D columns), after the mean of each
    position is taken out, at most D; `rank_fraction` divides it by that.
    `rank_channel` is that of the images' means over positions (P rows, D columns), at most the
    smaller of P - 1 and D, and `rank_sample` that of whole images (P rows, N D columns), at most
    P - 1.
    `participation` is the participation ratio of the same tokens as `rank`.
    `latent_std` is the content's standard deviation after the latent norm, `raw_std` before.
    `positional` is the share of variance that only says where a token lies.
    `rank_online`, `rank_fraction_online` and `latent_std_online` are those of the trained
    encoder's latents, of fewer images.

    Signs of collapse are a `rank_fraction` or `latent_std` of either encoder below, or a
    `positional` above, the option of that name; what follows from them is the recipe's `alarm`.

    Source: Roy & Vetterli 2007 for the rank; the other definitions and the bounds are ours, and
    lie between the healthy and the collapsed runs of `benchmarks/alarm.py`.
    """

    figures: ClassVar[tuple[Figure, ...]] = (
        _RANK,
        Figure("rank_fraction", "rank fraction", "high", ".3f", ("table",)),
        _STD,
        Figure("positional", "positional share", "low", ".3f", ("table", "charts"), _STD.panel,
               dead_above=0.99),
        Figure("rank_channel", "effective rank of images' means", "high", ".2f", ("charts",),
               _RANK.panel),
        Figure("rank_sample", "effective rank of whole images", "high", ".2f", ("charts",),
               _RANK.panel),
        attrs.evolve(_RANK, name="rank_online", title=f"{_RANK.title} before averaging",
                     shown_on=("charts",)),
        attrs.evolve(_STD, name="latent_std_online", title=f"{_STD.title} before averaging",
                     shown_on=()),
    )  # fmt: skip

    rank_fraction: float = attrs.field(default=0.4, validator=_SHARE)
    positional: float = attrs.field(default=0.6, validator=_SHARE)
    latent_std: float = attrs.field(default=0.1, validator=validators.ge(0.0))

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """Figures of the averaged encoder's latents, and rank and std of the trained one's."""
        if not probe.learned:  # what a data set's pixels are says nothing about training
            return {}
        trained = {} if probe.z_online is None else _vital(probe.z_online)
        return {
            **_vital(probe.z),
            "rank_channel": effective_rank(probe.z.mean(dim=1)),
            "rank_sample": effective_rank(probe.z.flatten(1)),
            "participation": participation_ratio(_content(probe.z)),
            "raw_std": content_std(probe.raw),
            "positional": positional_fraction(probe.z),
            **{f"{name}_online": value for name, value in trained.items()},
        }

    def verdict(self, values: Mapping[str, float]) -> Sequence[str]:
        """Which of rank, share of position and content are out of bounds."""
        found = self._weak(values, "", "")
        if (share := values.get("positional", 0.0)) > self.positional:
            found.append(f"{share:.0%} of the latents' variance only says where a token lies")
        return found + self._weak(values, "_online", "before averaging, ")

    def _weak(self, values: Mapping[str, float], suffix: str, whose: str) -> list[str]:
        """What rank and std say of one encoder's latents."""
        found = []
        fraction, std = (values.get(f"{k}{suffix}") for k in ("rank_fraction", "latent_std"))
        if fraction is not None and fraction < self.rank_fraction:
            found.append(
                f"{whose}effective rank {values[f'rank{suffix}']:.2f} is {fraction:.0%} of what "
                "the latents could hold"
            )
        if std is not None and std < self.latent_std:
            found.append(
                f"{whose}the latents of different images differ by a std of only {std:.3f}"
            )
        return found


@attrs.frozen(kw_only=True)
class RankGap(Diagnostic):
    """Effective rank of the denoised latents minus that of the target latents, by time.

    Negative where the denoiser filters out weak modes: the rank differentiation that keeps
    self-distillation stable.
    Also `unexplained`, the denoiser's squared error over the latents' variance.

    Source: DSD (arXiv 2511.14716) for the mechanism; Zhuo et al. 2023 (arXiv 2303.02387).
    """

    asks: ClassVar[frozenset[Costly]] = frozenset({"denoised"})
    figures: ClassVar[tuple[Figure, ...]] = (Figure("unexplained", better="low"),)

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """rank_gap@t and unexplained@t for each probed time t."""
        figures: dict[str, float] = {}
        if not probe.denoised:
            return figures
        z = probe.z[: len(next(iter(probe.denoised.values())))]  # (G, N, D)
        target = effective_rank(z.flatten(0, 1))
        variance = z.double().var(dim=(0, 1), correction=0).sum().clamp_min(1e-12)
        for t, guess in probe.denoised.items():
            error = (guess - z).double().square().mean(dim=(0, 1)).sum()
            figures[f"rank_gap@{t:g}"] = effective_rank(guess.flatten(0, 1)) - target
            figures[f"unexplained@{t:g}"] = float(error / variance)
        return figures


@attrs.frozen(kw_only=True)
class Reconstruction(Diagnostic):
    """Peak signal-to-noise ratio of the averaged autoencoder on the probe images.

    In decibels, for images in [0, 1], from the mean over images of each image's own value.
    """

    asks: ClassVar[frozenset[Costly]] = frozenset({"x_hat"})
    figures: ClassVar[tuple[Figure, ...]] = (
        Figure("psnr", "PSNR (dB)", "high", ".2f", ("line", "table", "charts"),
               of="reconstructions"),
    )  # fmt: skip

    @override
    def measure(self, probe: Probe) -> Mapping[str, float]:
        if probe.x_hat is None:
            return {}
        x = probe.x[: len(probe.x_hat)]
        error = ((probe.x_hat.clamp(-1, 1) - x) / 2).square().mean(dim=(1, 2, 3))
        return {"psnr": float((-10 * error.clamp_min(1e-10).log10()).mean())}
