"""The UNITE network: registers as latents, an encoder that is the denoiser, a decoder apart."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
import torch
from command_line import e2ediff
from declared_stops import holds_its_declaration
from e2ediff_testing import (
    check_backbone,
    make_batch,
    make_draw,
    make_nets,
    own_randomness,
)
from e2ediff_unite.backbone import UniteConfig
from e2ediff_unite.decoder import DecoderConfig
from e2ediff_unite.encoder import NormedBlock
from e2ediff_unite.objective import Unite
from torch import nn

from e2ediff.backbone import Decode, Denoise, Encode
from e2ediff.condition import Labels
from e2ediff.data import ImageSpec
from e2ediff.host.plugins import load

RECIPES = Path(__file__).parents[3] / "recipes"
TINY = UniteConfig(
    width=16, depth=3, heads=2, patch=8, registers=4, latent_dim=4, context=2, context_start=1
)
BATCH = make_batch()
VARIANTS = {
    "plain": {},
    "fewer registers than patches": {"registers": 3},
    "more registers than patches": {"registers": 7},
    "no context": {"context": 0},
    "context from the start": {"context_start": 0},
    "batch norm": {"latent_norm": "batch"},
    "raw prediction": {"norm_prediction": False},
    "small decoder": {"decoder": DecoderConfig(width=8, depth=1, heads=1)},
    "wide embedding of the decoder": {"decoder": DecoderConfig(width=8, heads=1, embed_width=24)},
}


def shaken(**changes):
    """Networks without the zeros of a fresh start, behind which passes would agree."""
    nets, g = make_nets(attrs.evolve(TINY, **changes)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in nets.online.parameters():
            p += 0.1 * torch.randn(p.shape, generator=g)
    return nets


def latents(tokens=4, seed=1):
    return torch.randn(6, tokens, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_the_network_keeps_the_contract_of_backbones(changes) -> None:
    check_backbone(attrs.evolve(TINY, **changes))


@pytest.mark.parametrize("image", [ImageSpec(1, 16, 24, 0), ImageSpec(3, 8, 32, 1)], ids=str)
def test_it_takes_grey_oblong_and_unlabelled_images(image) -> None:
    check_backbone(TINY, image)


@pytest.mark.parametrize("changes", [{}, {"reduce": "mean", "draws": 1}, {"weight": "x0"}])
def test_the_objective_keeps_its_contract_on_it(changes) -> None:
    holds_its_declaration(Unite(**changes), TINY)


def test_fused_passes_equal_single_ones() -> None:
    net, z, draw = shaken().online, latents(), make_draw(BATCH)
    passes = [
        Denoise(z_t=z, t=draw.t, condition=draw.condition, taps=(2,)),
        Encode(x=BATCH.x, taps=(1, 3)),
        Decode(z=z),
        Denoise(z_t=z[:3], t=1 - draw.t[:3], condition=draw.condition.rows(slice(3)), taps=(1, 2)),
        Encode(x=BATCH.x[:2], z_t=z[:2], t=draw.t[:2]),
        Decode(z=z[:1]),
    ]
    for fused, p in zip(net.outputs(*passes), passes, strict=True):
        (alone,) = net.outputs(p)
        # float32 matrix products of other sizes sum in another order
        near = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(fused.value, alone.value, **near)
        assert list(fused.features) == list(alone.features)
        for tap in fused.features:
            torch.testing.assert_close(fused.features[tap], alone.features[tap], **near)


def test_registers_have_no_place_and_as_many_as_asked_for() -> None:
    latent = make_nets(attrs.evolve(TINY, registers=7)).online.latent
    assert (latent.tokens, latent.dim, latent.grid, latent.norm) == (7, 4, None, "affine")
    assert latent.learned


def test_a_latent_is_a_function_of_the_image_unless_it_is_given_noise() -> None:
    net = shaken().online
    t = torch.full((6,), 0.005)
    with own_randomness(net):
        assert torch.equal(net.encode(BATCH.x), net.encode(BATCH.x))
    a, b = (net.run(Encode(x=BATCH.x, z_t=latents(seed=s), t=t))[0] for s in (1, 2))
    assert not torch.allclose(a, b, atol=1e-3)
    assert not torch.allclose(net.encode(BATCH.x), net.encode(BATCH.x.flip(0)), atol=1e-3)


def test_the_fixed_start_is_like_the_noise_it_stands_for() -> None:
    """In mean, spread, and in that no register or channel tells of another."""
    config = attrs.evolve(TINY, registers=256, latent_dim=32)
    start = make_nets(config).online.start
    assert abs(float(start.mean())) < 4 / (256 * 32) ** 0.5
    assert abs(float(start.std()) - 1) < 4 / (2 * 256 * 32) ** 0.5
    energy = torch.linalg.svdvals(start).square()
    share = energy / energy.sum()
    # Marchenko and Pastur's law for this shape: rank 30.1 of 32, and 5.7 % in the largest
    assert float(torch.exp(-(share * share.log()).sum())) > 29.5
    assert float(share[0]) < 0.07
    assert float(torch.corrcoef(start).triu(1).abs().max()) < 0.85  # of 32,640 pairs
    assert torch.equal(make_nets(config).online.start, start)
    assert make_nets(config, device="meta").online.start.is_meta


def test_weights_begin_as_those_of_the_released_code() -> None:
    """Decoder and patches as torch makes linear layers, the trunk by Xavier's rule and zeros."""
    wide = attrs.evolve(TINY, width=96, latent_dim=32)
    net = make_nets(wide).online
    named = dict(net.named_modules())
    linears = {k: m for k, m in named.items() if isinstance(m, torch.nn.Linear)}
    for name, m in linears.items():
        (rows, columns), weight = m.weight.shape, m.weight.detach()
        spread = float(weight.std()) * 3**0.5  # the bound, if it is uniform
        if name == "embed_pixels" or name.startswith("decoder."):
            bound = columns**-0.5
            largest = float(m.bias.detach().abs().max())
            assert largest == pytest.approx(bound, rel=0.2), name
            assert largest <= bound, name
        else:
            assert not m.bias.any(), name
            bound = (6 / (rows + columns)) ** 0.5
        if "modulation" in name or name == "trunk.final":
            assert not weight.any(), name
        elif name.startswith("embed_time"):
            assert float(weight.std()) == pytest.approx(0.02, rel=0.05), name
        else:
            assert spread == pytest.approx(bound, rel=0.05), name
    for p in (net.embed_label.weight, net.embed_context):
        assert float(p.detach().std()) == pytest.approx(0.02, rel=0.2)
    assert not net.decoder.embed_extra.any()
    assert {m.eps for m in net.decoder.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-12}


