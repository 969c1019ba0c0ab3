"""Registries: one for each kind of part, from names to classes, and what a class's options are."""

from __future__ import annotations

import difflib
import inspect
import re
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Literal, Union

import attrs

from e2ediff.backbone import BackboneConfig
from e2ediff.data import SourceConfig
from e2ediff.diagnostic import Diagnostic
from e2ediff.errors import DuplicateNameError, PluginError
from e2ediff.features import FeatureConfig
from e2ediff.guidance import Guidance
from e2ediff.host.discovery import BUILTIN
from e2ediff.interpolant import Interpolant
from e2ediff.metric import Metric
from e2ediff.objective import Objective
from e2ediff.optimizer import OptimizerConfig
from e2ediff.regularizer import Regularizer
from e2ediff.sampler import Sampler
from e2ediff.times import TimeSampler
from e2ediff.tracker import TrackerConfig

KINDS: tuple[tuple[str, str, type[object]], ...] = (
    ("backbones", "backbone", BackboneConfig),
    ("interpolants", "interpolant", Interpolant),
    ("time_samplers", "time sampler", TimeSampler),
    ("objectives", "objective", Objective),
    ("regularizers", "regularizer", Regularizer),
    ("guidance", "guidance", Guidance),
    ("samplers", "sampler", Sampler),
    ("sources", "data source", SourceConfig),
    ("optimizers", "optimizer", OptimizerConfig),
    ("diagnostics", "diagnostic", Diagnostic),
    ("trackers", "tracker", TrackerConfig),
    ("features", "feature network", FeatureConfig),
    ("metrics", "metric", Metric),
)
"""Plural, as in `register_<plural>`; the word for one; the contract that its classes keep."""

CONTRACTS = tuple(contract for _, _, contract in KINDS)

SCALARS = (int, float, bool, str, type(None))


@attrs.frozen
class Plugin:
    """Who registered a part: entry point or module, its distribution, the hooks it has."""

    name: str
    distribution: str = ""
    version: str = ""
    hooks: tuple[str, ...] = ()

    def __str__(self) -> str:
        origin = f" ({self.distribution} {self.version})" if self.distribution else ""
        return f"{self.name!r}{origin}"


@attrs.frozen
class Part:
    """A registered class."""

    name: str
    cls: type
    plugin: Plugin

    @property
    def qualified(self) -> str:
        """`plugin:name`, which is unique."""
        return f"{self.plugin.name}:{self.name}"

    def answers(self, name: str) -> bool:
        """Whether a recipe that says `name` can mean this part."""
        owner, _, bare = name.rpartition(":")
        return bare == self.name and owner in ("", self.plugin.name, self.plugin.distribution)


