"""One small tree of images, and the same images in every form that people keep them in."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def write_tree(
    root: Path, counts: Sequence[int], *, suffix: str = "JPEG", size: tuple[int, int] = (14, 10)
) -> Path:
    """Class folders named as ImageNet's, class k with counts[k] images of random sizes."""
    g = np.random.default_rng(0)
    for k, count in enumerate(counts):
        folder = root / f"n{k:08}"
        folder.mkdir(parents=True)
        for i in range(count):
            height, width = (int(s + g.integers(4)) for s in size)
            coarse = Image.fromarray(g.integers(256, size=(3, 3, 3), dtype=np.uint8))
            image = coarse.resize((width, height), Image.Resampling.BICUBIC)
            image.save(folder / f"{folder.name}_{i}.{suffix}")
    return root


def files(root: Path) -> list[tuple[str, str, bytes]]:
    """Path below the root, class and content of every image, in the order of class folders."""
    paths = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())
    return [(path, path.partition("/")[0], (root / path).read_bytes()) for path in paths]


def classes(root: Path) -> dict[str, int]:
    """Number of each class."""
    return {name: i for i, name in enumerate(sorted(p.name for p in root.iterdir()))}


def tar_bytes(members: Iterator[tuple[str, bytes]] | Sequence[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def as_zip(root: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, _, data in files(root):
            file.writestr(name, data)
    return path


def as_dataset_json(root: Path, path: Path) -> Path:
    """A zip as EDM's dataset tool writes it: numbered names, labels in dataset.json."""
    number, labels = classes(root), []
    with zipfile.ZipFile(path, "w") as file:
        for i, (_, name, data) in enumerate(files(root)):
            place = f"{i // 1000:05}/img{i:08}.jpg"
            file.writestr(place, data)
            labels.append([place, number[name]])
        file.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


def as_class_tars(root: Path, path: Path) -> Path:
    """ImageNet's ILSVRC2012_img_train.tar; members in no particular order."""
    by_class: dict[str, list[tuple[str, bytes]]] = {}
    for name, label, data in files(root):
        by_class.setdefault(label, []).insert(0, (name.rpartition("/")[2], data))
    inner = [(f"{label}.tar", tar_bytes(rows)) for label, rows in reversed(by_class.items())]
    path.write_bytes(tar_bytes(inner))
    return path


def as_shards(root: Path, folder: Path, each: int, label: str = "cls") -> str:
    """WebDataset shards; returns their pattern."""
    folder.mkdir()
    number, rows = classes(root), files(root)
    count = -(-len(rows) // each)
    for shard in range(count):
        members = []
        for i, (_, name, data) in list(enumerate(rows))[shard * each : (shard + 1) * each]:
            value = str(number[name]) if label == "cls" else json.dumps({"label": number[name]})
            members += [(f"{i:06}.{label}", value.encode()), (f"{i:06}.jpg", data)]
        (folder / f"train-{shard:04}.tar").write_bytes(tar_bytes(members))
    return f"{folder}/train-{{0000..{count - 1:04}}}.tar"


def as_parquet(root: Path, folder: Path) -> str:
    """Two files as Hugging Face's datasets library writes them; returns their pattern."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    number, rows = classes(root), files(root)
    feature = {"label": {"names": list(number), "_type": "ClassLabel"}}
    told = {"huggingface": json.dumps({"info": {"features": feature}})}
    half = len(rows) // 2
    for i, part in enumerate((rows[:half], rows[half:])):
        images = [{"bytes": data, "path": name} for name, _, data in part]
        table = pa.table({"image": images, "label": [number[name] for _, name, _ in part]})
        table = table.replace_schema_metadata(told)
        pq.write_table(table, folder / f"train-{i}.parquet", row_group_size=16)
    return f"{folder}/train-*.parquet"


def as_arrow(root: Path, folder: Path) -> Path:
    """A folder as `save_to_disk` of Hugging Face's datasets writes it, with two files."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    as_parquet(root, folder)
    names = [f"data-{i:05}-of-00002.arrow" for i in (0, 1)]
    for path, name in zip(sorted(folder.iterdir()), names, strict=True):
        table = pq.read_table(path)
        with pa.ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table, max_chunksize=16)
        path.unlink()
    state = {"_data_files": [{"filename": name} for name in names]}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def as_npz(x: np.ndarray, y: np.ndarray, path: Path) -> Path:
    np.savez(path, images=x, labels=y)
    return path


def as_idx(array: np.ndarray, path: Path) -> Path:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(head + array.astype(np.uint8).tobytes())
    return path


def promise(path: str, member: bytes, size: int) -> None:
    """Let a member of a zip say that it has so many bytes once unpacked."""
    data = bytearray(Path(path).read_bytes())
    entry = data.index(member, data.index(b"PK\1\2")) - 46
    data[entry + 24 : entry + 28] = size.to_bytes(4, "little")
    Path(path).write_bytes(data)


def header(*shape: int) -> bytes:
    """The beginning of an npy file of bytes."""
    out = io.BytesIO()
    told = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(out, told)
    return out.getvalue()


def damage(path: Path) -> None:
    """Cut a file in the middle."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
