"""Convert a YAML tree to typed values, and back: a part's attrs class is its schema."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, Union

import attrs

from e2ediff.errors import DuplicateNameError, PluginError, Problem, RecipeError
from e2ediff.host.registry import (
    DEFAULTS,
    SCALARS,
    closest,
    contracts,
    did_you_mean,
    fixed_items,
    options,
)
from e2ediff.host.yaml import Node, path_join

if TYPE_CHECKING:
    from e2ediff.host.plugins import Host

_FAILED: Final = object()


@attrs.frozen
class Structurer:
    """Reads a tree into typed values, and collects every problem.

    `excused` is set while a distribution that the recipe requires is missing: unknown names that
    it may define are then not reported again.
    """

    host: Host
    problems: list[Problem] = attrs.field(factory=list)
    excused: bool = False

    def read(self, node: Node, cls: type) -> object:
        """Read a whole tree into a value of class `cls`; `None` if `problems` is not empty."""
        value = self._value(node, cls, "recipe")
        return None if value is _FAILED else value

    def _value(self, node: Node, hint: object, where: str) -> object:
        if node.reported:
            return _FAILED
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if origin in (Union, types.UnionType):
            return self._union(node, args, where)
        if origin is Literal:
            return self._literal(node, args, where)
        if _is_list(hint):
            return self._list(node, hint, where)
        if origin in (dict, Mapping):
            return self._dict(node, args[1], where)
        if hint in SCALARS:
            return self._scalar(node, hint, where)
        assert isinstance(hint, type)
        if self.host.registry_of(hint):
            return self._part(node, hint, where)
        if isinstance(node.value, dict):
            return self._block(node, hint, where, node.value)
        return self._expected(describe(hint), node, where)

    def _complain(self, where: str, what: str, place: str, hint: str = "") -> object:
        self.problems.append(Problem(where, what, place, hint))
        return _FAILED

    def _expected(self, what: str, node: Node, where: str, hint: str = "") -> object:
        return self._complain(where, f"expected {what}, got {show(node)}.", node.place, hint)

    def _scalar(self, node: Node, hint: object, where: str) -> object:
        value = node.value
        if hint is float and type(value) in (int, float):
            try:
                number = float(value)  # type: ignore[arg-type]
            except OverflowError:
                number = math.inf
            if math.isfinite(number):
                return number
            return self._expected("a finite float", node, where)
        if type(value) is hint:
            return value
        way_out = ""
        if hint is str and isinstance(value, int | float):
            way_out = "Quote it."
        elif hint is bool and isinstance(value, str):
            way_out = "Write true or false."
        return self._expected(describe(hint), node, where, way_out)

    def _literal(self, node: Node, allowed: tuple[object, ...], where: str) -> object:
        for value in allowed:
            if type(value) is type(node.value) and value == node.value:
                return value
        words = [a for a in allowed if isinstance(a, str)]
        near = closest(str(node.value), words) if isinstance(node.value, str) else []
        way_out = f"Did you mean {near[0]!r}?" if near else ""
        return self._expected(describe(Literal[allowed]), node, where, way_out)

    def _list(self, node: Node, hint: object, where: str) -> object:
        kind: Any = typing.get_origin(hint) or hint
        if not isinstance(node.value, list):
            return self._expected(describe(hint), node, where, "Write it as [a, b].")
        hints = fixed_items(hint)
        if hints is None:
            hints = typing.get_args(hint)[:1] * len(node.value)
        elif len(node.value) != len(hints):
            what = f"expected a list of {len(hints)} items, got {len(node.value)}."
            return self._complain(where, what, node.place)
        items = [
            self._value(item, inner, path_join(where, i))
            for i, (item, inner) in enumerate(zip(node.value, hints, strict=True))
        ]
        make = getattr(kind, "_make", kind)  # a named tuple takes its items one by one
        return _FAILED if any(i is _FAILED for i in items) else make(items)

    def _dict(self, node: Node, hint: object, where: str) -> object:
        if not isinstance(node.value, dict):
            return self._expected("a block of 'key: value' lines", node, where)
        found = {k: self._value(v, hint, path_join(where, k)) for k, v in node.value.items()}
        return _FAILED if any(v is _FAILED for v in found.values()) else found

    def _union(self, node: Node, members: tuple[object, ...], where: str) -> object:
        # Try the exact type first, so that an int stays an int under `float | int`.
        for hint in sorted(members, key=lambda m: m is not type(node.value)):
            trial = attrs.evolve(self, problems=[])
            value = trial._value(node, hint, where)
            if value is not _FAILED:
                return value
        real = [m for m in members if m is not type(None)]
        fitting = [m for m in real if self._has_shape(m, node)]
        if len(fitting or real) == 1:
            return self._value(node, (fitting or real)[0], where)
        return self._expected(" or ".join(describe(m) for m in members), node, where)

    def _has_shape(self, hint: object, node: Node) -> bool:
        origin = typing.get_origin(hint)
        if isinstance(node.value, list):
            items = fixed_items(hint)
            return _is_list(hint) and (items is None or len(items) == len(node.value))
        if isinstance(node.value, dict):
            block = isinstance(hint, type) and hint not in SCALARS and not _is_list(hint)
            return block or origin in (dict, Mapping)
        part = isinstance(hint, type) and self.host.registry_of(hint) is not None
        # A scalar that is no int is meant as one no more than as another member.
        scalar = hint in SCALARS and hint is not int
        return scalar or origin is Literal or (part and isinstance(node.value, str))

    def _part(self, node: Node, contract: type, where: str) -> object:
        registry = self.host.registry_of(contract)
        assert registry is not None
        entries = dict(node.value) if isinstance(node.value, dict) else {registry.key: node}
        cls = self._chosen(node, contract, where, entries)
        return self._block(node, cls, where, entries) if isinstance(cls, type) else _FAILED

    def _chosen(self, node: Node, contract: type, where: str, entries: dict[str, Node]) -> object:
        """Return the class of the part that a block names; remove the name from its entries."""
        registry = self.host.registry_of(contract)
        assert registry is not None
        name = entries.pop(registry.key, None)
        if name is None and contract in DEFAULTS:
            name = Node(DEFAULTS[contract], node.place)
        if name is None:
            for key in closest("name", entries)[:1]:
                what = f"unknown option {key[:60]!r}."
                return self._complain(where, what, node.keys[key], "Did you mean 'name'?")
            way_out = f"Add `name:` with one of {', '.join(registry.names())}."
            return self._complain(where, "'name' is missing.", node.place, way_out)
        if not isinstance(name.value, str):
            return self._expected(describe(contract), name, where)
        try:
            cls = registry.find(name.value)
        except DuplicateNameError as exc:
            raise DuplicateNameError(f"{name.place}: {where}: {exc}") from None
        except PluginError as exc:
            return self._complain(where, f"{exc}.", name.place)
        if cls is not None:
            return cls
        if self.excused and not closest(name.value, registry.names()):
            return _FAILED
        what = f"unknown {registry.kind} {name.value[:60]!r}."
        known = registry.names()
        way_out = self.host.explain_unknown(registry.plural, name.value, known, name.place)
        return self._complain(where, what, name.place, way_out)

    def _block(self, node: Node, cls: type, where: str, entries: Mapping[str, Node]) -> object:
        known, entries, inner = options(cls), dict(entries), cls
        flat = next((option for option in known.values() if option.flat), None)
        if flat:
            assert isinstance(flat.hint, type)
            chosen = self._chosen(node, flat.hint, where, entries)
            known = {k: o for k, o in known.items() if o is not flat}
            if isinstance(chosen, type):
                inner = chosen
                known |= options(inner)
            else:  # other entries may be options of the part
                entries = {k: v for k, v in entries.items() if k in known}
        words = {*known, "kind"} if issubclass(inner, (*DEFAULTS,)) else {*known}
        values: dict[str, object] = {}
        meant: set[str] = set()
        for key, child in entries.items():
            if key in known:
                values[key] = self._value(child, known[key].hint, path_join(where, key))
                continue
            meant.update(closest(key, words)[:1])
            place = node.keys.get(key, node.place)
            values[key] = self._complain(
                where, f"unknown option {key[:60]!r}.", place, did_you_mean(key, words, "Options")
            )
        for option in known.values():
            if option.name in values:
                continue
            if option.name in meant:
                # Do not report an option twice that is given, but misspelt.
                values[option.name] = _FAILED
            elif option.part is not None:
                named = Node(option.part, node.place)
                values[option.name] = self._value(
                    named, option.hint, path_join(where, option.name)
                )
            elif option.required:
                wanted = "a path or URL" if option.address else describe(option.hint)
                way_out = f"Add `{option.name}:` with {wanted}."
                self._complain(where, f"{option.name!r} is missing.", node.place, way_out)
                values[option.name] = _FAILED
        if flat and inner is cls:
            values[flat.attribute] = _FAILED
        elif flat:
            own = {name: values.pop(name) for name in options(inner) if name in values}
            values[flat.attribute] = self._built(inner, own, node, where, entries)
        return self._built(cls, values, node, where, entries)

    def _built(
        self,
        cls: type,
        values: Mapping[str, object],
        node: Node,
        where: str,
        entries: Mapping[str, Node],
    ) -> object:
        error: Exception | None = None
        if not any(value is _FAILED for value in values.values()):
            try:
                return cls(**values)
            except Exception as exc:  # a plugin's validator; ours and attrs' raise ValueError
                error = exc
        refused = [*_refusals(cls, values)] or ([("", error)] if error else [])
        for key, cause in refused:
            place = entries[key].place if key in entries else node.place
            self._complain(path_join(where, key) if key else where, _text(cause), place)
        return _FAILED


def structured(
    host: Host,
    node: Node,
    cls: type,
    source: str,
    problems: Sequence[Problem] = (),
    *,
    excused: bool = False,
) -> Any:
    """Read a tree of `source` into a value of class `cls`.

    Raises:
        RecipeError: It is wrong, or had `problems` before.
    """
    structurer = Structurer(host, excused=excused)
    value = structurer.read(node, cls)
    if found := [*problems, *sorted(structurer.problems, key=_position)]:
        raise RecipeError(source, found)
    assert isinstance(value, cls)
    return value


def _position(problem: Problem) -> tuple[bool, list[int]]:
    """Return the order of a problem: by line and column, those of overrides after the file's."""
    override = problem.line.startswith("--set ")
    parts = problem.line.split(" " if override else ":")[1:]
    return override, [int(part) for part in parts if part.isdecimal()][-2:]


