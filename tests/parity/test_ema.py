"""Averaged weights are torch-ema's own, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch_ema import ExponentialMovingAverage

from e2ediff.run.ema import Average, calibrate, in_use
from e2ediff.testing import TinyBackbone, make_batch, make_draw, make_nets


def trained_steps(net, steps: int):
    """Really train, so that the averaged numbers are not special ones."""
    optimizer, batch = torch.optim.AdamW(net.parameters(), lr=1e-2), make_batch()
    for step in range(steps):
        z = net.encode(batch.x)
        loss = (net.decode(z) - batch.x).square().mean()
        loss = loss + net.denoise(z, make_draw(batch, seed=step).t, batch.label).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield step


@pytest.mark.parametrize("warmup", [False, True], ids=["constant", "warm-up"])
@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_fifty_updates_equal_those_of_torch_ema_bit_for_bit(decay, warmup) -> None:
    net = make_nets().online
    ours = Average(net, decay, warmup=warmup)
    theirs = ExponentialMovingAverage(net.parameters(), decay, use_num_updates=warmup)
    for _ in trained_steps(net, 50):
        ours.update()
        theirs.update()
        pairs = zip(ours.net.parameters(), theirs.shadow_params, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    pairs = zip(ours.net.parameters(), net.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs)


def test_warm_up_follows_the_online_weights_closely_at_first() -> None:
    """Decay min(d, (1 + k) / (10 + k)) after k updates, as torch-ema counts."""
    net = make_nets().online
    average = Average(net, 0.999, warmup=True)
    start = [p.clone() for p in net.parameters()]
    with torch.no_grad():
        for p in net.parameters():
            p += 1.0
    average.update()
    for p, old in zip(average.net.parameters(), start, strict=True):
        torch.testing.assert_close(p, old + (1 - 2 / 11))


def test_an_average_continues_where_its_count_says() -> None:
    net = make_nets().online
    first = Average(net, 0.999, warmup=True)
    for _ in trained_steps(net, 5):
        first.update()
    second = Average(net, 0.999, warmup=True)
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
    average = Average(net, 0.9, warmup=False)
    before = copy.deepcopy(average.net.state_dict())
    for _ in trained_steps(net, 1):
        pass
    assert all(torch.equal(v, before[k]) for k, v in average.net.state_dict().items())
    assert not any(p.requires_grad for p in average.net.parameters())


def test_calibrated_statistics_belong_to_the_weights_in_use() -> None:
    """Online and averaged weights differ, so their latents' statistics do."""
    net = make_nets(TinyBackbone(latent_norm="batch")).online
    average, x = Average(net, 0.5, warmup=False), make_batch(size=32).x
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
