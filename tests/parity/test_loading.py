"""The same batches for any number of workers and ranks, with and without damaged images."""

from __future__ import annotations

import gc
import io
import json
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.queues import Queue
from pathlib import Path
from types import FrameType, ModuleType

import attrs
import pytest
import torch
from command_line import needs
from pictures import damage, write_tree
from PIL import Image
from source_kinds import COUNTS, SIZE, TOTAL, folder, make
from tiny_recipe import tiny

from e2ediff import hookimpl
from e2ediff.data import DataSource, SourceConfig
from e2ediff.errors import BadImageError, DataError, ResourceError
from e2ediff.host.plugins import load
from e2ediff.loading.bad_images import BadImages, Skipped, Skipping, open_source
from e2ediff.loading.batches import batches
from e2ediff.loading.order import Order
from e2ediff.parts import sources
from e2ediff.parts.sources.folder import FolderBytes
from e2ediff.store.storage import Store
from e2ediff.train.progress import Progress
from e2ediff.train.session import train

pytestmark = pytest.mark.usefixtures("cache")

CPU = torch.device("cpu")


def seen(config: SourceConfig, source: DataSource | None = None, **options: object):
    given = {"batch": 20, "seed": 1, "first": 0, "last": 9, "workers": 0, **options}
    return list(
        batches(
            source or config.open(),
            config.image,
            flip=config.flip,
            device=CPU,
            sampling=config.sampling,
            **given,
        )
    )


def nine_batches(config: SourceConfig, workers: int):
    return batches(config.open(), config.image, batch=20, seed=1, first=0, last=9, flip=False,
                   workers=workers, device=CPU)  # fmt: skip


def assert_same(these, those) -> None:
    assert len(these) == len(those) > 0
    for a, b in zip(these, those, strict=True):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.condition.label, b.condition.label)


@pytest.mark.parametrize("kind", ["zip", "tar of class tars", "parquet", "prepared as raw"])
def test_workers_and_a_resume_in_mid_epoch_see_the_same_images(kind, place, tmp_path) -> None:
    """9 batches of 20 are one epoch and a half of 119 images; half of them are mirrored."""
    whole = seen(folder(place))
    config = make(kind, place, tmp_path)
    assert_same(seen(config, workers=0), whole)
    assert_same(seen(config, workers=1), whole)
    assert_same(seen(config, workers=2, first=4), whole[4:])


# Killed processes


@attrs.frozen(kw_only=True)
class Fatal(sources.ImageFolder):
    """A folder whose images end the worker process that reads them, as `signal` would."""

    signal: int = int(signal.SIGKILL)

    def open(self, *, held_out: bool = False) -> DataSource:
        source = super().open(held_out=held_out)
        source.listing = attrs.evolve(source.listing, fetch=Ending(source.listing.fetch, self))
        return source


@attrs.frozen
class Ending:
    fetch: object
    config: Fatal

    def __call__(self, i: int) -> bytes:
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), self.config.signal)
        return self.fetch(i)


def fatal(place, **options) -> Fatal:
    return Fatal(root=str(place / "tree"), size=SIZE, classes=len(COUNTS), **options)


def test_a_run_whose_reading_process_was_killed_says_what_to_lower(place, tmp_path) -> None:
    module = ModuleType("fatal")
    module.register = hookimpl(lambda add: add("sources", "fatal", Fatal))
    host = load(module, entry_points=False)
    block = f"{{name: fatal, root: {place / 'tree'}, size: 16, classes: 30, workers: 1}}"
    (tmp_path / "x.yaml").write_text(tiny(steps="2", batch="4", data=block))
    with pytest.raises(ResourceError) as caught:
        train(host, str(tmp_path / "x.yaml"), (), str(tmp_path / "run"),
              progress=Progress(io.StringIO()))  # fmt: skip
    said = str(caught.value)
    assert "a process that reads images died (DataLoader worker (pid" in said
    assert "is killed by signal: Killed)" in said
    assert "lower data.workers, or provide more memory. What was saved is intact: continue" in said
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 8)


