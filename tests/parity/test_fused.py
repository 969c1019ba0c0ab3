"""Passes that the ViT fuses into one batch give what they give one by one."""

from __future__ import annotations

import pytest
import torch
from e2ediff_testing import make_batch, make_draw, make_nets

from e2ediff.backbone import Decode, Denoise, Encode
from e2ediff.parts.backbones import ViTConfig

SIZES = {"width": 32, "depth": 3, "heads": 2, "patch": 8, "latent_dim": 6}


def passes_of(net, z):
    batch = make_batch(size=4)
    draw = make_draw(batch)
    hidden = torch.arange(16).reshape(4, 4) % 3 == 0
    return [
        Encode(x=batch.x, taps=(1, 3)),
        Decode(z=z),
        Denoise(z_t=z, t=draw.t, condition=draw.condition, taps=(2,)),
        Encode(x=batch.x[:2], mask=hidden[:2]),
        Denoise(z_t=z[:3], t=1 - draw.t[:3], condition=draw.condition.rows(slice(3)), taps=(1, 2)),
        Decode(z=z[:1], taps=(3,)),
    ]


def shaken(**options):
    """A ViT without the zeros of a fresh start, behind which anything would agree."""
    net = make_nets(ViTConfig(**SIZES, **options)).online
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.05 * torch.randn(p.shape, generator=g)
    return net


@pytest.mark.parametrize("modulation", ["block", "shared", "lowrank"])
@pytest.mark.parametrize("position", ["sincos", "rope"])
@pytest.mark.parametrize("trunks", ["one", "decoder_apart", "denoiser_apart", "three"])
def test_fused_passes_equal_single_ones(trunks, position, modulation) -> None:
    net = shaken(trunks=trunks, position=position, modulation=modulation, latent_norm="batch")
    z = torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    fused = net.outputs(*passes_of(net, z))
    single = [net.outputs(p)[0] for p in passes_of(net, z)]
    # float32 matrix products of other sizes sum in another order: 1e-6 of values near 1
    near = {"rtol": 1e-4, "atol": 1e-5}
    for a, b in zip(fused, single, strict=True):
        torch.testing.assert_close(a.value, b.value, **near)
        assert list(a.features) == list(b.features)
        for tap in a.features:
            torch.testing.assert_close(a.features[tap], b.features[tap], **near)
    weights = list(net.parameters())
    together, apart = (
        torch.autograd.grad(
            sum(o.value.square().mean() for o in outs), [z, *weights], allow_unused=True
        )
        for outs in (fused, single)
    )
    for a, b in zip(together, apart, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * (1 + b.abs().max().item()))


def test_passes_come_back_in_the_order_they_were_given() -> None:
    net = shaken()
    z = torch.zeros(4, 4, 6)
    forward, backward = passes_of(net, z), passes_of(net, z)[::-1]
    for a, b in zip(net.outputs(*forward), net.outputs(*backward)[::-1], strict=True):
        torch.testing.assert_close(a.value, b.value, rtol=1e-4, atol=1e-5)


def test_a_hidden_patch_is_not_seen() -> None:
    net, x = shaken(), make_batch(size=2).x
    mask = torch.tensor([[True, False, False, False]] * 2)
    changed = x.clone()
    changed[:, :, :8, :8] = 0.5
    outs = [net.outputs(Encode(x=image, mask=mask))[0].value for image in (x, changed)]
    assert torch.equal(*outs)
    assert not torch.allclose(net.encode(x), net.encode(changed))
