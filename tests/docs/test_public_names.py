"""The public names are those of the committed list; a change of one is a decision, not a slip.

After a deliberate change: `python tests/docs/test_public_names.py`, and a line in the changelog.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import attrs

import e2ediff

LIST = Path(__file__).with_name("public_names.txt")
ROOT = Path(e2ediff.__file__).parent
CONTRACTS = sorted(
    f"e2ediff.{path.stem}" for path in ROOT.glob("*.py") if not path.stem.startswith("_")
)
MODULES = ["e2ediff", *CONTRACTS, "e2ediff.host.hookspecs", "e2ediff.testing"]


def public_names() -> list[str]:
    """A line for each public name: functions and methods with their arguments, classes' fields."""
    return [line for name in MODULES for line in _module(name)]


def _module(name: str) -> Iterator[str]:
    module = importlib.import_module(name)
    chosen = getattr(module, "__all__", None)
    for key, value in sorted(vars(module).items()):
        own = getattr(value, "__module__", name) == name
        constant = key.isupper() and key != "TYPE_CHECKING"
        simple = inspect.isclass(value) or inspect.isfunction(value) or constant
        if (key in chosen) if chosen else (own and simple and not key.startswith("_")):
            yield from _thing(f"{name}.{key}", value)
    if name == "e2ediff":
        yield from (f"{name}.{key}" for key in ("__version__", "hookimpl"))


def _thing(name: str, value: object) -> Iterator[str]:
    if inspect.isclass(value):
        fields = [f.alias for f in attrs.fields(value)] if attrs.has(value) else []
        yield f"{name}({', '.join(fields)})" if fields else name
        for key, member in sorted(vars(value).items()):
            function = member.fget if isinstance(member, property) else member
            function = getattr(function, "__func__", getattr(function, "__wrapped__", function))
            if inspect.isfunction(function) and not key.startswith("_"):
                kind = "" if isinstance(member, property) else _arguments(function)
                yield f"{name}.{key}{kind}"
    elif inspect.isfunction(value):
        yield f"{name}{_arguments(value)}"
    else:
        yield name


def _arguments(function: object) -> str:
    found = inspect.signature(function).parameters.values()
    plain = [p.replace(annotation=p.empty) for p in found if p.name not in ("self", "cls")]
    return str(inspect.Signature(plain))


def test_the_public_names_are_those_of_the_list() -> None:
    listed, found = LIST.read_text(encoding="utf-8").splitlines(), public_names()
    gone = [name for name in listed if name not in found]
    new = [name for name in found if name not in listed]
    assert not gone, f"no longer there, or with other arguments: {gone}"
    assert not new, f"public, and not in {LIST.name}: {new}"


def test_every_public_name_can_be_imported_by_a_plugin() -> None:
    """The list holds what matters: contracts, hooks, checks."""
    listed = LIST.read_text(encoding="utf-8")
    for name in (
        "e2ediff.objective.Objective.terms(nets, batch, draw, phase)",
        "e2ediff.host.hookspecs.register_objectives(add)",
        "e2ediff.testing.check_objective(objective, backbone=None)",
        "e2ediff.latent.LatentContract(tokens, dim, norm, grid, statistics, scale, time)",
        "e2ediff.load(run, **options)",
    ):
        assert f"{name}\n" in listed


if __name__ == "__main__":
    LIST.write_text("\n".join(public_names()) + "\n", encoding="utf-8")
