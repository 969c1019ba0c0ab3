"""Map names to classes, in one registry for each kind of part, and find a class's options."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import inspect
import re
import types
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, Union

import attrs

from e2ediff.averaging import Averaging
from e2ediff.errors import DuplicateNameError, PluginError
from e2ediff.host.checkout import install_hint
from e2ediff.host.discovery import BUILTIN, Plugin
from e2ediff.host.guard import StdoutToStderr, cause, guarded

KINDS = (
    ("backbones", "backbone", "e2ediff.backbone:BackboneConfig"),
    ("interpolants", "interpolant", "e2ediff.interpolant:Interpolant"),
    ("time_samplers", "time sampler", "e2ediff.times:TimeSampler"),
    ("objectives", "objective", "e2ediff.objective:Objective"),
    ("regularizers", "regularizer", "e2ediff.regularizer:Regularizer"),
    ("guidance", "guidance", "e2ediff.guidance:Guidance"),
    ("samplers", "sampler", "e2ediff.sampler:Sampler"),
    ("sources", "data source", "e2ediff.data:SourceConfig"),
    ("optimizers", "optimizer", "e2ediff.optimizer:OptimizerConfig"),
    ("diagnostics", "diagnostic", "e2ediff.diagnostic:Diagnostic"),
    ("trackers", "tracker", "e2ediff.tracker:TrackerConfig"),
    ("features", "feature network", "e2ediff.features:FeatureConfig"),
    ("metrics", "metric", "e2ediff.metric:Metric"),
    ("averages", "average", "e2ediff.averaging:Averaging"),
)
"""Plural, as `add` takes it; the word for one; the contract that its classes keep.

