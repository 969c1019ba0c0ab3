"""Real parts that do nothing, registered through real hooks; pytest's `pythonpath` finds this."""

from __future__ import annotations

from types import SimpleNamespace

import attrs

from e2ediff import hookimpl
from e2ediff.host.registry import KINDS

CONTRACTS = {plural: contract for plural, _, contract in KINDS}


def part(plural, **fields):
    """A part with options `name=(type, default or attrs.field())`; its methods do nothing."""
    contract = CONTRACTS[plural]
    body = {name: lambda self, *args: None for name in contract.__abstractmethods__}
    body["__annotations__"] = {name: hint for name, (hint, _) in fields.items()}
    body |= {name: default for name, (_, default) in fields.items()}
    return attrs.frozen(kw_only=True)(type("Tiny", (contract,), body))


def plugin(name, **parts):
    """A plugin that registers `plural=[(name, class), ...]`."""

    def hook(entries):
        def register(add):
            for entry in entries:
                add(*entry)

        return hookimpl(register)

    hooks = {f"register_{plural}": hook(entries) for plural, entries in parts.items()}
    return SimpleNamespace(__name__=name, **hooks)
