"""MeanFlow: its identity, its exact derivative, its times, and what it refuses."""

from __future__ import annotations

import attrs
import pytest
import torch
from command_line import e2ediff
from e2ediff_rivals.mean_flow import MeanFlow, TrainedGuidance, slope_along
from e2ediff_testing import check_objective, make_batch, make_draw, make_nets
from reached_modules import reached, shaken_nets
from tiny_recipe import tiny

from e2ediff.backbone import Denoise, Output
from e2ediff.data import ImageSpec
from e2ediff.interpolant import spread
from e2ediff.nn.attention import SDPBackend, _pinned
from e2ediff.parts.backbones import ViTConfig
from e2ediff.parts.interpolants import Cosine

BATCH = make_batch()
VIT = ViTConfig(
    width=16, depth=2, heads=2, patch=8, latent_dim=4, latent_norm="batch", second_time=True
)


@pytest.mark.parametrize("tangent", ["path", "network"])
def test_mean_flow_keeps_the_contract_of_objectives(tangent) -> None:
    check_objective(MeanFlow(tangent=tangent, apart=0.5), VIT)


@pytest.mark.parametrize("predicts", ["v", "x0"])
def test_mean_flow_trains_the_encoder_by_reconstruction_alone(predicts) -> None:
    nets = shaken_nets(MeanFlow(), attrs.evolve(VIT, trunks="three"), predicts=predicts)
    terms = MeanFlow().terms(nets, BATCH, make_draw(BATCH), "joint")
    found = {name: reached(nets, loss) for name, loss in terms.losses.items()}
    assert found == {"reconstruction": {"encode", "decode"}, "denoising": {"denoise"}}


@pytest.mark.filterwarnings("ignore:Mismatch dtype:UserWarning")  # norms of float32 queries
@pytest.mark.parametrize("variant", [
    {},
    {"position": "rope", "modulation": "lowrank", "qk_norm": False},
    {"mlp": "relu2", "denoise_skip": True, "modulation": "shared"},
])  # fmt: skip
@pytest.mark.parametrize("predicts", ["v", "x0"])
def test_the_slope_of_the_average_velocity_is_the_limit_of_differences(variant, predicts) -> None:
    nets = shaken_nets(MeanFlow(), attrs.evolve(VIT, **variant), predicts=predicts)
    nets.online.double()
    g = torch.Generator().manual_seed(0)
    z, along = torch.randn(2, 6, 4, 4, generator=g, dtype=torch.float64)
    t = torch.linspace(0.1, 0.6, 6, dtype=torch.float64)
    r, condition, h = t + 0.3, BATCH.condition, 1e-5

    def u(step: float) -> torch.Tensor:
        z_t = z + step * along
        (out,) = nets.online.run(Denoise(z_t=z_t, t=t + step, r=r, condition=condition))
        return nets.path.estimate(out, z_t, t + step, predicts).v

    kept = [m.attend for m in nets.online.modules() if hasattr(m, "attend")]
    found = slope_along(nets, z, t, r, along, condition)
    with torch.no_grad():
        expected = (u(h) - u(-h)) / (2 * h)
    # answers are float32, so that differences of them keep few digits
    assert (found - expected).norm() < 0.01 * expected.norm()
    assert [m.attend for m in nets.online.modules() if hasattr(m, "attend")] == kept


def test_kernels_without_forward_derivatives_and_compiled_blocks_give_the_same_slope() -> None:
    nets = shaken_nets(MeanFlow(), VIT, predicts="v")
    t = torch.full((6,), 0.4)
    given = (nets, torch.ones(6, 4, 4), t, t + 0.2, torch.ones(6, 4, 4), BATCH.condition)
    plain = slope_along(*given)
    for module in nets.online.modules():
        if hasattr(module, "attend"):
            module.attend = _pinned(SDPBackend.FLASH_ATTENTION)
    torch.testing.assert_close(slope_along(*given), plain)
    for block in nets.online.blocks():
        block.compile(backend="eager")
    torch.testing.assert_close(slope_along(*given), plain)


