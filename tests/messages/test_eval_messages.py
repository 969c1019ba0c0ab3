"""What `e2ediff eval` says when it is given what it cannot use."""

from __future__ import annotations

import json
import struct
import zipfile

import numpy as np
import pytest
import torch
from command_line import e2ediff
from PIL import Image

from e2ediff.parts.features.inception import Inception2015

PLAIN = ("--features", "random_projection")


@pytest.fixture
def folder(tmp_path):
    """Paths of small sets, good and bad."""
    chance = np.random.default_rng(0)

    def save(name, n, size, **further):
        array = chance.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
        np.savez(tmp_path / name, arr_0=array, **further)

    save("made.npz", 8, 16)
    save("few.npz", 3, 16)
    save("large.npz", 8, 32)
    np.savez(tmp_path / "other.npz", images=np.zeros(3), labels=np.zeros(3))
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((4, 16, 16, 3)))
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(3), sigma=np.eye(4))
    (tmp_path / "no.npz").write_bytes(b"not a zip")
    save("none.npz", 0, 16)
    moments = {"sigma": np.eye(3)}
    objects = np.array([{}, {}, {}], dtype=object)
    np.savez(tmp_path / "objects.npz", mu=objects, **moments)
    np.savez(tmp_path / "words.npz", mu=np.array(["a", "b", "c"]), **moments)
    np.savez(tmp_path / "complex.npz", mu=np.zeros(3, complex), **moments)
    np.savez(tmp_path / "whole.npz", mu=np.zeros(3), **moments)
    np.savez_compressed(tmp_path / "squeezed.npz", arr_0=np.zeros((8, 16, 16, 3), np.uint8))
    _flip(tmp_path, "made.npz", "bad_images.npz", 5000)
    _flip(tmp_path, "made.npz", "bad_header.npz", 20)
    _flip(tmp_path, "made.npz", "bad_magic.npz", 0)
    _flip(tmp_path, "whole.npz", "bad_mean.npz", 128 + 8)
    _flip(tmp_path, "squeezed.npz", "bad_stream.npz", 0)
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive:
        array = zipfile.ZipFile(tmp_path / "made.npz").read("arr_0.npy")
        archive.writestr("arr_0.npy", array[:-700])
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    for i, size in enumerate((16,) * 7 + (20,)):
        Image.new("RGB", (size, size)).save(tmp_path / "mixed" / f"{i}.png")
    return tmp_path


def _flip(folder, source, name, place):
    """A copy with 9 other bytes at a place in the first array's file."""
    data = bytearray((folder / source).read_bytes())
    place += 30 + sum(struct.unpack("<HH", data[26:30]))  # behind the zip's local header
    data[place : place + 9] = (b ^ 0x5A for b in data[place : place + 9])
    (folder / name).write_bytes(data)


def said(code, *words):
    done = e2ediff("eval", *words, *PLAIN)
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    return done.err


