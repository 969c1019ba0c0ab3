"""Find the data that a user names: by a recipe, a data block, or their own address."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from e2ediff import addresses
from e2ediff.addresses import Address
from e2ediff.data import Recognised, SourceConfig
from e2ediff.errors import DataError, E2EDiffError, PluginError, Problem, RecipeError
from e2ediff.host.checkout import uninstalled_plugins
from e2ediff.host.discovery import BUILTIN
from e2ediff.host.plugins import Host
from e2ediff.host.recipe import load_recipe
from e2ediff.host.registry import Part, options
from e2ediff.host.structure import structured
from e2ediff.host.yaml import Node, parse_yaml, set_value

_KINDS = "a folder of class folders or images, or one that `e2ediff data prepare` wrote"
_LEVELS = ("possible", "likely", "certain")


def source_config(
    host: Host, address: Address, overrides: Sequence[str] = (), size: int | None = None
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
        # attrs' validators append the attribute and the options to the message.
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
    block: _Holder = structured(host, holder, _Holder, source, problems)
    return block.data


@attrs.frozen(kw_only=True)
class _Holder:
    """The parent of a data block."""

    data: SourceConfig


def _counted(host: Host, block: Mapping[str, Any], overrides: Sequence[str]) -> SourceConfig:
    """Add the number of classes in the data to a block, unless it is given."""
    cls = host.registries["sources"].find(_named(overrides) or block["name"])
    defaults = {"size": 256, "classes": 0}
    known = options(cls) if cls else defaults
    full = {**{key: value for key, value in defaults.items() if key in known}, **block}
    node = Node({key: Node(value, "data") for key, value in full.items()}, "data")
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


def recognise(host: Host, address: Address, name: str = "") -> dict[str, Any]:
    """Make a data block for a path, URL or pattern, possibly without `size` and `classes`.

    Args:
        host: Knows the sources, including those of plugins.
        address: The path, URL or pattern.
        name: Prefer this source, where it recognises the data.

    Raises:
        DataError: The data are missing, unreadable, not recognised, or recognised by several
            sources.
        PluginError: A plugin's source fails.
    """
    address, sources = addresses.plain(address), host.registries["sources"]
    asked = {
        sources.name_of(part.cls): _asked(host, part, address) for part in host.usable("sources")
    }
    found = {own: answer for own, answer in asked.items() if answer is not None}
    if not found:
        raise DataError(f"{address}: {_why_unknown(host, address)}")
    level = max(_LEVELS.index(answer.certainty) for answer in found.values())
    best = [own for own, answer in found.items() if _LEVELS.index(answer.certainty) == level]
    best = [name] if name in found else best
    if len(best) > 1:
        raise DataError(
            f"{address}: {' and '.join(best)} can read it; choose with --set name={best[0]}"
        )
    return {"name": best[0], **found[best[0]].options}


def _asked(host: Host, part: Part, address: str) -> Recognised | None:
    """Return what a source recognises at an address."""
    try:
        answer: Recognised | None = part.cls.recognises(address)  # type: ignore[attr-defined]
    except E2EDiffError:
        raise
    except Exception as error:  # the plugin boundary
        raise PluginError(
            f"{host.owner_of(error) or part.qualified}: {part.name} fails to recognise "
            f"{address}: {type(error).__name__}: {error}. To go on without it: "
            f"E2EDIFF_BLOCK={part.plugin.name}"
        ) from error
    return answer


def _why_unknown(host: Host, address: str) -> str:
    """Explain that no source recognises what is at an address, and what they accept."""
    others = [
        part.name
        for part in host.registries["sources"]
        if part.plugin.name != BUILTIN and part.name != "shards"  # of which _KINDS tells
    ]
    expected = f"Expected {_KINDS}" + "".join(f", or data of {name}" for name in others)
    fs, path = addresses.file_system(address)
    if fs.isdir(path):
        return f"an empty folder. {expected}."
    lacking = "".join(
        f" {plugin.name} reads {', '.join(names)} and is not installed. Run: {plugin.install}"
        for plugin in uninstalled_plugins()
        if (names := plugin.parts("sources"))
    )
    if not fs.exists(path):
        return f"nothing is there. {expected}.{lacking}"
    return f"not recognised. {expected}, or a YAML file of a block.{lacking}"
