"""Batches on a GPU are those of the CPU, copied from pinned memory while the GPU is busy."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from e2ediff.loading.batches import batches
from e2ediff.parts.sources import Synthetic

# Python 3.12 warns of forking beside threads; workers use neither CUDA nor locks of others.
pytestmark = [
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Warning. Profiler clears events"),
]

_BUSY = 20_000_000  # cycles, about ten milliseconds


def stream(device: torch.device, workers: int):
    config = Synthetic(size=32, classes=4, count=64)
    return batches(
        config.open(), config.image, batch=16, microshards=4, seed=1, first=0, last=12, flip=True,
        workers=workers, device=device,
    )  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_the_same_numbers_while_the_device_is_busy(workers, device) -> None:
    """A batch is freed before the device has read it, and the next one is copied meanwhile."""
    seen = []
    for batch in stream(device, workers):
        if device.type == "cuda":
            torch.cuda._sleep(_BUSY)
        seen.append((batch.x.clone(), *(t.clone() for t in batch.condition.tensors().values())))
        del batch
    expected = [
        (batch.x, *batch.condition.tensors().values())
        for batch in stream(torch.device("cpu"), workers=0)
    ]
    assert len(seen) == len(expected) == 12
    for ours, theirs in zip(seen, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.device.type == device.type
            # 0..255 becomes [-1, 1] on the device, whose division may round otherwise.
            torch.testing.assert_close(a.cpu(), b, rtol=0.0, atol=1e-6)


def test_images_are_copied_from_pinned_memory_on_another_stream_than_work(cuda) -> None:
    torch.ones(1, device=cuda)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as made:
        for batch in stream(cuda, workers=2):
            torch.cuda._sleep(_BUSY)
            batch.x.sum()
        torch.cuda.synchronize()
    events = [
        event
        for event in made.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA
    ]
    copies = [event for event in events if "Memcpy HtoD" in event.name()]
    assert len(copies) >= 12
    assert not [event.name() for event in copies if "Pageable" in event.name()]
    work = [event for event in events if "reduce" in event.name()]
    streams = [{event.device_resource_id() for event in group} for group in (copies, work)]
    assert streams[0].isdisjoint(streams[1])