def exact_nets(objective: MeanFlow):
    """Networks whose denoiser knows that all latents are equal, and answers exactly."""
    nets = make_nets(VIT, objective, predicts="v")
    own = nets.online.outputs

    def outputs(*passes):
        made = own(*passes)
        return [
            Output(-p.z_t / spread(1 - p.t, p.z_t)) if isinstance(p, Denoise) else out
            for p, out in zip(passes, made, strict=True)
        ]

    nets.online.outputs = outputs
    nets.online.latent_norm.register_forward_hook(lambda module, given, out: out * 0)
    return nets


def test_the_true_average_velocity_of_a_point_has_no_loss() -> None:
    """All latents zero: v = -eps, u = -z_t / (1 - t) is constant along the path, so du/dt = 0."""
    for objective in (MeanFlow(apart=1.0), MeanFlow(apart=0.0), MeanFlow(tangent="network")):
        nets = exact_nets(objective)
        terms = objective.terms(nets, BATCH, make_draw(BATCH), "joint")
        assert terms.info["velocity_error"] < 1e-8
        assert terms.losses["denoising"] < 1e-4


@pytest.mark.parametrize("tangent", ["path", "network"])
def test_the_true_average_velocity_of_a_bent_path_has_no_loss(tangent) -> None:
    """All latents zero on a cosine: u = (sigma(r) - sigma(t)) / (r - t) eps changes with t."""
    objective = MeanFlow(apart=1.0, tangent=tangent)
    nets = make_nets(VIT, objective, predicts="v", path=Cosine())
    own, sigma = nets.online.outputs, nets.path.sigma

    def average(p):
        gap = p.r - p.t
        mean = (sigma(p.r) - sigma(p.t)) / torch.where(gap == 0, torch.ones_like(gap), gap)
        speed = torch.where(gap == 0, nets.path.sigma_dot(p.t), mean)
        return Output(spread(speed / sigma(p.t), p.z_t) * p.z_t)

    def outputs(*passes):
        made = own(*passes)
        pairs = zip(passes, made, strict=True)
        return [average(p) if isinstance(p, Denoise) else out for p, out in pairs]

    nets.online.outputs = outputs
    nets.online.latent_norm.register_forward_hook(lambda module, given, out: out * 0)
    terms = objective.terms(nets, BATCH, make_draw(BATCH), "joint")
    assert terms.info["velocity_error"] < 1e-8, "with the other sign it is of the order of 1"


def test_a_bent_path_is_refused() -> None:
    nets = make_nets(VIT, predicts="v", path=Cosine(), device="meta")
    ((where, what),) = MeanFlow().problems(nets)
    assert where == "interpolant"
    assert "set interpolant: linear" in what


def test_the_adaptive_weight_divides_by_the_sum_of_squares() -> None:
    nets = shaken_nets(MeanFlow(), VIT, predicts="v")
    found = {}
    for power in (0.0, 1.0):
        objective = MeanFlow(power=power, apart=0.0)
        terms = objective.terms(nets, BATCH, make_draw(BATCH), "joint")
        found[power] = terms.losses["denoising"], terms.info["velocity_error"]
    plain, error = found[0.0]
    assert plain.item() == pytest.approx(error.item() * 4 * 4, rel=1e-5)
    assert found[1.0][0].item() == pytest.approx(1.0, abs=0.01)


def test_the_share_of_latents_with_two_times_is_apart_and_times_never_cross() -> None:
    many = make_batch(size=4000)
    t, r = MeanFlow(apart=0.25)._times(make_draw(many))
    assert (r >= t).all()
    assert (r > t).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(*MeanFlow(apart=0.0)._times(make_draw(many)))