@attrs.frozen(eq=False)
class Registry:
    """The parts of one kind.

    Two plugins may register one name: the error comes when a recipe uses it, and the recipe can
    choose by writing `plugin:name` or `distribution:name`.
    `seekers` are asked for a name that is not there; they may add it.
    """

    kind: str
    plural: str
    contract: type[object]
    seekers: list[Callable[[Registry, str], None]] = attrs.field(factory=list, repr=False)
    _parts: list[Part] = attrs.field(factory=list)

    def add(self, name: str, cls: type, plugin: Plugin) -> None:
        """Register a class.

        Raises:
            PluginError: The name is not snake_case, or the class is no complete attrs class of
                this kind whose options a recipe can hold.
            DuplicateNameError: The plugin, or e2ediff itself, has already taken the name.
        """
        self._check(name, cls, plugin)
        for other in self._parts:
            if other.name == name and other.plugin.name in (BUILTIN, plugin.name):
                raise DuplicateNameError(
                    f"{self.kind} {name!r} is registered by both {other.plugin} and {plugin}; "
                    "register one of them under another name"
                )
        self._parts.append(Part(name, cls, plugin))

    def _check(self, name: str, cls: type, plugin: Plugin) -> None:
        title = f"{self.kind} {name!r} of plugin {plugin}"
        if not (isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9_]*", name)):
            raise PluginError(f"{title}: the name must be snake_case, such as 'variance_floor'")
        if not (isinstance(cls, type) and issubclass(cls, self.contract)):
            base = f"{self.contract.__module__}.{self.contract.__qualname__}"
            raise PluginError(f"{title}: expected a subclass of {base}, got {cls!r}")
        if "__attrs_attrs__" not in vars(cls):
            raise PluginError(
                f"{title}: decorate {cls.__qualname__} with @attrs.frozen(kw_only=True)"
            )
        if inspect.isabstract(cls):
            missing = ", ".join(sorted(getattr(cls, "__abstractmethods__", ())))
            raise PluginError(f"{title}: {cls.__qualname__} does not implement {missing}")
        try:
            found = options(cls)
        except PluginError as exc:
            raise PluginError(f"{title}: {exc}") from exc
        for option in found.values():
            if option.name == "name":
                raise PluginError(f"{title}: the option 'name' collides with the part's own name")
            if not expressible(option.hint):
                raise PluginError(
                    f"{title}: a recipe cannot hold option {option.name!r} of type {option.hint}"
                )

    def remove(self, plugin: Plugin) -> None:
        """Forget what a plugin registered before it failed."""
        self._parts[:] = [part for part in self._parts if part.plugin.name != plugin.name]

    def find(self, name: str) -> type | None:
        """The class of that name, bare or as `plugin:name`; `None` if there is none.

        Raises:
            DuplicateNameError: Several plugins registered the name.
        """
        found = [part for part in self._parts if part.answers(name)]
        if not found or ":" in name:
            # Whoever writes `plugin:name` chooses among several: all of them are to be known,
            # so that the recipe is written back with the choice in it.
            for seek in self.seekers:
                seek(self, name)
            found = [part for part in self._parts if part.answers(name)]
        if len(found) > 1:
            both = " and ".join(str(part.plugin) for part in found)
            raise DuplicateNameError(
                f"{self.kind} {name!r} is registered by both {both}; choose by writing "
                f"{' or '.join(repr(part.qualified) for part in found)}, "
                f"or block one with E2EDIFF_BLOCK={found[-1].plugin.name}"
            )
        return found[0].cls if found else None

    def get(self, name: str) -> type:
        """As `find`, but an unknown name is an error.

        Raises:
            PluginError: No part has that name.
            DuplicateNameError: Several plugins registered the name.
        """
        cls = self.find(name)
        if cls is None:
            raise PluginError(f"unknown {self.kind} {name!r}. {did_you_mean(name, self.names())}")
        return cls

    def name_of(self, cls: type) -> str:
        """The name by which a recipe gets this class, qualified where it must be.

        Raises:
            PluginError: The class is not registered.
        """
        for part in self._parts:
            if part.cls is cls:
                return self._shortest(part)
        raise PluginError(f"{cls.__qualname__} is not registered as {self.kind}")

    def names(self) -> list[str]:
        """Every name that a recipe can use, sorted."""
        return sorted(self._shortest(part) for part in self._parts)

    def _shortest(self, part: Part) -> str:
        alone = sum(other.name == part.name for other in self._parts) == 1
        return part.name if alone else part.qualified

    def __iter__(self) -> Iterator[Part]:
        return iter(sorted(self._parts, key=lambda part: (part.name, part.plugin.name)))


@attrs.frozen
class Option:
    """One key of a block: the attribute it sets, its type, and whether it must be written."""

    name: str
    attribute: str
    hint: object
    required: bool


def closest(word: str, known: Collection[str]) -> list[str]:
    """At most three known words that look like a misspelling's meaning, best first."""
    plain = {name.lower().replace("-", "_"): name for name in known}
    near = difflib.get_close_matches(word[:60].lower().replace("-", "_"), list(plain), cutoff=0.6)
    return [plain[name] for name in near]


def did_you_mean(word: str, known: Collection[str], label: str = "Known") -> str:
    """`Did you mean 'linear'? Known: cosine, linear.`, as far as that can be said."""
    near = " or ".join(repr(name) for name in closest(word, known))
    meant = f"Did you mean {near}? " if near else ""
    return f"{meant}{label}: {', '.join(sorted(known)) or 'none'}."


def options(cls: type) -> dict[str, Option]:
    """What a block of this class may hold.

    Raises:
        PluginError: The class has an option without a type, or with one that is not importable.
    """
    try:
        hints = typing.get_type_hints(cls)
    except Exception as exc:  # any error that evaluating a stranger's annotations can raise
        cause = f"{type(exc).__name__}: {exc}"
        raise PluginError(f"the types of {cls.__qualname__}'s options: {cause}") from exc
    found = {}
    for field in attrs.fields(cls):
        if not field.init:
            continue
        if field.name not in hints:
            raise PluginError(f"option {field.alias!r} of {cls.__qualname__} has no type")
        found[field.alias] = Option(
            field.alias, field.name, hints[field.name], required=field.default is attrs.NOTHING
        )
    return found


def expressible(hint: object, seen: frozenset[type] = frozenset()) -> bool:
    """Whether a recipe can hold values of this type."""
    if hint in SCALARS or hint in CONTRACTS or hint in seen:
        return True
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
