"""Advice that works as printed: how a plugin is installed that lies in a folder."""

from __future__ import annotations

import ast
import itertools
import os
import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest
from command_line import e2ediff, needs
from e2ediff_testing.scaffold import write_plugin
from packaging.requirements import Requirement
from tiny_recipe import tiny

import e2ediff as package
from e2ediff.cli import group
from e2ediff.host.checkout import pip_install, uninstalled_plugins

ROOT = Path(__file__).parents[2]
# click's, git's, docker's, and variables of a report's style
FOREIGN = {"--help", "--no-optional-locks", "--porcelain", "--shm-size"}
FOREIGN |= {"--list", "--name-only", "--show-scope", "--ignore-submodules"}
FOREIGN |= {"--ink", "--soft", "--line"}
NO_INDEX = (
    "in the folder that contains it; plugins of e2ediff itself are in plugins/ of its "
    "repository, and on no package index"
)
OURS = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of somebody else's: a recipe, and a plugin that is not installed."""
    write_plugin("objective", "my_way", str(tmp_path / "plugins" / "e2ediff-my-way"))
    (tmp_path / "recipes").mkdir()
    (tmp_path / "tiny.yaml").write_text(tiny())
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Paths, as pip takes them


def test_a_path_that_pip_would_misread_is_given_as_it_takes_it() -> None:
    assert pip_install("/a;b") == "pip install file:///a%3Bb"
    assert pip_install(".") == "pip install ."
    assert pip_install("~/x") == "pip install './~/x'"


# Plugins that are not installed


def test_a_required_plugin_that_lies_beside_is_named_with_its_folder(place) -> None:
    """From the folder of the checkout, from one below, and from elsewhere by the recipe's."""
    text = tiny(requires='["e2ediff-my-way>=0.1"]', objective="my_way")
    (place / "recipes" / "mine.yaml").write_text(text)
    line = "requires.0: e2ediff-my-way is not installed. Run: pip install "
    (place / "elsewhere").mkdir()
    for here, recipe, shown in (
        (place, "recipes/mine.yaml", "plugins/e2ediff-my-way"),
        (place / "recipes", "mine.yaml", f"{place}/plugins/e2ediff-my-way"),
        (Path("/"), place / "recipes" / "mine.yaml", None),
    ):
        os.chdir(here)
        done = e2ediff("check", recipe)
        shown = shown or str(place / "plugins/e2ediff-my-way").lstrip("/")
        assert done.code == 3
        (found,) = done.err.splitlines()[1:]
        assert found.endswith(f"{line}{shown}")
        folder = Path(shlex.split(found)[-1])
        assert (folder / "pyproject.toml").exists(), "as pip takes it from here"


def test_another_version_than_the_one_that_lies_beside_is_not_promised(place) -> None:
    (place / "mine.yaml").write_text(tiny(requires='["e2ediff-my-way>=2"]'))
    done = e2ediff("check", "mine.yaml")
    assert done.err.endswith(f"is not installed. Run: pip install ./e2ediff-my-way {NO_INDEX}\n")


def test_a_plugin_that_lies_nowhere_near_is_not_left_to_a_package_index(place) -> None:
    """An index may have somebody else's package of that name; other packages are an index's."""
    for wanted, way in (
        ("e2ediff-of-nobody", f"pip install ./e2ediff-of-nobody {NO_INDEX}"),
        ("E2EDiff_of.nobody>=1,<2", f"pip install ./e2ediff-of-nobody {NO_INDEX}"),
        ("a-package-of-nobody>=2", "pip install 'a-package-of-nobody>=2'"),
    ):
        (place / "mine.yaml").write_text(tiny(requires=f"['{wanted}']"))
        done = e2ediff("check", "mine.yaml")
        assert done.code == 3
        assert done.err.endswith(f" is not installed. Run: {way}\n")


