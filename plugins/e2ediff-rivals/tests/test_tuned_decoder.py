"""The decoder's last phase: its latents, what it trains, and what it leaves as it was alone."""

from __future__ import annotations

import json

import attrs
import pytest
import torch
from command_line import e2ediff, trained
from declared_stops import holds_its_declaration
from e2ediff_rivals.adversary import Adversary
from e2ediff_rivals.genfirst import GenFirst
from e2ediff_rivals.tuned_decoder import TunedDecoder, follow
from e2ediff_testing import (
    GaussianDenoiser,
    TinyBackbone,
    check_objective,
    make_batch,
    make_draw,
    make_nets,
)
from reached_modules import VIT, reached, shaken_nets
from safetensors.torch import load_file
from tiny_recipe import tiny

from e2ediff.backbone import Denoise, FusedBackbone, LatentSpec, Output
from e2ediff.losses import PixelLoss
from e2ediff.parts.features.networks import RandomProjection
from e2ediff.parts.interpolants import Cosine, Linear
from e2ediff.parts.objectives import Detached, TwoStage
from e2ediff.parts.samplers import Euler

BATCH = make_batch()
AROUND = TunedDecoder(of=Detached(draws=2), reconstruction=PixelLoss(kind="l2"))
CRITIC = Adversary(of=Detached(), layers=1, channels=8, critic_start=0.2, start=0.3)


class Answering(FusedBackbone):
    """Answers a denoise pass by a function of (z_t, t), and has nothing else."""

    def __init__(self, answer, **flags):
        super().__init__()
        self.answer, self.asked = answer, []
        vars(self).update(flags)

    def outputs(self, *passes):
        self.asked += passes
        return [Output(self.answer(p.z_t, p.t)) for p in passes]


def answering(path, answer, **flags):
    return attrs.evolve(make_nets(path=path), online=Answering(answer, **flags))


# Generated latents


@pytest.mark.parametrize("path", [Linear(), Cosine()], ids=str)
@pytest.mark.parametrize("steps", [1, 4])
def test_a_denoiser_that_knows_the_latents_gives_them_back(path, steps) -> None:
    g = torch.Generator().manual_seed(0)
    z, eps = torch.randn(2, 3, 4, 5, generator=g)
    t = torch.tensor([0.1, 0.5, 0.9])

    def answer(z_t, now):
        torch.testing.assert_close(z_t, path.mix(z, eps, now))
        return z

    nets = answering(path, answer)
    assert torch.equal(follow(nets, path.mix(z, eps, t), t, BATCH.condition, steps), z)
    assert len(nets.online.asked) == steps


def test_each_latent_is_followed_from_its_own_time_as_euler_s_sampler_would() -> None:
    path, t, n = Linear(), torch.tensor([0.2, 0.7]), 4
    exact = GaussianDenoiser(path, 0.3, 0.6)

    def answer(z_t, now):
        rows = zip(z_t, now, strict=True)
        return torch.cat([exact(z[None], float(s), None).x0 for z, s in rows])

    z_t = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1))
    found = follow(answering(path, answer), z_t, t, BATCH.condition, n)
    for i, first in enumerate(t.tolist()):
        times = [first + (1 - first) * k / n for k in range(n)]
        late = Euler().integrate(exact, z_t[i : i + 1], times, None, None)
        torch.testing.assert_close(found[i : i + 1], exact(late, times[-1], None).x0)


def test_a_network_that_learned_averages_is_given_the_end_of_each_step() -> None:
    nets = answering(Linear(), lambda z_t, t: z_t, second_time=True)
    t = torch.tensor([0.0, 0.5])
    follow(nets, torch.zeros(2, 4, 5), t, BATCH.condition, 2, averages=True)
    seen = [(p.t.tolist(), p.r.tolist()) for p in nets.online.asked]
    assert seen == [([0.0, 0.5], [0.5, 0.75]), ([0.5, 0.75], [1.0, 1.0])]
    follow(nets, torch.zeros(2, 4, 5), t, BATCH.condition, 2)
    assert [p.r for p in nets.online.asked[2:]] == [None, None]


def test_the_last_phase_compares_the_decoded_generated_latents_with_the_images() -> None:
    nets = shaken_nets(AROUND)
    passes, run = [], nets.online.outputs

    def watched(*given):
        outs = run(*given)
        passes.extend(zip(given, outs, strict=True))
        return outs

    nets.online.outputs = watched
    terms = AROUND.terms(nets, BATCH, make_draw(BATCH), "decoder")
    names = [type(p).__name__ for p, _ in passes]
    assert names == ["Encode", *["Denoise"] * 4, "Decode"]
    first, decode = passes[1][0], passes[-1]
    assert isinstance(first, Denoise)
    assert 0.5 <= first.t.min() < first.t.max() < 1
    assert torch.equal(first.condition.label, BATCH.condition.label), "none is dropped"
    torch.testing.assert_close(decode[0].z, passes[4][1].value)  # the last clean estimate
    assert terms.decoded is decode[1].value
    expected = (decode[1].value - BATCH.x).square().mean()
    torch.testing.assert_close(terms.losses["reconstruction"], expected)


