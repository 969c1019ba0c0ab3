"""The critic around an objective: its losses, its weight, its start, and what it leaves alone."""

from __future__ import annotations

import json

import attrs
import pytest
import torch
from command_line import e2ediff, needs
from declared_stops import holds_its_declaration
from e2ediff_rivals.adversary import Adversary, PatchCritic
from e2ediff_rivals.kl import KL
from e2ediff_rivals.repa_e import RepaE
from e2ediff_rivals.tuned_decoder import TunedDecoder
from e2ediff_testing import TinyBackbone, check_objective, make_batch, make_draw, make_nets
from pooled import Pooled
from reached_modules import VIT, reached, shaken_nets

from e2ediff.backbone import LatentSpec
from e2ediff.errors import AbsentDataError, DataError
from e2ediff.host.plugins import load
from e2ediff.losses import DecodeNoise
from e2ediff.parts.objectives import Coupled, Detached, TwoStage

BATCH = make_batch()
SMALL = {"layers": 1, "channels": 8, "critic_start": 0.0, "start": 0.0}
AROUND = Adversary(of=Detached(), **SMALL)


def late(progress: float, seed: int = 2):
    return attrs.evolve(make_draw(BATCH, seed=seed), progress=torch.tensor(progress))


@pytest.mark.parametrize("of", [Detached(draws=2), Coupled(), KL(std=0.1)], ids=type)
@pytest.mark.parametrize("adaptive", [True, False])
def test_a_critic_around_an_objective_keeps_the_contract(of, adaptive) -> None:
    check_objective(Adversary(of=of, adaptive=adaptive, **SMALL), TinyBackbone())
    holds_its_declaration(Adversary(of=of, adaptive=adaptive, **SMALL), VIT)


def test_the_adversarial_loss_trains_the_autoencoder_and_the_critic_itself_alone() -> None:
    nets = shaken_nets(AROUND)
    joint = AROUND.terms(nets, BATCH, make_draw(BATCH), "joint")
    assert reached(nets, joint.losses["adversarial"]) == {"encode", "decode", "heads"}
    critic = AROUND.terms(nets, BATCH, make_draw(BATCH), "critic")
    assert reached(nets, critic.losses["critic"]) == {"heads"}
    updated = {
        phase: {
            name.split(".")[0]
            for name in [
                *(f"online.{k}" for k, _ in nets.online.named_parameters()),
                *(f"heads.{k}" for k, _ in nets.heads.named_parameters()),
            ]
            if AROUND.trains(phase, name)
        }
        for phase in AROUND.phases
    }
    assert updated == {"joint": {"online"}, "critic": {"heads"}}


def test_what_is_wrapped_has_the_losses_that_it_has_alone() -> None:
    nets = shaken_nets(AROUND)
    alone = AROUND.of.terms(nets, BATCH, make_draw(BATCH), "joint")
    around = AROUND.terms(nets, BATCH, make_draw(BATCH), "joint")
    for name, loss in alone.losses.items():
        assert torch.equal(around.losses[name], loss)
        assert around.weights[name] == alone.weights[name]
    assert around.losses.keys() - alone.losses.keys() == {"adversarial"}


