"""LDM-is-AE: the image on the way, what each loss reaches, steps of rates, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest
import torch
from command_line import e2ediff
from declared_stops import holds_its_declaration
from e2ediff_ldm_is_ae.backbone import LDMIsAEConfig, eight_bit
from e2ediff_ldm_is_ae.objective import LDMIsAE
from e2ediff_ldm_is_ae.optimizer import RateSteps, Stepped
from e2ediff_testing import (
    TinyBackbone,
    check_backbone,
    check_optimizer,
    make_batch,
    make_draw,
    make_nets,
)
from torch import distributed

from e2ediff.backbone import Decode, Denoise, Encode
from e2ediff.condition import Labels
from e2ediff.data import ImageSpec
from e2ediff.errors import ResourceError
from e2ediff.host.plugins import load
from e2ediff.nn.layers import patchify
from e2ediff.parts.optimizers.scheduled import AdamW, ParameterGroup

RECIPES = Path(__file__).parents[3] / "recipes"
TINY = LDMIsAEConfig(
    width=16, depth=3, encoder_depth=1, heads=2, patch=8, latent_dim=6, bottleneck=8, context=2,
    context_start=1,
)  # fmt: skip
SCRIPT = {"eight_bit": True}
FREE = {"latent_scale": "none", "skip": False, "gamma": 0.0, "context": 0, "context_start": 0}
BATCH = make_batch()


def shaken(objective=None, **changes):
    """Networks without the zeros of a fresh start, which stop gradients by themselves."""
    nets = make_nets(attrs.evolve(TINY, **changes), objective or LDMIsAE())
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in nets.online.parameters():
            p += 0.1 * torch.randn(p.shape, generator=g)
    return nets


def at(*times):
    """A draw of six images at these times, in turn."""
    return attrs.evolve(make_draw(BATCH), t=torch.tensor(times).repeat(6 // len(times)))


def reached(loss, net) -> dict[str, bool]:
    """Whether a loss moves DiT-D's weights, and DiT-E's."""
    named = dict(net.named_parameters())
    grads = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    found = {"dit_d": False, "dit_e": False}
    for name, g in zip(named, grads, strict=True):
        found[name.split(".")[0]] |= g is not None and bool(g.any())
    return found


@pytest.mark.parametrize(
    "changes", [{}, SCRIPT, FREE, {"depth": 4, "encoder_depth": 2, "patch": 4}]
)
def test_the_network_keeps_the_contract_of_backbones(changes) -> None:
    check_backbone(attrs.evolve(TINY, **changes))


@pytest.mark.parametrize("image", [ImageSpec(1, 16, 24, 0), ImageSpec(3, 8, 32, 1)], ids=str)
def test_it_takes_grey_oblong_and_unlabelled_images(image) -> None:
    check_backbone(TINY, image)


def test_an_encoder_that_would_learn_at_no_time_is_refused() -> None:
    with pytest.raises(ValueError, match="'encoder_from' must be < 1"):
        LDMIsAE(encoder_from=1.0)


@pytest.mark.parametrize("options", [{}, {"weight": "x0"}, {"encoder_from": 0.0}])
def test_the_objective_keeps_its_contract(options) -> None:
    holds_its_declaration(LDMIsAE(**options), TINY)


@pytest.mark.parametrize("changes", [{}, FREE])
def test_at_t_1_the_denoiser_is_its_decoder_and_then_its_encoder(changes) -> None:
    """With the null condition that both have; gamma is 1 there, so F' has no part."""
    net = shaken(**changes).online
    z, one = torch.randn(6, 4, 6), torch.ones(6)
    null = BATCH.condition.null()
    with torch.no_grad():
        (out,) = net.outputs(Denoise(z_t=z, t=one, condition=null))
        (x,) = net.run(Decode(z=z))
        (again,) = net.run(Encode(x=x))
    torch.testing.assert_close(out.image, x, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.value, again, rtol=0, atol=1e-5)


