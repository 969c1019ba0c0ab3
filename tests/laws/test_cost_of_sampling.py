"""Around the network a sampler computes what its step needs, once, and with the same bits."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from e2ediff.condition import Labels
from e2ediff.denoiser import Plain
from e2ediff.interpolant import KINDS
from e2ediff.model.inference import _own_noise
from e2ediff.parts.guidance import ClassifierFree
from e2ediff.parts.interpolants import Cosine, Linear, VarianceExploding
from e2ediff.parts.samplers import Euler, Heun
from e2ediff.seeds import generator

PATHS = [Linear(), Cosine(), VarianceExploding()]
CPU = torch.device("cpu")


class Calls(TorchDispatchMode):
    """Counts the operators that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Still:
    """A network that answers what it is asked, without an operator."""

    second_time = False

    def denoise(self, z_t, t, condition):
        return z_t


def calls_of(sampler, guidance, steps):
    """Operators and network calls of a whole trajectory."""
    plain = Plain(Still(), Linear(), "x0")
    f = plain if guidance is None else guidance.wrap(plain)
    condition = Labels(torch.zeros(2, dtype=torch.long), 3)
    start = torch.ones(2, 4, 4)
    with Calls() as counted:
        sampler(steps=steps).sample(f, start, condition, torch.randn_like)
    return counted.names.total(), plain.calls


@pytest.mark.parametrize(
    ("sampler", "guidance", "most"),
    [
        (Euler, None, 9),  # times, velocity of the clean latent in six, step in two
        (Heun, None, 20),
        (Euler, ClassifierFree(scale=1.5), 14),  # both rows, their halves, three for the scale
        (Heun, ClassifierFree(scale=1.5), 30),
    ],
    ids=["euler", "heun", "euler guided", "heun guided"],
)
def test_a_step_calls_few_operators_besides_the_network(sampler, guidance, most) -> None:
    few, many = (calls_of(sampler, guidance, steps) for steps in (4, 12))
    few, many = (calls_of(sampler, guidance, steps) for steps in (4, 12))  # times are known
    network = 2 if sampler is Heun else 1
    assert (many[1] - few[1]) / 8 == network
    assert (many[0] - few[0]) / 8 <= most


@pytest.mark.parametrize("kind", KINDS)
def test_the_form_that_a_network_predicts_costs_nothing(kind) -> None:
    value, z_t = torch.ones(2, 4, 4), torch.ones(2, 4, 4)
    with Calls() as counted:
        assert getattr(Linear().estimate(value, z_t, 0.3, kind), kind) is value
        guess = Linear().estimate(value, z_t, torch.full((2,), 0.3), kind)
        assert getattr(guess, kind) is value
    assert counted.names.keys() <= {"aten.full.default"}


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_one_time_for_all_rows_gives_the_bits_of_a_time_for_each(path, kind) -> None:
    value, z_t = torch.randn(2, 7, 16, 8)
    for t in (0.0, 0.001, 0.1, 0.25, 0.5, 0.77, 0.999, 1.0, *torch.rand(20).tolist()):
        one = path.estimate(value, z_t, t, kind)
        each = path.estimate(value, z_t, torch.full((7,), t), kind)
        for form in KINDS:
            assert torch.equal(getattr(one, form), getattr(each, form)), (t, form)


def test_a_half_prediction_is_completed_in_the_type_of_the_latent() -> None:
    """As a time for each row does it."""
    value, z_t = torch.randn(2, 4, 4).bfloat16(), torch.randn(2, 4, 4)
    one, each = (Cosine().estimate(value, z_t, t, "v") for t in (0.3, torch.full((2,), 0.3)))
    for form in ("x0", "eps", "score"):
        assert getattr(one, form).dtype == torch.float32
        assert torch.equal(getattr(one, form), getattr(each, form))


def test_each_image_has_the_noise_of_its_own_generator() -> None:
    like = torch.empty(3, 5, 6)
    found = _own_noise(7, [4, 0, 9])
    draws = [found(like), found(like)]
    for row, number in enumerate([4, 0, 9]):
        g = generator(CPU, 7, "image", number)
        for drawn in draws:
            assert torch.equal(drawn[row], torch.randn(5, 6, generator=g))


def test_a_path_that_cannot_be_hashed_is_sampled_all_the_same() -> None:
    class Unhashable(Linear):
        __hash__ = None

    z = [
        Euler(steps=3, spacing="karras").sample(
            Plain(Still(), path, "x0"), torch.ones(1, 2, 2), Labels(torch.zeros(1), 3), torch.randn
        )
        for path in (Linear(), Unhashable())
    ]
    assert torch.equal(*z)
