"""The feature network that a user names on the command line."""

from __future__ import annotations

from e2ediff.errors import RecipeError
from e2ediff.features import FeatureConfig
from e2ediff.host.plugins import Host
from e2ediff.host.structure import Structurer
from e2ediff.host.yaml import parse_yaml, set_value


def feature_network(
    host: Host, text: str | None, place: str | None, sha256: str | None
) -> FeatureConfig:
    """The part that `--features`, `--weights-file` and `--sha256` describe.

    Raises:
        RecipeError: The part or its options are wrong.
    """
    text = (text or ("inception2015" if place else "efficientnet_lite0")).strip()
    block = text if text.startswith("{") else f"{{name: {text}}}"
    root, problems = parse_yaml(block, "--features")
    if root is not None and place:
        problems += set_value(root, f"weights={place}", "--weights-file")
        if sha256:
            problems += set_value(root, f"sha256='{sha256}'", "--sha256")
    structurer = Structurer(host)
    found = structurer.read(root, FeatureConfig) if root is not None else None
    if problems or structurer.problems:
        raise RecipeError("--features", [*problems, *structurer.problems])
    assert isinstance(found, FeatureConfig)
    return found