Contracts are named and not imported, because most of them import torch, and the command line
lists plugins without.
"""

DEFAULTS: Mapping[Any, str] = {Averaging: "constant"}
"""Contracts whose blocks choose a part by `kind`, and the part of a block that names none."""

FLAT: Mapping[str, object] = {"flat": True}
"""Metadata of a field whose part has its options in the same block, beside the other fields."""

SCALARS = (int, float, bool, str, type(None))


def import_named(target: str) -> Any:
    """Import the object that `module:name` names."""
    module, _, path = target.partition(":")
    found: Any = importlib.import_module(module)
    for word in path.split("."):
        found = getattr(found, word)
    return found


@functools.cache
def contracts() -> dict[str, type]:
    """Return the contract of each kind of part, by its plural."""
    return {plural: import_named(contract) for plural, _, contract in KINDS}


@contextlib.contextmanager
def boundary(plugin: Plugin, title: str = "") -> Iterator[StdoutToStderr]:
    """Run code of a plugin, `guarded`; whatever it raises becomes a `PluginError` in one line.

    The message begins with `title`, and ends with what to install, if that is what is missing.
    """
    try:
        with guarded(plugin.name) as diverted:
            yield diverted
    except KeyboardInterrupt:
        raise
    except BaseException as exc:  # SystemExit and the like, too
        what = cause(exc) + install_hint(exc, plugin.requires)
        raise PluginError(f"{title}{what}") from exc


@attrs.define(eq=False)
class Part:
    """A registered class, or the text `module:Class` that names it until it is imported."""

    name: str
    target: type | str
    plugin: Plugin
    registry: Registry = attrs.field(repr=False)

    @property
    def cls(self) -> type:
        """Return the class, imported on first use.

        Raises:
            PluginError: It cannot be imported, or is not a complete part of its kind.
        """
        if isinstance(self.target, str):
            found: type = self._imported(self.target)
            self.registry.check(self.name, found, self.plugin)
            self.target = found
            return found
        return self.target

    @property
    def imported(self) -> bool:
        """Return whether its class is imported already."""
        return not isinstance(self.target, str)

    def _imported(self, target: str) -> Any:
        if self.plugin.name == BUILTIN:
            return import_named(target)
        try:
            with boundary(self.plugin):
                return import_named(target)
        except PluginError as exc:
            title = f"{self.registry.kind} {self.name!r} of plugin {self.plugin}"
            what = f"{title} cannot be imported from {target} ({exc})"
            raise PluginError(what) from exc.__cause__

    @property
    def qualified(self) -> str:
        """Return `plugin:name`, which is unique."""
        return f"{self.plugin.name}:{self.name}"

    def matches(self, name: str) -> bool:
        """Return whether `name` in a recipe may refer to this part."""
        owner, _, bare = name.rpartition(":")
        return bare == self.name and owner in ("", self.plugin.name, self.plugin.distribution)


@attrs.frozen(eq=False)
class Registry:
    """The parts of one kind.

    Two plugins may register one name: using it in a recipe is an error, unless the recipe requires
    only one of them (`required` has the names of such plugins).
    The recipe can choose by writing `plugin:name` or `distribution:name`.
    `used` has the names of the plugins whose parts were found by name.
    """

    kind: str
    plural: str
    contract_name: str
    required: set[str] = attrs.field(factory=set, repr=False)
    used: set[str] = attrs.field(factory=set, repr=False)
    _parts: list[Part] = attrs.field(factory=list)

    @property
    def contract(self) -> type[object]:
        """Return the base class of the classes of this kind."""
        found: type[object] = import_named(self.contract_name)
        return found

    @property
    def key(self) -> str:
        """Return the key by which a block chooses a part."""
        return "kind" if self.contract in DEFAULTS else "name"

    def add(self, name: str, target: type | str, plugin: Plugin) -> None:
        """Register a class, or the text `module:Class`, which is imported when it is needed.

        Raises:
            PluginError: The name is not snake_case, or the class is no complete attrs class of
                this kind whose options a recipe can hold.
            DuplicateNameError: The plugin, or e2ediff itself, has already taken the name.
        """
        title = f"{self.kind} {name!r} of plugin {plugin}"
        if not (isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9_]*", name)):
            raise PluginError(f"{title}: the name must be snake_case, such as 'variance_floor'")
        if isinstance(target, str) and not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", target):
            raise PluginError(f"{title}: expected a class or 'module:Class', got {target!r}")
        for other in self._parts:
            if other.name == name and other.plugin.name in (BUILTIN, plugin.name):
                raise DuplicateNameError(
                    f"{self.kind} {name!r} is registered by both {other.plugin} and {plugin}; "
                    "register one of them under another name"
                )
        if not isinstance(target, str):
            self.check(name, target, plugin)
        self._parts.append(Part(name, target, plugin, self))

    def check(self, name: str, cls: type, plugin: Plugin) -> None:
        """Refuse a class that is not a complete part of this kind.

        Raises:
            PluginError: It is not an attrs class of this kind whose options a recipe can hold.
        """
        title = f"{self.kind} {name!r} of plugin {plugin}"
        if not (isinstance(cls, type) and issubclass(cls, self.contract)):
            raise PluginError(
                f"{title}: expected a subclass of {self.contract_name.replace(':', '.')}, "
                f"got {cls!r}"
            )
        if "__attrs_attrs__" not in vars(cls):
            raise PluginError(
                f"{title}: decorate {cls.__qualname__} with @attrs.frozen(kw_only=True)"
            )
        if inspect.isabstract(cls):
            lacking = ", ".join(sorted(getattr(cls, "__abstractmethods__", ())))
            raise PluginError(f"{title}: {cls.__qualname__} does not implement {lacking}")
        try:
            found = options(cls)
        except PluginError as exc:
            raise PluginError(f"{title}: {exc}") from exc
        for option in found.values():
            if option.name in {"name", self.key}:
                what = f"the option {option.name!r} collides with the part's own name"
                raise PluginError(f"{title}: {what}")
            if not expressible(option.hint):
                raise PluginError(
                    f"{title}: a recipe cannot hold option {option.name!r} of type {option.hint}"
                )

    def remove(self, plugin: Plugin) -> None:
        """Remove what a plugin registered before it failed."""
        self._parts[:] = [part for part in self._parts if part.plugin.name != plugin.name]

    def find(self, name: str) -> type | None:
        """Return the class of that name, bare or as `plugin:name`; `None` if there is none.

        Raises:
            DuplicateNameError: Several plugins registered the name.
            PluginError: The class cannot be imported.
        """
        found = [part for part in self._parts if part.matches(name)]
        found = self._chosen(found) or found
        if len(found) > 1:
            both = " and ".join(str(part.plugin) for part in found)
            raise DuplicateNameError(
                f"{self.kind} {name!r} is registered by both {both}; choose by writing "
                f"{' or '.join(repr(part.qualified) for part in found)}, "
                f"or block one with E2EDIFF_BLOCK={found[-1].plugin.name}"
            )
        if not found:
            return None
        self.used.add(found[0].plugin.name)
        return found[0].cls

    def get(self, name: str) -> type:
        """Return the class of that name; an unknown name is an error.

        Raises:
            PluginError: No part has that name.
            DuplicateNameError: Several plugins registered the name.
        """
        cls = self.find(name)
        if cls is None:
            raise PluginError(f"unknown {self.kind} {name!r}. {did_you_mean(name, self.names())}")
        return cls

    def name_of(self, cls: type) -> str:
        """Return the name of this class in a recipe, qualified if necessary.

        Raises:
            PluginError: The class is not registered.
        """
        # A class in a recipe was found by its name, so others need not be imported.
        known = [part for part in self._parts if part.imported]
        for part in [*known, *self._parts]:
            if part.cls is cls:
                return self._shortest(part)
        raise PluginError(f"{cls.__qualname__} is not registered as {self.kind}")

    def names(self) -> list[str]:
        """Return every name that a recipe can use, sorted."""
        return sorted(self._shortest(part) for part in self._parts)

    def _shortest(self, part: Part) -> str:
        same = [other for other in self._parts if other.name == part.name]
        return part.name if len(same) == 1 or self._chosen(same) == [part] else part.qualified

    def _chosen(self, parts: Sequence[Part]) -> list[Part]:
        """Return the parts of plugins that the recipe requires."""
        return [part for part in parts if part.plugin.name in self.required]

    def __iter__(self) -> Iterator[Part]:
        return iter(sorted(self._parts, key=lambda part: (part.name, part.plugin.name)))


@attrs.frozen
class Option:
    """One key of a block: the attribute it sets, its type, and whether it must be written.

    `part` is the name of the part that an option holds where it is not written: what
    `attrs.field(metadata={"part": NAME})` says, or its contract.
    One that is `flat` chooses a part whose own options are further keys of the same block.
    An `address` is what `addresses.allowed` validates.
    """

    name: str
    attribute: str
    hint: object
    required: bool
    part: str | None = None
    flat: bool = False
    address: bool = False


def closest(word: str, known: Collection[str]) -> list[str]:
    """Return at most three known words that resemble a misspelling, best first."""
    plain = {name.lower().replace("-", "_"): name for name in known}
    near = difflib.get_close_matches(word[:60].lower().replace("-", "_"), list(plain), cutoff=0.6)
    return [plain[name] for name in near]


def did_you_mean(word: str, known: Collection[str], label: str = "Known") -> str:
    """Return `Did you mean 'linear'? Known: cosine, linear.`, without what does not apply."""
    near = " or ".join(repr(name) for name in closest(word, known))
    meant = f"Did you mean {near}? " if near else ""
    return f"{meant}{label}: {', '.join(sorted(known)) or 'none'}."


def options(cls: type) -> dict[str, Option]:
    """Return the options of a block of this class.

    Raises:
        PluginError: An option of the class has no type, or one that cannot be imported.
    """
    try:
        hints = typing.get_type_hints(cls)
    except Exception as exc:  # evaluating third-party annotations can raise any error
        cause = f"{type(exc).__name__}: {exc}"
        raise PluginError(f"the types of {cls.__qualname__}'s options: {cause}") from exc
    found = {}
    for field in attrs.fields(cls):
        if not field.init:
            continue
        if field.name not in hints:
            raise PluginError(f"option {field.alias!r} of {cls.__qualname__} has no type")
        hint, flat = hints[field.name], bool(field.metadata.get("flat"))
        part = field.metadata.get("part", DEFAULTS.get(hint))
        required = field.default is attrs.NOTHING and part is None
        name = "kind" if flat else field.alias
        address = _is_address(field.validator)
        found[name] = Option(name, field.name, hint, required, part, flat, address)
    return found


def _is_address(validator: object) -> bool:
    from e2ediff.addresses import allowed  # of fsspec, which a question for help does without

    inner = (*getattr(validator, "_validators", ()), getattr(validator, "validator", None))
    return validator is allowed or any(map(_is_address, filter(None, inner)))


def fixed_items(hint: object) -> tuple[object, ...] | None:
    """Return the types of the items of a tuple of fixed length, or of a `NamedTuple`.

    `None` for any other type.
    """
    if isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields"):
        return tuple(typing.get_type_hints(hint).values())
    args = typing.get_args(hint)
    return args if typing.get_origin(hint) is tuple and Ellipsis not in args else None


def expressible(hint: object, seen: frozenset[type] = frozenset()) -> bool:
    """Return whether a recipe can hold values of this type."""
    if hint in SCALARS or hint in contracts().values() or hint in seen:
        return True
    if (items := fixed_items(hint)) is not None:
        return all(expressible(item, seen) for item in items)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return all(type(a) in SCALARS for a in args)
    if origin in (tuple, list, Union, types.UnionType):
        return all(expressible(a, seen) for a in args if a is not Ellipsis)
    if origin in (dict, Mapping):
        return args[0] is str and expressible(args[1], seen)
    if isinstance(hint, type) and attrs.has(hint):
        inner = options(hint).values()
        return all(expressible(o.hint, seen | {hint}) for o in inner)
    return False
