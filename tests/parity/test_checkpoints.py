"""A checkpoint is whole or absent: after full disks, odd manifests and aliases.

Kills and damaged files are in `test_guarantees.py`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from e2ediff.errors import CheckpointError, DivergedError, ResourceError
from e2ediff.store import checkpoint as ck
from e2ediff.store.manifest import sealed
from e2ediff.store.storage import JSON, Store
from e2ediff.train.optimizer_state import flatten_optimizer, restore_optimizer

FILES = ("online", "target", "optimizer-joint")


def content(images: int, size: int = 300) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors whose every value tells which save they are from."""
    return {
        file: {
            "weight": torch.full((size, 7), float(images + i)),
            "bias": torch.full((5,), images + i, dtype=torch.int64),
        }
        for i, file in enumerate(FILES)
    }


def put(store: Store, images: int, keep: int = 3, size: int = 300) -> str:
    return ck.save(store, images, images // 10, content(images, size), {"images": images}, keep)


def assert_whole(found: ck.Checkpoint) -> None:
    """All of it, tensors, state and counters, is from one and the same save."""
    assert found.state == {"images": found.images}
    assert found.step == found.images // 10
    for file, tensors in content(found.images, len(found.tensors("online")["weight"])).items():
        loaded = found.tensors(file)
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def leftovers(path: Path) -> list[str]:
    return [str(p) for p in path.rglob("*") if p.name.startswith((".tmp-", ".trash-"))]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "run"))


