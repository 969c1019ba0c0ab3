"""What Hugging Face's datasets writes, to Arrow folders and to Parquet, is read or refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets as hf
import numpy as np
import pyarrow as pa
import pytest
import torch
from command_line import e2ediff, needs
from e2ediff_sources.arrow import Arrow
from e2ediff_sources.parquet import Parquet
from e2ediff_sources.tars import TarShards
from pictures import tar_bytes
from PIL import Image
from refusals import refusal

from e2ediff.data import LeftOut, SourceConfig
from e2ediff.errors import BadImageError, DataError

hf.disable_progress_bars()

SIZE, LABELS, NAMES = 8, [0, 1, 0, 1, 1, 0], ["cat", "dog"]
PIXELS = np.random.default_rng(0).integers(256, size=(6, SIZE, SIZE, 3), dtype=np.uint8)
IMAGES = [Image.fromarray(pixels) for pixels in PIXELS]
FEATURES = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=NAMES)})
X = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})  # of Hugging Face's images
ONE = "data-00000-of-00001.arrow"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, and an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("E2EDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path


def dataset(features: Any = FEATURES, **columns: list[Any]) -> Any:
    return hf.Dataset.from_dict(columns or {"image": IMAGES, "label": LABELS}, features=features)


def renamed(image: str, label: str) -> Any:
    return dataset().rename_columns({"image": image, "label": label})


def assert_holds(config: SourceConfig, rows: list[int], *, held_out: bool = False) -> None:
    source = config.open(held_out=held_out)
    pixels, labels = source.read(range(len(source)))
    assert torch.equal(pixels, X[rows])
    assert labels.tolist() == source.labels().tolist() == [LABELS[i] for i in rows]
    assert source.class_names == tuple(NAMES)


def arrow(path: str, **options: Any) -> Arrow:
    return Arrow(**{"path": path, "size": SIZE, "classes": 2, **options})


ROWS = {
    "whole": (dataset, range(6)),
    "in an order of its own": (lambda: dataset().shuffle(seed=3), None),
    "chosen": (lambda: dataset().select([4, 1, 2]), [4, 1, 2]),
    "filtered": (lambda: dataset().filter(lambda row: row["label"] == 1), [1, 3, 4]),
    "sliced": (lambda: dataset().select(range(2, 5)), [2, 3, 4]),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_saved_dataset_holds_its_rows_in_their_order(kind: str) -> None:
    make, rows = ROWS[kind]
    written = make()
    written.save_to_disk("saved")
    if rows is None:
        first = [np.asarray(image) for image in written["image"]]
        rows = [next(i for i in range(6) if (PIXELS[i] == x).all()) for x in first]
        assert rows != list(range(6))
    assert_holds(arrow("saved"), list(rows))
    assert sorted(p.name for p in Path("saved").glob("*.safetensors")), "its index lies beside it"
    assert len(hf.load_from_disk("saved")) == len(list(rows)), "which disturbs nobody"


def test_shards_and_batches_are_read_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf.config, "DEFAULT_MAX_BATCH_SIZE", 2)
    monkeypatch.setattr(hf.config, "ARROW_RECORD_BATCH_MAX_SIZE_FOR_IMAGE_DATASETS", 2, False)
    whole = hf.concatenate_datasets([dataset()] * 3)
    whole.save_to_disk("saved", num_shards=2)
    with pa.ipc.open_stream("saved/data-00000-of-00002.arrow") as stream:
        assert len(list(stream)) > 1
    assert_holds(arrow("saved"), [*range(6)] * 3)
    assert arrow("saved").open().path_of(9).endswith("saved/data-00001-of-00002.arrow#0")


def test_a_saved_dataset_is_what_its_state_lists() -> None:
    """Those of an earlier one stay in the folder."""
    dataset().save_to_disk("saved", num_shards=2)
    dataset().save_to_disk("saved")
    assert_holds(arrow("saved"), [*range(6)])
    stale = LeftOut("with suffix .arrow", 2, "data-00000-of-00002.arrow")
    assert arrow("saved").open().left_out == (stale,)
    Path("saved", ONE).unlink()
    assert refusal(arrow("saved")) == (
        f"data.path: saved has no file {ONE}, which its state.json lists; fetch it again, or save "
        "the dataset again"
    )


def test_a_folder_of_splits_gives_each_of_them() -> None:
    whole = dataset()
    splits = {"train": whole, "test": whole.select([0, 3]), "odd": whole.select([1, 5])}
    hf.DatasetDict(splits).save_to_disk("saved")
    assert_holds(arrow("saved"), [*range(6)])
    assert_holds(arrow("saved", split="odd"), [1, 5])
    assert_holds(arrow("saved/odd"), [1, 5])
    for held_out in ("test", "saved/test"):
        assert_holds(arrow("saved", held_out=held_out), [0, 3], held_out=True)
    assert refusal(arrow("saved", split="valid")) == (
        "data.path: saved has no split 'valid': it has train, test, odd; give saved/train, or "
        "`--set data.split=train`"
    )
    with pytest.raises(DataError, match=r"data.held_out: saved has several splits: it has train"):
        arrow("saved", held_out="saved").open(held_out=True)
    with pytest.raises(DataError, match=r"data.held_out: no files tset"):
        arrow("saved", held_out="tset").open(held_out=True)
    assert "saved/odd is no folder of splits" in refusal(arrow("saved/odd", split="odd"))
    Path("test").mkdir()
    with pytest.raises(DataError, match=r"'test' is a split of saved, and a folder too; give "):
        arrow("saved", held_out="test").open(held_out=True)


def test_the_only_split_needs_no_name_and_two_others_do() -> None:
    hf.DatasetDict({"photos": dataset()}).save_to_disk("one")
    assert_holds(arrow("one"), [*range(6)])
    hf.DatasetDict({"a": dataset(), "b": dataset()}).save_to_disk("two")
    assert "two has several splits: it has a, b; give two/a, or " in refusal(arrow("two"))


@pytest.mark.parametrize("kind", [Arrow, Parquet])
def test_files_beside_those_of_a_dataset_are_counted(kind: Any) -> None:
    dataset().save_to_disk("saved")
    if kind is Parquet:
        Path("saved").rename("x")
        dataset().to_parquet("saved/x.parquet")
    assert kind(path="saved", size=SIZE, classes=2).open().left_out == ()
    for name in ("README.md", ".gitattributes", "LICENSE"):
        Path("saved", name).write_text("")
    others = (LeftOut("with suffix .md", 1, "README.md"), LeftOut("without suffix", 1, "LICENSE"))
    for path, found in (("saved", others), (f"saved/*.{kind.__name__.lower()}", ())):
        assert kind(path=path, size=SIZE, classes=2).open().left_out == found


@needs("e2ediff-data")
@pytest.mark.parametrize("form", ["folder", "splits", "file", "Parquet"])
def test_data_commands_recognise_it_and_propose_its_columns(form: str) -> None:
    written = renamed("img", "kind")
    if form == "Parquet":
        written.to_parquet("saved")
        Path("saved").rename(place := "x.parquet")
    elif form == "splits":
        hf.DatasetDict({"train": written}).save_to_disk(place := "saved")
    else:
        written.save_to_disk("saved")
        place = "saved" if form == "folder" else f"saved/{ONE}"
    done = e2ediff("data", "stats", place, "--workers", 0, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert [(c["name"], c["images"]) for c in found["classes"]] == [("cat", 3), ("dog", 3)]
    block = found["proposed"]["data"]
    assert block["name"] == ("parquet" if form == "Parquet" else "arrow")
    assert (block["path"], block["image_column"], block["label_column"]) == (place, "img", "kind")


@pytest.mark.parametrize("kind", [Arrow, Parquet])
def test_the_only_columns_of_images_and_classes_are_taken_whatever_their_names(kind: Any) -> None:
    written = renamed("img", "fine")
    written.save_to_disk("saved")
    written.to_parquet("saved/x.parquet")
    assert_holds(kind(path="saved", size=SIZE, classes=2), [*range(6)])
    line = refusal(kind(path="saved", size=SIZE, classes=2, image_column="picture"))
    assert "has no column 'picture', it has img (Image), fine; name the column of" in line
    line = refusal(kind(path="saved", size=SIZE, classes=2, label_column="coarse"))
    assert "it has no column 'coarse', but img, fine. Name the column of labels with" in line


@pytest.mark.parametrize("kind", [Arrow, Parquet, TarShards])
def test_a_folder_of_files_of_several_splits_is_not_read_as_one(kind: Any) -> None:
    """As a repository of Hugging Face has them, and folders of shards."""
    suffix = {Arrow: "arrow", Parquet: "parquet", TarShards: "tar"}[kind]
    Path("data").mkdir()
    for i, split in enumerate(("train", "test")):
        part = dataset().select(range(i, 6))
        part.to_parquet(f"data/{split}-00000-of-00001.parquet")
        part.save_to_disk(split)
        Path(split, ONE).rename(f"data/{split}-00000-of-00001.arrow")
        members = [(f"{k}.png", png(k)) for k in range(i, 6)]
        Path(f"data/{split}-00000-of-00001.tar").write_bytes(tar_bytes(members))
    said = (
        f"data holds files of several splits, such as test-00000-of-00001.{suffix} and train-"
        f"00000-of-00001.{suffix}; expected those of one. Give a pattern, such as "
        f"'data/train*.{suffix}'"
    )
    assert refusal(kind(path="data", size=SIZE, classes=0)).endswith(said)
    assert len(kind(path=f"data/train*.{suffix}", size=SIZE, classes=0).open()) == 6
    for path in Path("data").glob("test*"):  # "latest" is no split
        path.rename(path.with_name(f"la{path.name}"))
    assert len(kind(path="data", size=SIZE, classes=0).open()) == 11


def test_a_choice_between_columns_is_the_user_s() -> None:
    kinds = {"image": hf.Image(), "fine": FEATURES["label"], "coarse": FEATURES["label"]}
    columns = {"image": IMAGES, "fine": LABELS, "coarse": [0] * 6}
    dataset(hf.Features(kinds), **columns).save_to_disk("saved")
    with pytest.raises(DataError, match=r"saved has several columns of classes, fine, coarse; ch"):
        arrow("saved", classes=0).with_counted_classes()
    assert_holds(arrow("saved", label_column="fine"), [*range(6)])
    assert arrow("saved", classes=0).open().labels().tolist() == [0] * 6
    kinds = {"a": hf.Image(), "b": hf.Image()}
    dataset(hf.Features(kinds), a=IMAGES, b=IMAGES).save_to_disk("two")
    assert "has no column 'image', it has a (Image), b (Image); " in refusal(arrow("two"))


REFUSED = {
    "arrays": (
        lambda: dataset(hf.Features({"image": hf.Array3D((8, 8, 3), "uint8")}), image=[*PIXELS]),
        f"column 'image' of {{}}/saved/{ONE} holds Array3D, expected encoded images: bytes"),
    "lists of images": (
        lambda: dataset(hf.Features({"image": hf.List(hf.Image())}), image=[IMAGES[:2]]),
        f"column 'image' of {{}}/saved/{ONE} holds List, expected encoded images: bytes"),
    "text": (
        lambda: dataset(hf.Features({"image": hf.Value("string")}), image=["0.png"]),
        f"column 'image' of {{}}/saved/{ONE} holds Value, expected encoded images: bytes"),
    "labels of several kinds": (
        lambda: dataset(
            hf.Features({"image": hf.Image(), "label": hf.List(hf.Value("int64"))}),
            image=IMAGES[:1], label=[[1, 2]]),
        f"column 'label' of {{}}/saved/{ONE} holds List, expected class numbers or names"),
    "no rows": (
        lambda: dataset().select([]), "data.path: saved has no rows; expected one for each"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_holds_no_encoded_images_is_refused_by_name(kind: str, place: Path) -> None:
    make, said = REFUSED[kind]
    make().save_to_disk("saved")
    assert said.format(place) in refusal(arrow("saved", classes=0))


def write_stream(path: str, batches: list[pa.RecordBatch], **options: Any) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    written = pa.ipc.IpcWriteOptions(**options)
    with pa.ipc.new_stream(path, batches[0].schema, options=written) as stream:
        for batch in batches:
            stream.write_batch(batch)


def png(i: int) -> bytes:
    out = io.BytesIO()
    IMAGES[i].save(out, "PNG")
    return out.getvalue()


def rows(images: list[Any], labels: list[Any], type_: Any = None) -> pa.RecordBatch:
    return pa.record_batch({"image": pa.array(images, type_), "label": pa.array(labels)})


@pytest.mark.parametrize("kind", [Arrow, Parquet])
@pytest.mark.parametrize("first", [0, 1])
def test_images_that_are_paths_alone_are_refused(kind: Any, first: int) -> None:
    whole = {"bytes": png(0), "path": None}
    images = [whole, {"bytes": None, "path": "/elsewhere/1.png"}][first:]
    batch = rows(images, [0, 1][first:], STRUCT)
    write_stream("saved/x.arrow", [batch])
    pa.parquet.write_table(pa.table(batch), "saved/x.parquet")
    line = refusal(kind(path="saved", size=SIZE, classes=2))
    assert "column 'image' has the paths of images without their bytes; expected" in line


def test_a_row_without_an_image_is_one_damaged_image() -> None:
    images = [{"bytes": png(0), "path": "a.png"}, None, {"bytes": png(2)}, {"bytes": b""}]
    write_stream("saved/x.arrow", [rows(images, LABELS[:4], STRUCT)])
    source = arrow("saved").open()
    assert torch.equal(source.read([0, 2])[0], X[[0, 2]])
    for i in (1, 3):
        with pytest.raises(BadImageError, match=rf"x.arrow#{i}: damaged image \(empty file\)"):
            source.read([i])


@pytest.mark.parametrize("type_", [pa.binary(), pa.large_binary()], ids=str)
@pytest.mark.parametrize("form", ["stream", "file of random access"])
def test_plain_bytes_of_any_writer_are_read(type_: Any, form: str) -> None:
    batches = [rows([png(i)], [LABELS[i]], type_) for i in range(6)]
    Path("saved").mkdir()
    write = pa.ipc.new_stream if form == "stream" else pa.ipc.new_file
    with write("saved/x.arrow", batches[0].schema) as out:
        for batch in batches:
            out.write_batch(batch)
    source = arrow("saved").open()
    assert torch.equal(source.read(range(6))[0], X)
    assert source.labels().tolist() == LABELS


def test_a_file_that_is_cut_anywhere_is_refused() -> None:
    write_stream("saved/x.arrow", [rows([png(i)], [0]) for i in range(2)])
    whole = Path("saved/x.arrow").read_bytes()
    for cut in (*range(0, len(whole), 97), len(whole) - 8, len(whole) - 4):
        Path("saved/x.arrow").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"is cut short|cannot be read as Arrow"):
            arrow("saved", classes=1).open()
    assert not list(Path("saved").glob("*.safetensors")), "no index is kept of what was refused"


def test_what_another_writer_changed_within_is_refused_by_name() -> None:
    write_stream("saved/x.arrow", [rows([png(0)], [0])], compression="lz4")
    assert "x.arrow is compressed within; expected images as they are" in refusal(arrow("saved"))
    words = pa.array(["a"]).dictionary_encode()
    write_stream("saved/x.arrow", [pa.record_batch({"image": [png(0)], "label": words})])
    assert "x.arrow has columns that are encoded by a dictionary" in refusal(arrow("saved"))
    write_stream("saved/x.arrow", [rows([png(0)], [0])])
    write_stream("saved/y.arrow", [pa.record_batch({"picture": [png(0)], "label": [0]})])
    assert "y.arrow has no column 'image', it has picture, label" in refusal(arrow("saved"))
    Path("saved/y.arrow").write_bytes(Path("saved/x.arrow").read_bytes() * 2)
    assert "y.arrow goes on after the mark that ends a stream; " in refusal(arrow("saved"))


@pytest.mark.parametrize("kind", [Arrow, Parquet])
def test_files_that_number_their_classes_differently_are_refused(kind: Any) -> None:
    for name, names in (("x", NAMES), ("y", NAMES[::-1])):
        features = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=names)})
        written = dataset(features, image=IMAGES[:2], label=[0, 1])
        written.save_to_disk(name)
        Path(name, ONE).rename(f"{name}.arrow")
        written.to_parquet(f"{name}.parquet")
    line = refusal(kind(path=".", size=SIZE, classes=2))
    assert "the classes of column 'label' have other names in " in line


def test_a_state_that_lists_what_lies_elsewhere_is_refused() -> None:
    dataset().save_to_disk("saved")
    told = json.loads(Path("saved/state.json").read_text())
    for changes, said in (
        ({"_data_files": [{"filename": "../x.arrow"}]}, "lists '../x.arrow'; expected names of"),
        ({"_data_files": [1]}, "lists 1; expected names of"),
        ({"_data_files": 1}, "state.json cannot be read: "),
        ({"_indices_data_files": [{"filename": "i.arrow"}]}, "chooses its rows by a list of ind"),
    ):
        Path("saved/state.json").write_text(json.dumps({**told, **changes}))
        assert said in refusal(arrow("saved"))
    Path("saved/state.json").write_text("{")
    assert "state.json cannot be read: Expecting property name" in refusal(arrow("saved"))


def test_a_dataset_in_a_store_is_read_in_place() -> None:
    dataset().save_to_disk("memory://bucket/saved")
    assert_holds(arrow("memory://bucket/saved"), [*range(6)])
