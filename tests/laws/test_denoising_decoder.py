"""A decoder that denoises: its steps, its one noise, and what an image depends on."""

from __future__ import annotations

import attrs
import pytest
import torch
from e2ediff_testing import IMAGE, GaussianDenoiser, make_batch, make_draw, make_nets

from e2ediff.backbone import Backbone, Decode, Denoise, Encode
from e2ediff.condition import Labels
from e2ediff.data import ImageSpec
from e2ediff.host.plugins import load
from e2ediff.host.recipe import parse_recipe
from e2ediff.model.inference import Model
from e2ediff.nn.pixel_decoding import decoding_noise, last_step, noised_image
from e2ediff.parts.backbones import ViTConfig
from e2ediff.parts.interpolants import Linear
from e2ediff.parts.samplers import Euler

VIT = ViTConfig(
    width=16, depth=2, heads=2, patch=8, latent_dim=4, decoder="denoising", decode_steps=3
)
BATCH = make_batch(size=4)
Z = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(1))


def shaken(**options):
    """A ViT without the zeros of a fresh start, behind which any image is black."""
    net = make_nets(attrs.evolve(VIT, **options)).online
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.1 * torch.randn(p.shape, generator=g)
    return net


# Steps


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_a_decoder_that_knows_the_image_gives_it_back_in_any_number_of_steps(steps) -> None:
    noise, calls = decoding_noise(IMAGE, 0).expand(4, -1, -1, -1), []

    def clean(x_t, t):
        calls.append(float(t[0]))
        torch.testing.assert_close(x_t, noised_image(BATCH.x, noise, t))
        return BATCH.x

    x_t, t = last_step(clean, noise, steps)
    assert torch.equal(clean(x_t, t), BATCH.x)
    assert calls == pytest.approx([i / steps for i in range(steps)])


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_its_steps_are_those_of_the_euler_sampler_on_the_straight_path(steps) -> None:
    exact, none = GaussianDenoiser(Linear(), 0.4, 0.7), Labels(torch.zeros(2).long(), 4)
    noise = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(3))

    def clean(x_t, t):
        return exact(x_t, float(t[0]), none).x0

    expected = Euler(steps=steps).sample(exact, noise, none, lambda like: like)
    torch.testing.assert_close(clean(*last_step(clean, noise, steps)), expected)


def test_the_vit_s_image_is_its_clean_estimate_after_all_steps_but_the_last() -> None:
    net, x_t = shaken(), decoding_noise(IMAGE, 0).expand(4, -1, -1, -1)
    for i in range(3):
        t = torch.full((4,), i / 3)
        (x,) = net.run(Decode(z=Z, x_t=x_t, t=t))
        x_t = x_t + (1 / 3) * (x - x_t) / (1 - t[0])
    torch.testing.assert_close(net.decode(Z), x, rtol=1e-4, atol=1e-5)


def test_gradients_flow_through_every_step() -> None:
    """The noised image enters the last step only; what the earlier steps saw reaches z, too."""
    z = Z.clone().requires_grad_()
    for steps, others in ((1, False), (3, True)):
        net = shaken(decode_steps=steps)
        seen = []
        net.embed_noised.register_forward_hook(lambda m, i, out, seen=seen: seen.append(i[0]))
        loss = net.decode(z).square().mean()
        grads = torch.autograd.grad(loss, [z, net.embed_noised.weight])
        assert all(g.abs().sum() > 0 for g in grads)
        assert len(seen) == steps
        assert [x.requires_grad for x in seen] == [False] + [others] * (steps - 1)


# The noise


def test_decoding_is_repeatable_and_draws_nothing() -> None:
    net = shaken()
    state = torch.get_rng_state()
    first = net.decode(Z)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(net.decode(Z), first)
    assert torch.equal(shaken().decode(Z), first)
    assert not torch.equal(shaken(decode_seed=1).decode(Z), first)
    assert "decode_noise" not in net.state_dict()


def test_the_noise_is_unit_normal_and_apart_from_the_weights() -> None:
    noise = decoding_noise(ImageSpec(3, 64, 64, 4), 3)
    assert noise.mean().abs() < 0.03
    assert noise.std() == pytest.approx(1, abs=0.03)
    one, other = (
        make_nets(attrs.evolve(VIT, decode_seed=seed)).online.state_dict() for seed in (0, 1)
    )
    assert all(torch.equal(one[k], other[k]) for k in one)
    with torch.device("meta"):
        assert decoding_noise(IMAGE, 0).is_meta


def test_an_image_depends_on_its_latent_alone_to_the_bit(tiny_text) -> None:
    recipe = parse_recipe(load(entry_points=False), tiny_text, "tiny", [
        "objective=detached", "backbone.decoder=denoising", "backbone.decode_steps=3",
    ])  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = recipe.backbone.build(recipe.data.image).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    model = Model(recipe, net, rows=4)
    labels = [0, 1, 1, 0, 1, 0]
    whole = model.sample(labels, seed=3)
    assert torch.equal(model.sample(labels[2:5], seed=3, first=2), whole[2:5])
    image = recipe.data.image
    x = torch.rand(6, image.channels, image.height, image.width) * 2 - 1
    again = model.reconstruct(x)
    assert torch.equal(model.reconstruct(x), again)
    mates = torch.cat([x[:1], -x[1:4], x[4:]])
    assert torch.equal(model.reconstruct(mates)[0], again[0])
    assert not torch.equal(again[0], again[1])


# Passes


@pytest.mark.parametrize("trunks", ["one", "three"])
def test_steps_and_passes_that_are_fused_equal_single_ones(trunks) -> None:
    net, t = shaken(trunks=trunks), make_draw(BATCH).t
    passes = [
        Encode(x=BATCH.x),
        Decode(z=Z, taps=(2,)),
        Denoise(z_t=Z, t=t, condition=BATCH.condition),
        Decode(z=Z, x_t=BATCH.x, t=t, taps=(1,)),
        Decode(z=Z[:2]),
    ]
    for p, fused in zip(passes, net.outputs(*passes), strict=True):
        (alone,) = net.outputs(p)
        torch.testing.assert_close(fused.value, alone.value, rtol=1e-4, atol=1e-5)
        assert list(fused.features) == list(p.taps)
        for tap in p.taps:
            torch.testing.assert_close(fused.features[tap], alone.features[tap])


def test_a_noised_image_is_refused_where_it_would_be_ignored() -> None:
    t, direct = torch.zeros(4), make_nets(attrs.evolve(VIT, decoder="direct"))
    with pytest.raises(ValueError, match="the decoder of ViT denoises no image"):
        direct.online.outputs(Decode(z=Z, x_t=BATCH.x, t=t))
    for net in (direct.online, shaken()):
        with pytest.raises(ValueError, match="x_t and t together, or neither"):
            net.outputs(Decode(z=Z, x_t=BATCH.x))
    plain = make_nets().online
    plain.denoises_pixels = True
    with pytest.raises(ValueError, match="needs `outputs` of its own"):
        Backbone.outputs(plain, Decode(z=Z, x_t=BATCH.x, t=t))
