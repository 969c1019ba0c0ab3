"""No work where an image is already as it is read: counts of calls, which no machine changes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from source_kinds import SIZE, folder, make
from torch.utils._python_dispatch import TorchDispatchMode

from e2ediff.data import HeightWidth
from e2ediff.files.arrays import InMemory, picture
from e2ediff.files.images import centre_crop, to_mode
from e2ediff.loading.batches import batches

pytestmark = pytest.mark.usefixtures("cache")


class Calls(TorchDispatchMode):
    """Counts what torch does with bytes and with floats."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.floats = Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor) and one.dtype in (torch.uint8, torch.float32):
                kind = self.bytes if one.dtype == torch.uint8 else self.floats
                kind[func.overloadpacket.__name__] += 1
        return out


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_a_picture_of_its_mode_and_size_is_handed_on_as_it_is(mode: str, channels: int) -> None:
    image = Image.effect_noise((12, 8), 50).convert(mode)
    assert to_mode(image, channels) is image
    assert centre_crop(image, HeightWidth(8, 12)) is image
    assert to_mode(image, 4 - channels) is not image
    assert centre_crop(image, HeightWidth(8, 8)).size == (8, 8)


@pytest.mark.parametrize("kind", ["prepared as png", "prepared as raw", "zip", "parquet"])
def test_images_of_a_source_are_read_into_one_array(kind, place, tmp_path) -> None:
    """No image has an array of its own that is copied into that of the batch."""
    source = make(kind, place, tmp_path).open()
    with Calls() as calls:
        x, _ = source.read(range(50))
    assert x.is_contiguous()
    assert calls.bytes["empty"] == 1
    copies = {"stack", "cat", "clone", "copy_", "new_empty", "contiguous"}
    assert not copies & calls.bytes.keys()


def test_images_in_memory_are_cropped_into_one_array() -> None:
    g = torch.Generator().manual_seed(0)
    for channels in (1, 3):
        x = torch.randint(256, (5, channels, 9, 14), dtype=torch.uint8, generator=g)
        source = InMemory(x, torch.zeros(5, dtype=torch.int64), HeightWidth(6, 7))
        with Calls() as calls:
            found, _ = source.read(range(5))
        assert calls.bytes["new_empty"] == 1
        assert not {"stack", "clone"} & calls.bytes.keys()
        for one, pixels in zip(found, x, strict=True):
            cut = np.array(centre_crop(picture(pixels), HeightWidth(6, 7)))
            assert np.array_equal(one.permute(1, 2, 0).numpy(), cut.reshape(6, 7, channels))


def test_images_are_mirrored_as_bytes_and_become_floats_once(place) -> None:
    """Half of them, in one pass over the batch."""
    config = folder(place)
    with Calls() as calls:
        found = batches(
            config.open(), config.image, batch=20, seed=1, first=0, last=3, flip=True,
            workers=0, device=torch.device("cpu"),
        )  # fmt: skip
        assert [batch.x.shape for batch in found] == 3 * [(20, 3, SIZE, SIZE)]
    assert 15 < calls.bytes["flip"] < 45
    assert calls.bytes["stack"] == 3
    assert calls.floats.keys() <= {"_to_copy", "div_", "sub_", "rand", "empty", "lt"}
    assert calls.floats["_to_copy"] == 3
