"""Count FLOPs of what is computed on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from e2ediff.step.shapes import Key, Layout, Shapes


class FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts, inside `with`, what torch's FlopCounterMode counts, by its formulas, in `total`.

    A call that was seen before, on tensors of the same shapes, is answered from memory, in
    microseconds where the kernels of the meta device, which are Python, take a tenth of a
    millisecond.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self._shapes = Shapes()
        self._flops: dict[Key, int] = {}
        self._composed: dict[Any, bool] = {}

    @property
    def remembered(self) -> int:
        """Return the number of calls in memory, each of which was computed once."""
        return len(self._flops)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket)
        if formula is None and self._composed.get(func, True):
            with self:
                made = func.decompose(*args, **kwargs)
            self._composed[func] = made is not NotImplemented
            if made is not NotImplemented:
                return made
        key = self._shapes.key(func, args, kwargs)
        if key and (known := self._shapes.recall(key, Layout.blank)) is not None:
            self.total += self._flops[key]
            return known
        out = func(*args, **kwargs)
        flops = formula(*args, **kwargs, out_val=out) if formula else 0
        self.total += flops
        if key:
            self._shapes.learn(key, out, args)
            self._flops[key] = flops
        return out
