"""JiT: pixels as latents, the loss of velocities, louder noise, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
import torch
from command_line import e2ediff, needs
from e2ediff_jit.backbone import JiTConfig
from e2ediff_jit.interpolant import LinearScaled
from e2ediff_jit.objective import Pixel
from e2ediff_testing import (
    GaussianDenoiser,
    TinyBackbone,
    check_backbone,
    check_interpolant,
    check_objective,
    make_batch,
    make_draw,
    make_nets,
)

from e2ediff.condition import ClassLabels, Labels
from e2ediff.data import ImageSpec
from e2ediff.host.plugins import load
from e2ediff.host.recipe import load_recipe
from e2ediff.model.build import problems

RECIPES = Path(__file__).parents[3] / "recipes"
TINY = JiTConfig(width=16, depth=3, heads=2, patch=8, bottleneck=4, context=2, context_start=1)
BATCH = make_batch()


def shaken(**changes):
    """Networks without the zeros of a fresh start, whose answer is zero."""
    nets, g = make_nets(attrs.evolve(TINY, **changes)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in nets.online.parameters():
            p += 0.1 * torch.randn(p.shape, generator=g)
    return nets


@pytest.mark.parametrize(
    "changes", [{}, {"context": 0}, {"context_start": 0}, {"patch": 4, "bottleneck": 32}]
)
def test_the_network_keeps_the_contract_of_backbones(changes) -> None:
    check_backbone(attrs.evolve(TINY, **changes))


@pytest.mark.parametrize("image", [ImageSpec(1, 16, 24, 0), ImageSpec(3, 8, 32, 1)], ids=str)
def test_it_takes_grey_oblong_and_unlabelled_images(image) -> None:
    check_backbone(TINY, image)


@pytest.mark.parametrize("objective", [Pixel(), Pixel(weight="x0"), Pixel(weight="eps")])
def test_the_objective_keeps_its_contract(objective) -> None:
    check_objective(objective, TINY)
    assert list(objective.stops("joint")) == [], "no encoder is there to be left alone"


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_the_scaled_path_keeps_the_contract_of_interpolants(scale) -> None:
    check_interpolant(LinearScaled(noise_scale=scale))


def test_the_latent_is_the_image_and_nothing_of_it_is_lost() -> None:
    net = make_nets(TINY).online
    z = net.encode(BATCH.x)
    assert z.shape == (6, net.latent.tokens, net.latent.dim) == (6, 4, 192)
    assert torch.equal(net.decode(z), BATCH.x)
    assert not net.latent.learned
    assert not z.requires_grad


def test_its_loss_is_the_released_one_of_velocities() -> None:
    """|(f - z_t) / max(1 - t, 0.05) - (x - z_t) / max(1 - t, 0.05)|^2."""
    nets = shaken()
    draw = make_draw(BATCH)
    with torch.no_grad():
        x, t = nets.online.encode(BATCH.x), draw.t[:, None, None]
        z_t = t * x + (1 - t) * make_draw(BATCH).noise(x)
        f, span = nets.online.denoise(z_t, draw.t, draw.condition), (1 - t).clamp_min(0.05)
        expected = ((f - z_t) / span - (x - z_t) / span).square().mean()
    (loss,) = Pixel().terms(nets, BATCH, make_draw(BATCH), "joint").losses.values()
    # differences of numbers up to 20 in float32
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=0)


def test_every_weight_is_the_denoiser_s() -> None:
    nets = shaken()
    terms = Pixel().terms(nets, BATCH, make_draw(BATCH), "joint")
    grads = torch.autograd.grad(terms.total, list(nets.online.parameters()))
    assert all(g.abs().sum() > 0 for g in grads)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_louder_noise_is_what_sampling_begins_from(scale) -> None:
    """Samples of a Gaussian come out right only from noise of the path's own scale."""
    path, condition = LinearScaled(noise_scale=scale), ClassLabels(1).null(4096)
    heun = load(entry_points=False).registries["samplers"].get("heun")(steps=30)
    start = torch.randn(4096, 1, 2, generator=torch.Generator().manual_seed(0))
    z = heun.sample(GaussianDenoiser(path, 1.0, 0.5), start, condition, torch.randn_like)
    # 0.03 is the error of 4096 samples and 30 steps
    assert float(z.mean()) == pytest.approx(1.0, abs=0.03)
    assert float(z.std()) == pytest.approx(0.5, abs=0.03)


def two_classes(net):
    """Conditions of six rows that differ in their class."""
    return [Labels(torch.full((6,), k), net.image.classes) for k in (0, 1)]


@pytest.mark.parametrize("option", ["label", "t"])
def test_the_denoiser_hears_of_class_and_time(option) -> None:
    net, z = shaken().online, shaken().online.encode(BATCH.x)
    t, one, two = torch.full((6,), 0.5), *two_classes(net)
    other = (t, two) if option == "label" else (t + 0.3, one)
    assert not torch.allclose(net.denoise(z, t, one), net.denoise(z, *other), atol=1e-3)


