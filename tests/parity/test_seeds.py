"""Random numbers depend on what they are for, never on when or where they are drawn."""

from __future__ import annotations

import subprocess
import sys

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from e2ediff.condition import Labels
from e2ediff.host.recipe import parse_recipe
from e2ediff.loading.batches import Order, batches, fixed_images
from e2ediff.model.build import build_nets
from e2ediff.model.inference import Model
from e2ediff.objective import Draw
from e2ediff.parts.sources import Synthetic
from e2ediff.parts.time_samplers import Uniform
from e2ediff.seeds import derive
from e2ediff.step.splitting import part_of

CPU = torch.device("cpu")


# Seeds


def test_a_seed_is_the_same_in_every_process() -> None:
    script = "from e2ediff.seeds import derive; print(derive(3, 'draw', 640, 1))"
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert int(found.stdout) == derive(3, "draw", 640, 1)


@given(seed=st.integers(0, 2**63 - 1), numbers=st.lists(st.integers(0, 10**12), max_size=3))
def test_purposes_and_numbers_give_different_seeds(seed, numbers) -> None:
    found = {
        derive(seed, "draw", *numbers),
        derive(seed, "order", *numbers),
        derive(seed, "draw", *numbers, 0),
        derive(seed + 1, "draw", *numbers),
    }
    assert len(found) == 4
    assert all(0 <= s < 2**63 for s in found)


# The order of images


@settings(max_examples=300)
@given(size=st.integers(1, 50), seed=st.integers(0, 100), epochs=st.integers(1, 4))
def test_each_epoch_shows_every_image_exactly_once(size, seed, epochs) -> None:
    found = Order(size, seed).indices(0, size * epochs)
    for epoch in range(epochs):
        assert sorted(found[epoch * size : (epoch + 1) * size]) == list(range(size))


@settings(max_examples=300)
@given(
    size=st.integers(1, 50),
    seed=st.integers(0, 100),
    start=st.integers(0, 300),
    counts=st.lists(st.integers(0, 40), max_size=8),
)
def test_the_order_does_not_depend_on_where_one_starts_or_how_one_reads(size, seed, start, counts):
    whole = Order(size, seed).indices(0, start + sum(counts))
    resumed, place = Order(size, seed), start
    for count in counts:
        assert resumed.indices(place, count) == whole[place : place + count]
        place += count


def test_epochs_differ_and_so_do_seeds() -> None:
    order = Order(50, 0)
    assert order.indices(0, 50) != order.indices(50, 50)
    assert order.indices(0, 50) != Order(50, 1).indices(0, 50)


# Batches


KIND = Synthetic().image.conditioning


def collect(first: int, last: int, workers: int, batch: int = 7):
    source = Synthetic(size=8, count=30).open()
    return list(
        batches(
            source,
            Synthetic(size=8).image,
            batch=batch,
            seed=1,
            first=first,
            last=last,
            flip=True,
            workers=workers,
            device=CPU,
        )
    )


def assert_same(these, those) -> None:
    assert len(these) == len(those)
    for a, b in zip(these, those, strict=True):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.condition.label, b.condition.label)


def test_worker_processes_give_the_same_batches_as_none() -> None:
    assert_same(collect(0, 9, workers=0), collect(0, 9, workers=2))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_the_middle_are_those_of_the_whole_run(workers) -> None:
    """Also in the middle of an epoch: 30 images are no whole number of batches of 7."""
    assert_same(collect(0, 9, workers=0)[5:], collect(5, 9, workers=workers))


def test_batches_lie_in_minus_one_to_one_and_some_are_mirrored() -> None:
    source = Synthetic(size=8, count=30).open()
    (batch,) = batches(
        source,
        Synthetic(size=8).image,
        batch=30,
        seed=1,
        first=0,
        last=1,
        flip=True,
        workers=0,
        device=CPU,
    )
    x, _ = source.read(Order(30, 1).indices(0, 30))
    plain = x.float() / 127.5 - 1
    assert -1 <= batch.x.min() <= batch.x.max() <= 1
    same = (batch.x == plain).flatten(1).all(dim=1)
    mirrored = (batch.x == plain.flip(-1)).flatten(1).all(dim=1)
    assert (same | mirrored).all()
    assert 3 < mirrored.sum() < 27


