"""The copy of a run's tensors from which a checkpoint is written while training goes on."""

from __future__ import annotations

import itertools
import resource

import pytest
import torch
from real_steps import engine_of

from e2ediff.host.recipe import parse_recipe
from e2ediff.train import staging
from e2ediff.train.staging import Staging

TYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64)


def tensors(seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """Of many types and shapes, one of them empty, one a number, one transposed, one twice."""
    g = torch.Generator().manual_seed(seed)
    found = {
        f"{dtype} {shape}": (100 * torch.randn(shape, generator=g)).to(dtype)
        for dtype in TYPES
        for shape in ((), (0, 3), (3,), (5, 7), (64, 33))
    }
    found["turned"] = torch.randn(6, 4, generator=g).mT
    found["tied"] = found["torch.float32 (5, 7)"]
    return {"one": found, "other": {"w": torch.randn(9, generator=g)}}


@pytest.fixture(params=[1 << 28, 256], ids=["one chunk", "many chunks"])
def place(request, monkeypatch) -> Staging:
    monkeypatch.setattr(staging, "_CHUNK", request.param)
    return Staging()


def test_a_copy_has_every_value_and_no_memory_of_the_original(place) -> None:
    given = tensors()
    copies = place.copy(given, keep=True)
    place.wait()
    wanted = {file: {k: t.clone() for k, t in held.items()} for file, held in given.items()}
    for held in given.values():
        for tensor in held.values():
            tensor.zero_()
    for file, held in wanted.items():
        assert copies[file].keys() == held.keys()
        for key, value in held.items():
            assert torch.equal(copies[file][key], value), key
            assert copies[file][key].dtype == value.dtype
            assert copies[file][key].is_contiguous()
    assert copies["one"]["tied"] is copies["one"]["torch.float32 (5, 7)"]


def test_no_two_tensors_of_a_copy_overlap_and_all_are_aligned(place) -> None:
    copies = place.copy(tensors(), keep=True)
    spans = sorted(
        {(t.data_ptr(), t.nbytes) for held in copies.values() for t in held.values() if t.numel()}
    )
    assert all(start % 16 == 0 for start, _ in spans)
    assert all(a + size <= b for (a, size), (b, _) in itertools.pairwise(spans))


def test_the_next_copy_takes_the_same_memory_and_other_sizes_fit_it_too(place) -> None:
    first = place.copy(tensors(), keep=True)["one"]
    again = place.copy(tensors(1), keep=True)["one"]
    assert all(again[key].data_ptr() == value.data_ptr() for key, value in first.items())
    assert torch.equal(again["turned"], tensors(1)["one"]["turned"])
    more = {"one": {"large": torch.arange(1000.0)}}
    assert torch.equal(place.copy(more, keep=True)["one"]["large"], torch.arange(1000.0))


def test_memory_is_freed_where_not_as_much_again_is_free(monkeypatch) -> None:
    free = iter([None, 10**9, 0])
    place = Staging(lambda: next(free))
    place.copy(tensors(), keep=True)
    size = place.size
    place.release()
    assert sum(room.given for room in place._rooms.values()) > 0.9 * size
    place.release()
    assert sum(room.given for room in place._rooms.values()) == 0


def test_where_a_copy_does_not_fit_there_is_none(monkeypatch) -> None:
    place, given = Staging(lambda: 100), tensors()
    copies = place.copy(given, keep=True)
    assert not place.fits
    assert all(copies[file][key] is t for file, held in given.items() for key, t in held.items())


# Memory that is asked for beforehand


def faults() -> int:
    """Pages that this thread has waited for."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt


def chunks(place: Staging) -> list[int]:
    return [chunk.data_ptr() for chunk in place._rooms[False]._chunks]


@pytest.mark.parametrize("chunk", [1 << 10, 256])
def test_a_copy_takes_the_memory_that_was_asked_for_and_no_more(chunk, monkeypatch) -> None:
    monkeypatch.setattr(staging, "_CHUNK", chunk)
    place, given = Staging(), tensors()
    place.prepare(given)
    before = chunks(place)
    copies = place.copy(given, keep=True)
    assert chunks(place) == before != []
    assert torch.equal(copies["one"]["turned"], given["one"]["turned"])


@pytest.mark.skipif(not hasattr(resource, "RUSAGE_THREAD"), reason="needs Linux")
def test_a_copy_waits_for_no_page_of_it() -> None:
    """One that nothing was asked for beforehand waits for every page of 300 MB."""
    given, waited = {"one": {"w": torch.ones(75_000_000)}}, []
    for asked in (False, True):
        place = Staging()
        if asked:
            place.prepare(given)
            place.settle()
        before = faults()
        place.copy(given, keep=True)
        waited.append(faults() - before)
        del place
    assert waited[0] > 100  # of 4 kB, or of 2 MB
    assert waited[1] < waited[0] / 10


def test_no_memory_is_asked_for_where_it_is_little_or_would_not_fit(monkeypatch) -> None:
    little = Staging()
    little.prepare(tensors())
    monkeypatch.setattr(staging, "_CHUNK", 256)
    size = sum(t.nbytes for held in tensors().values() for t in held.values())
    short = Staging(lambda: round(1.5 * size))
    short.prepare(tensors())
    assert chunks(little) == chunks(short) == []
    for place in (little, short):
        place.settle()
        place.abandon()


def test_what_is_given_up_is_not_taken_by_a_later_copy(monkeypatch) -> None:
    """A thread may still write to it."""
    monkeypatch.setattr(staging, "_CHUNK", 256)
    place, given = Staging(), tensors()
    place.prepare(given)
    written = [*place._rooms[False]._chunks]  # kept, so that no address is used twice
    place.abandon()
    place.copy(given, keep=True)
    assert {*chunks(place)}.isdisjoint(chunk.data_ptr() for chunk in written)
    assert written


def test_a_run_asks_for_it_after_three_steps(host, tiny_text, tmp_path, monkeypatch) -> None:
    """The first ones are timed."""
    monkeypatch.setattr(staging, "_CHUNK", 256)
    engine = engine_of(host, parse_recipe(host, tiny_text, "tiny", []), tmp_path / "run")
    asked, at = [], engine.position
    for batch in itertools.islice(engine._batches(), 4):
        record = engine.update(batch, at.images)
        at.step, at.images = at.step + 1, at.images + engine.recipe.batch
        engine._after_step(record)
        asked.append(len(chunks(engine.saver.staging)) > 0)
    engine.saver.save()
    assert asked == [False, False, True, True]
