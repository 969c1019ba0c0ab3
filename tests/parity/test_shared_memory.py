"""Workers share each batch in parts, which change nothing and take little shared memory."""

from __future__ import annotations

import ctypes
import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import connection, resource_sharer
from pathlib import Path

import attrs
import forked
import pytest
import torch
from pictures import damage, write_tree
from source_kinds import COUNTS, TOTAL, folder
from tiny_recipe import tiny
from torch import Tensor
from torch.utils.data import Dataset

from e2ediff.condition import TokenSpec
from e2ediff.data import DataSource, ImageSpec, Original, SourceConfig
from e2ediff.errors import DataError, ResourceError
from e2ediff.host.plugins import load
from e2ediff.host.recipe import load_recipe
from e2ediff.loading.bad_images import Skipped, open_source
from e2ediff.loading.batches import batches, read
from e2ediff.loading.shared_memory import divide, usable

pytestmark = pytest.mark.usefixtures("cache")

CPU = torch.device("cpu")
LARGE = ImageSpec(3, 256, 256, 1000)
RECIPES = Path(__file__).parents[2] / "recipes"


def large(place: Path, **options: object) -> SourceConfig:
    """The tree in images so large that 20 of them are divided."""
    return attrs.evolve(folder(place, **options), size=256)


def seen(config: SourceConfig, **options: object):
    given = {"batch": 20, "seed": 1, "first": 0, "last": 8, "workers": 0, **options}
    return list(batches(open_source(config), config.image, flip=True, device=CPU, **given))


@pytest.fixture(scope="module")
def whole(place: Path):
    """Eight batches, read as a whole in this process."""
    return seen(large(place))


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("microshards", [1, 2, 4, 20])
def test_divided_batches_are_the_same_to_the_bit(place, whole, workers, microshards) -> None:
    """They cross the end of an epoch, and half of the images are mirrored."""
    config = large(place)
    items = divide(config.image, 20, microshards, usable(workers)).items
    assert items > 1 or workers == 0 or (usable(workers) == 1 and microshards == 1)
    found = seen(config, workers=workers, microshards=microshards)
    for a, b in zip(found, whole, strict=True):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.condition.label, b.condition.label)


@pytest.mark.parametrize("rows", [slice(0, 10), slice(10, 20), slice(15, 20)])
def test_divided_rows_of_a_process_are_those_of_the_batch(place, whole, rows) -> None:
    found = seen(large(place), workers=1, microshards=20, rows=rows)
    for a, b in zip(found, whole, strict=True):
        assert torch.equal(a.x, b.x[rows])
        assert torch.equal(a.condition.label, b.condition.label[rows])


# What is divided, and how much it takes


CASES = [
    (image, batch, microshards, workers, processes)
    for image in (LARGE, ImageSpec(3, 32, 32, 10), ImageSpec(1, 8, 8, 0),
                  ImageSpec(3, 2048, 2048, 2),
                  ImageSpec(3, 64, 64, 0, conditioning=TokenSpec(77, 768)))
    for batch in (8, 256, 1024)
    for microshards in (1, 8, batch)
    for workers in (1, 2, 16, 100)
    for processes in (1, 8)
    if microshards % processes == 0
]  # fmt: skip


def bytes_of(image: ImageSpec) -> int:
    condition = sum(t.nbytes for t in image.conditioning.example(1).tensors().values())
    return image.channels * image.height * image.width + condition


def test_an_item_is_at_most_a_micro_shard_and_a_worker_s_share_unless_that_is_little() -> None:
    for image, batch, microshards, workers, processes in CASES:
        rows, found = batch // processes, divide(image, batch, microshards, workers, processes)
        assert found.rows * (found.items - 1) < rows <= found.rows * found.items
        little = max((1 << 20) / bytes_of(image), rows / 64 + 1)
        most = min(batch / microshards, rows / workers + 1)
        assert found.rows <= max(most, little, 1)
        assert found.items <= max(64, workers)


def test_two_batches_and_an_item_lie_in_shared_memory_or_two_items_a_worker() -> None:
    for image, batch, microshards, workers, processes in CASES:
        found = divide(image, batch, microshards, workers, processes)
        ready = workers * found.ahead
        assert ready >= 2 * found.items, "two batches are read ahead"
        assert ready == 2 * workers or ready < 2 * found.items + workers
        item = found.rows * bytes_of(image)
        least = processes * (ready + 1) * item
        assert least <= found.needed <= least + processes * (ready + 1) * 4 * 4096
        assert divide(image, batch, microshards, 0, processes).needed == 0


@pytest.mark.parametrize(
    "name", ["dsd_in256", "dsd_in256_s", "jit_in256", "unite_in256", "ldm_is_ae_in256"]
)
def test_recipes_of_1024_large_images_need_less_than_half_a_gigabyte(name) -> None:
    """When an item was a batch, 16 workers held 33 of them, 6.6 GB."""
    recipe = load_recipe(load(), str(RECIPES / f"{name}.yaml"))
    for workers in (4, 8, 16):
        found = divide(recipe.data.image, recipe.batch, recipe.microshards, workers)
        assert found.needed < 5e8
        assert found.rows <= recipe.batch // recipe.microshards


