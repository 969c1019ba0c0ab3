"""Layers that transformers share: rotary positions, late context, and what stays float32."""

from __future__ import annotations

import attrs
import pytest
import torch
from e2ediff_testing import make_nets
from torch import nn

from e2ediff.backbone import Decode, Denoise, Encode
from e2ediff.data import ImageSpec
from e2ediff.nn.layers import (
    MLP,
    Block,
    Context,
    Residual,
    Rotary,
    TimeEmbedding,
    Trunk,
    modulate,
    rotary_angles,
    rotate,
)
from e2ediff.parts.backbones import ViTConfig

PLAIN = ViTConfig(width=16, depth=1, heads=2, patch=8, latent_dim=4)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grid", [(7,), (3, 4), (2, 3, 2)], ids=str)
def test_rotary_products_depend_on_where_tokens_lie_from_one_another(grid) -> None:
    """q . k of two tokens is that of any pair moved by the same step."""
    angles = rotary_angles(grid, 12, base=50.0)[:, None]
    n = len(angles)
    q, k = (random(12, seed=s).expand(1, n, 1, 12) for s in (1, 2))
    q, k = (rotate(x, angles.cos(), angles.sin())[0, :, 0] for x in (q, k))
    products = (q @ k.T).reshape(*grid, *grid)
    first = products[(0,) * len(grid)]
    corner = tuple(slice(1, None) for _ in grid)
    inner = tuple(slice(None, size - 1) for size in grid)
    torch.testing.assert_close(products[(1,) * len(grid)][corner], first[inner])


