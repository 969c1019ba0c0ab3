"""The feature network that a user names on the command line."""

from __future__ import annotations

import attrs

from e2ediff.errors import DataError
from e2ediff.features import FeatureConfig
from e2ediff.host.plugins import Host
from e2ediff.host.registry import Part
from e2ediff.host.structure import structured
from e2ediff.host.yaml import Node, parse_yaml, set_value


def feature_network(
    host: Host, text: str | None, place: str | None, sha256: str | None
) -> FeatureConfig:
    """Return the part that `--features`, `--weights-file` and `--sha256` describe.

    Raises:
        RecipeError: The part or its options are wrong.
    """
    text = (text or ("inception2015" if place else "efficientnet_lite0")).strip()
    block = text if text.startswith("{") else f"{{name: {text}}}"
    root, problems = parse_yaml(block, "--features")
    assert root is not None
    if place:
        _check_takes_a_file(host, root)
        problems += set_value(root, f"weights={place}", "--weights-file")
        if sha256:
            problems += set_value(root, f"sha256='{sha256}'", "--sha256")
    found: FeatureConfig = structured(host, root, FeatureConfig, "--features", problems)
    return found


def _check_takes_a_file(host: Host, root: Node) -> None:
    """Refuse a weights file for a network that reads none; unknown names are reported later."""
    name = root.value.get("name") if isinstance(root.value, dict) else None
    reading, others = list[Part](), list[Part]()
    for part in host.usable("features"):
        options = {field.alias for field in attrs.fields(part.cls)}
        (reading if "weights" in options else others).append(part)
    if name is not None and any(part.matches(str(name.value)) for part in others):
        raise DataError(
            f"--weights-file: {name.value} takes no file, its weights come with it; leave "
            "--weights-file out, or name a network that reads one: "
            f"{', '.join(sorted(part.name for part in reading))}"
        )
