"""Layers that transformers share: rotary positions, and context that joins late."""

from __future__ import annotations

import pytest
import torch

from e2ediff.nn.layers import MLP, Block, Context, Rotary, Trunk, rotary_angles, rotate


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