@needs("e2ediff-data")
@pytest.mark.parametrize(
    ("number", "said"),
    [(signal.SIGKILL, "lower --workers, or provide more memory"),
     (signal.SIGBUS, "the shared memory through which images are passed is full"),
     (signal.SIGSEGV, "with --workers 0 this process reads the images itself")],
    ids=["killed", "bus error", "crash"],
)  # fmt: skip
def test_commands_on_data_say_what_to_lower_when_a_process_was_killed(
    number, said, place, tmp_path
) -> None:
    from e2ediff_data.examine import examine
    from e2ediff_data.write import Settings, prepare

    config = fatal(place, signal=number)
    source = config.open()
    with pytest.raises(ResourceError, match=said):
        examine(source, range(4), quick=False, workers=1, progress=lambda line: None)
    settings = Settings(
        source="", images=4, size=SIZE, channels=3, classes=0, format="png", quality=95, each=2,
        skip=False,
    )  # fmt: skip
    with pytest.raises(ResourceError, match=said):
        prepare(source, settings, str(tmp_path / "x"), workers=1, progress=lambda line: None)


@pytest.mark.parametrize("handler", [signal.SIG_DFL, lambda number, frame: None])
def test_reading_leaves_the_handler_of_dying_processes_as_it_was(place, handler) -> None:
    """torch's own raises wherever the main thread is when a process dies."""
    before = signal.signal(signal.SIGCHLD, handler)
    try:
        items = nine_batches(folder(place), workers=1)
        next(items)
        assert signal.getsignal(signal.SIGCHLD) is handler
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.timeout(60)
def test_a_kill_at_the_worst_moment_is_reported_and_hangs_nothing(place) -> None:
    """When the main thread has just taken a queue's lock to hand out the next index."""
    others = multiprocessing.active_children()
    items = nine_batches(folder(place), workers=1)
    next(items)
    (worker,) = (p for p in multiprocessing.active_children() if p not in others)
    taken, put = threading.Condition.__enter__.__code__, Queue.put.__code__

    def kill(frame: FrameType, event: str, arg: object) -> None:
        here = frame.f_code is taken and frame.f_back.f_code is put
        if here and event == "return" and worker.is_alive():
            os.kill(worker.pid, signal.SIGKILL)
            os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)

    sys.setprofile(kill)
    try:
        with pytest.raises(ResourceError, match="is killed by signal: Killed"):
            list(items)
    finally:
        sys.setprofile(None)
    del items
    gc.collect()


def fail_at_first(items) -> None:
    for _ in items:
        raise ZeroDivisionError


@pytest.mark.parametrize("end", ["closed", "dropped", "error"])
def test_reading_that_ends_early_takes_its_processes_along(place, end) -> None:
    others = multiprocessing.active_children()
    items = nine_batches(folder(place), workers=2)
    if end == "error":
        with pytest.raises(ZeroDivisionError):
            fail_at_first(items)
    else:
        next(items)
    if end == "closed":
        items.close()
    del items
    gc.collect()
    assert [p for p in multiprocessing.active_children() if p not in others] == []


@pytest.fixture
def raise_in_forks():
    """Let this signal reach each new process before it runs a line of its own; 0 for none."""
    numbers = [0]
    os.register_at_fork(after_in_child=lambda: numbers[0] and signal.raise_signal(numbers[0]))
    yield lambda number: numbers.__setitem__(0, int(number))
    numbers[0] = 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
def test_a_signal_that_reaches_a_reading_process_as_it_starts_ends_nothing(
    number, place, raise_in_forks
) -> None:
    """As when a terminal or a batch system sends it to all processes of a run."""
    before, blocked = seen(folder(place)), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    raise_in_forks(number)
    assert_same(seen(folder(place), workers=2), before)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == blocked


