"""DSD: its place among the methods it unifies, and what each of its losses may reach."""

from __future__ import annotations

import attrs
import pytest
import torch
from declared_stops import holds_its_declaration
from e2ediff_dsd.augment import Augmentation
from e2ediff_dsd.objective import DSD
from e2ediff_testing import TinyBackbone, check_objective, make_batch, make_draw, make_nets
from torch import nn

from e2ediff.backbone import Backbone, BackboneConfig, LatentSpec
from e2ediff.condition import ClassLabels
from e2ediff.data import Batch, ImageSpec
from e2ediff.host.plugins import load
from e2ediff.host.recipe import dump_recipe, parse_recipe
from e2ediff.latent import LatentNorm
from e2ediff.losses import DecodeNoise
from e2ediff.objective import Draw
from e2ediff.parts.backbones import ViTConfig
from e2ediff.parts.objectives import Coupled, Detached
from e2ediff.parts.time_samplers import Uniform

PLAIN = Augmentation(mask_probability=0.0)
# DSD without anything that the methods it is compared with do not have.
BARE = DSD(align_weight=0.0, repr_weight=0.0, class_weight=0.0, augmentation=PLAIN)


def rung(**switches) -> DSD:
    return attrs.evolve(BARE, **switches)


def gradient(objective, nets, loss: str, seed: int = 2) -> dict[str, torch.Tensor]:
    """The gradient of one loss by parameter, zeros where there is none."""
    batch = make_batch()
    terms = objective.terms(nets, batch, make_draw(batch, seed=seed), "joint")
    named = dict(nets.online.named_parameters())
    named |= {f"heads.{k}": p for k, p in nets.heads.named_parameters()}
    grads = torch.autograd.grad(terms.losses[loss], list(named.values()), allow_unused=True)
    pairs = zip(named.items(), grads, strict=True)
    return {k: torch.zeros_like(p) if g is None else g for (k, p), g in pairs}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], rtol: float) -> None:
    for name, value in a.items():
        size = max(value.abs().max().item(), 1e-3)
        torch.testing.assert_close(value, b[name], rtol=rtol, atol=rtol * size, msg=name)


# The contract


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"draws": 3, "weight": "v"},
        {"target": "online", "target_gradient": 0.5, "regress": "v"},
        {"target": "online", "regress": "eps", "input_gradient": 0.0},
        {"augmentation": Augmentation(jitter=0.3)},
    ],
    ids=str,
)
@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_dsd_keeps_the_contract_of_objectives(changes, norm) -> None:
    vit = ViTConfig(width=16, depth=3, heads=2, patch=8, latent_dim=4, latent_norm=norm)
    check_objective(attrs.evolve(DSD(), **changes), vit)
    check_objective(attrs.evolve(DSD(), **changes), TinyBackbone(latent_norm=norm))


@pytest.mark.parametrize(
    ("changes", "stops"),
    [
        ({}, []),
        ({"input_gradient": 0.0}, ["denoising", "align"]),
        ({"input_gradient": 0.0, "align_weight": 0.0}, ["denoising"]),
        ({"input_gradient": 0.0, "target": "online", "target_gradient": 0.5}, ["align"]),
    ],
    ids=str,
)
def test_dsd_declares_what_its_switches_stop(changes, stops) -> None:
    objective = DSD(**changes)
    assert list(objective.stops("joint")) == stops
    vit = ViTConfig(width=16, depth=3, heads=2, patch=8, latent_dim=4, latent_norm="batch")
    holds_its_declaration(objective, vit)


def test_the_plugin_registers_dsd_and_its_recipe_reads_back_equal() -> None:
    host = load()
    assert host.broken == {}
    assert host.registries["objectives"].get("dsd") is DSD
    text = """\
e2ediff: 1
name: tiny
requires: ["e2ediff-dsd"]
steps: 2
batch: 4
data: {name: synthetic, size: 16}
backbone: {name: vit, width: 16, depth: 2, heads: 2, patch: 8, latent_dim: 4}
interpolant: linear
times: uniform
objective: {name: dsd, regress: v, target: online, augmentation: {jitter: 0.1}}
optimizer: adamw
sampler: euler
"""
    recipe = parse_recipe(host, text, "tiny")
    assert recipe.objective == DSD(
        regress="v", target="online", augmentation=Augmentation(jitter=0.1)
    )
    assert parse_recipe(host, dump_recipe(host, recipe), "dumped") == recipe