@pytest.mark.parametrize("gamma", [3.0, 1.0, 0.0])
def test_what_is_encoded_is_mixed_by_a_power_of_time(gamma) -> None:
    """F' counts by 1 - t^gamma: shifts of its rows of the last layer, seen through a linear E."""
    net = shaken(gamma=gamma, skip=False).online
    seen = []
    net.dit_e.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    z, t = torch.randn(6, 4, 6), torch.tensor([0.0, 0.2, 0.5, 0.8, 0.95, 1.0])
    with torch.no_grad():
        (out,) = net.outputs(Denoise(z_t=z, t=t, condition=BATCH.condition))
        net.dit_d.head.bias[:192] += 1.0  # F'
        (moved,) = net.outputs(Denoise(z_t=z, t=t, condition=BATCH.condition))
    assert torch.equal(moved.image, out.image)
    share = torch.tensor([1 - float(one) ** gamma for one in t])  # 0^0 is 1
    expected = share[:, None, None].expand_as(seen[0])
    torch.testing.assert_close(seen[1] - seen[0], expected, rtol=0, atol=1e-6)


def test_the_skip_adds_the_image_s_pixels_interpolated_over_a_patch() -> None:
    """192 numbers become 6: each is the mean of the two in the middle of its 32."""
    with_skip, without = (shaken(skip=skip).online.encode(BATCH.x) for skip in (True, False))
    pixels = patchify(BATCH.x, 8).unflatten(-1, (6, 32))
    wanted = (pixels[..., 15] + pixels[..., 16]) / 2
    torch.testing.assert_close(with_skip - without, wanted, rtol=0, atol=1e-5)


def test_latents_have_a_root_mean_square_of_1_before_the_skip() -> None:
    with torch.no_grad():
        z = shaken(skip=False).online.encode(BATCH.x)
        free = shaken(skip=False, latent_scale="none").online.encode(BATCH.x)
    torch.testing.assert_close(z.square().mean((1, 2)), torch.ones(6), rtol=0, atol=1e-4)
    assert float((free.square().mean((1, 2)) - 1).abs().max()) > 0.05


