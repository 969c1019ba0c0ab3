"""The request for an evaluation: what to score, the metrics, the conventions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import attrs

from e2ediff import addresses
from e2ediff.addresses import Address
from e2ediff.evaluate.conventions import Convention
from e2ediff.evaluate.reconstruction import Perceptual
from e2ediff.features import FeatureNetwork
from e2ediff.metric import Metric
from e2ediff.model.labels import LabelLaw
from e2ediff.sample.load import ModelRef

Say = Callable[[str], None]


def _plain_places(places: Mapping[str, Address]) -> dict[str, str]:
    return {name: addresses.plain(place) for name, place in places.items()}


@attrs.frozen(kw_only=True, eq=False)
class Request:
    """What to score, and how.

    `target` is the model to score or, in its `run`, a folder or npz of images; its `device` is
    used for all networks.
    `references` are addresses by convention, "" for all others; `sections` are some of
    `e2ediff.evaluate.sections.SECTIONS`.
    `count` and `labels` default to the first convention's.
    `classes` are those of a run's samples, and of its data where they are the reference; empty
    for all.
    `bootstrap` is the number of resampled sets for errors and intervals.
    With `choose_threads` timing decides between one CPU thread and all.
    """

    target: ModelRef
    network: FeatureNetwork
    metrics: Sequence[Metric]
    conventions: Sequence[Convention]
    sections: Sequence[str] = ()
    references: Mapping[str, str] = attrs.field(factory=dict, converter=_plain_places)
    count: int | None = None
    labels: LabelLaw | None = None
    classes: tuple[int, ...] = ()
    seed: int = 0
    batch: int = 64
    processes: int = 1
    cache: str = attrs.field(factory=addresses.cache_folder, converter=addresses.plain)
    perceptual: Perceptual | None = None
    bootstrap: int = 0
    choose_threads: bool = False