# The unified form


@pytest.mark.parametrize("predicts", ["x0", "v"])
@pytest.mark.parametrize("loss", ["reconstruction", "denoising"])
@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_naive_switches_give_the_gradient_of_coupled(loss, predicts, path) -> None:
    """gamma 1, beta 1, v, online: the velocity loss, which `coupled` writes as a clean loss."""
    naive = rung(input_gradient=1.0, target_gradient=1.0, regress="v", target="online")
    interpolant = load().registries["interpolants"].get(path)()
    nets = make_nets(path=interpolant, predicts=predicts)
    # v is a difference of numbers up to 1 / (1 - t): float32 keeps 1e-4 of it
    assert_same(gradient(naive, nets, loss), gradient(Coupled(), nets, loss), rtol=1e-3)


@pytest.mark.parametrize("weight", ["x0", "v"])
@pytest.mark.parametrize("draws", [1, 3])
def test_unite_switches_give_the_gradient_of_detached(weight, draws) -> None:
    """gamma 0, beta 0, x0, online."""
    unite = rung(input_gradient=0.0, target="online", weight=weight, draws=draws)
    detached, nets = Detached(weight=weight, draws=draws), make_nets()
    for loss in ("reconstruction", "denoising"):
        assert_same(gradient(unite, nets, loss), gradient(detached, nets, loss), rtol=1e-6)
    encoder = gradient(unite, nets, "denoising")
    assert encoder["patches.weight"].abs().max() == 0
    assert encoder["noised.weight"].abs().max() > 0


def test_the_shares_interpolate_between_stopped_and_whole_gradients() -> None:
    nets = make_nets()

    def encoder(gamma: float, beta: float) -> torch.Tensor:
        switches = {"input_gradient": gamma, "target_gradient": beta, "target": "online"}
        return gradient(rung(**switches), nets, "denoising")["patches.weight"]

    by_input, by_target = encoder(1.0, 0.0), encoder(0.0, 1.0)
    assert by_input.norm() > 0
    assert by_target.norm() > 0
    torch.testing.assert_close(encoder(0.25, 0.0), 0.25 * by_input)
    torch.testing.assert_close(encoder(0.0, 0.5), 0.5 * by_target)
    torch.testing.assert_close(
        encoder(0.25, 0.5), 0.25 * by_input + 0.5 * by_target, rtol=1e-4, atol=1e-6
    )
    assert encoder(0.0, 0.0).abs().max() == 0


def test_with_equal_weights_the_ema_target_gives_the_stopped_online_gradient() -> None:
    """At the start of a run; so nothing reaches the encoder through the target."""
    nets = make_nets()
    assert_same(
        gradient(rung(target="ema"), nets, "denoising"),
        gradient(rung(target="online"), nets, "denoising"),
        rtol=1e-6,
    )


def test_the_target_is_the_averaged_encoders_latent_of_the_plain_image() -> None:
    objective, nets, batch = rung(), make_nets(), make_batch()
    before = objective.terms(nets, batch, make_draw(batch), "joint").losses
    with torch.no_grad():
        for p in nets.target.parameters():
            p.mul_(-1.0)
    after = objective.terms(nets, batch, make_draw(batch), "joint").losses
    assert after["reconstruction"] == before["reconstruction"]
    assert after["denoising"] != before["denoising"]
    assert all(p.grad is None for p in nets.target.parameters())


GROUPS = {
    "encode": ("embed_pixels", "trunks.encode", "head_latent", "mask_token"),
    "decode": ("embed_decode", "trunks.decode", "head_pixels"),
    "denoise": ("embed_denoise", "trunks.denoise", "head_denoise"),
    **{f"{head} head": (f"heads.{head}.",) for head in ("align", "repr", "class")},
}