@pytest.mark.parametrize("sampling", ["natural", "class_balanced"])
def test_rows_of_several_ranks_are_the_batch_of_one(place, sampling) -> None:
    config = folder(place, sampling=sampling)
    whole = seen(config)
    parts = [seen(config, rows=rows) for rows in (slice(0, 10), slice(10, 15), slice(15, 20))]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[step].x for part in parts]), batch.x)
        assert torch.equal(
            torch.cat([part[step].condition.label for part in parts]), batch.condition.label
        )


def test_rows_that_another_rank_has_are_not_read(place) -> None:
    source = folder(place).open()
    read: list[int] = []

    class Counting(FolderBytes):
        def __call__(self, i: int) -> bytes:
            read.append(i)
            return super().__call__(i)

    fetch = source.listing.fetch
    counting = Counting(fetch.location, fetch.names)
    source.listing = attrs.evolve(source.listing, fetch=counting)
    seen(folder(place), source, rows=slice(5, 9), last=2)
    order = Order(TOTAL, 1).indices(0, 40)
    assert read == order[5:9] + order[25:29]


def test_an_image_is_mirrored_by_epoch_and_index_alone() -> None:
    """Whatever the batch, and whatever else is in the epoch."""
    order = Order(50, 7)
    by_image: list[dict[int, bool]] = []
    for epoch in range(2):
        indices, mirrored = order.seen(epoch * 50, 50)
        by_image.append(dict(zip(indices, mirrored.tolist(), strict=True)))
        for start, count in ((0, 7), (7, 20), (27, 23)):
            part, flips = Order(50, 7).seen(epoch * 50 + start, count)
            assert [by_image[epoch][i] for i in part] == flips.tolist()
    assert by_image[0] != by_image[1]
    assert 10 < sum(by_image[0].values()) < 40
    # Shown in another order, with repetitions: still the same images.
    labels = torch.tensor([0] * 45 + [1] * 5)
    indices, mirrored = Order(50, 7, labels).seen(0, 50)
    assert [by_image[0][i] for i in indices] == mirrored.tolist()


def test_loading_leaves_the_global_generator_alone(place) -> None:
    state = torch.get_rng_state()
    seen(folder(place), workers=1, last=1)
    assert torch.equal(state, torch.get_rng_state())


# Class-balanced sampling