def test_to_encode_is_to_denoise_with_the_image_in_sight() -> None:
    """At the same start, time and null label, patches alone make the difference."""
    net, t = shaken(latent_norm="none").online, torch.full((6,), 0.005)
    null = net.image.conditioning.null(6)
    blind = net.denoise(latents(), t, null)
    seen = net.run(Encode(x=BATCH.x, z_t=latents(), t=t))[0]
    assert not torch.allclose(blind, seen, atol=1e-3)
    with torch.no_grad():  # closed gates: no token receives anything from another
        for block in net.trunk.blocks:
            block.modulation.weight.zero_()
            block.modulation.bias.zero_()
    blind = net.denoise(latents(), t, null)
    torch.testing.assert_close(net.run(Encode(x=BATCH.x, z_t=latents(), t=t))[0], blind)


def two_classes(net):
    """Conditions of six rows that differ in their class."""
    return [Labels(torch.full((6,), k), net.image.classes) for k in (0, 1)]


@pytest.mark.parametrize("option", ["label", "t"])
def test_the_denoiser_hears_of_class_and_time(option) -> None:
    net, z = shaken().online, latents()
    t, one, two = torch.full((6,), 0.5), *two_classes(net)
    other = (t, two) if option == "label" else (t + 0.3, one)
    assert not torch.allclose(net.denoise(z, t, one), net.denoise(z, *other), atol=1e-3)


