"""Addresses that a stranger wrote are refused before anything at them is opened."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path

import attrs
import fsspec
import pytest
from command_line import e2ediff, needs, trained
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from tiny_recipe import tiny

from e2ediff import addresses
from e2ediff.denoiser import Denoiser
from e2ediff.errors import DataError, RecipeError, RunDirectoryError
from e2ediff.features import read_weights
from e2ediff.files.location import find_files
from e2ediff.guidance import Guidance, Reference
from e2ediff.host.plugins import load
from e2ediff.host.recipe import parse_recipe
from e2ediff.host.registry import options
from e2ediff.model.build import guidance_problems
from e2ediff.sample.load import load_model, recipe_of
from e2ediff.store.storage import Store

# Of core alone: the default network needs an extra.
FEATURES = ("--features", "random_projection")
pytestmark = needs("e2ediff-sampling")
TINY = tiny(steps="2", guidance="{name: autoguidance, scale: 2}")

# None of them may be opened for a file; `watched` is a protocol that a package registered.
STRANGE = [
    "watched://x",
    "reference://watched://x",
    "reference://::watched://x",
    "simplecache::watched://x",
    "filecache::watched://x",
    "blockcache::watched://x",
    "dir::watched://x",
    "filecache::reference://::watched://x",
    "zip://x::watched://y.zip",
    "zip://::simplecache::memory://x.zip",
    "zip://::reference",
    "tar::reference://x",
    "zip::reference://x",
    "REFERENCE://x",
    " reference://x",
    "reference ://x",
    "generic://watched://x",
    "github://a:b@main/c",
    "ftp://host/x",
    "sftp://host/x",
    "ssh://host/x",
    "smb://host/x",
    "git://x",
    "dask::watched://x",
    "libarchive://x::watched://y",
    "data:,x",
    "nobody-knows://x",
    "file://::watched://x",
    "memory::watched://x",
    "a/b::watched://x",
    "::watched://x",
]


@pytest.fixture
def seen() -> Iterator[list[str]]:
    """Uses of the protocol `watched`."""
    seen: list[str] = []

    class Watched(MemoryFileSystem):
        protocol = "watched"
        cachable = False

        def __init__(self, *args: object, **kwargs: object) -> None:
            seen.append("made")
            super().__init__(*args, **kwargs)

    fsspec.register_implementation("watched", Watched, clobber=True)
    yield seen
    import_module("fsspec.registry")._registry.pop("watched")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("addresses"), TINY)


@pytest.fixture
def run(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "run")
    return "run"


def write(key: str, value: object) -> int:
    """Put a value into a run's recipe, as who made the run could; returns its line."""
    path, block = Path("run/resolved.yaml"), rf"(?m)^{key}:.*\n(?:[ -].*\n)*"
    text = path.read_text()
    assert re.search(block, text)
    text = re.sub(block, lambda found: f"{key}: {json.dumps(value)}\n", text)
    path.write_text(text)
    return text[: text.index(f"\n{key}: ")].count("\n") + 2


def guided(address: str) -> dict[str, object]:
    return {"name": "autoguidance", "scale": 2.0, "run": address}


# Whose guidance is another run


@pytest.mark.parametrize("address", STRANGE)
def test_a_run_that_guides_by_a_strange_address_is_refused_unopened(
    run: str, seen: list[str], address: str
) -> None:
    line = write("guidance", guided(address))
    for words in (
        ("sample", run),
        ("interpolate", run, "--seeds", 1, 2),
        ("eval", run, *FEATURES),
    ):
        done = e2ediff(*words)
        assert done.code == 3, done
        assert f"run/resolved.yaml:{line}:" in done.err
        assert "guidance.run: " in done.err
        assert "protocol" in done.err
        assert done.err.count("\n") == 2
    assert seen == []


@pytest.mark.parametrize("block", [
    {"name": "interval", "guidance": guided("watched://x")},
    {"name": "chain", "parts": [{"name": "classifier_free"}, guided("watched://x")]},
    {"name": "chain", "parts": [{"name": "interval", "guidance": guided("watched://x")}]},
])  # fmt: skip
def test_so_it_is_however_deep_in_the_guidance_it_lies(
    run: str, seen: list[str], block: Mapping[str, object]
) -> None:
    write("guidance", block)
    done = e2ediff("sample", run)
    assert done.code == 3
    assert "protocol 'watched' is not allowed here" in done.err
    assert seen == []


