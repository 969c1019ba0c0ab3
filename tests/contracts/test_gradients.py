"""Which loss reaches which part of the network: where gradients stop, by module group."""

from __future__ import annotations

import attrs
import pytest
import torch
from e2ediff_testing import make_batch, make_draw
from reached_modules import VIT, reached, shaken_nets

from e2ediff.condition import Labels
from e2ediff.losses import DecodeNoise
from e2ediff.parts.objectives import Coupled, Detached, TwoStage

NOISY = DecodeNoise(probability=0.5)
AUTOENCODER = {"encode", "decode"}
CASES = [
    (Coupled(), "joint", {"reconstruction": AUTOENCODER, "denoising": {"encode", "denoise"}}),
    (Detached(), "joint", {"reconstruction": AUTOENCODER, "denoising": {"denoise"}}),
    (
        Detached(draws=3, weight="v", decode_noise=NOISY),
        "joint",
        {"reconstruction": AUTOENCODER, "denoising": {"denoise"}},
    ),
    (TwoStage(decode_noise=NOISY), "autoencoder", {"reconstruction": AUTOENCODER}),
    (TwoStage(draws=2), "denoiser", {"denoising": {"denoise"}}),
]


@pytest.mark.parametrize("predicts", ["x0", "v", "eps", "score"])
@pytest.mark.parametrize(
    ("objective", "phase", "expected"),
    CASES,
    ids=[
        "coupled",
        "detached",
        "detached, more options",
        "first stage",
        "second stage",
    ],
)
def test_each_loss_reaches_exactly_its_modules(objective, phase, expected, predicts) -> None:
    nets, batch = shaken_nets(objective, predicts=predicts), make_batch()
    terms = objective.terms(nets, batch, make_draw(batch), phase)
    assert {name: reached(nets, loss) for name, loss in terms.losses.items()} == expected


def test_coupled_reaches_the_encoder_through_input_and_target_alike() -> None:
    """Its gradient is not the one that either path alone would give."""
    from e2ediff.losses import clean_loss, noise_levels
    from e2ediff.objective import sg

    objective, batch = Coupled(), make_batch()
    nets = shaken_nets(objective)

    def gradient(through_input: bool, through_target: bool):
        z = nets.online.encode(batch.x)
        z_in, z_tar = (z if on else sg(z) for on in (through_input, through_target))
        (level,) = noise_levels(z_in, make_draw(batch), nets.path, 1)
        guess = level.estimate(nets.online.run(level.denoise())[0], nets)
        loss = clean_loss(guess, z_tar, nets.path, level.draw.t, "v", objective.clamp)
        return torch.autograd.grad(loss, nets.online.head_latent.weight)[0]

    terms = objective.terms(nets, batch, make_draw(batch), "joint")
    (whole,) = torch.autograd.grad(terms.losses["denoising"], nets.online.head_latent.weight)
    by_input, by_target = gradient(True, False), gradient(False, True)
    # float32 sums of about 1e3 products in another order
    torch.testing.assert_close(whole, by_input + by_target, rtol=1e-3, atol=1e-5)
    assert by_input.norm() > 0.01 * whole.norm()
    assert by_target.norm() > 0.01 * whole.norm()


@pytest.mark.parametrize("objective", [Coupled(), Detached()], ids=["coupled", "detached"])
def test_a_weight_of_zero_keeps_the_loss_and_drops_its_gradient(objective) -> None:
    silent = attrs.evolve(objective, denoising_weight=0.0)
    nets, batch = shaken_nets(silent), make_batch()
    terms = silent.terms(nets, batch, make_draw(batch), "joint")
    assert terms.losses["denoising"] > 0
    assert reached(nets, terms.total) == AUTOENCODER


@pytest.mark.parametrize("trunks", ["three", "denoiser_apart"])
def test_the_second_stage_leaves_every_weight_of_the_autoencoder_alone(trunks) -> None:
    import attrs

    objective, batch = TwoStage(), make_batch()
    nets = shaken_nets(objective, attrs.evolve(VIT, trunks=trunks))
    net = nets.online
    with torch.no_grad():
        before = net.decode(net.encode(batch.x))
    terms = objective.terms(nets, batch, make_draw(batch), "denoiser")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    terms.total.backward()
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(net.decode(net.encode(batch.x)), before)


def test_the_denoiser_is_told_nothing_where_the_draw_says_so() -> None:
    """Gradients reach the rows of the label table that the draw names, and no others but null."""
    import attrs

    objective, batch = Detached(), make_batch()
    nets = shaken_nets(objective)
    null = nets.online.image.null_label
    condition = Labels(torch.tensor([2, 2, null, null, 2, null]), null)
    draw = attrs.evolve(make_draw(batch), condition=condition)
    table = nets.online.embed_label.weight
    terms = objective.terms(nets, batch, draw, "joint")
    (grad,) = torch.autograd.grad(terms.losses["denoising"], table)
    assert (grad.abs().sum(dim=1) > 0).nonzero().flatten().tolist() == [2, null]


@pytest.mark.parametrize("how", ["time", "own"])
def test_encoder_and_decoder_touch_the_denoisers_conditioning_only_where_told_to(how) -> None:
    """In one trunk: with `own`, what they learn leaves time and class embeddings alone."""
    nets = shaken_nets(Detached(), attrs.evolve(VIT, trunks="one", mode_conditioning=how))
    batch = make_batch()
    losses = Detached().terms(nets, batch, make_draw(batch), "joint").losses
    embeddings = [
        p for k, p in nets.online.named_parameters() if k.startswith(("embed_time", "embed_label"))
    ]
    for name, touched in {"reconstruction": how == "time", "denoising": True}.items():
        found = torch.autograd.grad(losses[name], embeddings, retain_graph=True, allow_unused=True)
        assert any(g is not None and bool(g.any()) for g in found) == touched
