"""Real parts that do nothing, registered through real hooks; pytest's `pythonpath` finds this."""

from __future__ import annotations

from types import SimpleNamespace

import attrs

from e2ediff import hookimpl
from e2ediff.host.registry import contracts


def part(plural, **fields):
    """A part with options `name=(type, default or attrs.field())`; its methods do nothing."""
    contract = contracts()[plural]
    body = {name: lambda self, *args: None for name in contract.__abstractmethods__}
    body["__annotations__"] = {name: hint for name, (hint, _) in fields.items()}
    body |= {name: default for name, (_, default) in fields.items()}
    return attrs.frozen(kw_only=True)(type("Tiny", (contract,), body))


def plugin(name, **parts):
    """A plugin that registers `plural=[(name, class), ...]`."""

    @hookimpl
    def register(add):
        for plural, entries in parts.items():
            for entry in entries:
                add(plural, *entry)

    return SimpleNamespace(__name__=name, register=register)