# What it trains


@pytest.mark.parametrize("of", [Detached(draws=2), CRITIC], ids=type)
@pytest.mark.parametrize("backbone", [TinyBackbone(), VIT], ids=type)
def test_a_tuned_decoder_keeps_the_contract(of, backbone) -> None:
    check_objective(TunedDecoder(of=of), backbone)


def test_it_declares_what_stops() -> None:
    holds_its_declaration(AROUND, VIT)


@pytest.mark.parametrize("changes", [
    {}, {"decoder": "denoising", "decode_steps": 2}, {"trunks": "decoder_apart"},
])  # fmt: skip
def test_the_last_phase_trains_the_decoder_alone(changes) -> None:
    nets = shaken_nets(AROUND, attrs.evolve(VIT, **changes))
    terms = AROUND.terms(nets, BATCH, make_draw(BATCH), "decoder")
    assert reached(nets, terms.losses["reconstruction"]) == {"decode"}
    terms.total.backward()
    own = {k.split(".")[0] for k, p in nets.online.named_parameters() if p.grad is not None}
    more = {"embed_noised", "embed_pixel_time"} if "decoder" in changes else set()
    assert own == {"embed_decode", "embed_mode", "trunks", "head_pixels"} | more
    assert AROUND.trains("decoder", "online.head_pixels.weight")
    judged = TunedDecoder(of=CRITIC)
    assert not judged.trains("decoder", "heads.critic.layers.0.weight")
    assert judged.trains("critic", "heads.critic.layers.0.weight")


# What is wrapped


def test_what_is_wrapped_has_the_losses_that_it_has_alone() -> None:
    nets = shaken_nets(AROUND)
    alone = AROUND.of.terms(nets, BATCH, make_draw(BATCH), "joint").losses
    around = AROUND.terms(nets, BATCH, make_draw(BATCH), "joint").losses
    assert around.keys() == alone.keys()
    assert all(torch.equal(around[name], loss) for name, loss in alone.items())


def test_two_perceptual_networks_stay_apart() -> None:
    inner = PixelLoss(perceptual=RandomProjection(width=8, seed=1))
    outer = PixelLoss(perceptual=RandomProjection(width=4, seed=2))
    alone = Detached(reconstruction=inner)
    around = TunedDecoder(of=alone, reconstruction=outer)
    nets = shaken_nets(around, attrs.evolve(VIT, trunks="decoder_apart"))
    own = attrs.evolve(nets, frozen=alone.frozen(nets.online))
    draw = lambda: attrs.evolve(make_draw(BATCH), progress=torch.tensor(0.5))  # noqa: E731
    expected = alone.terms(own, BATCH, draw(), "joint").losses["reconstruction"]
    found = around.terms(nets, BATCH, draw(), "joint").losses["reconstruction"]
    assert torch.equal(found, expected)
    last = around.terms(nets, BATCH, draw(), "decoder")
    other = outer(last.decoded, BATCH.x, outer.frozen())
    torch.testing.assert_close(last.losses["reconstruction"], other)


def test_latents_are_followed_past_the_last_trained_time_by_its_estimate() -> None:
    nets = answering(Linear(), lambda z_t, t: 0.5 * z_t)
    z_t, t = torch.ones(3, 2, 2), torch.tensor([0.0, 0.4, 0.9])
    end = follow(nets, z_t, t, BATCH.condition.rows(slice(3)), 1, until=0.5)
    (asked,) = nets.online.asked
    assert asked.t.tolist() == pytest.approx([0.0, 0.4, 0.5])
    assert asked.z_t[:, 0, 0].tolist() == pytest.approx([1.0, 1.0, 0.5 / 0.9])
    assert end[:, 0, 0].tolist() == pytest.approx([0.5, 0.5, 0.25 / 0.9])