def test_a_plugin_just_made_is_named_with_its_folder(tmp_path, monkeypatch) -> None:
    """`plugins new` makes it in the current folder, and prints the same line."""
    monkeypatch.chdir(tmp_path)
    made = e2ediff("plugins", "new", "our_way", "--kind", "objective")
    assert made.err.startswith("next: pip install ./e2ediff-our-way && ")
    (tmp_path / "mine.yaml").write_text(tiny(requires='["e2ediff-our-way"]', objective="our_way"))
    done = e2ediff("check", "mine.yaml")
    assert done.err.endswith(
        "e2ediff-our-way is not installed. Run: pip install ./e2ediff-our-way\n"
    )
    done = e2ediff("check", "mine.yaml", "--set", "requires=[]")
    assert done.err.endswith("Run: pip install ./e2ediff-our-way\n")


def advised() -> dict[str, list[str]]:
    """What every `pip install` of this repository's texts installs, by where it is written."""
    texts = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    texts += [
        path
        for folder in ("e2ediff", "plugins", "benchmarks", "recipes")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".md", ".txt", ".yaml", ".jinja") and "tests" not in path.parts
    ]
    found = {}
    for path in texts:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for words in re.findall(r"pip install ([^`&)#]+)", line):
                if "{" not in words:  # an f-string, whose text other tests read
                    place = f"{path.relative_to(ROOT)}:{number}"
                    found[place] = words.strip(" \"'$").replace('"', "").split()
    return found


def test_every_printed_install_line_takes_ours_from_a_folder_and_others_from_an_index() -> None:
    """Ours are on no index; others are those that the projects name, or a file system's."""
    declared = {"gcsfs", "huggingface_hub", "dinov2"}  # of fsspec, and of a test that is skipped
    declared |= {"timm", "einops"}  # which the checkouts import that benchmarks/parity.py takes
    for project in (ROOT / "pyproject.toml", *ROOT.glob("plugins/*/pyproject.toml")):
        table = tomllib.loads(project.read_text())["project"]
        extras = table.get("optional-dependencies", {}).values()
        for line in (*table.get("dependencies", ()), *(line for e in extras for line in e)):
            declared.add(Requirement(line).name)
    wrong = []
    lines = advised()
    for place, words in lines.items():
        limits = {after for word, after in itertools.pairwise(words) if word == "-c"}
        targets = [w for w in words if not w.startswith("-") and w not in limits]
        for target in targets:
            name = re.split(r"[=<>\[;]", target)[0].rstrip(".,:")
            is_path = "/" in target or target.startswith(".") or target == "FOLDER"
            if not is_path and (name not in declared or name.startswith("e2ediff")):
                wrong.append(f"{place}: {target}")
    assert wrong == []
    assert len(lines) > 30


def test_a_part_of_a_plugin_that_lies_beside_is_named_with_its_folder(place) -> None:
    """For its own kind alone."""
    done = e2ediff("check", "tiny.yaml", "--set", "objective=my_way")
    assert done.code == 3
    assert done.err.endswith(
        " e2ediff-my-way provides it but is not installed. "
        "Run: pip install plugins/e2ediff-my-way\n"
    )
    done = e2ediff("check", "tiny.yaml", "--set", "sampler=my_way")
    assert "provides it" not in done.err


@needs("e2ediff-data")
def test_a_plugin_that_lies_beside_is_named_where_data_are_not_recognised(place) -> None:
    write_plugin("source", "my_files", str(place / "plugins" / "e2ediff-my-files"))
    Path("x.mine").touch()
    for address in ("x.mine", "nowhere.mine"):
        done = e2ediff("data", "check", address)
        assert done.code == 5
        said = " e2ediff-my-files reads my_files and is not installed. Run: pip install "
        assert f"{said}plugins/e2ediff-my-files" in done.err
        assert "e2ediff-my-way" not in done.err


