"""The public names are those of the committed list; a change of one is a decision, not a slip.

After a deliberate change: `python tests/docs/test_public_names.py`, and a line in the changelog.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import attrs
import click

import e2ediff
from e2ediff.cli import group
from e2ediff.host.plugins import load

LIST = Path(__file__).with_name("public_names.txt")
ROOT = Path(e2ediff.__file__).parent
CONTRACTS = sorted(
    f"e2ediff.{path.stem}" for path in ROOT.glob("*.py") if not path.stem.startswith("_")
)
PAGES = Path(__file__).parents[2] / "docs" / "reference"
ROOMS = sorted(
    f"e2ediff.{room}.{path.stem}"
    for room in ("files", "nn")
    for path in (ROOT / room).glob("[a-z]*.py")
)
MODULES = ["e2ediff", *CONTRACTS, *ROOMS, "e2ediff.host.hookspecs", "e2ediff_testing.checks"]


def public_names() -> list[str]:
    """A line for each public name.

    Functions and methods with their arguments, classes with their fields and attributes, type
    aliases with what they stand for, commands with their options, exit codes, variables.
    """
    names = [line.replace(".checks.", ".", 1) if line.startswith("e2ediff_testing") else line
             for name in MODULES for line in _module(name)]  # fmt: skip
    return [*names, *_command(group, "$ e2ediff"), *_exit_codes(), *_variables()]


def _module(name: str) -> Iterator[str]:
    module = importlib.import_module(name)
    chosen = getattr(module, "__all__", None)
    imported = _imported(Path(module.__file__ or ""))
    for key, value in sorted(vars(module).items()):
        own = getattr(value, "__module__", name) == name
        constant = key.isupper() and key not in imported
        simple = inspect.isclass(value) or inspect.isfunction(value) or constant
        if (key in chosen) if chosen else (own and simple and not key.startswith("_")):
            yield from _thing(f"{name}.{key}", value)
    yield from _aliases(name, Path(module.__file__ or ""))
    if name == "e2ediff":
        yield from (f"{name}.{key}" for key in ("__version__", "hookimpl"))


def _imported(file: Path) -> set[str]:
    """Names that a module has from others; a constant is listed where it is defined."""
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return {a.asname or a.name for n in nodes if isinstance(n, ast.ImportFrom) for a in n.names}


def _thing(name: str, value: object) -> Iterator[str]:
    if inspect.isclass(value):
        fields = [f.alias for f in attrs.fields(value) if f.init] if attrs.has(value) else []
        fields = fields or getattr(value, "_fields", ())  # of a named tuple
        yield f"{name}({', '.join(fields)})" if fields else name
        yield from _attributes(name, value)
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


def _aliases(name: str, file: Path) -> Iterator[str]:
    """Types that a module gives a name: `Kind = Literal['x0', 'eps', 'v', 'score']`."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            alias = node.targets[0].id
            if re.fullmatch(r"[A-Z]\w*[a-z]\w*", alias):
                yield f"{name}.{alias} = {ast.unparse(node.value)}"


def _attributes(name: str, cls: type) -> Iterator[str]:
    """What a class declares besides fields: `phases: ClassVar[tuple[str, ...]] = ('joint',)`."""
    fields = {f.name for f in attrs.fields(cls)} if attrs.has(cls) else getattr(cls, "_fields", ())
    for key, hint in inspect.get_annotations(cls).items():
        if key not in fields and not key.startswith("_"):
            default = f" = {vars(cls)[key]!r}" if key in vars(cls) else ""
            yield f"{name}.{key}: {hint}{default}"
    if "exit_code" in vars(cls) and "exit_code" not in inspect.get_annotations(cls):
        yield f"{name}.exit_code = {vars(cls)['exit_code']}"


def _command(command: click.Command, words: str) -> Iterator[str]:
    """A command with its arguments, a line for each option, and its subcommands.

    Of plugins' commands, those of the kit for authors alone.
    """
    context = click.Context(command)
    given = [p for p in command.params if isinstance(p, click.Argument)]
    yield " ".join([words, *(p.metavar or str(p.name).upper() for p in given)])
    for option in command.params:
        if isinstance(option, click.Option):
            taken = "" if option.is_flag else f" {_taken(option)}"
            several = " ..." if option.multiple else ""
            must = " (required)" if option.required else ""
            names = "/".join([*option.opts, *option.secondary_opts])
            yield f"{words} {names}{taken}{several}{must}"
    if isinstance(command, click.Group):
        added = {n for n, (_, owner) in load().commands.items() if owner.name != "testing_kit"}
        for name in command.list_commands(context):
            if f"{words} {name}".removeprefix("$ e2ediff ") in added:
                continue
            found = command.get_command(context, name)
            assert found is not None
            yield from _command(found, f"{words} {name}")


def _taken(option: click.Option) -> str:
    """What an option takes."""
    if isinstance(option.type, click.Choice):
        return f"[{'|'.join(map(str, option.type.choices))}]"
    return option.metavar or option.type.name.upper()


def _exit_codes() -> Iterator[str]:
    page = (PAGES / "exit-codes.md").read_text(encoding="utf-8")
    yield from (f"exit code {code}" for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE))


def _variables() -> Iterator[str]:
    """The environment variables that the code reads."""
    texts = [path.read_text(encoding="utf-8") for path in ROOT.rglob("*.py")]
    found = {word for text in texts for word in re.findall(r"\bE2EDIFF_[A-Z_]+\b", text)}
    yield from (f"variable {name}" for name in sorted(found))


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
        "e2ediff.host.hookspecs.register(add)",
        "e2ediff_testing.check_objective(objective, backbone=None)",
        "e2ediff.latent.LatentContract(tokens, dim, norm, grid, statistics, scale, time)",
        "e2ediff.load(run, **options)",
        "e2ediff.interpolant.Kind = Literal['x0', 'eps', 'v', 'score']",
        "e2ediff.objective.Objective.phases: ClassVar[tuple[str, ...]] = ('joint',)",
        "e2ediff.backbone.Backbone.denoiser_apart: bool = False",
        "e2ediff.errors.PluginError.exit_code = 4",
        "$ e2ediff run RECIPE|RUN",
        "$ e2ediff plugins new --kind TEXT (required)",
        "exit code 75",
        "variable E2EDIFF_CACHE",
    ):
        assert f"{name}\n" in listed


def test_the_page_on_stability_names_every_variable() -> None:
    page = (PAGES / "stable-api.md").read_text(encoding="utf-8")
    assert [v for v in _variables() if f"`{v.removeprefix('variable ')}`" not in page] == []


if __name__ == "__main__":
    LIST.write_text("\n".join(public_names()) + "\n", encoding="utf-8")