def test_the_critic_s_loss_is_the_hinge_of_real_and_decoded_images() -> None:
    nets = shaken_nets(AROUND)

    class Brightness(torch.nn.Module):
        def forward(self, x):
            return 3 * x.mean(dim=(1, 2, 3), keepdim=True)

    nets.heads["critic"] = Brightness()
    found = AROUND.terms(nets, BATCH, make_draw(BATCH), "critic").losses["critic"]
    with torch.no_grad():
        x_hat = nets.online.decode(nets.online.encode(BATCH.x))
        real, made = (3 * x.mean(dim=(1, 2, 3)) for x in (BATCH.x, x_hat))
    expected = (1 - real).clamp(min=0).mean() + (1 + made).clamp(min=0).mean()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("of", [
    Detached(decode_noise=DecodeNoise(probability=1.0)), KL(std=0.5),
    TunedDecoder(of=Detached(decode_noise=DecodeNoise(probability=1.0)), share=0.5),
], ids=lambda of: type(of).__name__)  # fmt: skip
def test_the_critic_learns_from_the_images_that_it_judges(of) -> None:
    around = Adversary(of=of, **SMALL)
    nets = shaken_nets(around, attrs.evolve(VIT, trunks="decoder_apart"))
    for progress, now in ((0.2, "joint"), (0.9, of.phases[-1])):
        _, seen = around._judged(nets, BATCH, late(progress))
        draw = late(progress)
        judged = {phase: of.terms(nets, BATCH, draw, phase).decoded for phase in of.phases}
        assert torch.equal(seen, judged[now])
        assert not seen.requires_grad
    with torch.no_grad():
        clean = nets.online.decode(nets.online.encode(BATCH.x))
    assert float((seen - clean).abs().max()) > 1e-3, "the images of clean latents are others"


def test_a_micro_shard_whose_weight_is_adaptive_is_not_computed_in_parts() -> None:
    assert AROUND.compares_images
    assert not Adversary(of=Detached(), adaptive=False, **SMALL).compares_images
    assert TunedDecoder(of=AROUND).compares_images, "what is around it says the same"


def test_a_missing_optimizer_hides_no_other_problem(tmp_path) -> None:
    (tmp_path / "judged.yaml").write_text(RECIPE)
    words = ("--set", "objective={name: adversary, of: {name: detached, reconstruction: "
             "{scales: 9}}, layers: 9}")  # fmt: skip
    refused = e2ediff("check", tmp_path / "judged.yaml", *words, "--set", "parallel=fsdp2")
    assert refused.code == 3
    assert "optimizers.critic: phase 'critic' needs an optimizer" in refused.err
    assert "objective.of.reconstruction.scales: 9 halves images of 16 x 16" in refused.err
    assert "set it to 5 or less" in refused.err


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_the_adaptive_weight_makes_both_gradients_at_the_images_proportional(scale) -> None:
    objective = attrs.evolve(AROUND, weight=0.25)
    nets = shaken_nets(objective)
    with torch.no_grad():
        for p in nets.heads["critic"].layers[-1].parameters():
            p.mul_(scale)
    terms = objective.terms(nets, BATCH, make_draw(BATCH), "joint")
    losses = (terms.losses["reconstruction"], terms.losses["adversarial"])
    norms = [
        torch.autograd.grad(loss, terms.decoded, retain_graph=True)[0].norm() for loss in losses
    ]
    weighted = terms.weights["adversarial"] * norms[1]
    torch.testing.assert_close(weighted, 0.25 * norms[0], rtol=1e-4, atol=0)
    assert not terms.weights["adversarial"].requires_grad
    plain = attrs.evolve(objective, adaptive=False).terms(nets, BATCH, make_draw(BATCH), "joint")
    assert plain.weights["adversarial"] == 0.25


def test_nothing_is_judged_before_the_start_and_the_critic_begins_before_it() -> None:
    objective = Adversary(of=Detached(), layers=1, channels=8, critic_start=0.2, start=0.3)
    nets = shaken_nets(objective)
    weights = {
        progress: float(
            objective.terms(nets, BATCH, late(progress), "joint").weights["adversarial"]
        )
        for progress in (0.0, 0.29, 0.3, 0.9)
    }
    assert weights[0.0] == weights[0.29] == 0
    assert weights[0.3] > 0
    assert weights[0.9] > 0
    assert objective.span("critic") == (0.2, 1.0)
    assert objective.span("joint") == (0.0, 1.0)
    with pytest.raises(ValueError, match=r"'start' must be >= critic_start, 0.4"):
        Adversary(of=Detached(), critic_start=0.4)