@attrs.frozen
class Told(DataSource):
    """Large images whose labels are the process that read them."""

    count: int = 500

    def __len__(self) -> int:
        return self.count

    def read(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        x = torch.zeros(len(indices), 3, 256, 256, dtype=torch.uint8)
        return x, torch.full((len(indices),), os.getpid())

    def labels(self) -> Tensor:
        return torch.zeros(self.count, dtype=torch.long)

    def path_of(self, index: int) -> str:
        return str(index)

    def original(self, index: int) -> Original:
        return Original(256, 256)


def told(**options: object):
    return batches(Told(), LARGE, seed=0, first=0, flip=True, device=CPU, **options)


def test_all_workers_read_an_equal_share_of_the_first_batch() -> None:
    first = next(told(batch=48, last=9, workers=2))
    shares = Counter(first.condition.label.tolist())
    assert len(shares) == usable(2)
    assert os.getpid() not in shares
    assert len({*shares.values()}) == 1


def held(pids: Sequence[int]) -> int:
    """Bytes of the shared memory that images lie in, of all open files of these processes."""
    files = {}
    for pid in pids:
        for file in Path(f"/proc/{pid}/fd").iterdir():
            try:
                if os.readlink(file).startswith("/dev/shm/torch_"):
                    about = file.stat()
                    files[about.st_ino] = about.st_blocks * 512
            except FileNotFoundError:
                continue  # closed since it was listed
    return sum(files.values())


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's /proc")
@pytest.mark.parametrize("microshards", [1, 8])
def test_workers_that_are_ready_hold_what_was_computed_and_no_more(microshards) -> None:
    others = multiprocessing.active_children()
    needed = divide(LARGE, 48, microshards, usable(2)).needed
    found = told(batch=48, last=9, workers=2, microshards=microshards)
    highest = 0
    for _ in range(2):
        next(found)
        pids = [
            os.getpid(),
            *(p.pid for p in multiprocessing.active_children() if p not in others),
        ]
        last, until = -1, time.monotonic() + 20
        while (now := held(pids)) != last or now < 2 * 48 * 3 * 256**2:
            assert time.monotonic() < until, "two batches are never ready"
            last, highest = now, max(highest, now)
            time.sleep(0.3)
    assert highest <= needed


# Damaged images


@pytest.fixture
def broken(tmp_path: Path) -> SourceConfig:
    tree = write_tree(tmp_path / "tree", COUNTS)
    paths = sorted(tree.rglob("*.JPEG"))
    for i in (10, 50, 51, TOTAL - 1):
        damage(paths[i])
    return large(tmp_path, on_bad_image="skip")


def report(found: list, skipped: Sequence[Skipped], seen: int) -> None:
    found.append(([*skipped], seen))


def test_skipped_images_of_a_divided_batch_are_reported_together_and_in_order(broken) -> None:
    """By one worker, as each worker reports what it meets first."""
    reports: dict[int, list] = {0: [], 1: [], 2: []}
    for workers, found in reports.items():
        add = partial(report, found)
        seen(broken, workers=workers, microshards=4, report=add)
    assert reports[1] == reports[0]
    assert len(reports[0]) > 1
    ours, theirs = ({one for skipped, _ in reports[k] for one in skipped} for k in (2, 0))
    assert ours == theirs


def children_end(others: Sequence[multiprocessing.Process]) -> bool:
    """Whether all processes but these end; Python waits for them for ever as it ends itself."""
    until = time.monotonic() + 20
    while left := {*multiprocessing.active_children()} - {*others}:
        if time.monotonic() > until:
            return False
        left.pop().join(0.1)
    return True


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_damaged_image_of_the_order_is_the_one_that_stops(broken, workers) -> None:
    """No process reads on, though the error is kept."""
    others = multiprocessing.active_children()
    stops = attrs.evolve(broken, on_bad_image="stop")
    ends = []
    for number in (0, workers):
        found = batches(open_source(stops), stops.image, batch=20, seed=1, first=0, last=8,
                        flip=False, workers=number, device=CPU, microshards=4)  # fmt: skip
        steps = iter(range(8))
        with pytest.raises(DataError) as caught:
            list(zip(steps, found, strict=False))
        ends.append((str(caught.value), next(steps)))
        assert children_end(others)
    assert ends[0] == ends[1]


# Too little shared memory


# Runs commands, each with so much of it, as forks of a process that has imported torch.
SERVER = """
import json, subprocess, sys
sys.path.append(sys.argv[1])
from forked import Forked
for size, *words in json.loads(sys.argv[2]):
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "/dev/shm"], check=True)
    done = Forked([sys.executable, "-m", "e2ediff", *words], stdout=-1, stderr=-1, text=True)
    out, err = done.communicate()
    print(json.dumps([done.returncode, out, err]))
"""


def with_shared_memory(*commands: Sequence[object]) -> list[tuple[int, str, str]]:
    """Exit codes and streams of commands, each after the size of it that the command sees.

    Skips the test where that is not allowed.
    """
    unshare = ["unshare", "--mount"]
    mount = ["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    if not shutil.which("unshare") or subprocess.run([*unshare, *mount]).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    words = [sys.executable, "-c", SERVER, Path(forked.__file__).parent]
    given = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run(
        [*unshare, *words, given], text=True, stdout=subprocess.PIPE, timeout=200, check=True
    )
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


class NoItem(Dataset[object]):
    """Gives what cannot be handed over."""

    def __getitem__(self, index: int) -> object:
        return threading.Lock()


@pytest.mark.timeout(60)
def test_what_cannot_be_handed_over_ends_the_reading_with_its_cause(capfd) -> None:
    with pytest.raises(ResourceError, match="a process that reads images died"):
        list(read(NoItem(), range(2), 1, option="--workers"))
    assert "cannot pickle" in capfd.readouterr().err


class Ends(Dataset[Tensor]):
    """Gives an item, and ends the process that gave it soon after."""

    def __init__(self, end: Callable[[], object]) -> None:
        self.end = end

    def __getitem__(self, index: int) -> Tensor:
        threading.Timer(0.2, self.end).start()
        return torch.zeros(1000)


class Later:
    """Indices of which the second is given when the process that had the first is gone."""

    def __init__(self) -> None:
        self.others = multiprocessing.active_children()

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[int]:
        (worker,) = (p for p in multiprocessing.active_children() if p not in self.others)
        yield 0
        connection.wait([worker.sentinel])
        yield 1


def end_slowly() -> None:
    """End as a process of much memory does: its files are closed before it has an exit code."""
    resource_sharer._resource_sharer._listener.close()  # nobody can fetch what it handed over
    os.closerange(3, 1024)
    ctypes.PyDLL(None).usleep(500_000)  # no other thread of Python goes on meanwhile
    os._exit(errno.ENOSPC)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("end", "said"),
    [(partial(os._exit, errno.ENOSPC), "through which images are passed is full"),
     (end_slowly, "through which images are passed is full"),
     (partial(os._exit, 3), "exited with code 3"),
     (partial(signal.raise_signal, signal.SIGKILL), "is killed by signal: Killed")],
    ids=["full", "slowly", "code", "killed"],
)  # fmt: skip
def test_an_item_whose_process_is_gone_before_it_is_fetched_is_reported_as_such(end, said) -> None:
    """Its memory is fetched from that process, which ends as an end of file or a lost connection.

    The first is what the command line takes for Ctrl-D.
    """
    with pytest.raises(ResourceError, match="a process that reads images died") as caught:
        list(read(Ends(end), Later(), 1, option="--workers"))
    assert said in str(caught.value)


class Raises(Dataset[Tensor]):
    def __getitem__(self, index: int) -> Tensor:
        raise FileNotFoundError("an image of a source")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_source_is_not_taken_for_a_process_that_died(workers) -> None:
    """No process reads on, though the error is kept."""
    others = multiprocessing.active_children()
    with pytest.raises(FileNotFoundError, match="an image of a source") as caught:
        list(read(Raises(), range(2), workers, option="--workers"))
    assert children_end(others)
    assert caught.value.__traceback__ is not None


@pytest.fixture
def elsewhere() -> Iterator[Path]:
    """A folder that a file system mounted on /dev/shm does not hide, as it may `tmp_path`."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.timeout(240)
def test_a_run_warns_of_too_little_shared_memory_and_ends_with_the_remedy(elsewhere) -> None:
    """Torch drops what does not fit, for which the run waited for ever; `doctor` compares, too."""
    root = write_tree(elsewhere / "tree", [20, 20])
    data = f"{{name: image_folder, root: {root}, size: 64, classes: 2, workers: 1}}"
    (elsewhere / "x.yaml").write_text(tiny(batch="32", data=data, steps="50"))
    run = elsewhere / "run"
    sizes = {"800k": "warning", "80m": "ok"}
    (code, _, err), *doctors = with_shared_memory(
        ("800k", "run", elsewhere / "x.yaml", "--out", run),
        *((size, "doctor", run, "--json") for size in sizes),
    )
    assert code == 8, err
    up_to = f"{divide(ImageSpec(3, 64, 64, 2), 32, 1, 1).needed / 1e6:,.0f} MB"
    remedy = "provide more (docker run --shm-size=2g), or set data.workers to 0"
    for said in (
        "warning: /dev/shm has 1 MB free, and the processes that read images need up to "
        f"{up_to} of it; the run ends if it is full: {remedy}",
        "a process that reads images died (DataLoader worker (pid ",
        "No space left on device): the shared memory through which images are passed is full: "
        f"up to {up_to} are needed; {remedy}. What was saved is intact",
    ):
        assert said in err
    assert "Traceback" not in err
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 8)
    for (_, out, _), state in zip(doctors, sizes.values(), strict=True):
        (found,) = (one for one in json.loads(out) if one["name"] == "run's workers")
        assert found["state"] == state
        assert f"up to {up_to} of " in found["what"]
        assert ("--shm-size=2g" in found["hint"]) == (state == "warning")