def test_the_class_reaches_the_patches_through_the_context_too() -> None:
    """Without adaLN, context tokens are the only way; before their block there is none."""
    t = torch.full((6,), 0.5)
    for start, reaches in ((1, True), (None, False)):
        net = shaken(context=2 if reaches else 0, context_start=start or 0).online
        with torch.no_grad():
            for block in net.trunk.blocks:  # gates open, whatever time and class are
                block.modulation.weight.zero_()
            net.trunk.final.weight.zero_()
        z = net.encode(BATCH.x)
        one, two = (net.denoise(z, t, condition) for condition in two_classes(net))
        same = torch.allclose(one, two, atol=1e-6)
        assert same != reaches


def test_an_encoder_that_nothing_would_train_is_refused() -> None:
    ((where, what),) = Pixel().problems(make_nets(TinyBackbone(), device="meta"))
    assert where == "objective"
    assert "backbone: jit" in what


@pytest.mark.parametrize(
    ("changes", "where"),
    [({"patch": 5}, "patch"), ({"heads": 3}, "heads"), ({"context_start": 3}, "context_start")],
)
def test_sizes_that_do_not_fit_are_named(changes, where) -> None:
    found = attrs.evolve(TINY, **changes).problems(ImageSpec(3, 16, 16, 4))
    assert [name for name, _ in found] == [where]


@pytest.mark.parametrize(
    ("objective", "refused"), [("pixel", False), ("detached", False), ("two_stage", True)]
)
def test_what_trains_nothing_of_pixels_is_refused(objective, refused) -> None:
    recipe = load_recipe(
        load(), RECIPES / "jit_quickstart.yaml", [f"objective={objective}", "backbone.width=12"]
    )
    said = [str(p) for p in problems(recipe)]
    assert any("not learned" in one for one in said) == bool(said) == refused


def test_regularisers_of_latents_that_are_the_image_are_refused() -> None:
    changes = ["regularizers=[variance_expansion]", "backbone.width=12"]
    recipe = load_recipe(load(), RECIPES / "jit_quickstart.yaml", changes)
    (found,) = problems(recipe)
    assert "regularizers: the latents are a fixed function of the image" in str(found)


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        ("dsd", "features"),
        ("repa_e", "features"),
        ("genfirst", "the posterior is an encoder's, and this backbone has none to train"),
    ],
)
@needs("e2ediff-dsd", "e2ediff-rivals")
def test_losses_of_what_is_not_there_are_refused_without_warnings(objective, said) -> None:
    done = e2ediff("check", RECIPES / "jit_quickstart.yaml", "--set", f"objective={objective}")
    assert done.code == 3
    assert said in done.err, "and a warning would have been raised"


SIZES = {  # name: width, depth, heads, bottleneck, context_start; trainable parameters of the code
    "JiT-B/16": ((768, 12, 12, 128, 4), 131_123_712),
    "JiT-L/16": ((1024, 24, 16, 128, 8), 458_877_664),
    "JiT-H/16": ((1280, 32, 16, 256, 10), 952_514_368),
}


@pytest.mark.parametrize("name", SIZES)
def test_every_released_size_has_the_code_s_number_of_weights(name) -> None:
    (width, depth, heads, bottleneck, start), expected = SIZES[name]
    config = JiTConfig(
        width=width, depth=depth, heads=heads, patch=16, bottleneck=bottleneck,
        context_start=start, swiglu_width="truncated",
    )  # fmt: skip
    with torch.device("meta"):
        net = config.build(ImageSpec(3, 256, 256, 1000))
    assert sum(p.numel() for p in net.parameters()) == expected


@pytest.mark.parametrize(
    ("width", "rule", "hidden"),
    [(768, "truncated", 2048), (1024, "truncated", 2730), (1280, "truncated", 3413),
     (768, "multiple_of_8", 2048), (1024, "multiple_of_8", 2728), (1280, "multiple_of_8", 3416)],
)  # fmt: skip
def test_the_perceptron_s_width_follows_its_rule(width, rule, hidden) -> None:
    config = attrs.evolve(TINY, width=width, heads=16, depth=2, swiglu_width=rule)
    with torch.device("meta"):
        block = config.build(ImageSpec(3, 16, 16, 4)).trunk.blocks[0]
    assert block.mlp.inner.weight.shape == (2 * hidden, width)
    assert block.mlp.outer.weight.shape == (width, hidden)


def test_the_plugin_registers_its_three_parts() -> None:
    registries = load().registries
    assert registries["backbones"].get("jit") is JiTConfig
    assert registries["objectives"].get("pixel") is Pixel
    assert registries["interpolants"].get("linear_scaled") is LinearScaled


def test_its_small_recipe_trains_and_samples_without_a_word_of_collapse(tmp_path: Path) -> None:
    less = ("steps=4", "probe={images: 16, glance: 8, calibration: 16}",
            "preview={rows: 1, classes: 2}",
            "sampler.steps=2", "backbone.depth=3", "backbone.width=24",
            "cadence={log: 1, diagnose: 1, preview: 100, checkpoint: 100}")  # fmt: skip
    words = [word for one in less for word in ("--set", one)]
    done = e2ediff("run", RECIPES / "jit_quickstart.yaml", "--out", tmp_path / "run", *words)
    assert done.code == 0, done.err
    assert "collaps" not in (done.err + done.out).lower()
    assert e2ediff("sample", tmp_path / "run", "--count", 1, "--label", 3).code == 0
    psnr = e2ediff("reconstruct", tmp_path / "run", "--count", 4, "--out", tmp_path)
    assert psnr.out.startswith("psnr 100.00 dB"), "its bound, for images that are equal"
