"""Distances between sets of feature vectors, in float64.

Every function is deterministic and works in blocks, so that memory grows with n and not n^2.

Shapes: n made rows, m real rows, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from e2ediff.errors import ResourceError
from e2ediff.metric import Moments

_BLOCK = 2048


def frechet(a: Moments, b: Moments) -> float:
    """Return the squared Fréchet distance of two Gaussians.

    |mean a - mean b|^2 + tr A + tr B - 2 tr (A^1/2 B A^1/2)^1/2 for covariances A and B.
    Both roots by eigenvalues of symmetric matrices, which exist and are real where a covariance
    is singular; the root of the product A B of a general solver is neither.

    Source: Dowson & Landau 1982; the use of Heusel et al. 2017 (arXiv 1706.08500).
    """
    shift = (a.mean.double() - b.mean.double()).square().sum()
    return max(0.0, float(shift) + _bures(a.covariance.double(), b.covariance.double()))


def _bures(a: Tensor, b: Tensor) -> float:
    # tr (A^1/2 B A^1/2)^1/2 is the sum of the singular values of A^1/2 B^1/2, without squaring.
    cross = torch.linalg.svdvals(_root(a).T @ _root(b)).sum()
    return float(a.trace() + b.trace() - 2 * cross)


def _root(c: Tensor) -> Tensor:
    """Return R (F, rank) with R R^T = c; rounding alone counts as 0, so that it has no column."""
    values, vectors = torch.linalg.eigh((c + c.T) / 2)
    kept = values > len(c) * torch.finfo(c.dtype).eps * values.max().clamp_min(0)
    root: Tensor = vectors[:, kept] * values[kept].sqrt()
    return root


def polynomial_mmd(x: Tensor, y: Tensor) -> float:
    """Return the unbiased squared MMD of x (n, F), y (m, F) with the kernel (x y / F + 1)^3.

    May be negative; its expectation is 0 for sets of one law.

    Source: Binkowski et al. 2018 (KID, arXiv 1801.01401), eq. 4 and section 4.
    """
    between = _kernel_sum(x.double(), y.double(), _polynomial) / (len(x) * len(y))
    return polynomial_mean(x) + polynomial_mean(y) - 2 * between


def polynomial_mean(x: Tensor) -> float:
    """Average the kernel (x x' / F + 1)^3 over pairs of different rows of x (n, F)."""
    x, n = x.double(), len(x)
    return (_kernel_sum(x, x, _polynomial) - float(_polynomial_own(x).sum())) / (n * (n - 1))


def polynomial_shares(x: Tensor, y: Tensor, own: float) -> Tensor:
    """Return the jackknife's pseudo-value (n,) in the distance of each row of x (n, F), n >= 3.

    Their mean is `polynomial_mmd(x, y)`, and the standard deviation over the root of n its
    standard error over the choice of x; y (m, F) is taken as given, and `own` is
    `polynomial_mean(y)`.

    Source: Efron & Tibshirani 1993, chapter 11.
    """
    x, y, n = x.double(), y.double(), len(x)
    parts = torch.split(x, _BLOCK)
    between = torch.cat([_polynomial(part, y).mean(1) for part in parts])  # (n,)
    within = torch.cat([_polynomial(part, x).sum(1) for part in parts]) - _polynomial_own(x)
    within = within / (n - 1)
    # What leaving row i out of the mean over pairs does, in closed form.
    pairs = (2 * (n - 1) * within - n * within.mean()) / (n - 2)
    return own + pairs - 2 * between


def polynomial_error(x: Tensor, y: Tensor, n: int | None = None, m: int | None = None) -> float:
    """Return the jackknife's standard error of `polynomial_mmd` over the choice of both sets.

    Args:
        x: Made rows, at least 3.
        y: Real rows, at least 3.
        n: Of a distance of so many made rows, of which x are some; by default all.
        m: Likewise of real rows.

    Source: Efron & Tibshirani 1993, chapter 11; Arvesen 1969 for two samples.
    """
    ours = polynomial_shares(x, y, polynomial_mean(y)).var() / (n or len(x))
    theirs = polynomial_shares(y, x, polynomial_mean(x)).var() / (m or len(y))
    return float((ours + theirs).sqrt())


def _polynomial(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _polynomial_own(a: Tensor) -> Tensor:
    """Return the kernel of each row with itself, (n,)."""
    return (a.square().sum(1) / a.shape[1] + 1) ** 3


def gaussian_mmd(x: Tensor, y: Tensor, sigma: float = 10.0, scale: float = 1000.0) -> float:
    """Return the squared MMD of unit-length rows with a Gaussian kernel, times `scale`.

    With the diagonal, as published: at least 0, and biased by about 1/n.

    Source: Jayasumana et al. 2024 (CMMD, arXiv 2401.09603); sigma 10 and scale 1000 are those of
    the released code.
    """
    x = torch.nn.functional.normalize(x.double(), dim=1)
    y = torch.nn.functional.normalize(y.double(), dim=1)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-_squared(a, b) / (2 * sigma**2))

    def mean(a: Tensor, b: Tensor) -> float:
        return _kernel_sum(a, b, kernel) / (len(a) * len(b))

    return scale * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def _kernel_sum(a: Tensor, b: Tensor, kernel: Callable[[Tensor, Tensor], Tensor]) -> float:
    return sum(float(kernel(part, b).sum()) for part in torch.split(a, _BLOCK))


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """Return the squared distances (n, m) of rows, at least 0."""
    norms = a.square().sum(1)[:, None] + b.square().sum(1)[None]
    return (norms - 2 * a @ b.T).clamp_min(0)


def _distances(rows: Tensor, others: Tensor) -> Iterator[Tensor]:
    """Yield distances (block, m) of rows (n, F) to `others` (m, F), a block of rows at a time.

    Both are first centred on the mean of the others, so that large norms do not cancel.
    """
    origin = others.double().mean(0)
    others = others.double() - origin
    for part in torch.split(rows.double() - origin, _BLOCK):
        yield _squared(part, others).sqrt()


def nearest(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distance (n,) of each row to its nearest of `others` (m, F), and which it is."""
    low, who = zip(*(block.min(dim=1) for block in _distances(rows, others)), strict=True)
    return torch.cat(low), torch.cat(who)


def radii(rows: Tensor, k: int) -> Tensor:
    """Return the distance (n,) of each row to its k-th nearest other row."""
    return torch.cat([d.kthvalue(k + 1, dim=1).values for d in _distances(rows, rows)])


def precision_recall(made: Tensor, real: Tensor, k: int = 3) -> tuple[float, float]:
    """Return the share of made rows inside a ball around a real one, and the reverse.

    A ball reaches to its centre's k-th nearest neighbour within the centre's own set, rim
    included.

    Source: Kynkäänniemi et al. 2019 (arXiv 1904.06991), eq. 1 and 2.
    """
    return _share_inside(made, real, radii(real, k)), _share_inside(real, made, radii(made, k))


def _share_inside(points: Tensor, centres: Tensor, reach: Tensor) -> float:
    inside = [(distance <= reach).any(dim=1) for distance in _distances(points, centres)]
    return float(torch.cat(inside).double().mean())


def density_coverage(made: Tensor, real: Tensor, k: int = 5) -> tuple[float, float]:
    """Return the mean number of real balls around a made row, over k; share of balls with one.

    Source: Naeem et al. 2020 (arXiv 2002.09797), eq. 3 and 4: k = 5, and the rim is outside.
    """
    reach = radii(real, k)
    count, low = 0.0, torch.full_like(reach, torch.inf)
    for distance in _distances(made, real):  # (block, m)
        count += float((distance < reach).sum())
        low = torch.minimum(low, distance.amin(dim=0))
    return count / (k * len(made)), float((low < reach).double().mean())


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """Return exp of the mean KL of p(y|x) against p(y), mean and std over `splits` parts.

    Source: Salimans et al. 2016 (arXiv 1606.03498), section 4; parts follow the rows' order.
    """
    logits, scores, n = logits.double(), [], len(logits)
    for i in range(splits):
        log_p = logits[i * n // splits : (i + 1) * n // splits].log_softmax(dim=1)
        p = log_p.exp()
        # An answer of probability 0 counts 0, as its limit does.
        terms = torch.where(p > 0, p * (log_p - p.mean(0).log()), 0.0)
        scores.append(float(terms.sum(1).mean().exp()))
    found = torch.tensor(scores, dtype=torch.float64)
    return float(found.mean()), float(found.std(correction=0))


def self_test() -> None:
    """Compare the machine's linear algebra with Gaussians whose distance is known.

    A broken matrix root has turned an FID of 8 into 20; this costs milliseconds.

    Raises:
        ResourceError: The distance comes out wrong.
    """
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(32, 32, generator=g, dtype=torch.float64)).Q
    a, b = torch.rand(2, 32, generator=g, dtype=torch.float64)
    a[:8] = 0  # singular, as of fewer images than features
    shift = torch.randn(32, generator=g, dtype=torch.float64)
    known = float(shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    first = Moments(0, torch.zeros(32, dtype=torch.float64), (basis * a) @ basis.T)
    found = frechet(first, Moments(0, shift, (basis * b) @ basis.T))
    if not abs(found - known) <= 1e-6 * known:
        raise ResourceError(
            f"the Fréchet distance of two known Gaussians is {known:.6f} and came out as "
            f"{found:.6f}: this machine's linear algebra is broken, and no score is computed. "
            "Reinstall torch, or use another device."
        )