@pytest.mark.parametrize(
    ("target", "reference", "text"),
    [
        ("other.npz", "made.npz", "holds images, labels; expected images in arr_0"),
        ("made.npz", "other.npz", "holds images, labels; expected mu and sigma"),
        ("floats.npz", "made.npz", "arr_0 is float64 (4, 16, 16, 3), expected uint8"),
        ("no.npz", "made.npz", "cannot be read as an npz"),
        ("missing.npz", "made.npz", "cannot be read as an npz"),
        ("nowhere", "made.npz", "no such file or folder; give an image, a folder of images, a zip "
         "or tar of one, or an npz"),
        ("empty", "made.npz", "holds no images (looked for .jpg"),
        ("mixed", "made.npz", "20 x 20 pixels, the first image has 16 x 16"),
        ("made.npz", "large.npz", "its images have 32 x 32 pixels (height x width), those of"),
        ("made.npz", "statistics.npz", "its statistics are of Inception features, and the network "
         "is RandomProjection128"),
        ("made.npz", "narrow.npz", "mu (3,) and sigma (4, 4), expected (F,) and (F, F)"),
        ("few.npz", "made.npz", "3 images, and the metrics need 6"),
        ("made.npz", "few.npz", "3 images, and DensityCoverage needs 6"),
        ("made.npz", "none.npz", "arr_0 holds no images, (0, 16, 16, 3); expected uint8"),
        ("none.npz", "made.npz", "arr_0 holds no images, (0, 16, 16, 3); expected uint8"),
        ("made.npz", "objects.npz", "mu or sigma cannot be read: Object arrays cannot be loaded"),
        ("made.npz", "words.npz", "mu is <U1, expected numbers, a mean (F,) and a covariance"),
        ("made.npz", "complex.npz", "mu is complex128, expected numbers, a mean (F,)"),
        ("made.npz", "bad_mean.npz", "mu or sigma cannot be read: Bad CRC-32 for file 'mu.npy'"),
        ("made.npz", "bad_images.npz", "arr_0 cannot be read: Bad CRC-32 for file 'arr_0.npy'"),
        ("bad_images.npz", "made.npz", "arr_0 cannot be read: Bad CRC-32 for file 'arr_0.npy'"),
        ("made.npz", "bad_header.npz", "bad_header.npz: arr_0 cannot be read: "),
        ("bad_header.npz", "made.npz", "bad_header.npz: arr_0 cannot be read: "),
        ("bad_magic.npz", "made.npz", "arr_0 cannot be read: the magic string is not correct"),
        ("bad_stream.npz", "made.npz", "arr_0 cannot be read: Error -3 while decompressing"),
        ("short.npz", "made.npz", "arr_0 cannot be read: it ends 700 bytes early; expected uint8"),
        ("made.npz", "data", "--reference data: only a run has data"),
    ],
)  # fmt: skip
def test_images_that_cannot_be_scored_are_refused(folder, target, reference, text) -> None:
    place = reference if reference == "data" else folder / reference
    assert text in said(5, folder / target, "--reference", place, "--cache", folder / "cache")


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--convention", "addm"], 5, "--convention addm: unknown. Did you mean 'adm'?"),
        (["--metrics", "fidd"], 3, "unknown metric 'fidd'. Did you mean 'fid' or 'sfid'?"),
        (["--metrics", "{name: kid, subset: 3}"], 3, "unknown option 'subset'"),
        (["--metrics", "sfid"], 5, "has no features called 'spatial'; it has pool"),
        (["--metrics", "cmmd"], 5, "CMMD needs a clip network, not RandomProjection128"),
        (["--metrics", "latents"], 5, "only a run has them"),
        (["--count", "9"], 5, "holds 8 images, --count asks for 9"),
        (["--sha256", "ab"], 2, "--sha256 is the hash of --weights-file; give both"),
        (["--reference", "{name: synthetik}"], 3, "unknown data source 'synthetik'"),
        (["--lpips-heads", "x"], 2, "--lpips-heads needs --lpips"),
    ],
)
def test_options_that_do_not_fit_are_refused(folder, words, code, text) -> None:
    reference = [] if "--reference" in words else ["--reference", folder / "made.npz"]
    assert text in said(code, folder / "made.npz", *reference, *words)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "{name: random_projection, width: 4}"])
def test_a_file_of_weights_for_a_network_that_reads_none_is_refused(
    folder, name, monkeypatch
) -> None:
    monkeypatch.setenv("E2EDIFF_BLOCK", "e2ediff-features")  # which would list its own, too
    words = (folder / "made.npz", "--features", name, "--weights-file", folder / "w.pth")
    done = e2ediff("eval", *words, "--reference", folder / "made.npz")
    assert done.code == 5
    bare = name.strip("{}").removeprefix("name: ").partition(",")[0]
    assert f"--weights-file: {bare} takes no file, its weights come with it; leave" in done.err
    assert "name a network that reads one: inception2015, torchvision\n" in done.err


def test_weights_of_another_network_are_refused_in_a_few_words(folder) -> None:
    own = Inception2015().state_dict()
    name, *_, last = own
    wrong = {f"encoder.{i}": torch.zeros(1) for i in range(400)}
    shape = tuple(own[last].shape)
    cases = (
        (wrong, f"{len(own)} of its {len(own)} tensors are missing ({name}, "),
        (
            wrong,
            "400 of the file's 400 are not its (encoder.0, encoder.1, encoder.2 and 397 more)",
        ),
        ({**own, last: torch.zeros(3)}, f"1 have other shapes ({last} (3,) instead of {shape})."),
    )
    for state, text in cases:
        torch.save(state, folder / "w.pth")
        done = e2ediff(
            "eval", folder / "made.npz", "--weights-file", folder / "w.pth",
            "--reference", folder / "made.npz",
        )  # fmt: skip
        assert done.code == 5
        assert "w.pth does not fit Inception2015: " in done.err
        assert text in done.err
        assert "Give weights of Inception2015." in done.err
        assert len(done.err) < 600


def test_a_missing_reference_says_what_the_convention_compares_with(folder) -> None:
    err = said(5, folder / "made.npz", "--convention", "jit")
    assert "--reference is missing: jit compares with JiT's fid_stats/jit_in256_stats.npz" in err


def test_files_that_hold_no_scores_are_named(folder) -> None:
    (folder / "a.json").write_text("{}")
    (folder / "b.json").write_text(json.dumps({"e2ediff_scores": 7}))
    done = e2ediff("compare", folder / "a.json", folder / "b.json")
    assert done.code == 5
    assert "not a file of scores as `e2ediff eval` writes them" in done.err
    done = e2ediff("compare", folder / "b.json", folder / "a.json")
    assert "scores of version 7; this e2ediff reads 1" in done.err