def test_the_message_names_file_key_protocol_and_what_to_do(run: str) -> None:
    write("guidance", guided("ftp://host/x"))
    (_, line) = e2ediff("sample", run).err.splitlines()
    place, said = line.strip().split(" ", 1)
    assert place.startswith("run/resolved.yaml:")
    assert said == (
        "guidance.run: protocol 'ftp' is not allowed here; expected a path, or file, local, "
        "memory, http, https, s3, s3a, gs, gcs, az, abfs, abfss, hf. Copy the files there, or "
        "allow it on this machine with E2EDIFF_PROTOCOLS=ftp."
    )
    write("guidance", guided("reference://::https://host/x.json"))
    assert (
        "protocol 'reference' is never opened: what lies there chooses which other places are "
        "read, and could run code. Copy the files to a folder or a store, and give its address."
    ) in e2ediff("sample", run).err


def test_the_advice_keeps_the_protocols_that_are_allowed_already(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("E2EDIFF_PROTOCOLS", "sftp, simplecache,")
    said = addresses.refusal("ftp://host/x")
    assert said.endswith("on this machine with E2EDIFF_PROTOCOLS=sftp,simplecache,ftp")
    monkeypatch.setenv("E2EDIFF_PROTOCOLS", "sftp,simplecache,ftp")
    assert addresses.refusal("ftp://host/x") == ""


def test_guidance_of_a_plugin_is_held_to_it_too(host, seen: list[str]) -> None:
    """Its option is plain text, of which nobody but its author knows that it is an address."""

    @attrs.frozen(kw_only=True)
    class Foreign(Guidance):
        other: str = "watched://x"

        @property
        def references(self) -> tuple[Reference, ...]:
            return (Reference(run=self.other),)

        def wrap(self, inner: Denoiser) -> Denoiser:
            return inner

    recipe = attrs.evolve(parse_recipe(host, TINY, "tiny"), guidance=Foreign())
    (problem,) = guidance_problems(recipe)
    assert str(problem).startswith("guidance.run: protocol 'watched' is not allowed here")
    assert seen == []


def test_a_user_may_allow_a_protocol_but_never_reference(
    run: str, seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("E2EDIFF_PROTOCOLS", "watched, reference,generic")
    write("guidance", guided("watched://x"))
    done = e2ediff("sample", run)
    assert done.code == 6
    assert "names other files to open: guidance ('watched://x')" in done.err
    assert seen == []
    done = e2ediff("sample", run, "--trust")
    assert done.code == 6
    assert "watched://x: not a run directory" in done.err
    assert seen
    for address in ("reference://::watched://x", "generic://watched://x"):
        assert "is never opened" in addresses.refusal(address)
        assert "is never opened" in addresses.refusal(address, typed=True)


def test_guidance_by_a_run_at_an_allowed_address_works_as_before(run: str) -> None:
    shutil.copytree("run", "other")
    for address in ("other", str(Path("other").absolute()), f"file://{Path('other').absolute()}"):
        write("guidance", guided(address))
        done = e2ediff("sample", run, "--count", 1, "--overwrite", "--trust")
        assert done.code == 0, done.err


# Options of parts that are addresses

NO_ADDRESSES = {
    "guidance": {"checkpoint", "weights"},
    "features": {"sha256", "title", "model"},
    "sources": {
        "inside", "label", "label_key", "image_suffix", "image_column", "label_column",
        "split", "background",
    },
}  # fmt: skip


def address_options() -> Iterator[tuple[str, str, str]]:
    """Kind, part and option of all text options, but for those that are known to be none."""
    for plural, registry in load().registries.items():
        if plural not in NO_ADDRESSES:
            continue
        for part in registry:
            for option in options(part.cls).values():
                if option.hint in (str, str | None) and option.name not in NO_ADDRESSES[plural]:
                    yield plural, part.name, option.name


def test_there_are_addresses_of_every_kind() -> None:
    found = [*address_options()]
    assert len(found) > 20
    assert {("guidance", "autoguidance", "run"), ("sources", "image_folder", "root"),
            ("sources", "image_folder", "held_out"), ("features", "torchvision", "weights"),
            ("features", "inception2015", "weights")} <= {*found}  # fmt: skip


@pytest.mark.parametrize(("kind", "part", "option"), [*address_options()])
def test_every_option_that_holds_an_address_refuses_strange_ones_with_its_line(
    host, seen: list[str], kind: str, part: str, option: str
) -> None:
    cls = host.registries[kind].find(part)
    for address in ("watched://x", "reference://::/x", "simplecache::s3://x", "nope://x"):
        given = {name: "here" for name, o in options(cls).items() if o.required}
        given |= {"size": 28, "classes": 3} if kind == "sources" else {}
        given = {name: value for name, value in given.items() if name in options(cls)}
        block = {"name": part, **given, option: address}
        key, value = {
            "guidance": ("guidance", block),
            "sources": ("data", block),
            "features": ("scores", {"every": 8, "features": block, "metrics": ["kid"]}),
        }[kind]
        text = tiny(**{key: json.dumps(value)})
        with pytest.raises(RecipeError) as caught:
            parse_recipe(host, text, "tiny.yaml")
        where = {"guidance": "guidance", "sources": "data", "features": "scores.features"}[kind]
        (problem,) = caught.value.problems
        assert problem.where == f"{where}.{option}"
        assert problem.line.startswith("tiny.yaml:")
        assert "protocol" in problem.what
    assert seen == []


def test_a_recipe_names_all_of_them_at_once(tmp_path: Path, seen: list[str]) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny(
        data="{name: image_folder, root: 'watched://x', held_out: 'nope://x', size: 16, "
        "classes: 2}",
        guidance="{name: autoguidance, run: 'dir::memory://x'}",
    ))  # fmt: skip
    for command in (("check", path), ("run", path, "--out", tmp_path / "run")):
        done = e2ediff(*command)
        assert done.code == 3
        for where in ("data.root", "data.held_out", "guidance.run"):
            assert f" {where}: protocol" in done.err
        assert "3 problems" in done.err
    assert not (tmp_path / "run").exists()
    assert seen == []


def test_an_assignment_on_the_command_line_is_named_as_such(run: str, seen: list[str]) -> None:
    done = e2ediff("sample", run, "--set", "guidance.run=watched://x")
    assert done.code == 3
    assert "--set 1: guidance.run: protocol 'watched' is not allowed here" in done.err
    assert seen == []


# Where no recipe is


def test_a_source_or_weights_in_python_are_refused_too(seen: list[str]) -> None:
    with pytest.raises(ValueError, match="protocol 'watched' is not allowed here"):
        load(entry_points=False).registries["sources"].find("image_folder")(
            root="watched://x", size=8, classes=1
        )
    with pytest.raises(DataError, match="protocol 'watched' is not allowed here"):
        read_weights("watched://x")
    assert seen == []


def test_a_pattern_cannot_spell_a_protocol(tmp_path: Path, seen: list[str]) -> None:
    """Braces are expanded after the recipe was read."""
    for pattern in ("watched:{/,x}/a.tar", "watched{:,x}//a.tar", "{watched:,x}//a.tar"):
        with pytest.raises(DataError, match=r"protocol|no file"):
            find_files(pattern, "data.path", ".tar")
    assert seen == []


# What a person types


def test_a_typed_address_may_have_any_protocol_but_reference(run: str, seen: list[str]) -> None:
    done = e2ediff("sample", run, "--set", "guidance=null", "--count", 1, "--out", "watched://x")
    assert (done.code, done.out) == (0, "watched://x\n"), done.err
    assert seen
    Store("simplecache::memory://x")
    for address in ("reference://::memory://x", "simplecache::reference://x", "REFERENCE://x"):
        for words in (
            ("sample", address), ("report", address), ("eval", address, *FEATURES),
            ("run", address),
            ("check", address), ("sample", run, "--set", "guidance=null", "--out", address),
            ("eval", run, "--reference", address, *FEATURES),
            ("reconstruct", run, "--out", address),
        ):  # fmt: skip
            done = e2ediff(*words)
            assert done.code in (3, 5, 6), (words, done)
            assert "is never opened" in done.err, (words, done)


def test_a_path_with_two_colons_is_refused_and_nothing_is_written_beside_it(run: str) -> None:
    """fsspec would have read it as a chain, and have written to `a`."""
    done = e2ediff("sample", run, "--set", "guidance=null", "--out", "a/b::c")
    assert done.code == 6
    assert "not known: 'a/b'; expected zip or tar before '::', or a path without it" in done.err
    assert not Path("a").exists()


def test_what_a_store_refuses_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError) as caught:
        Store(f"zip://::{tmp_path / 'none.zip'}")
    assert "cannot be used: FileNotFoundError" in str(caught.value)


