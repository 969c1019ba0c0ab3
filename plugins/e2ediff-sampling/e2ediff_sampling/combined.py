"""Guidance by another network, guidance at some times alone, and several in a row.

Shapes: B batch, N latent tokens, D latent channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
from attrs import validators
from torch import Tensor

from e2ediff import addresses
from e2ediff.condition import Condition
from e2ediff.denoiser import Denoiser
from e2ediff.errors import Problem, RecipeError
from e2ediff.guidance import Guidance, GuidedDenoiser, Reference, check_interval, in_interval
from e2ediff.interpolant import Estimate
from e2ediff.sampler import Sampler


@attrs.frozen(kw_only=True)
class Autoguidance(Guidance):
    """weak + scale (x0 - weak): away from what a weaker network of the same latents answers.

    The weak network is an earlier or a smaller one: `run` is a run's directory (empty: the run
    that is sampled), `checkpoint` and `weights` choose within it (empty: the newest, and those
    for sampling).
    Its latents must be those of the network that is sampled; of an end-to-end model that is an
    earlier checkpoint or another average of the same run, or a run that shares its autoencoder.
    Another run is refused unless both keep one latent contract, the statistics of the latent norm
    included; within a run these may differ, as they move while it trains.
    `scale` 1 is no guidance and costs one pass.
    Pictures during training are made without it.

    Source: Karras et al. 2024 (arXiv 2406.02507), eq. 3.
    """

    scale: float = attrs.field(default=1.5, validator=validators.ge(0))
    run: str = attrs.field(default="", converter=addresses.plain, validator=addresses.allowed)
    checkpoint: str = ""
    weights: str = ""

    @property
    def references(self) -> tuple[Reference, ...]:
        """The weak network."""
        reference = Reference(run=self.run, checkpoint=self.checkpoint, weights=self.weights)
        return () if self.scale == 1 else (reference,)

    def with_references(self, others: Mapping[Reference, Denoiser]) -> Guidance:
        """The same with its weak denoiser at hand."""
        return _Armed(self.scale, others[self.references[0]]) if self.references else self

    def wrap(self, inner: Denoiser) -> Denoiser:
        """The inner denoiser, at scale 1; otherwise `with_references` comes first.

        Raises:
            RecipeError: It did not.
        """
        if self.scale == 1:
            return inner
        what = "autoguidance has no weak network here"
        hint = "Load the model with `e2ediff.load`, or call `with_references`."
        raise RecipeError("sampling", [Problem("guidance", what, hint=hint)])


@attrs.frozen
class _Armed(Guidance):
    scale: float
    weak: Denoiser

    def wrap(self, inner: Denoiser) -> Denoiser:
        return _Extrapolated(inner, self.weak, self.scale)


class _Extrapolated(GuidedDenoiser):
    def __init__(self, inner: Denoiser, weak: Denoiser, scale: float) -> None:
        super().__init__(inner)
        self.weak = weak
        self.scale = scale

    def for_step(self, t: float, s: float) -> Denoiser:
        return _Extrapolated(self.inner.for_step(t, s), self.weak.for_step(t, s), self.scale)

    def __call__(self, z_t: Tensor, t: float, condition: Condition) -> Estimate:
        strong, weak = self.inner(z_t, t, condition).x0, self.weak(z_t, t, condition).x0
        return self.clean(weak + self.scale * (strong - weak), z_t, t)


@attrs.frozen(kw_only=True)
class Interval(Guidance):
    """Another guidance, `guidance`, at the times from `t_min` to `t_max`; plain answers elsewhere.

    With `exclusive` the two ends are left out, except a `t_min` of 0.

    Source: Kynkäänniemi et al. 2024 (arXiv 2404.07724).
    """

    guidance: Guidance = attrs.field(metadata={"part": "classifier_free"})
    t_min: float = attrs.field(default=0.0, validator=[validators.ge(0), validators.le(1)])
    t_max: float = attrs.field(default=1.0, validator=[validators.ge(0), validators.le(1)])
    exclusive: bool = False

    @t_max.validator
    def _some_time(self, field: attrs.Attribute[float], value: float) -> None:
        check_interval(self.t_min, value, exclusive=self.exclusive)

    @property
    def references(self) -> tuple[Reference, ...]:
        """Return those of the inner guidance."""
        return self.guidance.references

    @property
    def asks_null(self) -> bool:
        """Whether the inner guidance does."""
        return self.guidance.asks_null

    def with_references(self, others: Mapping[Reference, Denoiser]) -> Guidance:
        """The same with its denoisers at hand."""
        return attrs.evolve(self, guidance=self.guidance.with_references(others))

    def wrap(self, inner: Denoiser) -> Denoiser:
        """The guided denoiser; `inner` itself where its guidance changes nothing."""
        guided = self.guidance.wrap(inner)
        return inner if guided is inner else _Within(inner, guided, self)

    def problems(self, sampler: Sampler) -> Sequence[tuple[str, str]]:
        """Return those of the inner guidance."""
        return [(f"guidance.{field}", what) for field, what in self.guidance.problems(sampler)]


class _Within(Denoiser):
    def __init__(self, plain: Denoiser, guided: Denoiser, interval: Interval) -> None:
        self.plain = plain
        self.guided = guided
        self.interval = interval
        self.path = plain.path

    def for_step(self, t: float, s: float) -> Denoiser:
        return _Within(self.plain.for_step(t, s), self.guided.for_step(t, s), self.interval)

    def __call__(self, z_t: Tensor, t: float, condition: Condition) -> Estimate:
        i = self.interval
        inside = in_interval(t, i.t_min, i.t_max, exclusive=i.exclusive)
        return (self.guided if inside else self.plain)(z_t, t, condition)


@attrs.frozen(kw_only=True)
class Chain(Guidance):
    """Several guidances, `parts`, each wrapped around the one before it; none is no guidance.

    `[autoguidance, classifier_free]` guides an autoguided denoiser by its class; both parts
    multiply the passes that they cost.
    """

    parts: tuple[Guidance, ...] = ()

    @property
    def references(self) -> tuple[Reference, ...]:
        """Return those of all parts."""
        return tuple(reference for part in self.parts for reference in part.references)

    @property
    def asks_null(self) -> bool:
        """Whether any part does."""
        return any(part.asks_null for part in self.parts)

    def with_references(self, others: Mapping[Reference, Denoiser]) -> Guidance:
        """The same with its parts' denoisers at hand."""
        return Chain(parts=tuple(part.with_references(others) for part in self.parts))

    def wrap(self, inner: Denoiser) -> Denoiser:
        """The first part around `inner`, the second around that, and so on."""
        for part in self.parts:
            inner = part.wrap(inner)
        return inner

    def problems(self, sampler: Sampler) -> Sequence[tuple[str, str]]:
        """Return those of all parts."""
        return [
            (f"parts.{i}.{field}", what)
            for i, part in enumerate(self.parts)
            for field, what in part.problems(sampler)
        ]
