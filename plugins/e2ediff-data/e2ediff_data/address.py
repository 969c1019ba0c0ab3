"""Find the data that a user names: by a recipe, a data block, or their own address."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from e2ediff import addresses
from e2ediff.addresses import Address
from e2ediff.data import Size, SourceConfig, height_width, size_text
from e2ediff.errors import DataError, Problem, RecipeError
from e2ediff.host.data_block import PLACEHOLDERS, recognise
from e2ediff.host.plugins import Host
from e2ediff.host.recipe import load_recipe
from e2ediff.host.registry import options
from e2ediff.host.structure import structured
from e2ediff.host.yaml import Node, parse_yaml, set_value


def source_config(
    host: Host, address: Address, overrides: Sequence[str] = (), size: Size | None = None
) -> SourceConfig:
    """Return the data block of a recipe or YAML file, or one for the data at a path or URL.

    A YAML file without the key `backbone` is read as a data block, with its keys at the top
    level or below `data`.
    `overrides` are those of `run` for a recipe; for a block and a path `data.` may be left out
    (`--set labels=labels.csv`).
    `size` replaces the size in the block.

    Raises:
        RecipeError: The block is wrong.
        DataError: There is nothing at the address, or it is not recognised.
    """
    address = addresses.plain(address)
    if address.endswith((".yaml", ".yml")):
        config = _from_yaml(host, address, overrides)
    else:
        config = _counted(host, recognise(host, address, _named(overrides)), overrides)
    shape = (config.image.height, config.image.width)
    if size is None or shape == height_width(size):
        return config
    try:
        return attrs.evolve(config, size=size)  # type: ignore[misc]
    except (TypeError, attrs.exceptions.NotAnAttrsClassError) as error:
        raise DataError(
            f"{address}: cannot be cropped to {size_text(size)} pixels: its source has no option "
            f"'size', its images have {shape[0]} x {shape[1]} (height x width)"
        ) from error
    except ValueError as error:
        # attrs' validators append the attribute and the options to the message.
        raise DataError(
            f"{address}: cannot be cropped to {size_text(size)} pixels: {error.args[0]}"
        ) from error


def _from_yaml(host: Host, path: str, overrides: Sequence[str]) -> SourceConfig:
    try:
        with addresses.open_file(path, typed=True) as file:
            text = file.read().decode("utf-8-sig")
    except (OSError, ValueError, ImportError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    root, problems = parse_yaml(text, path)
    keys = root.value if root is not None and isinstance(root.value, dict) else {}
    if "backbone" in keys:
        return load_recipe(host, path, overrides).data
    if problems or root is None:
        raise RecipeError(path, problems or [Problem("data", "is empty.", path)])
    return _structured(host, keys.get("data", root), path, overrides)


def _structured(host: Host, node: Node, source: str, overrides: Sequence[str]) -> SourceConfig:
    holder = Node({"data": node}, node.place)
    problems = []
    for number, text in enumerate(overrides, 1):
        full = text if text.startswith(("data.", "data=")) else f"data.{text}"
        problems += set_value(holder, full, f"--set {number}")
    block: _Holder = structured(host, holder, _Holder, source, problems)
    return block.data


@attrs.frozen(kw_only=True)
class _Holder:
    """The parent of a data block."""

    data: SourceConfig


def _counted(host: Host, block: Mapping[str, Any], overrides: Sequence[str]) -> SourceConfig:
    """Add the number of classes in the data to a block, unless it is given."""
    cls = host.registries["sources"].find(_named(overrides) or block["name"])
    known = options(cls) if cls else PLACEHOLDERS
    full = {**{key: value for key, value in PLACEHOLDERS.items() if key in known}, **block}
    node = Node.of(full, "data")
    config = _structured(host, node, "data", overrides)
    given = {text.partition("=")[0].removeprefix("data.") for text in overrides}
    # `--set data=...` is a whole block.
    if "classes" in block or given & {"classes", "data"}:
        return config
    return config.with_counted_classes()


def _named(overrides: Sequence[str]) -> str:
    """Return the source that is requested by name, "" for none."""
    pairs = [text.partition("=") for text in overrides]
    return next((v.strip() for k, _, v in pairs[::-1] if k.strip() in ("name", "data.name")), "")