@pytest.mark.parametrize("words", [("info", "my_way"), ("check", "e2ediff-my-way")])
def test_a_command_about_a_plugin_that_lies_beside_names_its_folder(place, words) -> None:
    done = e2ediff("plugins", *words)
    assert done.code == 4
    assert done.err.endswith("Run: pip install plugins/e2ediff-my-way\n")


def test_what_lies_beside_is_read_and_not_run(place) -> None:
    """Nor does a damaged project keep the others from being found."""
    module = place / "plugins/e2ediff-my-way/e2ediff_my_way.py"
    module.write_text(f"{module.read_text()}\nopen('ran', 'w')\n")
    for i, text in enumerate(["", "[", "[project]\nname = 1\n", "\0"]):
        (place / f"plugins/bad{i}").mkdir()
        (place / f"plugins/bad{i}/pyproject.toml").write_text(text)
    (found,) = [one for one in uninstalled_plugins() if one.folder.is_relative_to(place)]
    assert found.parts("objectives") == ["my_way"]
    assert found.parts("sources") == []
    assert found.satisfies(Requirement("e2ediff_my.way==0.1.0"))
    assert not (place / "ran").exists()


@pytest.mark.parametrize("folder", OURS, ids=lambda path: path.name)
def test_every_part_and_command_of_our_plugins_is_found_by_its_name(
    folder, monkeypatch, host
) -> None:
    """As it would be where they are not installed."""
    from importlib import metadata

    found_before = metadata.distribution

    def distribution(name: str) -> metadata.Distribution:
        if name.startswith("e2ediff-"):
            raise metadata.PackageNotFoundError(name)
        return found_before(name)

    monkeypatch.setattr(metadata, "distribution", distribution)
    monkeypatch.chdir(ROOT)
    (found,) = [one for one in uninstalled_plugins() if one.folder == folder]
    assert found.install == f"pip install plugins/{folder.name}"
    parts = [
        (registry.plural, part.name)
        for registry in host.registries.values()
        for part in registry
        if part.plugin.distribution == folder.name
    ]
    commands = host.commands.items()
    parts += [("commands", name) for name, (_, p) in commands if p.distribution == folder.name]
    if not parts:
        pytest.skip(f"needs `pip install plugins/{folder.name}`")
    assert [one for one in parts if one[1] not in found.parts(one[0])] == []


# All messages


@needs("e2ediff-data")
def test_every_command_and_option_that_a_message_advises_exists() -> None:
    """Words after `e2ediff` are commands, and options are those of some command.

    Commands of our plugins count, installed or not; messages of those installed are read too.
    """
    options, commands = set[str](), set[str]()

    def walk(command: click.Command, words: str) -> None:
        commands.add(words)
        for option in command.params:
            options.update([*option.opts, *option.secondary_opts])
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                found = command.get_command(context, name)
                assert found is not None
                walk(found, f"{words} {name}")

    walk(group, "e2ediff")
    texts = [*Path(package.__file__).parent.rglob("*.py")]
    for folder in OURS:
        hook = folder / folder.name.replace("-", "_") / "__init__.py"
        added = {f"e2ediff {name}" for name in commands_added(hook)}
        texts += hook.parent.rglob("*.py") if added and added <= commands else []
        commands |= added
    assert "e2ediff plan" in commands
    wrong = []
    for path in texts:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                continue
            for words in re.findall(
                r"`e2ediff ([a-z]+(?: (?:prepare|check|stats|new|list))?)", node.value
            ):
                if f"e2ediff {words}" not in commands:
                    wrong.append((path.name, words))
            for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", node.value):
                if option not in options | FOREIGN:
                    wrong.append((path.name, option))
    assert wrong == []


def commands_added(hook: Path) -> list[str]:
    """Names that a plugin's source gives to `add("commands", ...)`."""
    text = hook.read_text(encoding="utf-8") if hook.exists() else ""
    return re.findall(r'add\("commands", "([a-z]+)"', text)
