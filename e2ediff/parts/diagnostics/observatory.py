"""What the latents hold and what trains them: spectrum, channels, places, neighbours, gradients.

Shapes: P probe images, G the first of them, N latent tokens, D latent channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import ClassVar

import attrs
import torch
from attrs import validators
from torch import Tensor
from torch.nn import functional

from e2ediff.condition import Labels
from e2ediff.diagnostic import Costly, Diagnostic, Probe
from e2ediff.parts.diagnostics.latent_health import singular_values


def token_variances(z: Tensor) -> Tensor:
    """Variances (D,), falling, along the principal axes of the tokens of z (P, N, D).

    The mean of each position is taken out, so that only content counts.
    """
    content = (z.double() - z.double().mean(dim=0)).flatten(0, 1)  # (P N, D)
    found = singular_values(content).square() / len(content)
    return functional.pad(found, (0, z.shape[-1] - len(found)))  # fewer rows than channels


def wiener_error(variances: Tensor, alpha: float, sigma: float) -> float:
    """Expected squared error of the best linear filter for z_t = alpha z + sigma eps.

    Sum over modes of l sigma^2 / (alpha^2 l + sigma^2): what a denoiser that knows nothing but
    the mean and covariance of Gaussian latents leaves.

    Args:
        variances: Eigenvalues l of the latents' covariance, (D,).
        alpha: Weight of the data.
        sigma: Weight of the noise, above 0.
    """
    return float((variances * sigma**2 / (alpha**2 * variances + sigma**2)).sum())


def neighbour_accuracy(rows: Tensor, label: Tensor, k: int) -> float:
    """Share of rows (n, d) whose label is that of most of the k nearest other rows.

    Nearness is the cosine after centring; a vote counts exp(cosine / 0.07).

    Source: the weighted vote of Wu et al. 2018 (arXiv 1805.01978), section 3.4.
    """
    if len(rows) < 2:
        return 0.0
    rows = functional.normalize(rows.double() - rows.double().mean(dim=0), dim=1)
    cosine = (rows @ rows.T).fill_diagonal_(-torch.inf)
    near, who = cosine.topk(min(k, len(rows) - 1), dim=1)  # (n, k)
    votes = torch.zeros(len(rows), int(label.max()) + 1, dtype=rows.dtype, device=rows.device)
    own = torch.arange(len(rows), device=rows.device)[:, None].expand_as(who)
    # Unlike `scatter_add_` this has an order of additions on CUDA too.
    votes.index_put_((own, label[who]), (near / 0.07).exp(), accumulate=True)
    return float((votes.argmax(dim=1) == label).double().mean())


@attrs.frozen(kw_only=True)
class Spectrum(Diagnostic):
    """How the latents' variance is spread over modes.

    `spectrum_95` is the number of principal axes of the tokens that hold 95 % of their variance,
    each position's mean taken out; `spectrum/1`, `spectrum/2`, ... are the shares of the first
    `top` axes.
    """

    top: int = attrs.field(default=8, validator=validators.ge(0))

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """spectrum_95 and spectrum/i."""
        variances = token_variances(probe.z)
        shares = (variances / variances.sum().clamp_min(1e-300)).cpu()  # summed up in order there
        # A rounding error must not count as a mode.
        held = shares.cumsum(dim=0) < 0.95 * (1 - 1e-12) * shares.sum()
        count = int(held.sum()) + 1 if float(variances.sum()) > 0 else 0
        figures = {"spectrum_95": float(count)}
        for i, share in enumerate(shares[: self.top].tolist(), start=1):
            figures[f"spectrum/{i}"] = share
        return figures


@attrs.frozen(kw_only=True)
class Spread(Diagnostic):
    """How evenly content is spread over channels and positions.

    `channel_std_min` and `channel_std_max` are the smallest and largest standard deviation
    across images among channels, positions pooled; `position_std_min` and `position_std_max`
    those among positions, channels pooled.
    `channel_offset` is the largest mean of a channel, as an absolute value.
    `dead_channels` is the share of channels whose standard deviation is below `dead` times the
    root mean square of all.
    """

    dead: float = attrs.field(default=0.1, validator=[validators.ge(0.0), validators.lt(1.0)])

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """Channel and position statistics."""
        z = probe.z.double()
        variance = z.var(dim=0, correction=0)  # (N, D)
        channel, position = variance.mean(dim=0).sqrt(), variance.mean(dim=1).sqrt()
        silent = channel <= self.dead * variance.mean().sqrt()
        return {
            "channel_std_min": float(channel.min()),
            "channel_std_max": float(channel.max()),
            "position_std_min": float(position.min()),
            "position_std_max": float(position.max()),
            "channel_offset": float(z.mean(dim=(0, 1)).abs().max()),
            "dead_channels": float(silent.double().mean()),
        }


@attrs.frozen(kw_only=True)
class Wiener(Diagnostic):
    """The denoiser's error over that of the trivial linear filter, by time.

    `beyond_wiener@t` is 1 for a denoiser that knows the tokens' covariance and each position's
    mean, and nothing else; below 1 it has learned more.
    Collapsed latents are no longer worth denoising, and the figure then says little.

    Source: `wiener_error`; the filter sees one token at a time.
    """

    asks: ClassVar[frozenset[Costly]] = frozenset({"denoised"})

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """beyond_wiener@t for each probed time t."""
        figures: dict[str, float] = {}
        if probe.path is None or not probe.denoised:
            return figures
        z = probe.z[: len(next(iter(probe.denoised.values())))]  # (G, N, D)
        variances = token_variances(z)
        for t, guess in probe.denoised.items():
            time = torch.tensor([t], dtype=torch.float64)
            alpha, sigma = float(probe.path.alpha(time)), float(probe.path.sigma(time))
            error = float((guess - z).double().square().sum(dim=2).mean())
            # Latents without content have nothing to filter; the quotient stays finite.
            best = max(wiener_error(variances, alpha, sigma), 1e-6)
            figures[f"beyond_wiener@{t:g}"] = error / best
        return figures


@attrs.frozen(kw_only=True)
class EncoderGradients(Diagnostic):
    """Which losses pull the latents, how strongly, and whether they agree.

    `encoder_grad/A` is the norm of the weighted loss A's gradient with respect to the latents;
    `encoder_cosine/A/B` is the cosine of two of them, 0 where one is 0.
    Opposite gradients of reconstruction and denoising are what collapse begins with.
    """

    asks: ClassVar[frozenset[Costly]] = frozenset({"gradients"})

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """encoder_grad/A and encoder_cosine/A/B."""
        flat = {name: g.double().flatten() for name, g in probe.gradients.items()}
        figures = {f"encoder_grad/{name}": float(g.norm()) for name, g in flat.items()}
        for (a, g), (b, h) in combinations(flat.items(), 2):
            scale = float(g.norm() * h.norm())
            figures[f"encoder_cosine/{a}/{b}"] = float(g @ h) / scale if scale > 0 else 0.0
        return figures


@attrs.frozen(kw_only=True)
class Neighbours(Diagnostic):
    """How often the nearest latents have the same label: what content there is, in one number.

    `knn` compares whole latents, `knn_mean` their means over positions; each leaves the image
    itself out and lets the `k` nearest others vote.
    Without labels both are 1; conditions of another kind have no figures.
    """

    asks: ClassVar[frozenset[Costly]] = frozenset({"many"})

    k: int = attrs.field(default=10, validator=validators.ge(1))

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """Knn and knn_mean, in [0, 1]."""
        if not isinstance(probe.condition, Labels):
            return {}
        label = probe.condition.label
        return {
            "knn": neighbour_accuracy(probe.z.flatten(1), label, self.k),
            "knn_mean": neighbour_accuracy(probe.z.mean(dim=1), label, self.k),
        }
