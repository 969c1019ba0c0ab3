"""What a user points at: a recipe, a data block, or the data themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from e2ediff import addresses
from e2ediff.addresses import Address
from e2ediff.data import SourceConfig
from e2ediff.errors import DataError, Problem, RecipeError
from e2ediff.files.names import is_hidden
from e2ediff.host.plugins import Host
from e2ediff.host.recipe import load_recipe
from e2ediff.host.structure import Structurer
from e2ediff.host.yaml import Node, parse_yaml, set_value
from e2ediff.parts.sources import Arrays
from e2ediff.parts.sources.listing import EncodedConfig
from e2ediff.parts.sources.location import Location
from e2ediff.parts.sources.shards import PREPARED, read_prepared
from e2ediff.parts.sources.tar_members import members

_ARRAYS = (".npz", ".npy", "-ubyte", ".idx")
_KINDS = (
    "a folder of class folders or images, a zip of them, ImageNet's tars, tar shards, Parquet "
    "files, an npz, npy or idx file, or a folder that `e2ediff data prepare` wrote"
)


def source_config(
    host: Host, address: Address, overrides: Sequence[str] = (), size: int | None = None
) -> SourceConfig:
    """The data block of a recipe or a YAML file, or one for the data at a path or URL.

    A YAML file without the key `backbone` is read as a data block: its keys stand at the top,
    or below `data`.
    `overrides` are those of `run` for a recipe; for a block and a path `data.` may be left out
    (`--set labels=labels.csv`).
    `size` replaces the block's.

    Raises:
        RecipeError: The block is wrong.
        DataError: There is nothing at the address, or nothing that can be recognised.
    """
    address = addresses.plain(address)
    if address.endswith((".yaml", ".yml")):
        config = _from_yaml(host, address, overrides)
    else:
        config = _counted(host, recognise(address), overrides)
    if size is None or config.image.height == size:
        return config
    try:
        return attrs.evolve(config, size=size)  # type: ignore[misc]
    except (TypeError, attrs.exceptions.NotAnAttrsClassError) as error:
        raise DataError(
            f"{address}: cannot be cropped to {size} pixels: its source has no option 'size', its "
            f"images have {config.image.height}"
        ) from error
    except ValueError as error:
        # attrs' validators put the attribute and the options behind the message.
        raise DataError(
            f"{address}: cannot be cropped to {size} pixels: {error.args[0]}"
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
    structurer = Structurer(host)
    block = structurer.read(holder, _Holder)
    problems += structurer.problems
    if problems:
        raise RecipeError(source, problems)
    assert isinstance(block, _Holder)
    return block.data


@attrs.frozen(kw_only=True)
class _Holder:
    """What a data block lies in."""

    data: SourceConfig


def _counted(host: Host, block: Mapping[str, Any], overrides: Sequence[str]) -> SourceConfig:
    """The block with the number of classes that the data have, unless it is given."""
    full = {"size": 256, "classes": 0, **block}
    node = Node({key: Node(value, "data") for key, value in full.items()}, "data")
    config = _structured(host, node, "data", overrides)
    given = {text.partition("=")[0].removeprefix("data.") for text in overrides}
    # `--set data=...` is a whole block in itself.
    if "classes" in block or given & {"classes", "data"}:
        return config
    if isinstance(config, EncodedConfig):
        return attrs.evolve(config, classes=config.listing(held_out=False).classes)
    if not isinstance(config, Arrays):  # `--set name=...`
        return config
    labels = config.arrays()[1]
    found = 0 if labels is None or not len(labels) else int(labels.max()) + 1
    return attrs.evolve(config, classes=found)


def recognise(address: Address) -> dict[str, Any]:
    """A data block for what lies at a path, URL or pattern, without its number of classes.

    Raises:
        DataError: Nothing is there, or nothing that is known.
    """
    address = addresses.plain(address)
    location = Location(address, "data")
    if location.is_pattern():
        kind = "parquet" if address.endswith(".parquet") else "tar_shards"
        return {"name": kind, "path": address}
    if location.is_folder():
        return _folder(location)
    if not location.is_file():
        raise DataError(f"{address}: nothing is there. Expected {_KINDS}.")
    lower = address.lower().removesuffix(".gz")
    if lower.endswith(".zip"):
        return {"name": "archive", "path": address}
    if lower.endswith(".parquet"):
        return {"name": "parquet", "path": address}
    if lower.endswith(".tar"):
        with location.opened(location.path) as file:
            head = next(members(file, address, "data"), None)
        nested = head is not None and head.name.endswith(".tar")
        return {"name": "class_tars" if nested else "tar_shards", "path": address}
    if lower.endswith(_ARRAYS):
        return {"name": "arrays", "images": address}
    raise DataError(f"{address}: not recognised. Expected {_KINDS}, or a YAML file of a block.")


def _folder(location: Location) -> dict[str, Any]:
    entries = location.fs.ls(location.path, detail=False)
    names = [str(path).rstrip("/").rpartition("/")[2] for path in entries]
    names = [name for name in names if not is_hidden(name)]
    if PREPARED in names:
        told = read_prepared(location)
        options = {key: told[key] for key in ("size", "channels", "classes")}
        return {"name": "shards", "path": location.url, **options}
    if any(name.endswith(".parquet") for name in names):
        return {"name": "parquet", "path": location.url}
    if tars := sorted(name for name in names if name.endswith(".tar")):
        with location.opened(location.below(tars[0])) as file:
            head = next(members(file, tars[0], "data"), None)
        # A class tar's images are named after it: n01440764.tar holds n01440764_10026.JPEG.
        stem = tars[0].removesuffix(".tar")
        classed = head is not None and head.name.rpartition("/")[2].startswith(f"{stem}_")
        return {"name": "class_tars" if classed else "tar_shards", "path": location.url}
    if not names:
        raise DataError(f"{location.url}: an empty folder. Expected {_KINDS}.")
    return {"name": "image_folder", "root": location.url}
