"""Find the data block for images that a recipe gives by their address alone.

Every data source is asked whether it recognises what lies there; classes are counted, and a size
and channels are chosen by a look at some of the images.
"""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor

from e2ediff import addresses
from e2ediff.addresses import Address
from e2ediff.condition import ClassLabels
from e2ediff.data import DataSource, Recognised, SourceConfig
from e2ediff.errors import BadImageError, DataError, E2EDiffError, PluginError, Problem
from e2ediff.host.checkout import uninstalled_plugins
from e2ediff.host.plugins import Host
from e2ediff.host.registry import Part, options
from e2ediff.host.suggestions import similar_paths
from e2ediff.host.yaml import Node

LOOKED_AT = 2000
"""Number of images that a size and channels are chosen by."""

PLACEHOLDERS = {"size": 256, "classes": 0}
"""Values of required options of a source, until they are inferred from the data."""

_INFERRED = ("size", "channels", "classes")
_SIZES = (32, 64, 128, 256, 512)
_LEVELS = ("possible", "likely", "certain")
_PART_NAME = re.compile(r"([\w.-]+:)?[a-z][a-z0-9_]*")


class ShowsProgress(Protocol):
    """What shows a user what is done: `update` replaces a line, `say` adds one."""

    def update(self, line: str, /) -> None:
        """Replace the line that shows how far the work is."""

    def say(self, line: str, /) -> None:
        """Add a permanent line."""


@attrs.frozen
class DataAddress:
    """The data block `node` for an address; its options `unknown` are still to be inferred.

    `note` says where the other options come from.
    """

    address: str
    node: Node
    unknown: frozenset[str]
    note: str


def data_address(
    host: Host, node: Node | None, earlier: Node | None = None
) -> DataAddress | Problem | None:
    """Read a data block whose name is the address of images, as in `data: /path`.

    Args:
        host: Knows the sources, including those of plugins.
        node: The value of `data` in a recipe: an address, or a block whose `name` is one.
        earlier: The data block of the run that the recipe continues: what it says counts, except
            where the images lie.

    Returns:
        The block of the source that recognises the images; a problem if none does; None if the
        name is that of a source, or the block has another error.

    Raises:
        PluginError: A plugin's source fails.
    """
    given = dict(node.value) if node and isinstance(node.value, dict) else {}
    name = given.pop("name", None) if node and isinstance(node.value, dict) else node
    if node is None or name is None or not isinstance(name.value, str) or not name.value:
        return None
    text = name.value
    if any(part.matches(text) for part in host.registries["sources"]):
        return None
    if _PART_NAME.fullmatch(text) and not os.path.lexists(text):
        near = similar_paths(text)
        hint = host.explain_unknown(
            "sources", text, host.registries["sources"].names(), name.place
        )
        what = f"{text[:60]!r} is neither the name of a data source nor a path that exists."
        return Problem("data", what, name.place, _or_paths(near) + hint)
    try:
        block = recognise(host, text)
    except DataError as error:
        what = str(error).removeprefix("data: ").rstrip(".")
        return Problem("data", f"{what}.", name.place)
    cls = host.registries["sources"].find(block["name"])
    known = options(cls) if cls else {}
    before: dict[str, Node] = {}
    if earlier and isinstance(earlier.value, dict):
        same = earlier.value.get("name")
        before = earlier.value if same and same.value == block["name"] else {}
    found = {key: Node.of(value, name.place) for key, value in block.items()}
    entries = {**before, **found, **given}
    unknown = frozenset(k for k in _INFERRED if k in known and k not in entries)
    blank = {k: Node(v, name.place) for k, v in PLACEHOLDERS.items() if k in unknown}
    keys = {**dict.fromkeys(entries, name.place), **node.keys}
    note = "as in the run" if before else "inferred; give data.size=... to choose others"
    return DataAddress(text, Node({**entries, **blank}, node.place, keys), unknown, note)


def shadowed_folder(host: Host, texts: Iterable[object]) -> str:
    """Return a note if one of these names of data sources is also that of a folder; else ""."""
    for text in texts:
        if not (isinstance(text, str) and text and os.path.isdir(text)):
            continue
        if any(part.matches(text) for part in host.registries["sources"]):
            return f"data: {text} is a data source; for the folder of that name give ./{text}"
    return ""


