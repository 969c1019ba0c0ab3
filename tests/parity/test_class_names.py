"""What a class was called in training is kept with the run, and is all that is asked later."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import attrs
import pytest
import torch
from command_line import Done, e2ediff, trained
from PIL import Image
from source_kinds import KINDS, make
from tiny_recipe import tiny

import e2ediff as package
from e2ediff.data import DataSource, ImageSpec
from e2ediff.errors import DataError
from e2ediff.host.plugins import load
from e2ediff.loading.bad_images import Skipping
from e2ediff.loading.classes import check_same_classes, empty_classes, other_name
from e2ediff.model.inference import Model
from e2ediff.model.labels import label_of, labels_of, without_images
from e2ediff.parts import sources
from e2ediff.sample.pipeline import Pipeline
from e2ediff.store.run_directory import RunDirectory
from e2ediff.train.continuation import class_names

pytestmark = pytest.mark.usefixtures("cache")

# Sorted as text these are 0, 1, 10, 2, 20: the class that is called 2 is number 3.
NUMBERS = {"0": "red", "1": "green", "10": "blue", "2": "yellow", "20": "white"}


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("E2EDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))


def write_folders(root: Path, names: dict[str, str]) -> Path:
    for name, colour in names.items():
        (root / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (16, 16), colour).save(root / name / f"{i}.png")
    return root


def recipe(root: Path, **lines: str) -> str:
    data = f"{{name: image_folder, root: {root}, size: 16, classes: 5, workers: 0}}"
    return tiny(**{"steps": "2", "data": data, **lines})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `data`, `tiny.yaml` and `run`."""
    place = tmp_path_factory.mktemp("names")
    write_folders(place / "data", NUMBERS)
    trained(place, recipe(place / "data"))
    return place