@contextlib.contextmanager
def files_of(limit: int) -> Iterator[None]:
    """Let no file of this process grow beyond this many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_size_limit_anywhere_in_a_save_keeps_the_older_checkpoint(tmp_path: Path) -> None:
    """RLIMIT_FSIZE gives EFBIG at the first file, at the last and at the manifest."""
    whole = 300 * 7 * 4 + 5 * 8
    for limit in sorted({*range(0, whole + 200, 300), 1, 10, 100, 500, 900, 1100}):
        path = tmp_path / f"{limit}"
        store = Store(str(path))
        put(store, 100)

        if limit < whole:
            with pytest.raises(ResourceError) as caught, files_of(limit):
                put(store, 200)
            assert str(path) in str(caught.value)
            assert os.strerror(errno.EFBIG) in str(caught.value)
        else:
            with files_of(limit):
                put(store, 200)
        assert ck.open_checkpoint(store).images == (100 if limit < whole else 200)
        assert_whole(ck.open_checkpoint(store))
        assert not leftovers(path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_keeps_the_older_checkpoint(small_disk: Path) -> None:
    """ENOSPC at 40 fill levels, in the middle of a save too, as sizes are rounded up to pages."""
    store = Store(str(small_disk / "run"))
    put(store, 100)
    ballast = small_disk / "ballast"
    refused: list[str] = []
    for level in range(40):
        free = shutil.disk_usage(small_disk).free
        ballast.write_bytes(b"x" * max(0, free - level * 2048))
        try:
            put(store, 200, size=300)
        except ResourceError as error:
            refused.append(str(error))
            assert ck.list_checkpoints(store) == ["images-000000000100"]
        else:
            assert_whole(ck.open_checkpoint(store))
            shutil.rmtree(small_disk / "run/checkpoints/images-000000000200")
        assert_whole(ck.open_checkpoint(store, "images-000000000100"))
        assert not leftovers(small_disk)
        ballast.unlink()
    assert 10 < len(refused) < 40
    for told in refused:
        assert str(small_disk) in told
        assert "No space left on device (needed: " in told


def test_content_that_changes_after_opening_is_refused(store: Store) -> None:
    """Without `verify` too, a tensor file is only parsed if the very bytes read have the hash."""
    name = put(store, 100)
    path = Path(store.local_path(f"checkpoints/{name}/online.safetensors") or "")
    found = ck.open_checkpoint(store, verify=False)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert ck.open_checkpoint(store, verify=False).tensors("target")
    with pytest.raises(CheckpointError, match=r"online\.safetensors does not match its hash"):
        found.tensors("online")
    with pytest.raises(CheckpointError, match="no checkpoint is intact"):
        ck.open_checkpoint(store)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300) | st.text(max_size=80).map(str.encode) | st.just(b"[" * 100_000))
def test_any_bytes_as_manifest_are_refused(data: bytes) -> None:
    """Hypothesis: no content of MANIFEST.json leads to another exception."""
    memory = Store("memory://fuzz")
    memory.write("checkpoints/images-000000000001/MANIFEST.json", data)
    with pytest.raises(CheckpointError):
        ck.open_checkpoint(memory)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(["images", "step", "files", "aliases", "format_version"]),
        st.recursive(
            st.none() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["state.json", "bytes", "sha256", "a"]), inner)
            ),
            max_leaves=6,
        ),
    )
)
def test_a_well_sealed_manifest_of_wrong_types_is_refused(body: dict[str, object]) -> None:
    """A program that imitates the format badly gets a CheckpointError as well."""
    memory = Store("memory://imitation")
    memory.write("checkpoints/images-000000000001/MANIFEST.json", sealed(body))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError):
        ck.open_checkpoint(memory)


def test_a_pipe_in_place_of_a_file_does_not_hang(store: Store) -> None:
    """Opening a pipe would wait for ever."""
    name = put(store, 100)
    path = store.local_path(f"checkpoints/{name}/MANIFEST.json") or ""
    os.unlink(path)
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        ck.open_checkpoint(store, name)


def test_tensors_that_share_memory_are_saved_once_and_share_it_again(store: Store) -> None:
    """Tied weights; transposed and overlapping views keep their values."""
    table = torch.randn(50, 8)
    tensors = {
        "embed": table,
        "head": table,
        "turned": table.t(),
        "part": table[3:9],
        "empty": torch.empty(0),
        "hollow": torch.empty(0),
        "scalar": torch.tensor(3.5, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]),
    }
    name = ck.save(store, 1, 1, {"online": tensors}, {}, 1)
    folder = Path(store.local_path(f"checkpoints/{name}") or "")
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    assert manifest["aliases"] == {"online": {"head": "embed"}}
    loaded = ck.open_checkpoint(store).tensors("online")
    assert loaded.keys() == tensors.keys()
    for key, value in tensors.items():
        assert loaded[key].dtype == value.dtype
        assert torch.equal(loaded[key], value)
    assert loaded["head"] is loaded["embed"]
    assert loaded["turned"].data_ptr() != loaded["embed"].data_ptr()


def test_what_cannot_be_saved_is_refused_before_anything_is_written(store: Store) -> None:
    """A non-tensor, a sparse tensor, nan, inf, and state that is not JSON."""
    good = torch.ones(3)
    for bad in (1.0, [good], None, torch.eye(3).to_sparse(), torch.empty(3, device="meta")):
        with pytest.raises(CheckpointError, match="only dense tensors"):
            ck.save(store, 1, 1, {"a": {"x": good}, "b": {"y": bad}}, {}, 1)  # type: ignore[dict-item]
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e5m2, torch.complex64):
        for value in (float("nan"), float("inf")):
            tensor = torch.tensor([1.0, value]).to(dtype)
            with pytest.raises(DivergedError, match="b: y holds nan or inf"):
                ck.save(store, 1, 1, {"a": {"x": good}, "b": {"y": tensor}}, {}, 1)
    for state in ({"x": {1: 2}}, {"x": good}, {"x": {1, 2}}, {"x": b""}):
        with pytest.raises(CheckpointError, match=r"state\.json\.x: a \w+ cannot be saved"):
            ck.save(store, 1, 1, {"a": {"x": good}}, state, 1)  # type: ignore[arg-type]
    assert store.list() == []


def test_state_survives_exactly(store: Store) -> None:
    """Big integers, doubles and text come back as they were."""
    state: dict[str, JSON] = {
        "i": 2**70,
        "f": 0.1 + 0.2,
        "s": "ä\ud800\n",
        "n": None,
        "l": [True, [1.0, 1]],
    }
    ck.save(store, 1, 1, {}, state, 1)
    assert ck.open_checkpoint(store).state == state


@pytest.mark.parametrize("url", ["memory://{}/run", "{}/run", "file://{}/run"])
def test_saving_replacing_and_retiring_work_on_every_store(tmp_path: Path, url: str) -> None:
    """Oldest go first; a second save of the same count replaces the first."""
    store = Store(url.format(tmp_path))
    for images in (100, 200, 300, 400):
        put(store, images, keep=2)
    names = ck.list_checkpoints(store)
    assert names == ["images-000000000300", "images-000000000400"]
    assert_whole(ck.open_checkpoint(store, names[0]))
    again = ck.save(store, 400, 40, {"online": {"w": torch.zeros(2)}}, {"second": True}, 2)
    assert ck.open_checkpoint(store).state == {"second": True}
    assert ck.list_checkpoints(store) == [names[0], again]
    assert again == (names[1] if store.local else f"{names[1]}-r1")
    third = ck.save(store, 400, 40, {"online": {"w": torch.zeros(2)}}, {"third": True}, 2)
    assert ck.open_checkpoint(store).state == {"third": True}
    assert ck.list_checkpoints(store) == [names[0], third]


def test_an_unfinished_upload_is_no_checkpoint(tmp_path: Path) -> None:
    """On object stores the manifest is the commit mark, and debris does not block its name."""
    store = Store(f"memory://{tmp_path}")
    put(store, 100)
    name = put(store, 200)
    store.remove_file(f"checkpoints/{name}/MANIFEST.json")
    assert ck.open_checkpoint(store, warn=lambda _: None).images == 100
    assert put(store, 200) == name
    assert ck.open_checkpoint(store).images == 200


def test_the_last_verified_checkpoint_is_never_retired(tmp_path: Path) -> None:
    """Damaged ones do not count as kept, and keep=0 keeps all."""
    store = Store(str(tmp_path))
    first, second = put(store, 100), put(store, 200)
    weights = tmp_path / "checkpoints" / second / "online.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    third = put(store, 300, keep=2)
    assert ck.list_checkpoints(store) == [first, second, third]
    for images in range(400, 1000, 100):
        put(store, images, keep=0)
    assert len(ck.list_checkpoints(store)) == 9


def test_a_save_after_going_back_sets_the_abandoned_future_aside(store: Store) -> None:
    """Else the next resume would jump to checkpoints that this run no longer descends from."""
    for images in (100, 200, 300):
        put(store, images, keep=0)
    assert put(store, 150, keep=2) == "images-000000000150"
    assert ck.list_checkpoints(store) == ["images-000000000100", "images-000000000150"]
    assert ck.open_checkpoint(store).images == 150
    assert_whole(ck.open_checkpoint(store, "abandoned-images-000000000300"))
    put(store, 200, keep=0)
    put(store, 150, keep=0)
    assert "abandoned-images-000000000200-r2" in store.list("checkpoints")


def test_trouble_with_old_checkpoints_does_not_stop_a_save(
    tmp_path: Path, small_disk: Path
) -> None:
    """A mount point cannot be renamed or removed: the save is told of it and goes on."""
    del tmp_path
    store = Store(str(small_disk.parent))
    put(store, 100)
    old = small_disk.parent / "checkpoints" / "images-000000000100"
    subprocess.run(["mount", "--bind", str(old), str(old)], check=True)
    try:
        told: list[str] = []
        name = ck.save(store, 200, 20, content(200), {"images": 200}, 1, told.append)
        assert_whole(ck.open_checkpoint(store))
        assert name == "images-000000000200"
        assert len(told) == 1
        assert str(old) in told[0]
    finally:
        subprocess.run(["umount", str(old)], check=True)


OPTIMIZERS: dict[str, Callable[[list[dict[str, object]]], torch.optim.Optimizer]] = {
    "adamw-fused": lambda groups: torch.optim.AdamW(groups, fused=True, betas=(0.8, 0.9)),
    "adamw-amsgrad": lambda groups: torch.optim.AdamW(groups, amsgrad=True),
    "sgd-momentum": lambda groups: torch.optim.SGD(groups, momentum=0.9, nesterov=True),
    "muon": lambda groups: torch.optim.Muon(groups),
    "adafactor": lambda groups: torch.optim.Adafactor(groups),
}


def network(seed: int) -> dict[str, torch.nn.Parameter]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (6, 5), "b.weight": (5, 6), "c.weight": (4, 4)}
    return {n: torch.nn.Parameter(torch.randn(s, generator=g)) for n, s in shapes.items()}


def groups_of(net: dict[str, torch.nn.Parameter]) -> list[dict[str, object]]:
    *first, last = net.values()
    return [{"params": first, "lr": 0.01}, {"params": [last], "lr": 0.02, "initial_lr": 0.02}]


def train(net: dict[str, torch.nn.Parameter], opt: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        g = torch.Generator().manual_seed(step)
        for p in net.values():
            p.grad = torch.randn(p.shape, generator=g)
        for group in opt.param_groups:
            group["lr"] = float(group["lr"]) * 0.9
        opt.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("before", [0, 3])
def test_a_restored_optimizer_continues_bit_for_bit(store: Store, kind: str, before: int) -> None:
    """Through files, into a fresh optimizer whose groups list their parameters backwards."""
    net = network(0)
    opt = OPTIMIZERS[kind](groups_of(net))
    train(net, opt, range(before))
    tensors, record = flatten_optimizer(opt, {p: n for n, p in net.items()})
    files: dict[str, dict[str, torch.Tensor]] = {"online": {**net}, "optimizer-joint": tensors}
    ck.save(store, 1, before, files, {"joint": record}, 1)

    found = ck.open_checkpoint(store)
    twin = {n: torch.nn.Parameter(t) for n, t in found.tensors("online").items()}
    twin = {n: twin[n] for n in net}
    fresh = groups_of(twin)
    fresh[0]["params"] = list(reversed(fresh[0]["params"]))  # type: ignore[call-overload]
    other = OPTIMIZERS[kind](fresh)
    names = {p: n for n, p in twin.items()}
    restore_optimizer(other, names, found.tensors("optimizer-joint"), found.state["joint"])
    for group, again in zip(opt.param_groups, other.param_groups, strict=True):
        assert {**group, "params": 0} == {**again, "params": 0}
    train(net, opt, range(before, before + 3))
    train(twin, other, range(before, before + 3))
    assert all(torch.equal(net[n], twin[n]) for n in net)


def test_optimizer_state_keeps_its_dtype_and_the_strides_of_its_parameter() -> None:
    """Unlike torch's load_state_dict, which casts float32 averages to a bfloat16 parameter's."""
    made = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    p = torch.nn.Parameter(made.bfloat16())
    opt = torch.optim.AdamW([p])
    opt.state[p] = {"step": torch.tensor(2.0), "exp_avg": made, "note": [1], "none": None}
    tensors, record = flatten_optimizer(opt, {p: "w"})
    again = torch.optim.AdamW([p])
    contiguous = {k: v.contiguous() for k, v in tensors.items()}
    restore_optimizer(again, {p: "w"}, contiguous, json.loads(json.dumps(record)))
    state = again.state[p]
    assert state["exp_avg"].dtype == torch.float32
    assert state["exp_avg"].stride() == made.stride()
    assert torch.equal(state["exp_avg"], made)
    assert state["note"] == [1]
    assert state["none"] is None


def test_an_optimizer_that_does_not_fit_is_refused_and_left_as_it_was() -> None:
    """Other names, shapes, groups or a missing tensor."""
    net = network(0)
    opt = torch.optim.AdamW(net.values())
    train(net, opt, range(2))
    names = {p: n for n, p in net.items()}
    tensors, record = flatten_optimizer(opt, names)

    def refused(
        match: str, t: dict[str, torch.Tensor], rename: str = "", shape: tuple[int, ...] = ()
    ) -> None:
        twin = network(1)
        if shape:
            twin["c.weight"] = torch.nn.Parameter(torch.ones(shape))
        own = {p: f"{n}{rename}" for n, p in twin.items()}
        other = torch.optim.AdamW(twin.values(), lr=5.0)
        with pytest.raises(CheckpointError, match=match):
            restore_optimizer(other, own, t, record)
        assert not other.state
        assert other.param_groups[0]["lr"] == 5.0

    refused(r"missing a\.weight2, b\.weight2, c\.weight2; unexpected a\.weight", tensors, "2")
    refused(
        r"state of c\.weight is for shape \(4, 4\), the parameter has \(4, 5\)",
        tensors,
        shape=(4, 5),
    )
    refused(r"tensors .* missing a\.weight\.step", dict(list(tensors.items())[1:]))
    refused(r"tensors .* unexpected extra", {**tensors, "extra": torch.ones(1)})
    with pytest.raises(CheckpointError, match="incomplete"):
        restore_optimizer(opt, names, {}, {"groups": [{}], "states": {}})
    two = torch.optim.AdamW(groups_of(net))
    with pytest.raises(CheckpointError, match=r"missing -; unexpected group 1"):
        restore_optimizer(opt, names, *flatten_optimizer(two, names))