def test_the_second_of_two_stages_decodes_nothing_and_is_not_judged() -> None:
    objective = Adversary(of=TwoStage(), **SMALL)
    nets = shaken_nets(objective)
    assert objective.phases == ("autoencoder", "denoiser", "critic")
    first, second = (
        objective.terms(nets, BATCH, make_draw(BATCH), phase) for phase in objective.phases[:2]
    )
    assert "adversarial" in first.losses
    assert second.losses.keys() == {"denoising"}


def test_the_critic_judges_patches_apart_from_other_images() -> None:
    critic = PatchCritic(3, 8, 2)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert critic(x).shape == (4, 1, 6, 6)
    torch.testing.assert_close(critic(x)[:1], critic(x[:1]))


def test_pixels_small_images_and_critics_of_critics_are_refused() -> None:
    nets = make_nets(VIT, device="meta")
    found = dict(Adversary(of=Detached()).problems(nets))
    assert "set it to 2" in found["objective.layers"], "16 pixels"
    assert not Adversary(of=Detached(), layers=2).problems(nets)
    nested = Adversary(of=AROUND, **SMALL).problems(nets)
    assert ("objective.of", "an adversary is around an objective, not another") in nested
    shared = make_nets(attrs.evolve(VIT, trunks="one"), device="meta")
    inner = Adversary(of=TwoStage(), **SMALL).problems(shared)
    assert "two_stage needs a denoiser with weights of its own" in dict(inner)["objective.of"]
    noise = make_nets(VIT, predicts="eps", device="meta")
    ((where, what),) = Adversary(of=Detached(weight="x0"), **SMALL).problems(noise)
    assert where == "predicts"
    assert "set objective.of.weight: eps" in what
    nets.online.latent = LatentSpec(4, 4, "batch", learned=False)
    assert "no decoder to train" in dict(AROUND.problems(nets))["objective"]


def test_a_critic_that_would_begin_to_judge_after_the_last_decoded_image_is_refused() -> None:
    nets = make_nets(attrs.evolve(VIT, trunks="denoiser_apart"), device="meta")
    stages = TwoStage(autoencoder_fraction=0.3)
    for of, start, fits in (
        (stages, 0.29, True), (stages, 0.3, False), (Detached(), 0.99, True),
        (Detached(), 1.0, False),
    ):  # fmt: skip
        found = Adversary(of=of, **{**SMALL, "start": start}).problems(nets)
        assert [where for where, _ in found] == ([] if fits else ["objective.start"])
        assert fits or f"from a share of {start:g} of training on" in found[0][1]


def test_phases_of_what_is_wrapped_still_need_their_optimizers() -> None:
    @attrs.frozen(kw_only=True)
    class Own(Detached):
        own_optimizers = ("joint",)

    assert Adversary(of=Own(), **SMALL).own_optimizers == ("joint", "critic")
    assert TunedDecoder(of=Adversary(of=Own(), **SMALL)).own_optimizers == ("joint", "critic")


def test_errors_of_a_teacher_inside_name_the_options_where_they_are(tmp_path) -> None:
    class Lost(Pooled):
        def blank(self):
            raise AbsentDataError("no weights here")

    class Bent(Pooled):
        def build(self):
            raise DataError("objective.features: the network does not compute")

    inside = Adversary(of=RepaE(features=Lost()), **SMALL)
    with pytest.raises(AbsentDataError, match=r"^objective\.of\.features: no weights .*"
                       r"set objective\.of\.feature_dim to"):  # fmt: skip
        make_nets(VIT, inside)
    twice = TunedDecoder(of=Adversary(of=RepaE(features=Bent(), feature_dim=6), **SMALL))
    with pytest.raises(DataError, match=r"^objective\.of\.of\.features: the network does not"):
        make_nets(VIT, twice)


