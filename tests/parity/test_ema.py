"""Averaged weights are torch-ema's own, to rounding, and exchange their state with it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from e2ediff_testing import TinyBackbone, make_batch, make_draw, make_nets
from torch_ema import ExponentialMovingAverage

from e2ediff.model.averages import Average, update_all
from e2ediff.model.calibration import calibrate, in_use
from e2ediff.model.contiguous import SMALL, Pairs
from e2ediff.parts.averages import Constant, Power


def trained_steps(net, steps: int):
    """Really train, so that the averaged numbers are not special ones."""
    optimizer, batch = torch.optim.AdamW(net.parameters(), lr=1e-2), make_batch()
    for step in range(steps):
        z = net.encode(batch.x)
        loss = (net.decode(z) - batch.x).square().mean()
        loss = (
            loss + net.denoise(z, make_draw(batch, seed=step).t, batch.condition).square().mean()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield step


def spacing(*tensors):
    """The distance between neighbouring float32 numbers at the largest of these magnitudes."""
    return np.spacing(torch.stack(tensors).abs().amax(0).numpy())


@pytest.mark.parametrize("warmup", [False, True], ids=["constant", "warm-up"])
@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_an_update_is_that_of_torch_ema_to_two_units_in_the_last_place(decay, warmup) -> None:
    net = make_nets().online
    ours = Average(net, Constant(decay=decay, warmup=warmup))
    theirs = ExponentialMovingAverage(net.parameters(), decay, use_num_updates=warmup)
    for _ in trained_steps(net, 50):
        theirs.copy_to(ours.net.parameters())
        before = copy.deepcopy(theirs.shadow_params)
        ours.update()
        theirs.update()
        for a, b, old, p in zip(
            ours.net.parameters(), theirs.shadow_params, before, net.parameters(), strict=True
        ):
            assert ((a - b).abs().numpy() <= 2 * spacing(old, p.detach())).all()
    pairs = zip(ours.net.parameters(), net.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_the_difference_from_torch_ema_stays_bounded(decay) -> None:
    """Each update adds two units in the last place and shrinks what was there by the decay."""
    net = make_nets().online
    ours = Average(net, Constant(decay=decay, warmup=False))
    theirs = ExponentialMovingAverage(net.parameters(), decay, use_num_updates=False)
    largest = [p.detach().abs() for p in net.parameters()]
    updates = 200
    for _ in trained_steps(net, updates):
        ours.update()
        theirs.update()
        largest = [
            torch.maximum(m, p.detach().abs())
            for m, p in zip(largest, net.parameters(), strict=True)
        ]
    units = 2 * min(updates, 1 / (1 - decay))
    for a, b, most in zip(ours.net.parameters(), theirs.shadow_params, largest, strict=True):
        assert ((a - b).abs().numpy() <= units * spacing(most)).all()


@pytest.mark.parametrize("warmup", [False, True], ids=["constant", "warm-up"])
def test_the_state_of_an_average_and_that_of_torch_ema_continue_each_other(warmup) -> None:
    net = make_nets().online
    ours = Average(net, Constant(decay=0.999, warmup=warmup))
    for _ in trained_steps(net, 5):
        ours.update()
    theirs = ExponentialMovingAverage(net.parameters(), 0.5)
    theirs.load_state_dict(ours.state_dict())
    back = Average(net, Constant(decay=0.999, warmup=warmup))
    back.load_state_dict(theirs.state_dict())
    for _ in trained_steps(net, 5):
        ours.update()
        theirs.update()
        back.update()
    assert (theirs.decay, theirs.num_updates) == (0.999, 10 if warmup else None)
    for a, b, c in zip(
        ours.net.parameters(), theirs.shadow_params, back.net.parameters(), strict=True
    ):
        assert torch.equal(a, c)
        torch.testing.assert_close(b, a, rtol=1e-6, atol=5e-8)


def test_what_torch_ema_does_with_an_average_it_does_with_ours() -> None:
    net = make_nets().online
    average = Average(net, Constant(decay=0.9))
    assert isinstance(average, ExponentialMovingAverage)
    for _ in trained_steps(net, 3):
        average.update()
    trained = copy.deepcopy(net.state_dict())
    pairs = list(zip(net.parameters(), average.net.parameters(), strict=True))
    with average.average_parameters():
        assert all(torch.equal(p, a) for p, a in pairs)
    assert all(torch.equal(value, trained[name]) for name, value in net.state_dict().items())
    average.copy_to()
    assert all(torch.equal(p, a) for p, a in pairs)


def test_an_average_that_was_loaded_or_moved_is_still_its_network() -> None:
    net = make_nets().online
    average = Average(net, Constant(decay=0.9))
    average.load_state_dict(Average(net, Power(width=0.1)).state_dict())
    assert average.decay == 0.9, "the law stays the recipe's"
    average.to(dtype=torch.float64)
    with torch.no_grad():
        average.update([p.double() + 1 for p in net.parameters()])
    for own, shadow, p in zip(
        average.net.parameters(), average.shadow_params, net.parameters(), strict=True
    ):
        assert own is shadow
        torch.testing.assert_close(own, p.double() + 9 / 11)


def test_an_update_is_one_operation_that_allocates_nothing() -> None:
    net = make_nets().online
    average = Average(net, Constant(decay=0.999, warmup=False))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        average.update()
    events = profile.key_averages()
    calls = {event.key: event.count for event in events if "foreach" in event.key}
    assert calls == {"aten::_foreach_lerp_": 1}
    assert sum(max(0, event.self_cpu_memory_usage) for event in events) == 0


def test_averages_of_one_network_move_together_as_each_would_alone() -> None:
    net = make_nets().online
    laws = Constant(decay=0.9), Constant(decay=0.99, warmup=False), Power(width=0.1)
    together, alone = ([Average(net, law) for law in laws] for _ in range(2))
    for _ in trained_steps(net, 5):
        update_all(together)
        for average in alone:
            average.update()
    for a, b in zip(together, alone, strict=True):
        assert a.num_updates == b.num_updates
        assert all(map(torch.equal, a.net.parameters(), b.net.parameters()))
    assert not any(map(torch.equal, together[0].net.parameters(), together[1].net.parameters()))


def test_averages_whose_weights_lie_in_other_ways_move_together_as_each_would_alone() -> None:
    """Of two networks, a small and a large one, and of one whose average has a matrix turned."""
    nets = [make_nets().online for _ in range(2)]
    nets[1].more = torch.nn.Parameter(torch.randn(3, SMALL // 3 + 1))
    together, alone = (
        [Average(net, Constant(decay=0.9)) for net in (nets[0], nets[1], nets[1])]
        for _ in range(2)
    )
    turned = together[1].net.more
    turned.data = turned.data.t().contiguous().t()
    together[1].bind()
    for net in nets:
        with torch.no_grad():
            torch._foreach_add_([*net.parameters()], 1.0)
    for order in ([0, 1, 2], [2, 1, 0]):
        update_all([together[i] for i in order])
        for average in alone:
            average.update()
    for a, b in zip(together, alone, strict=True):
        assert all(map(torch.equal, a.net.parameters(), b.net.parameters()))
    update_all([])


def test_weights_that_share_memory_stay_shared() -> None:
    first = torch.nn.Parameter(torch.randn(6))
    second = torch.nn.Parameter(first.detach()[2:])
    theirs = [torch.nn.Parameter(torch.randn(6)), torch.nn.Parameter(torch.randn(4))]
    pieces = Pairs([first, second], theirs).current()
    assert [len(mine) for mine, _ in pieces] == [1, 1]
    assert [p.data_ptr() for mine, _ in pieces for p in mine] == [
        first.data_ptr(), second.data_ptr()
    ]  # fmt: skip
    with torch.no_grad():
        first.fill_(3.0)
    assert torch.equal(second, torch.full((4,), 3.0))
    assert Pairs([], []).current() == []


def large():
    return [torch.randn(SMALL // 2 + 3), torch.randn(3, 5), torch.randn(2, SMALL // 4)]


def turned():
    return [torch.randn(4, 3), torch.randn(5, 7).t()]


SHAPES = {
    "small": lambda: [torch.randn(4, 3), torch.randn(()), torch.randn(0), torch.randn(17)],
    "large": large,
    "turned": turned,
    "two types": lambda: [torch.randn(4), torch.randn(5).double()],
    "half": lambda: [torch.randn(33).bfloat16(), torch.randn(2, 2).bfloat16()],
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_weights_of_every_layout_move_as_each_tensor_would(shapes) -> None:
    ours, theirs = ([torch.nn.Parameter(v) for v in shapes()] for _ in range(2))
    expected = [a.detach().lerp(b.detach(), 0.25) for a, b in zip(ours, theirs, strict=True)]
    kept = [p.detach().clone() for p in theirs]
    with torch.no_grad():
        for mine, other in Pairs(ours, theirs).current():
            torch._foreach_lerp_(mine, other, 0.25)
    assert all(map(torch.equal, ours, expected))
    assert all(map(torch.equal, theirs, kept))


@pytest.mark.parametrize("shapes", [SHAPES["small"], large], ids=["small", "large"])
@pytest.mark.parametrize("side", [0, 1])
def test_weights_that_were_put_elsewhere_are_followed_there(shapes, side) -> None:
    sides = [[torch.nn.Parameter(v) for v in shapes()] for _ in range(2)]
    pairs = Pairs(*sides)
    moved = sides[side][-1]
    moved.data = moved.data + 1
    expected = [a.detach().lerp(b.detach(), 0.25) for a, b in zip(*sides, strict=True)]
    with torch.no_grad():
        for mine, other in pairs.current():
            torch._foreach_lerp_(mine, other, 0.25)
    assert all(map(torch.equal, sides[0], expected))


def test_joined_weights_begin_where_torch_would_place_them() -> None:
    """The last bits of products depend on where vectors begin on some processors."""
    net = make_nets().online
    Average(net, Constant())
    assert len({p.untyped_storage().data_ptr() for p in net.parameters()}) == 1
    assert not any(p.data_ptr() % 64 for p in net.parameters())


def test_warm_up_follows_the_online_weights_closely_at_first() -> None:
    """Decay min(d, (1 + k) / (10 + k)) after k updates, as torch-ema counts."""
    net = make_nets().online
    average = Average(net, Constant(decay=0.999, warmup=True))
    start = [p.clone() for p in net.parameters()]
    with torch.no_grad():
        for p in net.parameters():
            p += 1.0
    average.update()
    for p, old in zip(average.net.parameters(), start, strict=True):
        torch.testing.assert_close(p, old + (1 - 2 / 11))


def test_an_average_continues_where_its_count_says() -> None:
    net = make_nets().online
    first = Average(net, Constant(decay=0.999, warmup=True))
    for _ in trained_steps(net, 5):
        first.update()
    second = Average(net, Constant(decay=0.999, warmup=True))
    second.net.load_state_dict(first.net.state_dict())
    second.updates = first.updates
    for _ in trained_steps(net, 5):
        first.update()
        second.update()
    assert second.updates == 10
    pairs = zip(first.net.parameters(), second.net.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_an_average_has_no_gradients_and_shares_no_memory_with_the_online_weights() -> None:
    net = make_nets().online
    average = Average(net, Constant(decay=0.9, warmup=False))
    before = copy.deepcopy(average.net.state_dict())
    for _ in trained_steps(net, 1):
        pass
    assert all(torch.equal(v, before[k]) for k, v in average.net.state_dict().items())
    assert not any(p.requires_grad for p in average.net.parameters())


def test_calibrated_statistics_belong_to_the_weights_in_use() -> None:
    """Online and averaged weights differ, so their latents' statistics do."""
    net = make_nets(TinyBackbone(latent_norm="batch")).online
    average, x = Average(net, Constant(decay=0.5, warmup=False)), make_batch(size=32).x
    for _ in trained_steps(net, 3):
        average.update()
    calibrate(net, x)
    calibrate(average.net, x)
    kept = average.net.latent_norm.mean.clone()
    assert not torch.allclose(kept, net.latent_norm.mean)
    average.update()
    assert torch.equal(average.net.latent_norm.mean, kept)


def test_a_network_in_use_normalises_by_its_own_statistics_and_is_put_back() -> None:
    net, x = make_nets(TinyBackbone(latent_norm="batch")).online, make_batch(size=32).x
    modes = [m.training for m in net.modules()]
    with in_use(net, x) as ready, torch.no_grad():
        assert not any(m.training for m in ready.modules())
        var, mean = torch.var_mean(ready.encode(x), dim=(0, 1), correction=0)
        # statistics of these images themselves: float32 rounding and the norm's eps of 1e-5
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0.0, atol=1e-4)
        torch.testing.assert_close(var, torch.ones_like(var), rtol=0.0, atol=1e-2)
        torch.testing.assert_close(ready.encode(x[:1]), ready.encode(x)[:1])
    assert [m.training for m in net.modules()] == modes
