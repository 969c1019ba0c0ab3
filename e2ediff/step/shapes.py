"""Remember which tensors operations return, so that blocks that repeat are not computed again.

Only for tensors without values: those of the meta device, and torch's fake ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import attrs
import torch
from torch import Tensor
from torch._ops import OpOverload

Key: TypeAlias = tuple[Any, ...]

_PLAIN = {
    int, float, bool, str, type(None),
    torch.dtype, torch.device, torch.layout, torch.memory_format,
}  # fmt: skip
_BY_VALUE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


@attrs.frozen
class Layout:
    """A dense tensor without its values.

    `offset` is None for a tensor alone in its memory; otherwise the tensor is a view of the first
    argument, so many elements further on.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    offset: int | None

    @property
    def bytes(self) -> int:
        """Return the bytes of memory that it reaches over."""
        steps = zip(self.shape, self.stride, strict=True)
        reach = 1 + sum((size - 1) * stride for size, stride in steps)
        return self.dtype.itemsize * reach * (0 not in self.shape)

    def blank(self, first: Tensor | None = None) -> Tensor:
        """Return such a tensor on the meta device; a view needs the first argument."""
        if first is None or self.offset is None:
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        offset = first.storage_offset() + self.offset
        empty = torch.empty(0, dtype=self.dtype, device="meta")
        return empty.set_(first.untyped_storage(), offset, self.shape, self.stride)


def is_meta(value: object) -> bool:
    """Return whether a value is a dense tensor of the meta device."""
    return isinstance(value, Tensor) and value.is_meta and value.layout == torch.strided


class Shapes:
    """The layouts of results, by operation and layouts of its arguments.

    What is remembered are operations that change nothing, and return new tensors or, if asked
    for, views of their first argument.
    """

    def __init__(
        self, is_blank: Callable[[object], bool] = is_meta, *, views: bool = False
    ) -> None:
        """Take tensors for which `is_blank` says that they are dense and without values."""
        self._is_blank = is_blank
        self._views = views
        self._suited: dict[Any, bool] = {}
        self._known: dict[Key, Any] = {}

    def key(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Key | None:
        """Return what the layouts of a call's results depend on; None if that is not known."""
        if (suited := self._suited.get(func)) is None:
            suited = self._suited[func] = _is_suited(func, views=self._views)
        key: list[object] = [func]
        values = [*args, *kwargs, *kwargs.values()] if kwargs else args
        return tuple(key) if suited and all(self._describe(v, key) for v in values) else None

    def _describe(self, value: Any, key: list[object]) -> bool:
        kind = type(value)
        if kind in _PLAIN:
            key += (kind, value)  # the kind too, since 1 == 1.0 == True
        elif kind is list or kind is tuple:
            key.append(len(value))
            return all(self._describe(one, key) for one in value)
        elif self._is_blank(value) and not value.dtype.is_complex:
            key += (value.shape, value.stride(), value.dtype)
        else:
            return False
        return True

    def recall(self, key: Key, make: Callable[[Layout], Tensor]) -> Any:
        """Return the results of such a call, each made of its layout; None if it is new."""
        known = self._known.get(key)
        if isinstance(known, list | tuple):
            return type(known)(one and make(one) for one in known)
        return known and make(known)

    def learn(self, key: Key, out: Any, args: Sequence[Any]) -> None:
        """Remember what a call returned, if its results are of one of the two kinds."""
        made = out if (many := isinstance(out, list | tuple)) else [out]
        tensors = [one for one in made if one is not None]
        if not all(map(self._is_blank, tensors)):
            return
        first = args[0] if key[0].is_view else None
        layouts = [one if one is None else _layout(one, first) for one in made]
        places = [t.untyped_storage()._cdata for t in tensors]
        if first is not None:
            sound = {*places} == {first.untyped_storage()._cdata}
        else:
            held = [t.untyped_storage().nbytes() for t in tensors]
            given = [t.untyped_storage()._cdata for t in _tensors(args)]
            alone = len({*places, *given}) == len(places) + len({*given})
            sound = alone and held == [one.bytes for one in layouts if one]
        if sound:
            self._known[key] = type(out)(layouts) if many else layouts[0]


def _layout(tensor: Tensor, first: Tensor | None) -> Layout:
    apart = None if first is None else int(tensor.storage_offset() - first.storage_offset())
    return Layout(tensor.shape, tensor.stride(), tensor.dtype, apart)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _is_suited(func: Any, *, views: bool) -> bool:
    if not isinstance(func, OpOverload) or _BY_VALUE & {*func.tags}:
        return False
    returns = func._schema.returns
    if func.is_view:  # the offset of as_strided is not from that of its argument
        return views and func is not torch.ops.aten.as_strided.default
    fresh = [str(one.type) == "Tensor" and not one.alias_info for one in returns]
    return all(fresh) and bool(fresh) and not func._schema.is_mutable