@pytest.mark.parametrize("counts", [[1, 5, 60], [3, 3], [7], [1, 1, 1, 40, 2]])
def test_balanced_epochs_show_classes_equally_and_repeat_images_only_when_all_came(counts) -> None:
    labels = torch.tensor([k for k, count in enumerate(counts) for _ in range(count)])
    order = Order(len(labels), 5, labels)
    for epoch in range(3):
        indices = order.indices(epoch * len(labels), len(labels))
        shown = torch.bincount(labels[indices], minlength=len(counts))
        assert shown.max() - shown.min() <= 1
        for k, count in enumerate(counts):
            times = torch.bincount(torch.tensor([i for i in indices if labels[i] == k]))
            of_class = times[labels[: len(times)] == k]
            most = -(-int(shown[k]) // count)
            assert of_class.max() <= most
    resumed = Order(len(labels), 5, labels).indices(len(labels) + 3, 10)
    assert resumed == order.indices(len(labels) + 3, 10)


# Damaged images


@pytest.fixture
def broken(place: Path, tmp_path: Path) -> tuple[SourceConfig, list[int]]:
    """The tree with one image cut short, one that is text, one empty; and their indices."""
    tree = write_tree(tmp_path / "tree", COUNTS)
    paths = sorted(tree.rglob("*.JPEG"))
    bad = [10, 50, TOTAL - 1]
    damage(paths[10])
    paths[50].write_bytes(b"<html>404</html>")
    paths[TOTAL - 1].write_bytes(b"")
    return folder(tmp_path, on_bad_image="skip"), bad


@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_keeps_labels_and_all_other_images_where_they_are(place, broken, workers) -> None:
    config, bad = broken
    told: list = []
    source = open_source(config)
    options = {"workers": workers, "report": lambda found, seen: told.extend(found)}
    skipped, whole = seen(config, source, **options), seen(folder(place))
    order = torch.tensor(Order(TOTAL, 1).indices(0, 180)).reshape(9, 20)
    for a, b, indices in zip(skipped, whole, order, strict=True):
        assert torch.equal(a.condition.label, b.condition.label)
        same = (a.x == b.x).flatten(1).all(dim=1)
        good = ~torch.isin(indices, torch.tensor(bad))
        assert torch.equal(same, good)
    assert {s.number for s in told} == set(bad)
    labels = source.labels()
    for s in told:
        assert labels[s.number] == labels[s.instead]
        assert s.instead not in bad
        assert "damaged image" in s.what
        assert s.place.endswith(".JPEG")


def test_processes_of_one_run_share_a_list_without_repeating_themselves(tmp_path) -> None:
    """Also behind a line that a crash has torn."""
    one, two = BadImages(Store(str(tmp_path))), BadImages(Store(str(tmp_path)))
    a, b = Skipped(1, "a.jpg", "damaged", 2), Skipped(3, "b.jpg", "damaged", 4)
    assert one.add([a, a])
    assert not two.add([a, b])
    assert not one.add([b])
    file = tmp_path / "bad_images.jsonl"
    assert [json.loads(line)["image"] for line in file.read_text().splitlines()] == [
        "a.jpg",
        "b.jpg",
    ]
    file.write_text(file.read_text() + '{"image": "c.j')
    assert not BadImages(Store(str(tmp_path))).add([Skipped(5, "c.jpg", "damaged", 6)])
    assert one.listed() == {"a.jpg", "b.jpg", "c.jpg"}


def test_stopping_is_the_default_and_names_the_image(broken) -> None:
    config, _ = broken
    with pytest.raises(DataError, match=r"n0\d+_\d+.JPEG: damaged image .*on_bad_image: skip"):
        seen(attrs.evolve(config, on_bad_image="stop"))


def test_a_class_without_any_sound_image_ends_the_run(tmp_path) -> None:
    tree = write_tree(tmp_path / "tree", [3, 2])
    for path in (tree / "n00000001").iterdir():
        damage(path)
    source = Skipping(sources.ImageFolder(root=str(tree), size=SIZE, classes=2).open())
    source.read([0, 1, 2])
    with pytest.raises(DataError, match="none of the 2 images of its class can be used instead"):
        source.read([3])


def test_a_file_that_vanished_is_never_skipped(tmp_path) -> None:
    tree = write_tree(tmp_path / "tree", [3, 2])
    source = Skipping(sources.ImageFolder(root=str(tree), size=SIZE, classes=2).open())
    (tree / "n00000000/n00000000_1.JPEG").unlink()
    with pytest.raises(DataError, match="cannot be read: ") as caught:
        source.read([1])
    assert not isinstance(caught.value, BadImageError)


@pytest.mark.parametrize("side", [100, 20_000])
def test_an_image_above_the_limit_is_not_decoded(tmp_path, monkeypatch, side) -> None:
    """A picture of 400 megapixels takes 1.2 GB to decode, and 50 kB on the disk."""
    (tmp_path / "tree/a").mkdir(parents=True)
    Image.new("1", (side, side)).save(tmp_path / "tree/a/bomb.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "tree/a/small.png")
    config = sources.ImageFolder(
        root=str(tmp_path / "tree"), size=SIZE, classes=1, on_bad_image="skip", max_pixels=5000
    )
    loaded: list[tuple[int, int]] = []
    load = Image.Image.load

    def watched(image, *args):
        loaded.append(image.size)
        return load(image, *args)

    monkeypatch.setattr(Image.Image, "load", watched)
    source = open_source(config)
    source.read([0, 1])
    (skipped,) = source.take()
    assert "data.max_pixels: 5000" in skipped.what
    assert all(max(size) <= 64 for size in loaded)