def infer(
    host: Host, config: SourceConfig, found: DataAddress, progress: ShowsProgress | None = None
) -> SourceConfig:
    """Infer the options of a data block that are unknown, and report what was taken.

    A block is examined once; `host` keeps the result, for the other runs of a grid.

    Args:
        host: Knows the sources.
        config: The block, with placeholders for what is unknown.
        found: The address, and what is unknown.
        progress: Where to report.

    Raises:
        DataError: The data cannot be read, or the source refuses what was inferred.
    """
    key = f"{config!r} {sorted(found.unknown)}"
    if key not in host.inferred_data:
        update = progress.update if progress else lambda line: None
        config, count = _examined(config, found, update)
        host.inferred_data[key] = config
        if progress:
            progress.update("")
            name = host.registries["sources"].name_of(type(config))
            images = "" if count is None else f"{count:,} images, "
            progress.say(
                f"data: {name} at {found.address}: {images}{_shape(config)} ({found.note})"
            )
    kept: SourceConfig = host.inferred_data[key]
    return kept


def _examined(
    config: SourceConfig, found: DataAddress, update: Any
) -> tuple[SourceConfig, int | None]:
    """Return the block with what was unknown, and the number of images, if they were opened."""
    if "classes" in found.unknown:
        update(f"data: counting the images and classes of {found.address}")
        config = config.with_counted_classes()
    wanted = found.unknown - {"classes"}
    if not wanted:
        return config, None
    source = config.open()
    changes: dict[str, int] = {}
    shorter, colour = _look(source, update, decode="channels" in wanted)
    if not shorter:
        raise DataError(
            f"{found.address}: none of the {min(len(source), LOOKED_AT):,} images looked at can "
            f"be read; the first is {source.path_of(0)}"
        )
    if "size" in wanted:
        changes["size"] = proposed_size(shorter)
    if "channels" in wanted:
        changes["channels"] = 3 if colour else 1
    try:
        return attrs.evolve(config, **changes), len(source)  # type: ignore[misc]
    except ValueError as error:
        # attrs' validators append the attribute and the options to the message.
        raise DataError(
            f"{found.address}: its source refuses what was inferred: {error.args[0]}; give it "
            "with `--set data.size=...`"
        ) from error


def _look(source: DataSource, update: Any, *, decode: bool) -> tuple[list[int], bool]:
    """Return the shorter sides of some images as stored, and with `decode` whether any has colour.

    Images that cannot be used are left out: a run reports them when it reads them.
    """
    shorter, colour = list[int](), False
    chosen = choice_of(len(source))
    for number, i in enumerate(chosen):
        if number % 50 == 0:
            update(f"data: looked at {number:,} of {len(chosen):,} images")
        try:
            size = source.original(i)
            if decode and not colour:
                colour = has_colour(source.read([i])[0][0])
        except BadImageError:
            continue
        shorter.append(min(size.width, size.height))
    return shorter, colour


def choice_of(count: int, most: int = LOOKED_AT) -> list[int]:
    """Return the numbers of at most `most` of `count` images: a random choice, always the same."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    chosen: list[int] = order[:most].sort().values.tolist()
    return chosen


def has_colour(x: Tensor) -> bool:
    """Return whether the channels of an image (C, H, W) differ anywhere."""
    return len(x) > 1 and not bool((x == x[:1]).all())


def proposed_size(shorter: Sequence[int]) -> int:
    """Return the largest common size that no more than half of these shorter sides fall below."""
    middle = statistics.median_low(shorter)
    return max([s for s in _SIZES if s <= middle], default=_SIZES[0])


def _shape(config: SourceConfig) -> str:
    image = config.image
    kind = image.conditioning.title
    if isinstance(image.conditioning, ClassLabels):
        number = image.classes
        kind = f"{number:,} class{'' if number == 1 else 'es'}" if number else "no classes"
    colour = {1: "grey", 3: "colour"}.get(image.channels, f"{image.channels} channels")
    return f"{kind}, {image.height} x {image.width}, {colour}"


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
    able = [
        part.name
        for part in host.usable("sources")
        if part.cls.recognises.__func__ is not SourceConfig.recognises.__func__  # type: ignore[attr-defined]
    ]
    others = [name for name in able if name != "image_folder"]
    expected = "Expected a folder of class folders or images"
    expected += f", or data of {', '.join(others)}" if others else ""
    fs, path = addresses.file_system(address)
    if fs.isdir(path):
        return f"an empty folder. {expected}."
    lacking = "".join(_uninstalled())
    if not fs.exists(path):
        near = _or_paths(similar_paths(address))
        return f"nothing is there. {near}{expected}.{lacking}"
    return f"not recognised. {expected}.{lacking}"


def _uninstalled() -> Iterator[str]:
    for plugin in uninstalled_plugins():
        if names := plugin.parts("sources"):
            yield (
                f" {plugin.name} reads {', '.join(names)} and is not installed. "
                f"Run: {plugin.install}"
            )


def _or_paths(near: Sequence[str]) -> str:
    return f"Did you mean {' or '.join(near)}? " if near else ""
