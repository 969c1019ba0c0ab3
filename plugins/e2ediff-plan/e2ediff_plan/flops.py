"""Count FLOPs of every pass of a step, forward and backward, on the meta device."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from e2ediff.backbone import Backbone, Decode, Denoise, Encode, Output, Pass
from e2ediff.data import Batch, ImageSpec
from e2ediff.features import FeatureConfig, FeatureNetwork
from e2ediff.host.recipe import Recipe
from e2ediff.model.build import build_nets
from e2ediff.objective import Draw, Nets
from e2ediff.step.flops import FlopCounter
from e2ediff.step.step import Step
from e2ediff_plan.rehearsal import blank_batch

_META = torch.device("meta")
_NAMES: Mapping[type, str] = {Encode: "encode", Decode: "decode", Denoise: "denoise"}
_ROWS = 2
OTHER = "losses"


@attrs.frozen
class PassCost:
    """FLOPs of one image, forward and backward."""

    forward: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        """Return the sum of both directions."""
        return self.forward + self.backward


@attrs.frozen
class PhaseCost:
    """A phase's passes by name, and the number of its weighted losses."""

    passes: Mapping[str, PassCost]
    losses: int

    @property
    def per_image(self) -> PassCost:
        """Return the sum over all passes."""
        costs = self.passes.values()
        return PassCost(sum(c.forward for c in costs), sum(c.backward for c in costs))


def count_passes(recipe: Recipe) -> dict[str, PhaseCost]:
    """Count the passes of each phase.

    They are `encode`, `encode target`, `decode`, `denoise`, `heads` and `perceptual`.
    FLOPs are those that torch's FlopCounterMode counts (matrix products, convolutions and
    attention, two a multiply-add), over the real step on a batch of two.
    Passes that the backbone would fuse are run one by one, which takes as many FLOPs; a pass
    owns the backward FLOPs of the operations that it recorded.
    Attention counts as two products forward and four backward, without a kernel's recomputation.

    Raises:
        DataError: A feature network cannot be built here.
    """
    return {phase: _count_phase(recipe, phase) for phase in recipe.objective.phases}


def _count_phase(recipe: Recipe, phase: str) -> PhaseCost:
    """Count the passes of one phase, on networks that are watched for it and dropped."""
    nets, step, batch, draw = _meta_step(recipe)
    ledger = _Ledger()
    _watch(nets, ledger)
    with ledger.counter:
        terms = step.terms(batch, draw, phase)
        ledger.claim(OTHER, [terms.total])
        terms.total.backward()  # type: ignore[no-untyped-call]
    return PhaseCost(ledger.costs(), sum(map(terms.counts, terms.losses)))


def _meta_step(recipe: Recipe) -> tuple[Nets, Step, Batch, Draw]:
    """Build networks, a step and its arguments on the meta device."""
    nets = meta_nets(recipe)
    step = Step(recipe.objective, nets, torch.float32, recipe.regularizers)
    batch = blank_batch(recipe, _ROWS, _META)
    times = torch.zeros(_ROWS, device=_META)
    start = torch.zeros((), device=_META)
    draw = Draw(
        t=times, condition=batch.condition, generator=None, times=recipe.times, progress=start
    )
    return nets, step, batch, draw


def count_latent_gradients(recipe: Recipe) -> float:
    """Count FLOPs per image of the gradients of every loss at the latents, in the costliest phase.

    Raises:
        DataError: A feature network cannot be built here.
    """
    _, step, batch, draw = _meta_step(recipe)

    def gradients(phase: str) -> None:
        terms = step.terms(batch, draw, phase)
        for name, loss in terms.losses.items():
            if terms.counts(name) and terms.z.requires_grad and loss.requires_grad:
                weighted = terms.weights[name] * loss
                torch.autograd.grad(weighted, terms.z, retain_graph=True, allow_unused=True)

    return max(_flops(partial(gradients, phase)) for phase in recipe.objective.phases)


def count_inference(recipe: Recipe) -> dict[str, float]:
    """Count FLOPs per image of `encode`, `decode` and `denoise`, one pass each, no gradients."""
    net = build_nets(recipe, _META)[0].online
    (n, d), batch = (net.latent.tokens, net.latent.dim), blank_batch(recipe, _ROWS, _META)
    z, t = torch.zeros(_ROWS, n, d, device=_META), torch.zeros(_ROWS, device=_META)
    with torch.no_grad():
        return {
            "encode": _flops(lambda: net.encode(batch.x)),
            "decode": _flops(lambda: net.decode(z)),
            "denoise": _flops(lambda: net.denoise(z, t, batch.condition)),
        }


