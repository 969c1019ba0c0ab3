"""Whatever takes an address as text takes it as a path too, and does the same."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from command_line import needs, trained
from PIL import Image
from tiny_recipe import tiny

import e2ediff
from e2ediff import addresses
from e2ediff.ablate.group import Group
from e2ediff.ablate.plan import plan_ablation
from e2ediff.evaluate.conventions import CONVENTIONS
from e2ediff.evaluate.evaluate import evaluate
from e2ediff.evaluate.images import FolderImages, NpzImages, file_sha256
from e2ediff.evaluate.passport import read_card, write_card
from e2ediff.evaluate.ranking import cards_of
from e2ediff.evaluate.reference import npz_keys, open_reference
from e2ediff.evaluate.request import Request
from e2ediff.evaluate.subject import stored_subject
from e2ediff.features import read_file, read_weights
from e2ediff.files.labels import read_labels
from e2ediff.files.location import Location, find_files
from e2ediff.guidance import Reference
from e2ediff.host.plugins import Host, load
from e2ediff.host.recipe import load_recipe
from e2ediff.host.registry import options
from e2ediff.parts.sources.own_images import list_images, read_images
from e2ediff.report.gather import gather, gather_runs, read_run
from e2ediff.report.write import write_report
from e2ediff.sample.load import ModelRef, load_model
from e2ediff.sample.pipeline import Pipeline
from e2ediff.sample.request import SampleRequest
from e2ediff.sample.sample_set import make_set
from e2ediff.store.known_runs import own_recipe
from e2ediff.store.run_directory import RunDirectory, is_run
from e2ediff.store.storage import Store
from e2ediff.train.continuation import continue_command
from e2ediff.train.progress import Progress
from e2ediff.train.session import train

TINY = tiny(steps="2", guidance="null")
PAIRS = np.arange(2 * 16 * 16 * 3, dtype=np.uint8).reshape(2, 16, 16, 3)


class Pathlike:
    """A path of another library's."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