def trunk(norm="layer") -> Trunk:
    """Three blocks without the zeros of a fresh start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = [Block(16, 2, MLP(16, 2.0, "swiglu"), "block", norm=norm) for _ in range(3)]
        return Trunk(blocks, 16, shared=False, norm=norm)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_context_changes_the_tokens_from_its_block_on_and_not_their_number(norm) -> None:
    net, x, c = trunk(norm), random(2, 5, 16), random(2, 16, seed=1)
    angles = rotary_angles((5,), 8)[:, None]
    turn, taps = (angles.cos(), angles.sin()), frozenset({1, 2, 3})
    plain, before = net(x, c, taps, turn)
    joined, after = net(x, c, taps, turn, Context(random(2, 3, 16, seed=2), start=1))
    assert joined.shape == plain.shape
    assert {k: v.shape for k, v in after.items()} == {k: v.shape for k, v in before.items()}
    assert torch.equal(after[1], before[1])
    assert not torch.allclose(after[2], before[2], atol=1e-3)


def test_context_has_no_place() -> None:
    """Its order changes nothing, though the trunk turns every other token."""
    net, x, c, extra = trunk(), random(2, 5, 16), random(2, 16, seed=1), random(2, 3, 16, seed=2)
    angles = rotary_angles((5,), 8)[:, None]
    turn = (angles.cos(), angles.sin())
    a, _ = net(x, c, frozenset(), turn, Context(extra, 0))
    b, _ = net(x, c, frozenset(), turn, Context(extra.flip(1), 0))
    torch.testing.assert_close(a, b)


def test_rotary_gives_the_turns_of_its_first_places_and_keeps_them_out_of_checkpoints() -> None:
    rotary, angles = Rotary((3, 4), 16, base=50.0), rotary_angles((3, 4), 16, base=50.0)
    cos, sin = rotary()
    assert torch.equal(cos, angles.cos()[:, None])
    assert torch.equal(sin, angles.sin()[:, None])
    assert [part.shape for part in rotary(5)] == [(5, 1, 8), (5, 1, 8)]
    assert torch.equal(rotary(5)[1], sin[:5])
    assert not rotary.state_dict()


# Half precision


def test_a_small_scale_modulates_by_itself_and_not_by_a_step_of_bfloat16() -> None:
    """1 + s keeps steps of 2^-7: summed there, a scale of 0.05 would be 3.5 % off."""
    g = torch.Generator().manual_seed(0)
    scale = (0.05 * torch.randn(64, 256, generator=g)).bfloat16()
    x, shift = torch.ones(64, 3, 256), torch.zeros(64, 256, dtype=torch.bfloat16)
    found = modulate(x, shift, scale)[:, 0] - 1
    wanted = scale.double()
    assert found.dtype == torch.float32
    assert (found - wanted).norm() / wanted.norm() < 1e-5
    rounded = (1 + scale).double() - 1
    assert (rounded - wanted).norm() / wanted.norm() > 0.03


def test_modulation_keeps_the_type_of_wider_numbers() -> None:
    x, vector = torch.ones(2, 3, 4, dtype=torch.float64), torch.full((2, 4), 1e-12).double()
    assert torch.equal(modulate(x, vector, vector), x * (1 + 1e-12) + 1e-12)


@pytest.mark.parametrize("position", ["sincos", "learned", "rope"])
def test_every_block_adds_to_a_float32_residual_under_autocast(position) -> None:
    config = ViTConfig(
        width=16, depth=2, heads=2, patch=8, latent_dim=4, position=position, trunks="three"
    )
    net = make_nets(config).online
    seen: list[torch.dtype] = []
    for block in net.blocks():
        block.register_forward_hook(
            lambda module, given, out: seen.extend([given[0].dtype, out.dtype])
        )
    image, spec = net.image, net.latent
    x = torch.zeros(2, image.channels, image.height, image.width)
    z, null = torch.randn(2, spec.tokens, spec.dim), image.conditioning.null(2)
    with torch.autocast("cpu", torch.bfloat16):
        net.run(Encode(x=x), Decode(z=z), Denoise(z_t=z, t=torch.full((2,), 0.5), condition=null))
    assert len(seen) == 2 * 2 * 3
    assert set(seen) == {torch.float32}


def test_a_time_is_embedded_from_waves_in_float32_under_autocast() -> None:
    embed, t = TimeEmbedding(8), torch.tensor([0.996, 0.9965])
    waves: list[torch.Tensor] = []
    embed.layers[0].register_forward_hook(lambda module, given, out: waves.append(out))
    embed(t)
    with torch.autocast("cpu", torch.bfloat16):
        out = embed(t)
    assert waves[1].dtype == torch.float32
    assert torch.equal(*waves)
    assert out.dtype == torch.bfloat16  # the second layer is a product like any other


@pytest.mark.parametrize(("stride", "depth"), [(1, 0), (2, 1), (4, 0)])
@pytest.mark.parametrize("size", [(8, 16), (24, 8)])
def test_refinement_sees_past_the_seams_of_patches_and_not_further(stride, depth, size) -> None:
    """Squares of `stride` pixels see one more of them to each side for each convolution."""
    config = attrs.evolve(PLAIN, refine=4, refine_stride=stride, refine_depth=depth)
    net = config.build(ImageSpec(1, *size, 0))
    torch.manual_seed(0)
    for block in (m for m in net.refine if isinstance(m, Residual)):
        nn.init.normal_(block.outer.weight)  # which begins at 0, as the identity
    places = torch.randn(1, 4, size[0] // stride, size[1] // stride, requires_grad=True)
    out = net.refine(places)
    assert out.shape == (1, 1, *size)
    out[0, 0, 0, 0].backward()
    rows, columns = places.grad.abs().amax(dim=(0, 1)).nonzero().amax(dim=0).tolist()
    reach = 1 + max(1, 2 * depth)
    assert (rows, columns) == tuple(min(reach, n // stride - 1) for n in size)


def test_a_residual_block_begins_as_the_identity() -> None:
    x = torch.randn(2, 4, 5, 7)
    assert torch.equal(Residual(4)(x), x)


@pytest.mark.parametrize("times", [(3,), (3, 4)])
def test_the_skip_adds_the_noised_latent_times_a_gate_that_begins_at_zero(times) -> None:
    net = make_nets(attrs.evolve(PLAIN, denoise_skip=True)).online
    z, t = torch.randn(3, 4, 4), torch.rand(times)
    condition = net.image.conditioning.example(3)
    ask = Denoise(z_t=z, t=t, condition=condition)
    with torch.no_grad():
        net.head_denoise.weight.normal_()
        plain = net.run(ask)[0]
        assert torch.equal(net.run(ask)[0], plain)
        net.embed_skip.bias.copy_(torch.tensor([1.0, 2.0, 0.0, -1.0]))
        assert torch.allclose(net.run(ask)[0], plain + net.embed_skip.bias * z, atol=1e-6)
        net.embed_skip.weight.normal_()
        gates = (net.run(ask)[0] - plain) / z
    over = tuple(range(1, len(times)))
    assert (gates[0] - gates[1]).abs().min() > 1e-3, "the gate depends on the time"
    if not over:
        assert torch.allclose(gates, gates[:, :1].expand_as(gates), atol=1e-2)


def test_a_refinement_that_cannot_be_is_refused_with_its_option() -> None:
    image = ImageSpec(1, 16, 16, 0)
    said = attrs.evolve(PLAIN, refine=4, refine_stride=3).problems(image)
    assert said == [("refine_stride", "3 does not divide the patch, 8")]
    ((option, what),) = attrs.evolve(PLAIN, refine=0, refine_stride=2).problems(image)
    assert (option, "leave out refine_stride" in what) == ("refine", True)