def test_each_loss_reaches_exactly_its_modules() -> None:
    """They meet in the trunk alone; no gradient of the denoiser reaches patches or decoder."""
    nets, objective = shaken(), Unite()
    named = dict(nets.online.named_parameters())
    terms = objective.terms(nets, BATCH, make_draw(BATCH), "joint")
    reached = {}
    for name, loss in terms.losses.items():
        grads = torch.autograd.grad(loss, named.values(), retain_graph=True, allow_unused=True)
        pairs = zip(named, grads, strict=True)
        reached[name] = {k.split(".")[0] for k, g in pairs if g is not None and g.abs().sum() > 0}
    shared = {"embed_latent", "embed_register", "embed_time", "embed_label", "embed_context"}
    shared |= {"trunk", "head_latent", "latent_norm"}
    assert reached["denoising"] == shared
    assert reached["reconstruction"] == shared | {"embed_pixels", "decoder"}


def test_the_objective_draws_the_noise_that_encoding_begins_from() -> None:
    nets, objective = shaken(), Unite()
    z = [objective.terms(nets, BATCH, make_draw(BATCH, seed=s), "joint").z for s in (1, 1, 2)]
    assert torch.equal(z[0], z[1])
    assert not torch.allclose(z[0], z[2], atol=1e-3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mask": torch.zeros(6, 4, dtype=torch.bool)}, "cannot hide patches"),
        ({"z_t": latents()}, "together, or neither"),
        ({"t": torch.zeros(6)}, "together, or neither"),
    ],
)
def test_an_encode_pass_that_it_cannot_run_is_refused(wrong, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_nets(TINY).online.run(Encode(x=BATCH.x, **wrong))


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"patch": 5}, "patch"),
        ({"heads": 3, "decoder": DecoderConfig(heads=2)}, "heads"),
        ({"context_start": 3}, "context_start"),
        ({"latent_dim": 2}, "latent_dim"),
        ({"decoder": DecoderConfig(heads=3)}, "decoder.heads"),
        ({"decoder": DecoderConfig(width=6, heads=2)}, "decoder.width"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, where) -> None:
    found = attrs.evolve(TINY, **changes).problems(ImageSpec(3, 16, 16, 4))
    assert [name for name, _ in found] == [where]


def test_the_plugin_registers_both_parts() -> None:
    host = load()
    assert host.registries["backbones"].get("unite") is UniteConfig
    assert host.registries["objectives"].get("unite") is Unite


def test_its_small_recipe_trains_samples_and_reconstructs(tmp_path: Path) -> None:
    less = ("steps=4", "probe={images: 16, glance: 8, calibration: 16}",
            "preview={rows: 1, classes: 2}",
            "sampler.steps=2", "backbone.depth=3", "backbone.width=24")  # fmt: skip
    words = [word for one in less for word in ("--set", one)]
    done = e2ediff("run", RECIPES / "unite_quickstart.yaml", "--out", tmp_path / "run", *words)
    assert done.code == 0, done.err
    assert e2ediff("sample", tmp_path / "run", "--count", 1, "--label", 3).code == 0
    psnr = e2ediff("reconstruct", tmp_path / "run", "--count", 4, "--out", tmp_path)
    assert psnr.code == 0, psnr.err


@pytest.mark.parametrize(("rule", "hidden"), [("multiple_of_8", 2728), ("truncated", 2730)])
def test_perceptrons_of_unite_m_and_l_have_either_width(rule, hidden) -> None:
    """M and L are 1024 wide: the released code truncates 2/3 of 4 times that."""
    block = NormedBlock(1024, 16, 4.0, rule)
    assert [m.out_features for m in block.mlp.modules() if isinstance(m, nn.Linear)][-1] == 1024
    assert {m.in_features for m in block.mlp.modules() if isinstance(m, nn.Linear)} >= {hidden}
