"""Classifier-free guidance on a Gaussian mixture, where the denoiser that it wraps is exact."""

from __future__ import annotations

import pytest
from mixture import LABELS, Z_T, MixtureDenoiser, doubt

from e2ediff.parts.guidance import ClassifierFree
from e2ediff.parts.interpolants import Linear
from e2ediff.parts.samplers import RK4, Euler, Heun, Midpoint


def test_scale_one_is_the_denoiser_itself_in_one_pass_and_loads_nothing() -> None:
    inner, guidance = MixtureDenoiser(Linear()), ClassifierFree(scale=1.0)
    f = guidance.wrap(inner)
    assert f is inner
    assert f.for_step(0.1, 0.2) is inner
    f(Z_T, 0.5, LABELS)
    assert inner.rows == [4]
    assert guidance.references == ()


@pytest.mark.parametrize(
    "sampler", [Euler(), Heun(), Midpoint(), RK4()], ids=lambda s: type(s).__name__
)
def test_classifier_free_guidance_suits_every_sampler(sampler) -> None:
    assert not ClassifierFree().problems(sampler)


@pytest.mark.parametrize("label", [0, 2])
def test_guided_samples_of_a_class_are_more_surely_of_that_class(label) -> None:
    """By the posterior at samples of the outer classes, which guidance pushes apart."""
    sampler = Euler(steps=40)
    assert doubt(sampler, label, ClassifierFree(scale=3.0)) < doubt(sampler, label, None) / 2
