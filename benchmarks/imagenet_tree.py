"""The shipped `recipes/dsd_in256.yaml` at its full size on a tree of ImageNet's form, on a CPU.

Makes 1,000 class folders of 2 to 4 small JPEGs, some of them broken, and gives the real commands
the shipped recipe with another data root, length, device, precision (a CPU emulates bfloat16),
batch and cadence; the network is the recipe's.
One run is left alone; another is stopped by SIGTERM before its last step and resumed; both
checkpoints must agree in every bit. Then an image is sampled.
Takes 14 GB of memory, 9 GB of disk and some minutes of a core.

    $ python benchmarks/imagenet_tree.py --out imagenet_tree
"""

from __future__ import annotations

import argparse
import filecmp
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

RECIPE = Path(__file__).parents[1] / "recipes" / "dsd_in256.yaml"
SMALLER = (
    "batch=1",
    "microshards=1",
    "data.on_bad_image=skip",
    "precision=float32",
    "device=cpu",
    "probe={images: 1, calibration: 1}",
    "preview={rows: 1, classes: 1}",
    "sampler.steps=2",
    "cadence={log: 1, diagnose: 1000, preview: 1000, checkpoint: 1000}",
)


def make_tree(root: Path) -> int:
    """2 to 4 images of a class, in colours of its own; every eighth class has a broken one."""
    g, count = np.random.default_rng(0), 0
    for k in range(1000):
        folder = root / f"n{k:08}"
        folder.mkdir(parents=True)
        for i in range(2 + k % 3):
            out = io.BytesIO()
            coarse = Image.fromarray(g.integers(256, size=(3, 3, 3), dtype=np.uint8))
            coarse.resize((48, 40), Image.Resampling.BICUBIC).save(out, "JPEG")
            data = out.getvalue()
            cut = len(data) // 2 if i == 1 and k % 8 == 0 else len(data)
            (folder / f"{folder.name}_{i}.JPEG").write_bytes(data[:cut])
            count += 1
    return count


def e2ediff(*words: object, stop: Path | None = None, code: int = 0) -> float:
    """Seconds of a command, which must end with this code; SIGTERM once `stop` has a loss.

    The run ends after the step it is in by then: the second, of three.
    """
    began = time.perf_counter()
    command = [sys.executable, "-m", "e2ediff", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while stop is not None and process.poll() is None:
            if stop.exists() and "loss/denoising" in stop.read_text():
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.1)
    if process.returncode != code:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}, expected {code}")
    return time.perf_counter() - began


def tensors(run: Path) -> list[Path]:
    """The files of tensors of a run's last checkpoint."""
    return sorted(sorted((run / "checkpoints").glob("images-*"))[-1].glob("*.safetensors"))


def main() -> None:
    """Make the tree, run the commands, print what they took."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a new folder, removed at the end")
    out: Path = parser.parse_args().out
    out.mkdir()
    tree, whole, stopped = out / "train", out / "whole", out / "stopped"
    print(f"{make_tree(tree):,} images of 1,000 classes")
    changes = (f"data.root={tree}", "steps=3", *SMALLER)
    run = ("run", RECIPE, *(w for change in changes for w in ("--set", change)), "--threads", 1)
    print(f"3 steps: {e2ediff(*run, '--out', whole):.0f} s")
    seconds = e2ediff(*run, "--out", stopped, stop=stopped / "metrics.jsonl", code=75)
    print(f"stopped before the last step: {seconds:.0f} s")
    print(f"resumed: {e2ediff(*run, '--out', stopped, '--resume'):.0f} s")
    pairs = list(zip(tensors(whole), tensors(stopped), strict=True))
    if not pairs or not all(filecmp.cmp(a, b, shallow=False) for a, b in pairs):
        raise SystemExit("the resumed run's checkpoint differs from the other's")
    size = sum(path.stat().st_size for path, _ in pairs) / 1e9
    print(f"{len(pairs)} files of tensors, {size:.1f} GB, agree in every bit")
    one = ("--label", 207, "--count", 1, "--rows", 1)
    seconds = e2ediff("sample", stopped, *one, "--out", out / "samples")
    print(f"sampled {len(list((out / 'samples/images').glob('*.png')))} image: {seconds:.0f} s")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"peak {used.ru_maxrss / 1e6:.1f} GB, {used.ru_utime + used.ru_stime:.0f} s of CPU time")
    print(f"machine: {os.cpu_count()} cores, one thread used")
    shutil.rmtree(out)


if __name__ == "__main__":
    main()