def _refusals(cls: type, values: Mapping[str, object]) -> Iterator[tuple[str, Exception]]:
    """Yield each option that its validator refuses, as attrs stops at the first.

    An option that failed before is left out, and so is what a validator says that asks for it.
    """
    fields = attrs.fields(cls)
    partial: Any = object.__new__(cls)
    for field in fields:
        try:
            value = _converted(field, values.get(field.alias, field.default), partial)
        except Exception as exc:  # of a converter
            yield field.alias, exc
            continue
        if value is not _FAILED and value is not attrs.NOTHING:
            object.__setattr__(partial, field.name, value)
    lacking = [field.name for field in fields if not hasattr(partial, field.name)]
    for field in fields:
        if field.validator is None or field.name in lacking:
            continue
        try:
            field.validator(partial, field, getattr(partial, field.name))
        except AttributeError as exc:
            if not lacking:
                yield field.alias, exc
        except Exception as exc:  # as above
            yield field.alias, exc


def _converted(field: attrs.Attribute[Any], value: Any, instance: object) -> object:
    """Return the value of a field as attrs would set it, of an option or of its default."""
    if isinstance(value, attrs.Factory):  # type: ignore[arg-type]
        value = value.factory(instance) if value.takes_self else value.factory()
    converter: Any = field.converter
    if converter is None or value is _FAILED or value is attrs.NOTHING:
        return value
    if hasattr(converter, "takes_self"):  # an attrs.Converter
        more = [instance] * converter.takes_self + [field] * converter.takes_field
        return converter.converter(value, *more)
    return converter(value)