def test_each_loss_reaches_exactly_its_modules() -> None:
    vit = ViTConfig(
        width=16, depth=3, heads=2, patch=8, latent_dim=4, latent_norm="batch", trunks="three"
    )
    objective = DSD(augmentation=Augmentation(mask_probability=1.0, mask_most=1.0))
    nets = make_nets(vit, objective)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a fresh start has zeros that stop gradients by themselves
        for p in nets.online.parameters():
            p += 0.1 * torch.randn(p.shape, generator=g)
    reached = {}
    for loss in ("reconstruction", "denoising", "align", "repr", "class"):
        grads = gradient(objective, nets, loss)
        moved = [name for name, value in grads.items() if value.abs().max() > 0]
        reached[loss] = {
            group for group, own in GROUPS.items() if any(m.startswith(own) for m in moved)
        }
    assert reached == {
        "reconstruction": {"encode", "decode"},
        "denoising": {"encode", "denoise"},
        "align": {"encode", "denoise", "align head"},
        "repr": {"encode", "repr head"},
        "class": {"encode", "class head"},
    }


# The theory, through the objective itself

MODES = torch.tensor([0.05, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0])
FLAT = ImageSpec(len(MODES), 1, 1, 0)


class Wiener(Backbone):
    """Encodes a one-pixel image by a factor per channel; its denoiser is the exact one."""

    def __init__(self, image: ImageSpec) -> None:
        super().__init__()
        d = image.channels
        self.image, self.latent = image, LatentSpec(1, d, "none")
        self.latent_norm = LatentNorm("none", 1, d)
        self.w = nn.Parameter(MODES.sqrt())

    def encode(self, x):
        return (self.w * x[:, :, 0, 0])[:, None]

    def decode(self, z):
        return (z[:, 0] / self.w)[:, :, None, None]

    def denoise(self, z_t, t, condition):
        t, variance = t[:, None, None], self.w.detach().square()
        return t * variance / (t.square() * variance + (1 - t).square()) * z_t


@attrs.frozen(kw_only=True)
class WienerConfig(BackboneConfig):
    def build(self, image):
        return Wiener(image)


SIGNS = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
NODES = 500


class ExactMoments(Draw):
    """Noise of signs instead of normal numbers: losses are quadratic and see no difference."""

    def noise(self, like):
        return SIGNS[:, 1].repeat(NODES)[:, None, None].expand(like.shape)


def pull(objective: DSD) -> torch.Tensor:
    """-dL/dw of the denoising loss, summed over modes, exact but for a midpoint rule over t."""
    nets = make_nets(WienerConfig(), image=FLAT)
    t = ((torch.arange(NODES) + 0.5) / NODES).repeat_interleave(4)
    x = SIGNS[:, 0].repeat(NODES)[:, None, None, None].expand(-1, len(MODES), 1, 1)
    condition = ClassLabels(0).null(len(t))
    draw = ExactMoments(t=t, condition=condition, generator=None, times=Uniform())
    loss = objective.terms(nets, Batch(x=x, condition=condition), draw, "joint").losses[
        "denoising"
    ]
    if not loss.requires_grad:
        return torch.zeros(len(MODES))
    return -torch.autograd.grad(loss, nets.online.w)[0] * len(MODES)


HALF_PI = torch.full_like(MODES, torch.pi / 2)
ROOT = MODES.sqrt()
BY_VELOCITY = torch.pi / 2 - ROOT * (MODES.log() + torch.pi / ROOT) / (1 + MODES)
OPEN = {"clamp": 1e8}  # the closed forms know no clamp

RUNGS = {
    "L1 naive": ({"target_gradient": 1.0, "regress": "v", "target": "online"}, -HALF_PI),
    "L2 stopped target": ({"regress": "v", "target": "online"}, BY_VELOCITY),
    "L3 clean": ({"target_gradient": 1.0, "weight": "v", "target": "online"}, -HALF_PI),
    "L4 both": ({"weight": "v", "target": "online"}, HALF_PI),
    "L5 ema": ({"weight": "v", "target": "ema"}, HALF_PI),
    "U1 unite": ({"input_gradient": 0.0, "weight": "v", "target": "online"}, 0 * HALF_PI),
}


@pytest.mark.parametrize("name", RUNGS)
def test_each_rung_of_the_ladder_pulls_on_the_latents_as_its_closed_form(name) -> None:
    """U2, clean answers compared by velocity, is L2 here: this denoiser answers with x0."""
    switches, expected = RUNGS[name]
    # float32 next to t = 1, where 1e-7 is multiplied by up to 1 / (1 - t)^2 = 1e6 in 1 of 500
    torch.testing.assert_close(pull(rung(**switches, **OPEN)), expected, rtol=0.0, atol=0.01)


def test_without_a_weight_dsd_lets_every_mode_grow_a_little() -> None:
    found = pull(rung(target="online")) / ROOT
    assert (found > 0.05).all()
    assert (found < 0.3).all()