def test_a_run_whose_data_have_a_strange_address_is_refused(run: str) -> None:
    """Though sampling would not open them: `eval` would, and weights of a width."""
    write("guidance", None)
    block = {"root": "simplecache::s3://x", "size": 16, "classes": 2}
    write("data", {"name": "image_folder", **block})
    with pytest.raises(RecipeError, match=r"data\.root: protocol 'simplecache' is not allowed"):
        load_model(run)


@pytest.mark.parametrize("address", [
    "runs/x", "/x", "x", "file:///x", "local://x", "memory://x", "http://h/x", "https://h/x",
    "s3://b/x", "s3a://b/x", "gs://b/x", "gcs://b/x", "az://b/x", "abfs://b/x", "abfss://b/x",
    "hf://datasets/a/b", "zip://::x.zip", "zip://in/side::https://h/x.zip", "zip::s3://b/x.zip",
    "tar://in::/x.tar", "zip://a::tar://b::memory://x", "x[1]/{a,b}.tar", "C:", "a:b", "",
])  # fmt: skip
def test_addresses_that_are_allowed_in_files(address: str) -> None:
    assert addresses.refusal(address) == ""
    assert addresses.refusal(address, typed=True) == ""


def test_a_recipe_keeps_its_allowed_addresses(host) -> None:
    text = tiny(data="{name: image_folder, root: 'zip://a::s3://b/x.zip', size: 16, classes: 2}")
    assert parse_recipe(host, text, "tiny").data.root == "zip://a::s3://b/x.zip"