def _text(exc: Exception) -> str:
    # attrs' validators append the attribute and the options to the message.
    text = " ".join(str(exc.args[0] if exc.args else "").split())[:300]
    meant_for_users = isinstance(exc, ValueError | TypeError) and text
    return text if meant_for_users else f"{type(exc).__name__}: {text}"


def show(node: Node) -> str:
    """Format a value for an error message: `float 3.7`."""
    if isinstance(node.value, dict):
        return "a block"
    if isinstance(node.value, list):
        return f"a list of {len(node.value)}"
    if node.value is None:
        return "nothing"
    text = repr(node.value)
    return f"{type(node.value).__name__} {text if len(text) < 60 else text[:50] + '...'}"


def describe(hint: object) -> str:
    """Format a type for an error message."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in args)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if origin in (tuple, list):
        return f"a list of {_many(args[0])}" if args else "an empty list"
    if _is_list(hint):
        return f"[{', '.join(vars(hint)['_fields'])}]"
    if hint is type(None):
        return "null"
    if hint in SCALARS and isinstance(hint, type):
        return hint.__name__
    if hint in contracts().values():
        return f"the name of one of the {_many(hint)}"
    return "a block of 'key: value' lines"


def _is_list(hint: object) -> bool:
    return typing.get_origin(hint) in (tuple, list) or fixed_items(hint) is not None


def _many(hint: object) -> str:
    for plural, contract in contracts().items():
        if hint is contract:
            return plural.replace("_", " ")
    if hint in SCALARS:
        return f"{describe(hint)}s"
    return "blocks" if isinstance(hint, type) and attrs.has(hint) else f"({describe(hint)})"


def unstructure(host: Host, value: object, hint: object) -> object:
    """Convert a value of type `hint` to what `Structurer` reads back as that value."""
    members = typing.get_args(hint) if typing.get_origin(hint) not in (tuple, list, dict) else ()
    members = members or (hint,)
    if isinstance(value, tuple | list):
        of = next((m for m in members if _is_list(m)), hint)
        hints = fixed_items(of)
        if hints is None:
            hints = typing.get_args(of)[:1] * len(value)
        return [unstructure(host, v, h) for v, h in zip(value, hints, strict=True)]
    if isinstance(value, dict):
        of = next((m for m in members if len(typing.get_args(m)) == 2), hint)
        return {k: unstructure(host, v, typing.get_args(of)[1]) for k, v in value.items()}
    if not attrs.has(type(value)):
        return value
    cls = type(value)
    block: dict[str, object] = {}
    for option in options(cls).values():
        inner = unstructure(host, getattr(value, option.attribute), option.hint)
        block |= inner if option.flat and isinstance(inner, dict) else {option.name: inner}
    for member in members:
        registry = host.registry_of(member) if isinstance(member, type) else None
        if registry and isinstance(value, registry.contract):
            return {registry.key: registry.name_of(cls), **block}
    return block