RECIPE = """\
e2ediff: 1
name: judged
requires: [e2ediff-rivals]
steps: 6
batch: 4
data: {name: synthetic, size: 16}
backbone: {name: vit, width: 16, depth: 2, heads: 2, patch: 8, latent_dim: 4, latent_norm: batch}
interpolant: linear
times: uniform
objective:
  {name: adversary, of: {name: detached, draws: 2}, layers: 1, channels: 8, critic_start: 0.3,
   start: 0.5}
optimizer: {name: adamw, lr: 0.001}
sampler: {name: euler, steps: 1}
cadence: {log: 1, diagnose: 100, preview: 100, checkpoint: 100}
probe: {images: 8, times: [0.5], calibration: 8}
preview: {rows: 1, classes: 2}
device: cpu
"""


def test_a_phase_without_an_optimizer_is_refused_and_with_one_trains(tmp_path) -> None:
    (tmp_path / "judged.yaml").write_text(RECIPE)
    refused = e2ediff("check", tmp_path / "judged.yaml")
    assert refused.code == 3
    assert "optimizers.critic: phase 'critic' needs an optimizer of its own; add" in refused.err
    own = ("--set", "optimizers={critic: {name: adamw, lr: 1.0e-4}}")
    done = e2ediff("run", tmp_path / "judged.yaml", *own, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    logged = [line for line in map(json.loads, lines) if "loss/reconstruction" in line]
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in logged if "loss/critic" in line] == [3, 4, 5, 6], (
        "from 0.3 on"
    )
    assert all(line["adversarial_factor"] > 0 for line in logged)
    assert {line["lr"] for line in logged} == {0.001}, "the autoencoder's, also beside a critic"
    for figure, value in (("lr/critic", 1e-4), ("grad_norm/critic", None)):
        found = {line["step"]: line[figure] for line in logged if figure in line}
        assert [*found] == [3, 4, 5, 6]
        assert value is None or set(found.values()) == {value}
    assert all(line["grad_norm"] != line.get("grad_norm/critic") for line in logged)


@needs("e2ediff-jit")
def test_an_objective_without_decoded_images_is_refused_by_check(tmp_path) -> None:
    changes = (
        "backbone={name: jit, width: 16, depth: 2, heads: 2, patch: 8, context_start: 1}",
        "objective={name: adversary, of: pixel, layers: 1}",
        "optimizers={critic: adamw}",
    )
    (tmp_path / "judged.yaml").write_text(RECIPE)
    words = [word for change in changes for word in ("--set", change)]
    refused = e2ediff("check", tmp_path / "judged.yaml", *words)
    assert refused.code == 3
    assert "no decoder to train" in refused.err


def test_every_installed_objective_is_judged_or_refused(tmp_path) -> None:
    """Whose decoded images nobody sees would pay for a critic that changes nothing."""
    known = load().registries["objectives"]
    (tmp_path / "judged.yaml").write_text(RECIPE)
    judged, refused = set(), set()
    for name in known.names():
        if name in ("adversary", "tuned_decoder"):
            continue
        changes = [f"objective.of={name}", "optimizers={critic: adamw}"]
        for change in getattr(known.get(name), "trial", ()):
            if not change.startswith("objective="):  # of a backbone's trial
                changes.append(change.replace("objective.", "objective.of."))
        if name == "two_stage":
            # its first stage, which alone decodes, ends at half of the training
            changes += ["backbone.trunks=denoiser_apart", "objective.start=0.4"]
        words = [word for change in changes for word in ("--set", change)]
        done = e2ediff("check", tmp_path / "judged.yaml", *words)
        if done.code == 0:
            judged.add(name)
        else:
            said = ("no decoder to train", "hands on no decoded images")
            assert any(what in done.err for what in said), f"{name}: {done.err}"
            refused.add(name)
    assert refused <= {"pixel", "ldm_is_ae"}
    assert {"coupled", "detached", "genfirst", "kl", "mean_flow", "repa_e", "two_stage"} <= judged