def test_spans_and_progress_of_what_is_wrapped_end_where_the_last_phase_begins() -> None:
    stages = TunedDecoder(of=TwoStage(autoencoder_fraction=0.4), share=0.25)
    assert stages.phases == ("autoencoder", "denoiser", "decoder")
    spans = [stages.span(phase) for phase in stages.phases]
    assert spans == [(0.0, pytest.approx(0.3)), (pytest.approx(0.3), 0.75), (0.75, 1.0)]
    judged = TunedDecoder(of=CRITIC, share=0.5)
    assert judged.phases == ("joint", "critic", "decoder")
    assert judged.own_optimizers == ("critic",)
    assert judged.span("critic") == (0.1, 0.5)

    objective = TunedDecoder(of=GenFirst(prior_weight=0.01, first_phase=0.5), share=0.5)
    nets = shaken_nets(objective)
    weights = {}
    for progress in (0.0, 0.24, 0.26, 0.499, 0.9):
        draw = attrs.evolve(make_draw(BATCH), progress=torch.tensor(progress))
        terms = objective.terms(nets, BATCH, draw, "joint")
        weights[progress] = float(terms.weights["denoising"])
    assert weights[0.0] == weights[0.24] == pytest.approx(0.01)
    assert weights[0.26] == weights[0.499] == weights[0.9] == pytest.approx(0.001)


def test_a_shared_decoder_pixels_and_a_second_last_phase_are_refused() -> None:
    assert not AROUND.problems(make_nets(VIT, device="meta"))
    for trunks in ("one", "denoiser_apart"):
        nets = make_nets(attrs.evolve(VIT, trunks=trunks), device="meta")
        ((where, what),) = AROUND.problems(nets)
        assert (where, "`--set backbone.trunks=decoder_apart`" in what) == ("objective", True)
    nets = make_nets(VIT, predicts="eps", device="meta")
    ((where, what),) = TunedDecoder(of=Detached(weight="x0")).problems(nets)
    assert (where, "set objective.of.weight: eps" in what) == ("predicts", True)
    for t_min, fits in ((0.0, False), (0.01, True)):
        noise = TunedDecoder(of=Detached(weight="eps"), t_min=t_min).problems(nets)
        assert [where for where, _ in noise] == ([] if fits else ["objective.t_min"])
    nets = make_nets(VIT, device="meta")
    nested = dict(TunedDecoder(of=AROUND).problems(nets))
    assert "has a phase `decoder` already" in nested["objective.of"]
    twice = Adversary(of=TunedDecoder(of=CRITIC), layers=1).problems(nets)
    assert ("objective.of", "an adversary is around an objective, not another") in twice
    nets.online.latent = LatentSpec(4, 4, "batch", learned=False)
    assert "has none to train" in dict(AROUND.problems(nets))["objective"]


RECIPE = tiny(
    requires="[e2ediff-rivals]",
    backbone="{name: vit, width: 16, depth: 1, heads: 1, patch: 8, latent_dim: 4, "
    "trunks: decoder_apart}",
    objective="{name: tuned_decoder, of: detached, share: 0.5}",
)


@pytest.mark.parametrize(
    ("optimizers", "said"),
    [
        ("{}", "the schedule of optimizer begins anew and its learning rate reaches 13% of lr"),
        (
            "{decoder: {name: adamw, warmup_images: 100}}",
            "the schedule of optimizers.decoder begins anew and its learning rate reaches 13% of",
        ),
        ("{decoder: {name: adamw}}", ""),
        ("{decoder: {name: adamw, warmup_images: 16}}", ""),
    ],
)
def test_a_last_phase_that_ends_amid_its_warm_up_is_warned_of(tmp_path, optimizers, said) -> None:
    text = RECIPE.replace("optimizer: ", f"optimizers: {optimizers}\noptimizer: ")
    (tmp_path / "tuned.yaml").write_text(text)
    words = ("--set", "optimizer.warmup_images=100", "--set", "batch=4", "--set", "steps=8")
    done = e2ediff("check", tmp_path / "tuned.yaml", *words)
    assert done.code == 0, done.err
    warned = [line for line in done.err.splitlines() if "phase decoder lasts 16 images" in line]
    assert len(warned) == bool(said)
    for line in warned:
        assert said in line
        assert "optimizers.decoder" in line


def test_a_run_ends_with_the_decoder_alone(tmp_path) -> None:
    run = trained(tmp_path, RECIPE)
    half, end = sorted((run / "checkpoints").iterdir())
    weights = [load_file(next(p.glob("online*.safetensors"))) for p in (half, end)]
    moved = {k.split(".")[0] for k, v in weights[0].items() if not torch.equal(v, weights[1][k])}
    assert moved == {"embed_decode", "embed_mode", "trunks", "head_pixels"}
    encode = [k for k in weights[0] if k.startswith(("trunks.encode", "embed_mode.encode"))]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in encode)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "loss/reconstruction" in line]
    assert ["loss/denoising" in line for line in logged] == [True, True, False, False]
    assert ["generated_error" in line for line in logged] == [False, False, True, True]
