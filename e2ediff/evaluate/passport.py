"""Passports: what determines a score, in fields that can be compared.

`protocol` says how a score was measured, and must agree before two scores are ranked; `subject`
says what was measured, `machine` where.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import attrs

from e2ediff import addresses
from e2ediff.addresses import Address
from e2ediff.errors import DataError
from e2ediff.limits import MAX_GRAPH, json_object
from e2ediff.metric import MetricValue
from e2ediff.store.earlier import earlier_direction
from e2ediff.store.storage import JSON, Store

VERSION = 1
_SECTIONS = ("protocol", "subject", "machine")

_REFERENCE = ("reference_sha256", "reference_images")
_SAMPLES = (
    *("images", "made_by", "label_law", "sampler", "network_calls", "guidance", "guided_by"),
    *_REFERENCE,
)
_NETWORK = ("network", "network_sha256", "resize")
_IDLE = {
    "reconstruction": _SAMPLES,
    "pairs": (*_SAMPLES, *_NETWORK),
    "latents": (*_SAMPLES, *_NETWORK, "convention", "rounding"),
    "memorisation": _REFERENCE,
}
"""Fields of the protocol that say nothing of a section's scores; its own say it instead."""


@attrs.frozen
class Score(MetricValue):
    """One figure of a score file: a metric's value, and what determines it.

    `better` is None if unknown.
    `metric` has the metric's options; for a figure that does not describe the samples, also its
    `section` and images.
    """

    metric: Mapping[str, JSON] = attrs.field(factory=dict, kw_only=True)


def score_of(value: MetricValue, metric: Mapping[str, JSON]) -> Score:
    """Make a score of a metric's value, with what determines it besides the protocol."""
    return Score(**attrs.asdict(value, recurse=False), metric=metric)


@attrs.frozen
class Passport:
    """The three sections, each a flat mapping of JSON values."""

    protocol: Mapping[str, JSON]
    subject: Mapping[str, JSON]
    machine: Mapping[str, JSON]

    @property
    def digest(self) -> str:
        """Hash what was measured and how, but not where."""
        text = json.dumps([self.protocol, self.subject], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def measurement(self, score: Score) -> dict[str, JSON]:
        """Return all fields that must agree before a score is ranked with another."""
        idle = _IDLE.get(str(score.metric.get("section")), ())
        own = {k: v for k, v in self.protocol.items() if k not in idle}
        return {**own, **{f"metric.{k}": v for k, v in score.metric.items()}}

    def protocol_digest(self, score: Score) -> str:
        """Hash the fields of `measurement`."""
        text = json.dumps(self.measurement(score), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@attrs.frozen
class Card:
    """The content of a score file: figures measured under one passport."""

    place: str
    passport: Passport
    scores: Mapping[str, Score]
    notes: Mapping[str, JSON] = attrs.field(factory=dict)

    def text(self) -> str:
        """Return the JSON text that is stored."""
        content = {"e2ediff_scores": VERSION, **attrs.asdict(self), "digest": self.passport.digest}
        del content["place"]
        return json.dumps(content, indent=1, sort_keys=True) + "\n"


def read_card(place: Address) -> Card:
    """Read a score file.

    Raises:
        DataError: It is missing, or is not a score file.
    """
    place = addresses.plain(place)
    parent, _, name = place.rpartition("/")
    try:
        return parse_card(Store(parent or ".").read(name, MAX_GRAPH), place)
    except OSError as error:
        raise DataError(f"{place}: cannot be read: {error}") from error


def parse_card(data: bytes, place: str) -> Card:
    """Parse the content of a score file; errors are those of `read_card`."""
    try:
        content = json_object(data, MAX_GRAPH)
        version = content["e2ediff_scores"]
        if version != VERSION:
            raise DataError(f"{place}: scores of version {version}; this e2ediff reads {VERSION}")
        passport = Passport(**{s: _mapping(content["passport"][s]) for s in _SECTIONS})
        scores = {name: _score(name, s) for name, s in _mapping(content["scores"]).items()}
        notes = _mapping(content.get("notes", {}))
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        raise DataError(
            f"{place}: not a file of scores as `e2ediff eval` writes them ({error!r})"
        ) from error
    return Card(place, passport, scores, notes)


def _mapping(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r:.40} is no object")
    return value


def _score(name: str, content: object) -> Score:
    s = _mapping(content)
    low_high = s.get("interval")
    interval = None if low_high is None else (float(low_high[0]), float(low_high[1]))
    better = s["better"] if "better" in s else earlier_direction(name)
    error = None if s["error"] is None else float(s["error"])
    said, metric = tuple(map(str, s["warnings"])), _mapping(s["metric"])
    return Score(float(s["value"]), error, said, interval, better, metric=metric)


def write_card(folder: Address, card: Card) -> str:
    """Write a score file into a folder; return its address.

    Its name has the convention, the network and the digest, so that only the same measurement of
    the same subject is overwritten.
    """
    protocol = card.passport.protocol
    name = f"{protocol['convention']}-{protocol['network']}-{card.passport.digest[:8]}.json"
    store = Store(folder)
    store.write(name, card.text().encode())
    return store.where(name)