@pytest.fixture
def place(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run alone: its data are gone."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished / "run", "run")
    text = Path("run/resolved.yaml").read_text()
    Path("run/resolved.yaml").write_text(text.replace(str(finished / "data"), "/no/longer/there"))
    return tmp_path


def labels_drawn(*words: object) -> list[int]:
    done = e2ediff(
        "sample", "run", *words, "--count", 1, "--steps", 1, "--out", "s", "--overwrite"
    )
    assert done.code == 0, done.err
    return [entry["label"] for entry in json.loads(Path("s/samples.json").read_text())]


def refused(done: Done, code: int) -> str:
    assert (done.code, done.out) == (code, ""), done
    return done.err.partition("error: ")[2].strip()


# Sampling


def test_the_names_are_in_the_run_and_nowhere_else(place: Path) -> None:
    assert json.loads(Path("run/run.json").read_text())["class_names"] == [*NUMBERS]
    assert RunDirectory.open("run").class_names() == tuple(NUMBERS)
    assert package.load("run").image == ImageSpec(3, 16, 16, 5, tuple(NUMBERS))
    assert package.pipeline("run").labels == {"0": 0, "1": 1, "10": 2, "2": 3, "20": 4}


def test_a_name_that_is_the_index_of_another_class_is_refused_with_both_ways(place: Path) -> None:
    for words in (("sample", "run"), ("interpolate", "run", "--seeds", 1, 2)):
        assert refused(e2ediff(*words, "--label", 2), 5) == (
            "--label 2: is ambiguous. Write name:2 for class 3 (2) or index:2 for class 2 (10)."
        )
    assert labels_drawn("--label", "name:2", "--label", "index:2") == [3, 2]
    with pytest.raises(DataError, match=r"label 2: is ambiguous\. Write name:2"):
        package.load("run").sample(["2"])
    with pytest.raises(DataError, match="is ambiguous"):
        package.pipeline("run").get_label_ids("2")


def test_a_number_that_no_class_is_called_by_is_no_class_that_is_called_otherwise(place) -> None:
    assert refused(e2ediff("sample", "run", "--label", 3), 5) == (
        "--label 3: is ambiguous. Write index:3 for class 3 (2)."
    )


def test_names_that_mean_one_class_need_no_more(place: Path) -> None:
    assert labels_drawn("--label", 10, "--labels", "20, 1,0,none,name:10,index:4,0-1") == [
        2, 4, 1, 0, 5, 2, 4, 0, 1,
    ]  # fmt: skip
    assert labels_drawn("--labels", "all") == labels_drawn() == [0, 1, 2, 3, 4]


def test_images_of_a_name_are_those_of_its_index(place: Path) -> None:
    model = package.load("run")
    by_index = model.sample([3, 4, 5])
    assert torch.equal(model.sample(["name:2", "20", "index:none"]), by_index)
    assert not torch.equal(by_index[:1], model.sample([2]))
    assert torch.equal(
        model.interpolate((1, 2), "name:2", frames=2), model.interpolate((1, 2), 3, frames=2)
    )
    (x,) = package.pipeline("run")(["name:2"], output_type="pt").images
    assert torch.equal(x, (by_index[0] + 1) / 2)


def test_a_name_that_is_unknown_is_answered_with_those_of_the_run(place: Path) -> None:
    assert refused(e2ediff("sample", "run", "--label", "yellow"), 5) == (
        "--label yellow: no such class. Expected an index from 0 to 4 or one of 0, 1, 10, 2, 20, "
        "or 'none'."
    )


def test_a_run_from_before_names_were_kept_goes_by_indices(place: Path) -> None:
    record = json.loads(Path("run/run.json").read_text())
    del record["class_names"]
    Path("run/run.json").write_text(json.dumps(record))
    assert labels_drawn("--labels", "2,3,0-4") == [2, 3, 0, 1, 2, 3, 4]
    assert package.load("run").image.class_names == ()


@pytest.mark.parametrize("names", ["cat", {"0": 1}, [1, 2], None, [["a"]]])
def test_a_damaged_record_is_named(place: Path, names: object) -> None:
    record = json.loads(Path("run/run.json").read_text())
    Path("run/run.json").write_text(json.dumps({**record, "class_names": names}))
    assert refused(e2ediff("sample", "run"), 6).startswith(
        "run/run.json: class_names is not a list "
    )


def test_a_record_of_too_many_names_gives_no_class_that_the_network_lacks(place: Path) -> None:
    record = json.loads(Path("run/run.json").read_text())
    many = [f"c{k}" for k in range(50)]
    Path("run/run.json").write_text(json.dumps({**record, "class_names": many}))
    assert "no such class" in refused(e2ediff("sample", "run", "--label", "c7"), 5)
    assert labels_drawn("--label", "c4") == [4]


def test_a_report_lists_no_names_among_the_facts_of_the_machine(place: Path) -> None:
    assert e2ediff("report", "run", "--out", "page.html").code == 0
    text = Path("page.html").read_text()
    assert "python" in text
    assert "class_names</" not in text
    assert str([*NUMBERS]).replace("'", "&#34;") not in text


# What a text means


def spec(*names: str, classes: int | None = None) -> ImageSpec:
    return ImageSpec(3, 8, 8, len(names) if classes is None else classes, names)


@pytest.mark.parametrize(("text", "said"), [
    ("1-3", "index:FIRST-LAST for indices or the names"),
    ("3-4", "index:FIRST-LAST for indices or the names"),
    ("0-2", "index:FIRST-LAST for indices or the names"),
])  # fmt: skip
def test_a_range_over_classes_called_by_other_numbers_is_refused(text: str, said: str) -> None:
    with pytest.raises(DataError, match=f"--labels {text}: is ambiguous. Write {said}"):
        labels_of(spec(*NUMBERS), text)
    first, last = map(int, text.split("-"))
    assert labels_of(spec(*NUMBERS), f"index:{text}") == [*range(first, last + 1)]


def test_ranges_and_numbers_stay_where_names_and_indices_agree() -> None:
    hundred = spec(*sorted(str(k) for k in range(100)))
    assert labels_of(hundred, "0-99") == [*range(100)]
    padded = spec(*(f"{k:02}" for k in range(20)))
    assert labels_of(padded, "7,07,5-12") == [7, 7, *range(5, 13)]
    assert label_of(spec("cat", "dog"), "1") == 1
    assert labels_of(spec("cat", "dog"), "0-1") == [0, 1]


@pytest.mark.parametrize(("text", "ways"), [
    ("none", {"name:none": 2, "index:none": 4}),
    ("all", {"name:all": 1, "index:0-3": None}),
    ("0-9", {"name:0-9": 0, "index:0-9": None}),
])  # fmt: skip
def test_a_class_that_is_called_as_one_of_our_words_is_ambiguous(text: str, ways) -> None:
    image = spec("0-9", "all", "none", "dog")
    with pytest.raises(DataError) as caught:
        labels_of(image, text)
    for way, label in ways.items():
        assert f"{way} for " in str(caught.value) or str(caught.value).endswith(f"{way}.")
        if label is not None:
            assert labels_of(image, way) == [label]


def test_two_classes_of_one_name_are_told_apart_by_index() -> None:
    """ImageNet has two cranes, and two maillots, where classes are called by words."""
    with pytest.raises(DataError, match=r"Write index:0 for class 0 \(crane\) or index:2 for"):
        label_of(spec("crane", "dog", "crane"), "crane")


def test_names_that_a_stranger_chose_cannot_write_to_the_terminal() -> None:
    for text in ("cat", "\x1b[31mdo"):
        with pytest.raises(DataError) as caught:
            label_of(spec("\x1b[31mdog", "\u202edog"), text)
        assert str(caught.value).isprintable()


def test_of_many_names_a_message_has_the_first() -> None:
    with pytest.raises(DataError) as caught:
        label_of(spec(*(f"c{k}" for k in range(1000))), "dog")
    assert "c19, ... (1,000 in all), or 'none'." in str(caught.value)


def test_a_name_is_found_in_either_form_of_unicode() -> None:
    """File systems of Macs decompose what is typed composed."""
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    for known, typed in ((composed, decomposed), (decomposed, composed)):
        assert labels_of(spec("dog", known), f"{typed},name:{typed}") == [1, 1]
    with pytest.raises(DataError, match=r"Write index:0 for class 0 .* or index:1 for class 1"):
        label_of(spec(composed, decomposed), composed)


def test_no_class_stays_the_default_where_a_class_is_called_none() -> None:
    recipe = load_tiny("{name: synthetic, size: 16, count: 64}")
    plain = Model(recipe, recipe.backbone.build(recipe.data.image).eval(), rows=2)
    names = ("none", "dog", "crane", "crane", "all")
    named = attrs.evolve(plain, image=attrs.evolve(plain.image, class_names=names))
    nothing = plain.interpolate((1, 2), "none", frames=2)
    assert torch.equal(named.interpolate((1, 2), frames=2), nothing)
    assert torch.equal(named.interpolate((1, 2), "index:none", frames=2), nothing)
    assert torch.equal(named.interpolate((1, 2), "name:none", frames=2),
                       plain.interpolate((1, 2), 0, frames=2))  # fmt: skip
    assert torch.equal(named.sample(["all"]), plain.sample([4]))
    for ask in (
        lambda: named.interpolate((1, 2), "none"),
        lambda: named.sample(["none"]),
        lambda: Pipeline(named)("none"),
        lambda: Pipeline(named).get_label_ids(["none"]),
    ):
        with pytest.raises(DataError, match=r"none: is ambiguous\. Write name:none for class 0"):
            ask()
    assert Pipeline(named).labels == {"none": 0, "dog": 1, "all": 4}


# Classes without images


@pytest.fixture(scope="module")
def gapped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder of a run on images that are labelled from 1 and have no 3, and what it printed."""
    place = tmp_path_factory.mktemp("gapped")
    write_folders(place / "data", {"a": "red"})
    lines = [f"a/{i}.png {label}" for i, label in enumerate((1, 2, 1, 4))]
    (place / "labels.txt").write_text("\n".join(lines))
    data = (
        f"{{name: image_folder, root: {place}/data, labels: {place}/labels.txt, size: 16, "
        "classes: 5, workers: 0}"
    )
    (place / "tiny.yaml").write_text(tiny(steps="2", batch="4", data=data,
                                          probe="{images: 4, calibration: 4}"))  # fmt: skip
    done = e2ediff("run", place / "tiny.yaml", "--out", place / "run")
    assert done.code == 0, done.err
    return place, done.err


@pytest.fixture
def with_gaps(gapped: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(gapped[0] / "run", "run")
    return gapped[1]


def test_a_run_warns_of_classes_without_images_and_records_them(with_gaps: str, gapped) -> None:
    line = "warning: class 0, class 3 have no training images (2 of 5 classes)"
    assert with_gaps.count(line) == 1
    assert json.loads(Path("run/run.json").read_text())["empty_classes"] == [0, 3]
    events = [json.loads(line) for line in Path("run/events.jsonl").read_text().splitlines()]
    assert [e["classes"] for e in events if e["kind"] == "empty_classes"] == [[0, 3]]
    done = e2ediff("run", gapped[0] / "tiny.yaml", "--resume", "--out", "run", "--set", "steps=3")
    assert (done.code, done.err.count(line)) == (0, 1), done
    assert e2ediff("report", "run", "--out", "page.html").code == 0
    assert Path("page.html").read_text().count("empty_classes") == 2  # its events alone


def test_sampling_warns_of_those_that_it_draws(with_gaps: str, caplog) -> None:
    brief = ("--count", 1, "--steps", 1, "--out", "s", "--overwrite")
    for words, said in (
        ((), "class 0, class 3 have"),
        (("--labels", "all"), "class 0, class 3 have"),
        (("--labels", "1-3,none"), "class 3 has"),
        (("--label", 0), "class 0 has"),
        (("--labels", "1,2,4,none"), ""),
    ):
        done = e2ediff("sample", "run", *words, *brief)
        warned = [line for line in done.err.splitlines() if "no training images" in line]
        assert warned == [f"warning: {said} no training images"] * bool(said), words
    done = e2ediff("interpolate", "run", "--seeds", 1, 2, "--label", 3, "--frames", 2)
    assert "warning: class 3 has no training images\n" in done.err
    model = package.load("run")
    model.sample([1, 5])
    assert not any("no training images" in line for line in caplog.messages)
    model.sample([1, "3"])
    package.pipeline("run")(0)
    warned = [line for line in caplog.messages if "no training images" in line]
    assert warned == [f"class {k} has no training images" for k in (3, 0)]


def test_a_run_from_before_they_were_recorded_warns_of_none(with_gaps: str) -> None:
    record = json.loads(Path("run/run.json").read_text())
    del record["empty_classes"]
    Path("run/run.json").write_text(json.dumps(record))
    done = e2ediff("sample", "run", "--count", 1, "--steps", 1)
    assert (done.code, "no training images" in done.err) == (0, False)


@pytest.mark.parametrize("labels", ["cat", {"0": 1}, ["1"], [True], None])
def test_a_damaged_record_of_them_is_named(with_gaps: str, labels: object) -> None:
    record = json.loads(Path("run/run.json").read_text())
    Path("run/run.json").write_text(json.dumps({**record, "empty_classes": labels}))
    assert refused(e2ediff("sample", "run"), 6).startswith(
        "run/run.json: empty_classes is not a list of class numbers. "
    )


def test_they_are_found_without_reading_an_image() -> None:
    image = ImageSpec(3, 8, 8, 4)
    assert empty_classes(_Labelled([0, 2, 2]), image) == (1, 3)
    assert empty_classes(Skipping(_Labelled([0, 2, 2]), classes=True), image) == (1, 3)
    assert empty_classes(_Labelled([0, 1, 2, 3]), image) == ()
    assert empty_classes(_Labelled([0, 0]), ImageSpec(3, 8, 8, 0)) == ()
    assert empty_classes(_Unread(), image) == ()


class _Unread(DataSource):
    """A source that would have to read its images to find their labels."""

    def __len__(self) -> int:
        return 3

    def read(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("nothing is to be read")


class _Labelled(_Unread):
    def __init__(self, labels: Sequence[int], names: tuple[str, ...] = ()) -> None:
        self.known, self.names = torch.tensor(labels), names

    def labels(self) -> torch.Tensor:
        return self.known

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.names


def test_of_many_a_warning_has_the_first_with_their_names() -> None:
    image = attrs.evolve(spec(*(f"c{k}" for k in range(50))), empty_classes=(*range(1, 50),))
    said = without_images(image, range(50))
    assert said.startswith("class 1 (c1), class 2 (c2), ")
    assert said.endswith("class 20 (c20), ... (49 in all) have no training images")
    assert without_images(image, [0, 50]) == ""


# Going on


@pytest.fixture
def begun(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run, its recipe and its data, which may be changed."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished / "data", "data")
    shutil.copytree(finished / "run", "run")
    text = Path("run/resolved.yaml").read_text()
    Path("run/resolved.yaml").write_text(text.replace(str(finished / "data"), "data"))
    Path("tiny.yaml").write_text(recipe(Path("data"), steps="4"))
    return tmp_path


RESUME = ("run", "tiny.yaml", "--resume", "--out", "run")


def test_a_run_is_not_resumed_with_a_class_called_otherwise(begun: Path) -> None:
    """The labels are the same, so that nothing else would notice."""
    Path("data/2").rename("data/3")
    Path("data/3").rename("data/11")
    before = Path("run/metrics.jsonl").read_bytes(), Path("run/status.json").read_bytes()
    assert refused(e2ediff(*RESUME), 3).splitlines() == [
        "tiny.yaml (--resume): 1 problem",
        "  data: class 3 was called '2' in run, is '11' here. Give the images of the run, or "
        "start another run.",
    ]
    assert before == (
        Path("run/metrics.jsonl").read_bytes(), Path("run/status.json").read_bytes(),
    )  # fmt: skip


def test_nor_with_one_more(begun: Path) -> None:
    write_folders(Path("data"), {"3": "black"})
    assert "holds 6 class folders" in refused(e2ediff(*RESUME), 5)
    assert "data.classes: was 5 in run" in refused(e2ediff(*RESUME, "--set", "data.classes=6"), 3)


def test_nor_with_renamed_classes_elsewhere(begun: Path) -> None:
    shutil.copytree("data", "other")
    Path("other/20").rename("other/30")
    said = refused(e2ediff(*RESUME, "--set", "data.root=other"), 3)
    assert "data: class 4 was called '20' in run, is '30' here." in said


def test_nor_with_classes_that_a_file_of_labels_calls_otherwise_or_orders_otherwise(
    begun: Path,
) -> None:
    names = [*NUMBERS]
    for called, said in (
        (
            {name: f"c{name}" for name in names},
            "data: class 0 was called '0' in run, is 'c0' here",
        ),
        (dict(zip(names, (1, 0, 2, 3, 4), strict=True)), "training images have other labels or"),
    ):
        lines = [f"{n}/{i}.png,{called[n]}" for n in names for i in range(4)]
        Path("labels.csv").write_text("\n".join(lines))
        assert said in refused(e2ediff(*RESUME, "--set", "data.labels=labels.csv"), 3)


def test_names_in_another_form_of_unicode_are_the_same_names() -> None:
    composed, decomposed = ("caf\u00e9", "dog"), ("cafe\u0301", "dog")
    assert other_name(composed, decomposed) is None
    assert other_name(composed, ("cafe", "dog")) == (0, "caf\u00e9", "cafe")
    assert other_name((), composed) is other_name(composed, composed[:1]) is None


def test_held_out_images_of_other_classes_are_refused(begun: Path) -> None:
    """Their numbers would mean other classes in the probe and in scores."""
    shutil.copytree("data", "val")
    Path("val/2").rename("val/11")
    done = e2ediff("run", "tiny.yaml", "--out", "new", "--set", "data.held_out=val")
    assert refused(done, 5) == (
        "data: class 3 is '2' in the training images and '11' in the held-out ones; expected "
        "the same classes in both. Name them alike, or leave `data.held_out` away"
    )
    assert not Path("new").exists()
    check_same_classes(_Labelled([0], ("a",)), _Labelled([0]))


def test_it_is_resumed_with_the_same_names_elsewhere_and_with_numbers_for_them(
    begun: Path,
) -> None:
    Path("data").rename("other")
    assert e2ediff(*RESUME, "--set", "data.root=other").code == 0
    names = [*NUMBERS]
    lines = [f"{n}/{i}.png {names.index(n)}" for n in names for i in range(4)]
    Path("labels.txt").write_text("\n".join(lines))
    done = e2ediff(
        *RESUME, "--set", "data.root=other", "--set", "data.labels=labels.txt", "--set", "steps=5"
    )
    assert done.code == 0, done.err
    assert RunDirectory.open("run").class_names() == tuple(NUMBERS)


def test_an_older_run_is_resumed_as_before(begun: Path) -> None:
    record = json.loads(Path("run/run.json").read_text())
    del record["class_names"]
    Path("run/run.json").write_text(json.dumps(record))
    Path("data/2").rename("data/11")
    assert e2ediff(*RESUME).code == 0


# Every kind of data


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("npz", "idx", "zip as EDM's")])
def test_every_kind_of_data_that_has_names_gives_them(kind: str, tmp_path: Path, host) -> None:
    write_folders(tmp_path / "tree", NUMBERS)
    for path in (tmp_path / "tree").rglob("*.png"):
        path.rename(path.with_suffix(".JPEG"))  # the suffix that these helpers look for
    (tmp_path / "x").mkdir()
    config = make(kind, tmp_path, tmp_path / "x")
    found = config.open().class_names
    assert found in (tuple(NUMBERS), ())
    assert (found == ()) == (kind in ("shards with cls", "shards with json"))
    # A class that is called otherwise is noticed, although the labels stay.
    (tmp_path / "tree/2").rename(tmp_path / "tree/3")
    (tmp_path / "y").mkdir()
    renamed = make(kind, tmp_path, tmp_path / "y").open().class_names
    assert other_name(found, renamed) == ((3, "2", "20") if found else None)


def test_a_source_that_knows_its_names_without_reading_has_them_in_the_record(host) -> None:
    recipe = load_tiny("{name: fashion_mnist}")
    found = class_names(recipe, recipe.data.open())
    assert found == sources.FashionMNIST().image.class_names
    assert found[7] == "sneaker"
    synthetic = load_tiny("{name: synthetic, size: 16, count: 64}")
    assert class_names(synthetic, synthetic.data.open()) == ()


def load_tiny(data: str):
    from e2ediff.host.recipe import parse_recipe

    return parse_recipe(load(), tiny(data=data), "tiny")


def test_a_model_of_no_run_has_the_names_of_its_recipe() -> None:
    recipe = load_tiny("{name: fashion_mnist}")
    net = recipe.backbone.build(recipe.data.image)
    assert Model(recipe, net).label_of("sneaker") == 7
