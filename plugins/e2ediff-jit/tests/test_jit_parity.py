"""The network, the loss and the times of JiT's released code, as plain formulas.

The formulas are `tests/support/published.py`'s; the maps of weights, which also run on a checkout
of the code in `benchmarks/parity.py`, are those of `benchmarks/peer_weights.py`.
"""

from __future__ import annotations

import math

import attrs
import pytest
import torch
from e2ediff_jit.backbone import JiTConfig
from e2ediff_jit.interpolant import LinearScaled
from e2ediff_jit.objective import Pixel
from e2ediff_testing import make_nets
from published import jit, jit_shapes, peer_weights, random_state

from e2ediff.condition import Labels
from e2ediff.data import Batch, ImageSpec
from e2ediff.nn.layers import unpatchify
from e2ediff.objective import Draw, Nets
from e2ediff.parts.time_samplers import LogitNormal

WIDTH, DEPTH, HEADS, PATCH, GRID, CLASSES = 24, 3, 3, 4, 3, 5
CONFIG = JiTConfig(
    width=WIDTH, depth=DEPTH, heads=HEADS, patch=PATCH, bottleneck=7, context=2, context_start=1,
    swiglu_width="truncated",
)  # fmt: skip
IMAGE = ImageSpec(3, PATCH * GRID, PATCH * GRID, CLASSES)
STATE = random_state(jit_shapes(WIDTH, DEPTH, HEADS, PATCH, 7, 2, CLASSES))
SIZES = {"heads": HEADS, "patch": PATCH, "depth": DEPTH, "context_start": 1}
NOISE_SCALE = 2.0

_g = torch.Generator().manual_seed(1)
X = torch.rand(4, 3, IMAGE.height, IMAGE.width, generator=_g) * 2 - 1
EPS = torch.randn(X.shape, generator=_g)
T = torch.tensor([0.0, 0.3, 0.7, 0.98])  # the last is past the clamp
LABEL = torch.tensor([0, 4, 5, 2])  # 5 is no class


def loaded() -> Nets:
    """Networks with the weights of the released code, every one of them."""
    nets = make_nets(CONFIG, Pixel(), path=LinearScaled(noise_scale=NOISE_SCALE), image=IMAGE)
    nets.online.load_state_dict(peer_weights().jit(STATE, HEADS, PATCH), strict=True)
    return nets


@attrs.frozen(eq=False)
class Given(Draw):
    """A draw whose noise is known."""

    eps: torch.Tensor = attrs.field(kw_only=True)

    def noise(self, like):
        assert like.shape == self.eps.shape
        return self.eps


def released_loss(state) -> torch.Tensor:
    """mean |v_hat - v|^2, both velocities being (x - z) / max(1 - t, 0.05)."""
    t = T[:, None, None, None]
    z = t * X + (1 - t) * NOISE_SCALE * EPS
    v, v_hat = ((x - z) / (1 - t).clamp_min(0.05) for x in (X, jit(state, z, T, LABEL, **SIZES)))
    return (v_hat - v).square().mean()


def test_its_answer_is_the_released_network_s() -> None:
    net = loaded().online
    with torch.no_grad():
        ours = net.denoise(net.encode(X), T, Labels(LABEL, CLASSES))
        theirs = jit(STATE, X, T, LABEL, **SIZES)
    assert float(theirs.std()) > 0.3, "the answer hangs on the weights"
    ours = unpatchify(ours, PATCH, (GRID, GRID))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_its_loss_and_every_gradient_are_the_released_code_s() -> None:
    """With louder noise, a dropped label and a time past the clamp; relative, to 1e-5."""
    state = {name: w.clone().requires_grad_() for name, w in STATE.items()}
    theirs = released_loss(state)
    theirs.backward()
    wanted = peer_weights().jit({name: w.grad for name, w in state.items()}, HEADS, PATCH)

    nets, batch = loaded(), Batch(x=X, condition=Labels(LABEL, CLASSES))
    draw = Given(
        t=T, condition=batch.condition, generator=None, times=LogitNormal(),
        eps=nets.online.encode(EPS),
    )  # fmt: skip
    ours = Pixel().terms(nets, batch, draw, "joint").total
    ours.backward()
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    for name, p in nets.online.named_parameters():
        bound = 1e-5 * float(wanted[name].abs().max())
        assert bound > 0
        assert float((p.grad - wanted[name]).abs().max()) <= bound, name


def test_times_are_sigmoids_of_normals_of_mean_minus_0_8_and_std_0_8() -> None:
    """By quantiles of 100,000 times, within four standard errors of normal quantiles."""
    law, n = LogitNormal(mean=-0.8, std=0.8), 100_000
    t = law.draw(n, torch.Generator().manual_seed(0), torch.device("cpu"))
    share = torch.tensor([0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
    normal = torch.special.ndtri(share)
    density = torch.exp(-normal.square() / 2) / math.sqrt(2 * math.pi)
    error = (t.logit().quantile(share) - (0.8 * normal - 0.8)).abs()
    assert bool((error < 4 * 0.8 * (share * (1 - share) / n).sqrt() / density).all())


def test_positions_of_the_other_order_would_be_seen() -> None:
    """The map of queries and keys is needed: without it the answers differ."""
    nets, weights = loaded(), peer_weights()
    weights.turned = lambda heads: weights.as_it_is
    nets.online.load_state_dict(weights.jit(STATE, HEADS, PATCH))
    with torch.no_grad():
        ours = nets.online.denoise(nets.online.encode(X), T, Labels(LABEL, CLASSES))
        theirs = jit(STATE, X, T, LABEL, **SIZES)
    assert float((unpatchify(ours, PATCH, (GRID, GRID)) - theirs).abs().max()) > 1e-2