def test_the_guided_velocity_is_the_formula_s_within_its_times_and_v_for_dropped_rows() -> None:
    nets = shaken_nets(MeanFlow(), VIT, predicts="v")
    g = torch.Generator().manual_seed(0)
    z_t, v = torch.randn(2, 6, 4, 4, generator=g)
    t = torch.tensor([0.1, 0.2, 0.5, 0.5, 0.9, 0.95])
    dropped = torch.tensor([False, False, False, True, False, False])
    known = BATCH.condition.where(dropped, BATCH.condition.null())
    guidance = TrainedGuidance(scale=3.0, kappa=0.4, t_min=0.2, t_max=0.9)
    found = guidance(v, z_t, t, nets, known)
    with torch.no_grad():
        one, none = (
            nets.online.run(Denoise(z_t=z_t, t=t, condition=c))[0] for c in (known, known.null())
        )
    expected = 1.8 * v + 0.4 * one - 1.2 * none  # omega 3 (1 - 0.4)
    inside = [1, 2, 4]
    torch.testing.assert_close(found[inside], expected[inside])
    assert float((found - v)[inside].abs().max()) > 0.1
    assert torch.equal(found[[0, 3, 5]], v[[0, 3, 5]])
    assert not found.requires_grad, "the guidance is no path to the weights"


def test_a_guidance_of_1_changes_no_bit_and_another_changes_the_target_alone() -> None:
    found = {}
    for scale in (None, 1.0, 2.0):
        more = {} if scale is None else {"guidance": TrainedGuidance(scale=scale)}
        nets = shaken_nets(MeanFlow(), VIT, predicts="v")
        terms = MeanFlow(apart=0.5, **more).terms(nets, BATCH, make_draw(BATCH), "joint")
        found[scale] = terms.losses["denoising"], terms.losses["reconstruction"]
    assert torch.equal(found[None][0], found[1.0][0])
    assert not torch.equal(found[1.0][0], found[2.0][0])
    assert torch.equal(found[1.0][1], found[2.0][1])
    check_objective(MeanFlow(apart=0.5, guidance=TrainedGuidance(scale=2.0, kappa=0.5)), VIT)


def test_guidance_without_conditions_and_reversed_times_are_refused() -> None:
    objective = MeanFlow(guidance=TrainedGuidance(scale=2.0))
    nets = make_nets(VIT, objective, predicts="v", image=ImageSpec(3, 16, 16, 0), device="meta")
    assert [where for where, _ in objective.problems(nets)] == ["objective.guidance"]
    with pytest.raises(
        ValueError, match=r"'t_max' must be >= t_min, 0\.5, or no time is guided: 0\.4"
    ):
        TrainedGuidance(t_min=0.5, t_max=0.4)


def test_a_network_with_one_time_is_refused() -> None:
    nets = make_nets(attrs.evolve(VIT, second_time=False), predicts="v", device="meta")
    ((where, what),) = MeanFlow().problems(nets)
    assert where == "backbone.second_time"
    assert "set backbone.second_time: true" in what
    noise = make_nets(VIT, predicts="eps", device="meta")
    assert not MeanFlow().problems(noise), "the adaptive weight bounds the loss"
    assert [where for where, _ in MeanFlow(power=0.5).problems(noise)] == ["predicts"]


CHECKED = tiny(
    backbone="{name: vit, width: 16, depth: 1, heads: 1, patch: 8, latent_dim: 4, "
    "latent_norm: batch, second_time: true}",
    objective="{name: mean_flow}", predicts="v", sampler="average_velocity",
)  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), [
    (["objective.guidance.scale=2", "guidance=classifier_free"],
     "guidance: the denoiser is trained to be guided, by the objective"),
    (["objective.apart=0"], "sampler: follows average velocities, which this network has not"),
])  # fmt: skip
def test_guidance_twice_and_averages_that_are_not_trained_are_refused(
    tmp_path, changes, said
) -> None:
    (tmp_path / "tiny.yaml").write_text(CHECKED)
    words = [word for change in changes for word in ("--set", change)]
    refused = e2ediff("check", tmp_path / "tiny.yaml", *words)
    assert refused.code == 3
    assert said in refused.err
    undropped = ("--set", "objective.guidance.scale=2", "--set", "label_drop=0")
    refused = e2ediff("check", tmp_path / "tiny.yaml", *undropped)
    assert refused.code == 3
    assert "label_drop: the objective trains guided velocities" in refused.err
    kept = e2ediff("check", tmp_path / "tiny.yaml", "--set", "objective.guidance.scale=2")
    assert kept.code == 0, kept.err