def test_reading_the_recipe_is_enough(run: str, host, seen: list[str]) -> None:
    """What asks for a run's recipe alone, as `sample` does for its classes, is held to it."""
    from e2ediff.store.run_directory import RunDirectory

    write("guidance", guided("watched://x"))
    with pytest.raises(RecipeError):
        recipe_of(host, RunDirectory.open(run))
    assert seen == []


# Records that lie beside images


@pytest.fixture
def everything(seen: list[str]) -> Iterator[list[str]]:
    """Uses of `watched`, and of the protocols of the web too."""
    watched = fsspec.get_filesystem_class("watched")
    for protocol in ("http", "https"):
        fsspec.register_implementation(protocol, watched, clobber=True)
    yield seen
    for protocol in ("http", "https"):
        import_module("fsspec.registry")._registry.pop(protocol)


LED_AWAY = (
    "watched://x/a.png",
    "reference://::watched://x/a.png",
    "filecache::watched://x/a.png",
    "simplecache::https://host/a.png",
    "http://169.254.169.254/latest/a.png",
    "file://::watched://x/a.png",
    "zip://a.png::http://host/x.zip",
)


def replaced(value: object, address: str) -> object:
    """The same JSON with this address for every text in it, and keys that might name one."""
    if isinstance(value, dict):
        kept = {key: replaced(one, address) for key, one in value.items()}
        return kept | dict.fromkeys(("run", "path", "file", "source", "reference"), address)
    if isinstance(value, list):
        return [replaced(one, address) for one in value]
    return address if isinstance(value, str) else value


def test_the_records_of_a_set_lead_nowhere(run: str, everything: list[str]) -> None:
    words = ("--set", "guidance=null", "--count", 1, "--out", "set")
    assert e2ediff("sample", run, *words).code == 0
    records = {path: json.loads(path.read_text()) for path in Path("set").glob("*.json")}
    assert len(records) == 2
    score = ("eval", "set", *FEATURES, "--reference", "set", "--metrics", "kid", "--count", 8)
    for address in LED_AWAY:
        for path, content in records.items():
            path.write_text(json.dumps(replaced(content, address)))
        e2ediff(*score)
        e2ediff("reconstruct", run, "set", "--set", "guidance=null", "--out", "again")
        assert e2ediff("sample", run, *words).code in (0, 6)
    assert everything == []


def test_the_manifest_and_state_of_a_checkpoint_lead_nowhere(
    run: str, everything: list[str]
) -> None:
    (place,) = Path(run, "checkpoints").iterdir()
    records = {path: json.loads(path.read_text()) for path in place.glob("*.json")}
    for path, content in records.items():
        for address in LED_AWAY[:3]:
            path.write_text(json.dumps(replaced(content, address)))
            assert e2ediff("sample", run, "--set", "guidance=null").code == 6
        path.write_text(json.dumps(content))
    assert everything == []


def test_a_label_file_and_scores_lead_nowhere(tmp_path: Path, everything: list[str]) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (16, 16)).save(images / name)
    rows = "".join(f"{address},0\n" for address in LED_AWAY)
    (tmp_path / "labels.csv").write_text(f"a.png,0\nb.png,1\n{rows}")
    block = {"name": "image_folder", "root": str(images), "size": 16, "classes": 2}
    (tmp_path / "tiny.yaml").write_text(
        tiny(data=json.dumps({**block, "labels": str(tmp_path / "labels.csv")}))
    )
    assert e2ediff("run", tmp_path / "tiny.yaml", "--out", tmp_path / "out").code in (3, 5)
    score = {"value": 1.0, "error": None, "warnings": [], "metric": {}, "better": "low"}
    for address in LED_AWAY:
        section = {"network": address, "reference": address, address: address}
        passport = {"protocol": section, "subject": section, "machine": section}
        card = {"e2ediff_scores": 1, "passport": passport, "scores": {"fid": score}}
        for name in ("a", "b"):
            (tmp_path / f"{name}.json").write_text(json.dumps(card))
        assert e2ediff("compare", tmp_path / "a.json", tmp_path / "b.json").code == 0
    assert everything == []