# Switches that contradict one another


@pytest.mark.parametrize(
    ("changes", "norm", "where"),
    [
        ({"target_gradient": 0.5}, "batch", "objective.target_gradient"),
        ({}, "none", "backbone.latent_norm"),
        ({}, "affine", "backbone.latent_norm"),
        ({"regress": "v", "weight": "v"}, "batch", "objective.weight"),
        ({"align_weight": 1.0, "align_student": 9}, "batch", "objective.align_student"),
    ],
)
def test_a_contradiction_is_found_before_training(changes, norm, where) -> None:
    found = rung(**changes).problems(make_nets(TinyBackbone(latent_norm=norm), device="meta"))
    assert [place for place, _ in found] == [where]


def test_noise_that_latents_outgrow_and_unbounded_weights_are_found_before_training() -> None:
    free = make_nets(TinyBackbone(latent_norm="none"), device="meta")
    noisy = rung(input_gradient=0.0, decode_noise=DecodeNoise(probability=0.5))
    assert [where for where, _ in noisy.problems(free)] == ["backbone.latent_norm"]
    by_noise = make_nets(predicts="eps", device="meta")
    assert [where for where, _ in rung().problems(by_noise)] == ["predicts"]


@pytest.mark.parametrize("predicts", ["x0", "v", "eps", "score"])
@pytest.mark.parametrize("regress", ["x0", "v", "eps"])
def test_a_regression_that_has_no_bound_next_to_noise_is_refused_and_no_other(
    regress, predicts
) -> None:
    objective, batch = rung(regress=regress), make_batch()
    nets = make_nets(TinyBackbone(latent_norm="batch"), objective, predicts=predicts)
    found = objective.problems(nets)
    draw = attrs.evolve(make_draw(batch), t=torch.full((len(batch.x),), 1e-4))
    loss = objective.terms(nets, batch, draw, "joint").losses["denoising"].detach()
    assert [where for where, _ in found] == (["predicts"] if loss > 1e3 else [])
    option = "objective.weight" if regress == "x0" else "objective.regress"
    assert all(f"set {option}: eps, or predicts: x0 or v" in what for _, what in found)


def test_losses_that_need_labels_or_features_say_so() -> None:
    unlabelled = make_nets(image=ImageSpec(3, 16, 16, 0))
    assert [w for w, _ in DSD().problems(unlabelled)] == ["objective.class_weight"]
    blind = make_nets(WienerConfig(), image=FLAT)
    places = {w for w, _ in attrs.evolve(DSD(), input_gradient=0.0).problems(blind)}
    assert {f"objective.{x}_weight" for x in ("align", "repr", "class")} <= places


# The augmentation


def test_masks_hide_the_share_they_say() -> None:
    batch = make_batch(size=4000)
    half = Augmentation(mask_probability=0.5, mask_most=0.4).mask(64, make_draw(batch))
    share = half.float().mean(dim=1)
    assert half.dtype == torch.bool
    # half of the images are whole (some others by chance: up to 0.4 / 64 of them)
    assert 0.48 < (share == 0).float().mean() < 0.54
    assert share.max() < 0.7  # 0.4 and five standard deviations of 64 patches
    assert share.mean().item() == pytest.approx(0.5 * 0.2, abs=0.01)


@pytest.mark.parametrize("off", [{"mask_probability": 0.0}, {"mask_most": 0.0}])
def test_an_augmentation_that_is_off_draws_nothing_and_changes_nothing(off) -> None:
    batch = make_batch()
    draw, none = make_draw(batch), Augmentation(**off)
    state = draw.generator.get_state()
    assert none.mask(4, draw) is None
    assert none.colours(batch.x, draw) is batch.x
    assert not none.changes
    assert torch.equal(draw.generator.get_state(), state)


@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_keeps_images_in_range_and_black_images_black(channels) -> None:
    image = ImageSpec(channels, 8, 8, 2)
    batch = make_batch(image, size=50)
    jitter = Augmentation(jitter=0.5)
    x = jitter.colours(batch.x, make_draw(batch))
    assert -1 <= x.min() <= x.max() <= 1
    assert not torch.allclose(x, batch.x)
    black = torch.full_like(batch.x, -1.0)
    torch.testing.assert_close(jitter.colours(black, make_draw(batch)), black)