def count_features(config: FeatureConfig, image: ImageSpec) -> float:
    """Count FLOPs per image of a feature network.

    Raises:
        DataError: The network cannot be built here.
    """
    with _META:
        network = config.blank().to(_META)
    pixels = torch.zeros(_ROWS, image.channels, image.height, image.width, device=_META)
    with torch.no_grad():
        return _flops(lambda: network.vectors(pixels))


def _flops(call: Callable[[], object]) -> float:
    """Return the FLOPs per image of a call on `_ROWS` images."""
    counter = FlopCounter()
    with counter:
        call()
    return counter.total / _ROWS


def meta_nets(recipe: Recipe) -> Nets:
    """Build the networks on the meta device, feature networks without their weights."""
    nets, _ = build_nets(recipe, _META)
    with _META:
        frozen = without_weights(recipe.objective).frozen(nets.online)
    return attrs.evolve(nets, frozen=frozen)


@attrs.frozen
class _Blank(FeatureConfig):
    inner: FeatureConfig

    def build(self) -> FeatureNetwork:
        return self.inner.blank()


def without_weights(part: Any) -> Any:
    """Return the part with feature networks that are built without reading weights."""
    if isinstance(part, FeatureConfig):
        return _Blank(part)
    if not attrs.has(type(part)):
        return part
    old = {f.name: getattr(part, f.name) for f in attrs.fields(type(part)) if f.init}
    new = {name: without_weights(value) for name, value in old.items()}
    changed = {name: value for name, value in new.items() if value is not old[name]}
    return attrs.evolve(part, **changed) if changed else part


class _Ledger:
    """FLOPs by pass and direction; operations count for the pass selected last."""

    def __init__(self) -> None:
        self.counter = FlopCounter()
        self._flops: Counter[tuple[str, bool]] = Counter()
        self._mark = 0
        self.key = (OTHER, False)
        # Kept alive, because a node's Python object would otherwise be a new one each time.
        self._claimed: set[Node] = set()

    def turn_to(self, name: str, *, backward: bool = False) -> None:
        """Select the pass that counts from now on."""
        total = self.counter.total
        self._flops[self.key] += total - self._mark
        self._mark, self.key = total, (name, backward)

    @contextlib.contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Count for this pass inside the block; within another pass the outer one counts."""
        if self.key != (OTHER, False):
            yield
            return
        self.turn_to(name)
        try:
            yield
        finally:
            self.turn_to(OTHER)

    def claim(self, name: str, made: Iterable[Tensor]) -> None:
        """Assign to this pass all operations behind these tensors that no pass has recorded."""
        waiting = [t.grad_fn for t in made if t.grad_fn is not None]
        while waiting:
            node = waiting.pop()
            if node in self._claimed:
                continue
            self._claimed.add(node)
            node.register_prehook(lambda _: self.turn_to(name, backward=True))
            waiting += [n for n, _ in node.next_functions if n is not None]

    def costs(self) -> dict[str, PassCost]:
        """Return FLOPs of one image by pass; passes without any are left out."""
        self.turn_to(OTHER)
        flops = self._flops
        names = dict.fromkeys(name for (name, _), number in flops.items() if number)
        return {n: PassCost(flops[n, False] / _ROWS, flops[n, True] / _ROWS) for n in names}


def _watch(nets: Nets, ledger: _Ledger) -> None:
    """Report to the ledger when passes and heads start, and what they return."""
    _watch_passes(nets.online, "", ledger)
    _watch_passes(nets.target, " target", ledger)
    for name, owner in (("heads", nets.heads), *nets.frozen.items()):
        for module in owner.children() if owner is nets.heads else (owner,):
            _watch_method(module, "forward", name, ledger)


def _watch_passes(net: Backbone, suffix: str, ledger: _Ledger) -> None:
    run = net.outputs

    def outputs(*passes: Pass) -> list[Output]:
        made = []
        for one in passes:
            name = _NAMES[type(one)] + suffix
            with ledger.during(name):
                made += run(one)
            ledger.claim(name, _tensors(made[-1]))
        return made

    net.__dict__["outputs"] = outputs
    for mode in _NAMES.values():
        _watch_method(net, mode, mode + suffix, ledger)


def _watch_method(module: nn.Module, method: str, name: str, ledger: _Ledger) -> None:
    call = getattr(module, method)

    def watched(*values: Any, **named: Any) -> Any:
        with ledger.during(name):
            made = call(*values, **named)
        ledger.claim(name, _tensors(made))
        return made

    module.__dict__[method] = watched


def _tensors(made: Any) -> list[Tensor]:
    if isinstance(made, Tensor):
        return [made]
    if isinstance(made, Output):
        return [*_tensors(made.value), *_tensors(made.raw), *_tensors(dict(made.features))]
    if isinstance(made, Mapping):
        return [t for value in made.values() for t in _tensors(value)]
    return [t for value in made for t in _tensors(value)] if isinstance(made, list | tuple) else []
