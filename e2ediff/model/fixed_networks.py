"""The fixed feature networks that an objective names: which cannot be built, which are random."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs

from e2ediff.errors import AbsentDataError, DataError, Problem
from e2ediff.features import FeatureConfig


def named_networks(part: Any, where: str) -> Iterator[tuple[str, FeatureConfig]]:
    """Yield the feature networks anywhere in a part, each with its place in the recipe."""
    if isinstance(part, FeatureConfig):
        yield where, part
    elif attrs.has(type(part)):
        for field in attrs.fields(type(part)):
            if field.init:
                yield from named_networks(getattr(part, field.name), f"{where}.{field.name}")


def unusable_networks(part: Any, where: str) -> Iterator[Problem]:
    """Find feature networks that cannot be built here, with the setting to change.

    Reads the weights that lie on this machine; those in a store are left alone (`in_a_store`).

    Args:
        part: An objective.
        where: Its place in the recipe.
    """
    for place, network in named_networks(part, where):
        if in_a_store(network):
            continue
        try:
            network.build()
        except DataError as error:
            yield _problem(place, network, error)


def in_a_store(network: FeatureConfig) -> bool:
    """Return whether a network's weights are to be fetched from a store, not from a disk."""
    texts = [value for value in _options(network).values() if isinstance(value, str)]
    return any("://" in text and not text.startswith(("file://", "local://")) for text in texts)


def random_networks(part: Any, where: str) -> Iterator[str]:
    """Warn of networks that are random for lack of weights."""
    for place, network in named_networks(part, where):
        if network.random:
            yield (
                f"{place} has no weights: a random network, whose features teach little; set "
                f"{place}.weights to the path or URL of its weights"
            )


def placed(error: DataError, part: Any, where: str) -> DataError:
    """Return an error of a feature network with its place in the recipe, once it is found.

    Args:
        error: What building one of the part's networks ended with.
        part: An objective.
        where: Its place in the recipe.
    """
    for place, network in named_networks(part, where):
        try:
            network.build()
        except DataError as again:
            if str(again) == str(error):
                return type(error)(str(_problem(place, network, error)))
    return error


def _problem(place: str, network: FeatureConfig, error: DataError) -> Problem:
    said = str(error)
    weights = _options(network).get("weights")
    if isinstance(weights, str) and weights in said:
        place += ".weights"
    hint = ""
    if isinstance(error, AbsentDataError) and place.endswith(".weights"):
        hint = "Give the path or URL of the weights."
    return Problem(place, said if not hint else f"{said}.", hint=hint)


def _options(network: FeatureConfig) -> dict[str, Any]:
    cls: Any = type(network)
    fields = attrs.fields(cls) if attrs.has(cls) else ()
    return {field.name: getattr(network, field.name) for field in fields if field.init}