def test_fixed_images_are_fixed_and_never_more_than_there_are() -> None:
    source = Synthetic(size=8, count=30).open()
    first, second = (fixed_images(source, KIND, 12, 0, "probe", CPU) for _ in range(2))
    assert_same([first], [second])
    assert len(fixed_images(source, KIND, 100, 0, "probe", CPU).x) == 30
    other = fixed_images(source, KIND, 12, 0, "calibration", CPU)
    assert not torch.equal(first.x, other.x)


# Networks and samples


@pytest.fixture
def model(host, tiny_text) -> Model:
    recipe = parse_recipe(host, tiny_text, "tiny", ["guidance={name: classifier_free}"])
    net = build_nets(recipe, CPU)[0].online.eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.05 * torch.randn(p.shape, generator=g)
    return Model(recipe, net)


def test_another_number_of_rows_moves_an_image_by_rounding_alone(model) -> None:
    labels = torch.tensor([0, 1, 2, 3, 4, 0, 1])  # 4 is the null label
    whole = model.sample(labels, seed=5)
    # sums of other lengths differ by rounding, amplified by two steps and a decoder
    near = {"rtol": 0.0, "atol": 1e-4}
    for rows in (1, 2, 3):
        fewer = attrs.evolve(model, rows=rows)
        torch.testing.assert_close(fewer.sample(labels, seed=5), whole, **near)
    assert (model.sample(labels, seed=6) - whole).abs().max() > 1e-2


def test_sampling_leaves_the_global_generator_alone(model) -> None:
    state = torch.get_rng_state()
    model.sample([0, 1])
    assert torch.equal(state, torch.get_rng_state())


def test_weights_depend_on_the_seed_alone(host, tiny_text) -> None:
    recipe = parse_recipe(host, tiny_text, "tiny")
    state = torch.get_rng_state()
    first = build_nets(recipe, CPU)[0].online.state_dict()
    torch.rand(17)
    second = build_nets(recipe, CPU)[0].online.state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    other = build_nets(attrs.evolve(recipe, seed=1), CPU)[0].online.state_dict()
    assert not torch.equal(first["embed_pixels.weight"], other["embed_pixels.weight"])
    torch.set_rng_state(state)


# Draws


def draw_of(count: int = 4000, label_drop: float = 0.25) -> tuple[Draw, Labels]:
    """A draw whose conditions are those of `count` images of class 0, some dropped."""
    g, times = torch.Generator().manual_seed(0), Uniform()
    labels = Labels(torch.zeros(count, dtype=torch.int64), classes=1)
    t = times.draw(count, g, torch.device("cpu"))
    draw = Draw(t=t, condition=labels, generator=g, times=times, label_drop=label_drop)
    return attrs.evolve(draw, condition=draw.drop(labels)), labels


def test_a_further_draw_keeps_the_dropped_rows_or_drops_anew_where_it_is_given_conditions() -> (
    None
):
    draw, labels = draw_of()
    first, kept = draw.condition.label, draw.again()
    assert torch.equal(kept.condition.label, first)
    assert not torch.equal(kept.t, draw.t)
    anew = [draw.again(labels).condition.label for _ in range(2)]
    for dropped in (first, *anew):  # 0.25 of 4,000 rows, to four standard deviations
        assert float((dropped == 1).float().mean()) == pytest.approx(0.25, abs=0.028)
    for a, b in ((first, anew[0]), (first, anew[1]), (anew[0], anew[1])):
        both = float(((a == 1) & (b == 1)).float().mean())
        assert both == pytest.approx(0.25**2, abs=0.016), "independent of one another"


def test_conditions_that_are_never_dropped_stay_in_further_draws() -> None:
    draw, labels = draw_of(20, label_drop=0.0)
    assert torch.equal(draw.again(labels).condition.label, labels.label)


def test_a_part_of_further_draws_has_the_rows_of_the_whole() -> None:
    (whole, labels), (other, _) = draw_of(40), draw_of(40)
    part = part_of(other, slice(10, 30))
    for _ in range(2):
        all_rows, own = whole.again(labels), part.again(labels.rows(slice(10, 30)))
        assert torch.equal(own.t, all_rows.t[10:30])
        assert torch.equal(own.condition.label, all_rows.condition.label[10:30])