def test_eight_bits_are_a_picture_s_levels_with_the_gradient_of_clipping() -> None:
    x = torch.tensor([-2.0, -0.98, -0.999, 0.0, 0.3, 1.5], requires_grad=True)
    y = eight_bit(x)
    levels = (y.detach() + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    torch.testing.assert_close(levels, torch.tensor([0.0, 3, 0, 128, 166, 255]), rtol=0, atol=1e-4)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.tolist() == [0, 1, 1, 1, 1, 0]


@pytest.mark.parametrize(
    ("times", "encoder"), [((0.2, 0.4), False), ((0.5, 0.5), True), ((0.2, 0.9), True)]
)
def test_each_loss_reaches_exactly_its_part_and_its_rows(times, encoder) -> None:
    """The encoder learns by denoising from late times alone, and nothing by its own latent."""
    nets = shaken()
    terms = LDMIsAE().terms(nets, BATCH, at(*times), "joint")
    assert reached(terms.losses["reconstruction"], nets.online) == {"dit_d": True, "dit_e": False}
    assert reached(terms.losses["denoising"], nets.online) == {"dit_d": True, "dit_e": encoder}
    assert not terms.z.requires_grad, "it is encoded without a graph"


def test_the_encoder_s_gradient_is_that_of_the_late_rows_alone() -> None:
    """And DiT-D's is that of all rows, with a threshold or without."""
    times, found = (0.1, 0.3, 0.49, 0.5, 0.8, 0.97), {}
    for name, options in {"half": {}, "all": {"encoder_from": 0.0}}.items():
        nets = shaken()
        loss = LDMIsAE(**options).terms(nets, BATCH, at(*times), "joint").losses["denoising"]
        loss.backward()
        found[name] = {k: p.grad for k, p in nets.online.named_parameters()}
    nets = shaken()
    late = LDMIsAE(encoder_from=0.0).terms(nets, BATCH, at(*times), "joint")
    rows = at(*times)
    z = late.z.detach()
    z_t = nets.path.mix(z, rows.noise(z), rows.t)
    out = nets.online.denoise(z_t, rows.t, rows.condition)
    w = (1 / (1 - rows.t).square()).clamp_max(400.0)
    ((w[:, None, None] * (out - z).square())[3:].sum() / z.numel()).backward()
    for name, p in nets.online.named_parameters():
        wanted = p.grad if name.startswith("dit_e") else found["all"][name]
        bound = 1e-5 * float(wanted.abs().max()) + 1e-7
        assert float((found["half"][name] - wanted).abs().max()) <= bound, name


@pytest.mark.parametrize(
    ("options", "clamp", "factor"),
    [
        pytest.param({}, 400.0, 10.0, id="script"),
        pytest.param({"denoising_weight": 2.0}, 400.0, 2.0, id="arguments"),
        pytest.param({"clamp": 1e6, "denoising_weight": 1.0}, 1e6, 1.0, id="unclamped"),
    ],
)
def test_its_total_is_the_sum_of_both_squared_errors_over_the_time_left(
    options, clamp, factor
) -> None:
    """mean (F - x)^2 w + factor mean (v_hat - v)^2, w = 1 / max(1 - t, clamp^-1/2)^2."""
    objective, draw = LDMIsAE(**options), at(0.0, 0.3, 0.98)
    nets = shaken(objective)
    with torch.no_grad():
        terms = objective.terms(nets, BATCH, draw, "joint")
        z, eps = terms.z, at(0.0, 0.3, 0.98).noise(terms.z)
        t = draw.t[:, None, None]
        z_t = t * z + (1 - t) * eps
        (out,) = nets.online.outputs(Denoise(z_t=z_t, t=draw.t, condition=draw.condition))
        left = (1 - draw.t).clamp_min(clamp**-0.5)
        pixels = ((out.image - BATCH.x).square().mean((1, 2, 3)) / left.square()).mean()
        span = left[:, None, None]
        velocities = ((z - z_t) / span - (out.value - z_t) / span).square().mean()
    torch.testing.assert_close(terms.total, pixels + factor * velocities, rtol=1e-4, atol=0)


def test_an_encoder_whose_blocks_fsdp2_splits_is_refused_a_threshold() -> None:
    """It would put weights with gradients in the place of those without."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        nets = shaken()
        fully_shard(nets.online.dit_e.trunk.blocks[0], mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(
            ResourceError, match=r"set parallel: ddp, or objective\.encoder_from: 0"
        ):
            LDMIsAE().terms(nets, BATCH, at(0.5), "joint")
        LDMIsAE(encoder_from=0.0).terms(nets, BATCH, at(0.5), "joint")
    finally:
        distributed.destroy_process_group()


def test_class_and_time_reach_both_ends_and_the_autoencoder_knows_neither() -> None:
    net, z = shaken().online, torch.randn(6, 4, 6)
    one, two = (Labels(torch.full((6,), k), 4) for k in (0, 1))
    t = torch.full((6,), 0.5)
    (a,), (b,), (c,) = (
        net.outputs(Denoise(z_t=z, t=time, condition=condition))
        for time, condition in ((t, one), (t, two), (t + 0.3, one))
    )
    for other in (b, c):
        assert not torch.allclose(a.value, other.value, atol=1e-3)
        assert not torch.allclose(a.image, other.image, atol=1e-3)


def test_a_backbone_without_an_image_on_the_way_is_refused() -> None:
    ((where, what),) = LDMIsAE().problems(make_nets(TinyBackbone(), device="meta"))
    assert where == "backbone"
    assert "choose backbone: ldm_is_ae" in what


@pytest.mark.parametrize("predicts", ["v", "eps", "score"])
def test_a_denoiser_whose_answer_is_no_latent_is_refused(predicts) -> None:
    ((where, what),) = LDMIsAE().problems(make_nets(TINY, predicts=predicts, device="meta"))
    assert where == "predicts"
    assert "set predicts: x0" in what


def test_what_it_cannot_do_is_refused_by_check(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[3] / "recipes" / "ldm_is_ae_quickstart.yaml"
    done = e2ediff(
        "check", recipe, "--set", "regularizers=[vicreg]", "--set", "parallel=fsdp2",
        "--set", "predicts=v",
    )  # fmt: skip
    assert done.code == 3
    assert "3 problems" in done.err
    assert "regularizers: the objective trains no encoder through its latents" in done.err
    assert "parallel: the objective uses weights without their gradients" in done.err
    whole = e2ediff(
        "check", recipe, "--set", "parallel=fsdp2", "--set", "objective.encoder_from=0"
    )
    assert whole.code == 0, whole.err


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"patch": 5}, "patch"),
        ({"heads": 3}, "heads"),
        ({"context_start": 2}, "context_start"),
        ({"encoder_depth": 3}, "encoder_depth"),
        ({"encoder_depth": 5}, "encoder_depth"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, where) -> None:
    found = attrs.evolve(TINY, **changes).problems(ImageSpec(3, 16, 16, 4))
    assert [name for name, _ in found] == [where]


def test_the_paper_s_size_has_the_paper_s_number_of_weights() -> None:
    config = LDMIsAEConfig(
        width=1280, depth=32, encoder_depth=2, heads=16, patch=16, bottleneck=256, context_start=10
    )
    with torch.device("meta"):
        net = config.build(ImageSpec(3, 256, 256, 1000))
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == 961


EPOCH = 1000
INNER = AdamW(
    lr=2e-4, warmup_images=5 * EPOCH, groups=(ParameterGroup(match="online.dit_e.*", factor=1e-3),)
)
PAPER = RateSteps(match="online.dit_e.*", every_images=50 * EPOCH, factor=1 / 3, until=200 * EPOCH)


@pytest.mark.parametrize(
    ("epoch", "encoder"), [(49, 1), (50, 1 / 3), (99, 1 / 3), (150, 1 / 27), (200, 0), (299, 0)]
)
def test_the_encoder_s_rate_falls_to_a_third_every_50_epochs_and_to_0_after_200(
    epoch, encoder
) -> None:
    optimizer = Stepped(inner=INNER, steps=(PAPER,))
    name, images, total = "online.dit_e.*", epoch * EPOCH, 300 * EPOCH
    assert optimizer.group_factor(name, images, total) == pytest.approx(encoder)
    assert optimizer.factor(images, total) == optimizer.group_factor("", images, total) == 1


def test_the_other_rate_may_fall_in_steps_too_after_the_rise_of_inner() -> None:
    optimizer = Stepped(inner=INNER, steps=(RateSteps(every_images=200 * EPOCH, factor=0.1),))
    assert optimizer.factor(5 * EPOCH // 2, 10**6) == pytest.approx(0.5, abs=1e-3)
    assert optimizer.factor(250 * EPOCH, 10**6) == pytest.approx(0.1)
    assert optimizer.group_factor("online.dit_e.*", 250 * EPOCH, 10**6) == 1


def test_stepped_keeps_the_contract_of_optimizers_and_builds_that_of_inner() -> None:
    check_optimizer(Stepped(inner=AdamW(clip=0.5)))
    assert Stepped(inner=AdamW(clip=0.5)).clip == 0.5
    named = list(make_nets(TINY).online.named_parameters(prefix="online"))
    groups = Stepped(inner=INNER, steps=(PAPER,)).build(named).param_groups
    rates = {group.get("name", ""): group["lr"] for group in groups}
    assert rates == {"": 2e-4, "online.dit_e.*": pytest.approx(2e-7)}


def test_steps_of_no_group_and_of_one_group_twice_are_refused() -> None:
    names = ["online.dit_d.head.weight", "online.dit_e.head.weight"]
    ((where, what),) = Stepped(
        inner=INNER, steps=(attrs.evolve(PAPER, match="online.encoder.*"),)
    ).problems(names)
    assert where == "steps.0.match"
    assert "online.dit_e.*" in what
    ((where, _),) = Stepped(inner=INNER).problems(names[:1])
    assert where == "inner.groups.0.match"
    with pytest.raises(ValueError, match="two steps have the pattern"):
        Stepped(inner=INNER, steps=(PAPER, PAPER))


def test_the_plugin_registers_its_three_parts() -> None:
    host = load()
    assert "ldm_is_ae" not in host.broken
    assert host.registries["backbones"].get("ldm_is_ae") is LDMIsAEConfig
    assert host.registries["objectives"].get("ldm_is_ae") is LDMIsAE
    assert host.registries["optimizers"].get("stepped") is Stepped


def test_its_small_recipe_trains_samples_and_reconstructs(tmp_path: Path) -> None:
    less = ("steps=3", "probe={images: 16, glance: 8, calibration: 16}",
            "preview={rows: 1, classes: 2}",
            "sampler.steps=2", "backbone.depth=3", "backbone.width=24", "backbone.context_start=1",
            "cadence={log: 1, diagnose: 1, preview: 100, checkpoint: 100}")  # fmt: skip
    words = [word for one in less for word in ("--set", one)]
    done = e2ediff("run", RECIPES / "ldm_is_ae_quickstart.yaml", "--out", tmp_path / "run", *words)
    assert done.code == 0, done.err
    assert e2ediff("sample", tmp_path / "run", "--count", 1, "--label", 3).code == 0
    psnr = e2ediff("reconstruct", tmp_path / "run", "--count", 4, "--out", tmp_path)
    assert psnr.code == 0, psnr.err
