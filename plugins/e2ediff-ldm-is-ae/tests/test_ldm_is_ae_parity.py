"""The network and the losses of LDM-is-AE's released code, as plain formulas.

Its two parts are JiT's network on a grid of patches, whose formula `tests/support/published.py`
has; what joins them is written out here. The map of weights, which also runs on a checkout of the
code in `benchmarks/parity.py`, is that of `benchmarks/peer_weights.py`.
"""

from __future__ import annotations

import attrs
import pytest
import torch
from e2ediff_ldm_is_ae.backbone import LDMIsAEConfig
from e2ediff_ldm_is_ae.objective import LDMIsAE
from e2ediff_testing import make_nets
from published import jit, jit_shapes, peer_weights, random_state
from torch.nn import functional

from e2ediff.backbone import Decode, Denoise, Encode
from e2ediff.condition import Labels
from e2ediff.data import Batch, ImageSpec
from e2ediff.objective import Draw
from e2ediff.parts.time_samplers import LogitNormal

WIDTH, HEADS, PATCH, GRID, CLASSES, LATENT = 24, 3, 4, 3, 5, 10
PIXELS = 3 * PATCH**2
CONFIG = LDMIsAEConfig(
    width=WIDTH, depth=5, encoder_depth=2, heads=HEADS, patch=PATCH, latent_dim=LATENT,
    bottleneck=7, context=2, context_start=1,
)  # fmt: skip
IMAGE = ImageSpec(3, PATCH * GRID, PATCH * GRID, CLASSES)
SIZES = {  # depth, context_start
    "model_dec": {"depth": 3, "context_start": 1},
    "model_enc": {"depth": 2, "context_start": 0},
}


def shapes(depth: int, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    found = jit_shapes(WIDTH, depth, HEADS, 1, 7, 2, CLASSES)
    found["x_embedder.proj1.weight"] = (7, inputs, 1, 1)
    found["final_layer.linear.weight"] = (outputs, WIDTH)
    found["final_layer.linear.bias"] = (outputs,)
    return found


STATE = random_state(
    {f"net.model_dec.{k}": v for k, v in shapes(3, LATENT, 2 * PIXELS).items()}
    | {f"net.model_enc.{k}": v for k, v in shapes(2, PIXELS, LATENT).items()}
)
_g = torch.Generator().manual_seed(1)
X = torch.rand(4, 3, IMAGE.height, IMAGE.width, generator=_g) * 2 - 1
Z = torch.randn(4, LATENT, GRID, GRID, generator=_g)
T = torch.tensor([0.0, 0.3, 0.7, 0.98])  # two teach the encoder, the last is past the clamp
LABEL = torch.tensor([0, 4, 5, 2])  # 5 is no class
NOBODY = torch.full((4,), 5)


def part(state, name: str, x, t, y):
    own = {k.removeprefix(f"net.{name}."): w for k, w in state.items() if f".{name}." in k}
    return jit(own, x, t, y, heads=HEADS, patch=1, **SIZES[name])


def split(state, z, t, y):
    """F' and F on the grid."""
    return part(state, "model_dec", z, t, y).chunk(2, dim=1)


def joined(state, extra, image, t, y):
    """The latent of what both become: gamma = t^3, root mean square 1, pixels added."""
    gamma = (t**3)[:, None, None, None]
    raw = part(state, "model_enc", gamma * image + (1 - gamma) * extra, t, y)
    raw = raw / (raw.square().mean((1, 2, 3), keepdim=True) + 1e-6).sqrt()
    b, _, rows, columns = image.shape
    pixels = image.permute(0, 2, 3, 1).reshape(b, -1, PIXELS)
    pixels = functional.interpolate(pixels, size=LATENT, mode="linear", align_corners=False)
    return raw + pixels.mT.reshape(b, LATENT, rows, columns)


def encoded(state):
    grid = functional.pixel_unshuffle(X, PATCH)
    return joined(state, torch.zeros_like(grid), grid, torch.ones(4), NOBODY)


def tokens(x):
    return x.flatten(2).mT


def loaded():
    nets = make_nets(CONFIG, LDMIsAE(), image=IMAGE)
    nets.online.load_state_dict(peer_weights().ldm_is_ae(STATE, HEADS), strict=True)
    return nets


@attrs.frozen(eq=False)
class Given(Draw):
    """A draw whose noise is known."""

    eps: torch.Tensor = attrs.field(kw_only=True)

    def noise(self, like):
        assert like.shape == self.eps.shape
        return self.eps


def test_its_three_passes_are_the_released_network_s() -> None:
    net = loaded().online
    with torch.no_grad():
        e, d, n = net.outputs(
            Encode(x=X), Decode(z=tokens(Z)),
            Denoise(z_t=tokens(Z), t=T, condition=Labels(LABEL, CLASSES)),
        )  # fmt: skip
        _, decoded = split(STATE, Z, torch.ones(4), NOBODY)
        extra, image = split(STATE, Z, T, LABEL)
        wanted = [
            (e.value, tokens(encoded(STATE))),
            (d.value, functional.pixel_shuffle(decoded, PATCH)),
            (n.image, functional.pixel_shuffle(image, PATCH)),
            (n.value, tokens(joined(STATE, extra, image, T, LABEL))),
        ]
    for ours, theirs in wanted:
        assert float(theirs.std()) > 0.3, "the answer hangs on the weights"
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_its_loss_and_every_gradient_are_the_released_code_s() -> None:
    """x error + 10 v error, velocities over max(1 - t, 0.05); E learns where t >= 0.5."""
    state = {name: w.clone().requires_grad_() for name, w in STATE.items()}
    still = {k: w.detach() if ".model_enc." in k else w for k, w in state.items()}
    z1, left = encoded(STATE), (1 - T).clamp_min(0.05)[:, None, None, None]
    t = T[:, None, None, None]
    z_t = t * z1 + (1 - t) * Z  # Z as the noise
    extra, image = split(state, z_t, T, LABEL)
    late = joined(state, extra, image, T, LABEL)
    early = joined(still, extra, image, T, LABEL)
    z_hat = torch.where(t >= 0.5, late, early)
    x_error = ((image - functional.pixel_unshuffle(X, PATCH)) / left).square().mean()
    v_error = ((z1 - z_t) / left - (z_hat - z_t) / left).square().mean()
    theirs = x_error + 10 * v_error
    theirs.backward()
    wanted = peer_weights().ldm_is_ae({name: w.grad for name, w in state.items()}, HEADS)

    nets, batch = loaded(), Batch(x=X, condition=Labels(LABEL, CLASSES))
    draw = Given(
        t=T, condition=batch.condition, generator=None, times=LogitNormal(), eps=tokens(Z)
    )
    terms = LDMIsAE().terms(nets, batch, draw, "joint")
    terms.total.backward()
    found = {key: float(loss.detach()) for key, loss in terms.losses.items()}
    assert found["reconstruction"] == pytest.approx(float(x_error.detach()), rel=1e-5)
    assert found["denoising"] == pytest.approx(float(v_error.detach()), rel=1e-5)
    assert float(terms.total.detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)
    for name, p in nets.online.named_parameters():
        bound = 1e-5 * float(wanted[name].abs().max())
        assert bound > 0
        assert float((p.grad - wanted[name]).abs().max()) <= bound, name