FORMS = {"path": Path, "path-like": Pathlike}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, images, labels, weights, an npz."""
    place = tmp_path_factory.mktemp("paths")
    trained(place, TINY)
    for name, pixels in zip("ab", PAIRS, strict=True):
        (place / f"images/{name}").mkdir(parents=True)
        Image.fromarray(pixels).save(place / f"images/{name}/0.png")
    (place / "labels.csv").write_text("a/0.png a\nb/0.png b\n")
    np.savez(place / "set.npz", arr_0=PAIRS)
    torch.save({"x": torch.ones(1)}, place / "weights.pt")
    return place


HOST = load()
READERS: dict[str, Callable[[Callable[[str], addresses.Address]], object]] = {
    "e2ediff.load": lambda at: e2ediff.load(at("run")).sample([1]).tolist(),
    "e2ediff.pipeline": lambda at: e2ediff.pipeline(at("run")).model.origin,
    "load_model": lambda at: load_model(at("run")).origin,
    "Pipeline.from_run": lambda at: Pipeline.from_run(at("run")).model.origin,
    "RunDirectory.open": lambda at: RunDirectory.open(at("run")).path,
    "Store": lambda at: (Store(at("run")).url, Store(at("run")).list()),
    "load_recipe": lambda at: load_recipe(HOST, at("tiny.yaml")),
    "ablation": lambda at: plan_ablation(HOST, at("tiny.yaml"), ["batch=8,16"], "0").command(),
    "is_run": lambda at: (is_run(at("run")), is_run(at("images"))),
    "stored_subject": lambda at: stored_subject(at("images"), None).identity,
    "stored_subject of an npz": lambda at: stored_subject(at("set.npz"), None).identity,
    "FolderImages": lambda at: FolderImages(at("images")).files,
    "NpzImages": lambda at: (NpzImages(at("set.npz")).place, NpzImages(at("set.npz")).shape),
    "file_sha256": lambda at: file_sha256(at("set.npz")),
    "npz_keys": lambda at: npz_keys(at("set.npz")),
    "open_reference": lambda at: open_reference(at("set.npz"), HOST, None).place,
        "list_images": lambda at: list_images([at("images"), at("images/a/0.png")]),
    "read_images": lambda at: read_images(
        [at("images/a/0.png")], e2ediff.load(at("run")).recipe.data.image
    ).tolist(),
    "read_labels": lambda at: read_labels(at("labels.csv")),
    "Location": lambda at: (Location(at("images"), "data.root").url, Location(at("x"), "y").path),
    "find_files": lambda at: find_files(at("images/{a,b}/*.png"), "data.path", ".png")[1],
    "read_file": lambda at: read_file(at("weights.pt")),
    "read_weights": lambda at: read_weights(at("weights.pt"))[1],
    "gather": lambda at: gather(HOST, at("run")).place,
    "gather_runs": lambda at: gather_runs(HOST, [at("run"), at("run")]).command,
    "own_recipe": lambda at: own_recipe(at("run")),
    "continue_command": lambda at: continue_command(at("run")),
    "Reference": lambda at: Reference(run=at("run")).run,
    "read_run": lambda at: read_run(HOST, at("run"), "", {}).path,
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", READERS)
def test_what_reads_gives_the_same_for_text_and_paths(name: str, form: str, place: Path) -> None:
    read = READERS[name]
    text = read(lambda name: str(place / name))
    assert text == read(lambda name: FORMS[form](place / name))
    assert text


@pytest.mark.parametrize("form", FORMS)
def test_what_writes_takes_paths(form: str, place: Path, tmp_path: Path, host: Host) -> None:
    def at(name: str) -> addresses.Address:
        return FORMS[form](tmp_path / name)

    outcome = train(
        host, FORMS[form](place / "tiny.yaml"), (), at("run"), progress=Progress(io.StringIO())
    )
    assert outcome.path == str(tmp_path / "run")
    outcome = train(
        host,
        FORMS[form](place / "tiny.yaml"),
        (),
        at("run"),
        resume=True,
        progress=Progress(io.StringIO()),
    )
    assert outcome.exit_code == 0
    quiet = Progress(io.StringIO())
    assert train(host, None, (), at("run"), resume=True, progress=quiet).exit_code == 0
    RunDirectory.refuse_taken(at("free"))
    with RunDirectory.create(at("made"), "made", "", "", {}) as made:
        assert made.path == str(tmp_path / "made")
    request = SampleRequest(model=ModelRef(run=at("run")), out=at("set"), labels=(0, 1))
    assert make_set(request, host, say=print, update=print) == str(tmp_path / "set")
    assert (tmp_path / "set/images/000001.png").exists()
    written, _ = write_report(gather(host, at("run")), at("page.html"))
    assert os.path.samefile(written.html, tmp_path / "page.html")
    plan = plan_ablation(host, FORMS[form](place / "tiny.yaml"), ["batch=8,16"], "0")
    group = Group.create(at("group"), plan, {})
    assert group.path == Group.open(at("group")).path == str(tmp_path / "group")


@pytest.mark.parametrize("form", FORMS)
def test_scores_take_paths(form: str, place: Path, tmp_path: Path, host: Host) -> None:
    cls = host.registries["features"].find("random_projection")
    fid = host.registries["metrics"].find("fid")
    cards = []
    for at in (str, FORMS[form]):
        request = Request(
            target=ModelRef(run=at(place / "set.npz")),
            network=cls(width=4).build(),
            metrics=[fid()],
            conventions=[CONVENTIONS["adm"]],
            references={"": at(place / "images")},
            cache=at(tmp_path / "cache"),
        )
        (card,) = evaluate(host, request)
        cards.append(read_card(at(Path(write_card(at(tmp_path / "scores"), card)))))
    assert cards[0].scores == cards[1].scores != {}
    (found,) = cards_of(FORMS[form](tmp_path))
    assert found.scores == cards[0].scores
    assert cards[0].passport.digest == cards[1].passport.digest


@needs("e2ediff-data", "e2ediff-features", "e2ediff-sampling", "e2ediff-sources")
def test_every_option_that_holds_an_address_takes_a_path() -> None:
    seen = 0
    for plural in ("sources", "features", "guidance"):
        for part in load().registries[plural]:
            fields = {f.alias: f for f in attrs.fields(part.cls)}
            chosen = [n for n, f in fields.items() if f.validator is addresses.allowed]
            given = {n: "here" for n, o in options(part.cls).items() if o.required}
            given |= {"size": 28, "classes": 3} if plural == "sources" else {}
            given = {n: v for n, v in given.items() if n in fields}
            for name in chosen:
                assert getattr(part.cls(**{**given, name: Path("a/b")}), name) == "a/b"
                seen += 1
    assert seen > 20


@pytest.mark.parametrize("wrong", [3, None, b"runs/x", 2.5])
def test_what_is_no_address_is_a_type_error(wrong: object) -> None:
    with pytest.raises(TypeError):
        e2ediff.load(wrong)
