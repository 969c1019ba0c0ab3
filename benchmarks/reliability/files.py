"""Damage what runs, sets, scores, groups, sweeps, caches and data sets consist of, and read it.

A thing is a directory that a command has made, or data; a trial copies it, damages one of its
files and gives it to one of the commands that read it. Bytes are changed, values of JSON and YAML
replaced, members of archives exchanged, files replaced by others' or by what is no file. Files of
a checkpoint are resealed half of the time: their manifest agrees, and their content is read.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import shutil
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs

from benchmarks.reliability import runs
from benchmarks.reliability.fuzz import (
    CODES,
    MISTYPED,
    MOST_MEMORY,
    damaged,
    odd_json,
    with_memory,
)
from benchmarks.reliability.trials import Suite, Trial, command

PROMISES = {
    "traceback": "no file leads to a traceback",
    "code": "the command ends with 0 or a documented code, and by itself",
    "named": "what it refuses is named: the file, its folder, or the key of the recipe",
    "slow": "it ends within 60 seconds",
    "kept": "a command that only reads changes nothing of what it reads",
    "memory": f"a file of some kilobytes never takes {MOST_MEMORY} MB",
}
PATIENCE = 60.0
READS = {"sample", "eval", "report", "compare", "ckpt list", "ckpt verify", "ckpt info",
         "ckpt prune --dry-run", "ckpt export", "reconstruct", "interpolate", "sweep", "check",
         "plan"}  # fmt: skip
"""Commands that leave a run as it is, where what they write goes elsewhere."""
NO_THREADS = ("report", "compare", "ckpt", "data", "check", "plan")
PROJECTION = "{name: random_projection, width: 4}"
SCORED = ("--features", PROJECTION, "--metrics", "[fid]")

Words = Callable[[Path, Path], list[str]]
"""Gives the words of a command for a copy of a thing and a place for what it writes."""


@attrs.frozen
class Thing:
    """A directory or data, and the commands that read it, by name."""

    kind: str
    tree: Path
    commands: dict[str, Words]


@attrs.frozen
class Setup:
    """All things, with each of their files' kinds and each of their commands in turn."""

    things: tuple[Thing, ...]
    turns: tuple[tuple[Thing, str], ...]


def prepare(place: Path) -> Setup:
    """Make the things, and check that each command reads them where they are whole."""
    place.mkdir(parents=True, exist_ok=True)
    setup = _made(place)
    if wrong := check_commands(setup, place):
        raise RuntimeError("; ".join(wrong.values()))
    return setup


def check_commands(setup: Setup, place: Path) -> dict[tuple[str, str], str]:
    """Return which commands refuse a thing that is whole; import what the others import."""
    modules, log, wrong = place / "modules", place / "log", {}
    for number, (thing, name) in enumerate(setup.turns):
        folder = place / f"whole{number}"
        tree = _copied(thing, folder)
        words = thing.commands[name](tree, folder / "out")
        words += _threads(words[0])

        def act(words: list[str] = words, folder: Path = folder) -> int:
            os.environ["E2EDIFF_CACHE"] = str(folder / "cache")
            code = runs.command(words)
            modules.write_text("\n".join(sys.modules))
            return code

        since = time.monotonic()
        ended = runs.wait(runs.begin(act, log, runs.without_drawing), log, since, 180)
        if ended.code != 0:
            wrong[thing.kind, name] = f"{thing.kind}: {name}: exit {ended.code}: {ended.last}"
        else:
            runs.import_all(modules.read_text().splitlines())
        shutil.rmtree(folder)
    return wrong


def _made(place: Path) -> Setup:
    recipe, log = place / "tiny.yaml", place / "log"
    changes = {**runs.FULL, "steps": "2", "post_hoc": "{every: 1}", "checkpoint": "{keep: 2}"}
    changes["cadence"] = "{log: 1, diagnose: 1, preview: 1, checkpoint: 1}"
    recipe.write_text(runs.recipe(changes))
    runs.warm(place, recipe.read_text())

    def done(*words: object) -> None:
        ended = runs.fork([*words, *_threads(words[0])], log, runs.without_drawing, 180)
        if ended.code != 0:
            raise RuntimeError(f"{words}: {ended.said}")

    run, other = place / "run", place / "other"
    done("run", recipe, "--out", run)
    done("run", recipe, "--out", other, "--set", "seed=1")
    things = [Thing("run", run, _of_run(other))]
    for form in ("png", "npz", "zip", "tar"):
        given = ("sample", run, "--count", 6, "--format", form, "--out")
        done(*given, place / form)
        things.append(Thing(f"set as {form}", place / form, {
            "sample": lambda t, o, given=given: [*map(str, given), str(t)],
            "eval": lambda t, o: ["eval", str(t), "--reference", str(place / "data/tree"),
                                  *SCORED, "--out", str(o)],
            "eval --reference": lambda t, o: ["eval", str(run), "--reference", str(t),
                                              "--count", "4", *SCORED, "--out", str(o)],
        }))  # fmt: skip
    score = ("eval", run, "--count", 8, *SCORED)
    cached = (*score, "--cache", place / "features", "--out", place / "scores")
    done(*cached)
    done(*score, "--seed", 1, "--cache", place / "features", "--out", place / "scores1")
    things += [
        Thing("scores", place / "scores", {
            "compare": lambda t, o: ["compare", *map(str, sorted(t.glob("*.json"))),
                                     *map(str, sorted((place / "scores1").glob("*.json")))],
        }),
        Thing("features of references", place / "features", {
            "eval": lambda t, o: [*map(str, score), "--cache", str(t), "--out", str(o)],
        }),
    ]  # fmt: skip
    ablate = ("ablate", recipe, "--vary", "optimizer.lr=0.01,0.02", "--seeds", 0, "--out")
    done(*ablate, place / "group")
    things.append(Thing("ablation", place / "group", {
        "ablate": lambda t, o: [*map(str, ablate), str(t), "--resume"],
        "report": lambda t, o: ["report", str(t), "--out", f"{o}.html"],
        "compare": lambda t, o: ["compare", *map(str, sorted((t / "runs").iterdir()))],
    }))  # fmt: skip
    sweep = ("sweep", run, "--vary", "sampler.steps=1,2", "--count", 6, "--features", PROJECTION)
    done(*sweep, "--out", place / "sweep")
    things.append(Thing("sweep", place / "sweep", {
        "sweep again": lambda t, o: [*map(str, sweep), "--out", str(t)],
    }))  # fmt: skip
    things += _data(place / "data", recipe, done)
    turns = [(thing, name) for thing in things for name in thing.commands]
    return Setup(tuple(things), tuple(turns))


def _threads(name: object) -> list[str]:
    return [] if name in NO_THREADS else ["--threads", "1"]


def _of_run(other: Path) -> dict[str, Words]:
    one = ["--count", "1", "--label", "0"]
    return {
        "sample": lambda t, o: ["sample", str(t), *one, "--out", str(o)],
        "sample --weights ema": lambda t, o: ["sample", str(t), *one, "--weights", "ema:0.1",
                                              "--out", str(o)],
        "run --resume": lambda t, o: ["run", "--resume", str(t)],
        "run --resume --set": lambda t, o: ["run", "--resume", str(t), "--set", "steps=3"],
        "run resolved.yaml": lambda t, o: ["run", str(t / "resolved.yaml"), "--out", str(o)],
        "eval": lambda t, o: ["eval", str(t), "--count", "4", *SCORED, "--out", str(o)],
        "report": lambda t, o: ["report", str(t), "--out", f"{o}.html"],
        "compare": lambda t, o: ["compare", str(t), str(other)],
        "ckpt list": lambda t, o: ["ckpt", "list", str(t)],
        "ckpt verify": lambda t, o: ["ckpt", "verify", str(t)],
        "ckpt info": lambda t, o: ["ckpt", "info", str(t)],
        "ckpt prune --dry-run": lambda t, o: ["ckpt", "prune", str(t), "--keep", "1",
                                              "--dry-run"],
        "ckpt prune": lambda t, o: ["ckpt", "prune", str(t), "--keep", "1"],
        "ckpt migrate": lambda t, o: ["ckpt", "migrate", str(t)],
        "ckpt export": lambda t, o: ["ckpt", "export", str(t), f"{o}.safetensors"],
        "reconstruct": lambda t, o: ["reconstruct", str(t), "--count", "4", "--out", str(o)],
        "interpolate": lambda t, o: ["interpolate", str(t), "--seeds", "0", "1", "--frames", "2",
                                     "--out", f"{o}.png"],
        "sweep": lambda t, o: ["sweep", str(t), "--vary", "sampler.steps=1", "--count", "4",
                               "--features", PROJECTION, "--out", str(o)],
        "check": lambda t, o: ["check", str(t / "resolved.yaml")],
        "plan": lambda t, o: ["plan", str(t / "resolved.yaml")],
    }  # fmt: skip


def _data(place: Path, recipe: Path, done: Callable[..., None]) -> Iterator[Thing]:
    """Make images of two classes in everything that a source reads."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    tree, encoded, arrays = place / "tree", [], []
    for number in range(16):
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), np.uint8)
        path = tree / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        encoded.append(path.read_bytes())
        arrays.append(pixels)
    labels = [number % 2 for number in range(16)]

    def made(name: str) -> Path:
        (place / name).mkdir(parents=True)
        return place / name

    images = [{"bytes": data, "path": f"{i}.png"} for i, data in enumerate(encoded)]
    table = pa.table({"image": images, "label": labels})
    pq.write_table(table, made("parquet") / "x.parquet", row_group_size=4)
    with pa.ipc.new_stream(made("arrow") / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table, max_chunksize=4)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}
    (place / "arrow/state.json").write_text(json.dumps(state))
    shutil.make_archive(str(made("archive") / "x"), "zip", tree)
    inner = {
        f"{label}.tar": _tar({f"{i}.png": encoded[i] for i in range(16) if "ab"[i % 2] == label})
        for label in "ab"
    }
    (made("class_tars") / "x.tar").write_bytes(_tar(inner))
    members = {}
    for i, data in enumerate(encoded):
        members |= {f"{i:06}.png": data, f"{i:06}.cls": b"%d" % labels[i]}
    (made("tar_shards") / "x.tar").write_bytes(_tar(members))
    pixels = np.stack(arrays)
    np.savez(made("npz") / "x.npz", images=pixels, labels=np.array(labels))
    shutil.copytree(tree, made("image_folder") / "x")
    dimensions = b"".join(n.to_bytes(4, "big") for n in (16, 8, 8))
    (made("idx") / "x-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + dimensions
                                               + pixels[..., 0].tobytes())  # fmt: skip
    (place / "idx/x-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x10" + bytes(labels))
    done("data", "prepare", tree, place / "shards", "--size", 8, "--workers", 0)
    blocks = {
        "image_folder": "{{name: image_folder, root: {}/x, size: 8, classes: 2}}",
        "parquet": "{{name: parquet, path: {}, size: 8, classes: 2}}",
        "arrow": "{{name: arrow, path: {}, size: 8, classes: 2}}",
        "archive": "{{name: archive, path: {}/x.zip, size: 8, classes: 2}}",
        "class_tars": "{{name: class_tars, path: {}/x.tar, size: 8, classes: 2}}",
        "tar_shards": "{{name: tar_shards, path: {}/x.tar, size: 8, classes: 2}}",
        "npz": "{{name: arrays, images: {}/x.npz, size: 8, classes: 2}}",
        "idx": "{{name: arrays, images: {0}/x-idx3-ubyte, labels: {0}/x-idx1-ubyte, size: 8, "
        "classes: 2, channels: 1}}",
        "shards": "{{name: shards, path: {}, size: 8, classes: 2}}",
    }
    for name, block in blocks.items():

        def train(t: Path, o: Path, block: str = block) -> list[str]:
            return ["run", str(recipe), "--set", f"data={block.format(t)}", "--set", "steps=1",
                    "--out", str(o)]  # fmt: skip

        # What lies beside the data where they were read before is a file to damage, too.
        done(*train(place / name, place / f"{name}.run"))
        names = {"run": train}
        given = {"image_folder": "x", "archive": "x.zip", "class_tars": "x.tar",
                 "tar_shards": "x.tar"}.get(name, "")  # fmt: skip
        if name not in ("npz", "idx"):
            for verb in ("check", "stats"):
                names[f"data {verb}"] = (
                    lambda t, o, verb=verb, given=given: ["data", verb, str(t / given)]
                )  # fmt: skip
            names["data prepare"] = lambda t, o, given=given: [
                *("data", "prepare", str(t / given), str(o), "--size", "8", "--workers", "0")
            ]
        yield Thing(f"data: {name}", place / name, names)


def _tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _copied(thing: Thing, folder: Path) -> Path:
    tree = folder / thing.tree.name
    shutil.copytree(thing.tree, tree)
    return tree


def trial(setup: Setup, trial: Trial) -> None:
    """Damage a file of a thing, and give it to one of its commands; numbers go through these."""
    chance = trial.chance
    thing, name = setup.turns[trial.number % len(setup.turns)]
    tree = _copied(thing, trial.place)
    how = _damage(tree, chance)
    story, name_of = f"{name} on {thing.kind}: {how}", Path(how.split(" ")[0]).name
    before = _content(tree)
    words = thing.commands[name](tree, trial.place / "out")
    words += _threads(words[0])
    ended = with_memory(trial, words, story, PATIENCE)
    trial.facts[f"{thing.kind}: exit {ended.code}"] += 1
    if ended.code is None:
        trial.fail("slow", f"{ended.last} ({story})")
    elif ended.crashed:
        trial.fail("traceback", f"{ended.last} ({story})")
    elif ended.code not in CODES:
        trial.fail("code", f"exit {ended.code}: {ended.last} ({story})")
    elif ended.code and not any(part in ended.said for part in (f"{tree}", name_of, "data.")):
        trial.fail("named", f"exit {ended.code}: {ended.last} ({story})")
    if name in READS and thing.kind == "run":
        after = _content(tree)
        if changed := [path for path in before if after.get(path) != before[path]]:
            trial.fail("kept", f"{changed} ({story})")


def _content(tree: Path) -> dict[str, tuple[int, int]]:
    """Return what tells a file that was changed from one that was not."""
    found = {}
    for path in tree.rglob("*"):
        if path.name != ".lock" and not path.is_dir():
            at = path.lstat()
            found[str(path.relative_to(tree))] = (at.st_size, at.st_mtime_ns)
    return found


# Damage


def _damage(tree: Path, chance: random.Random) -> str:
    """Damage one file below a directory until it is another; return how."""
    files = [p for p in sorted(tree.rglob("*")) if p.is_file() and p.stat().st_size]
    kinds: dict[str, list[Path]] = {}
    for path in files:  # so that a hundred pictures are as likely as one record
        own = path.suffix if path.suffix in (".png", ".safetensors", ".svg") else path.name
        kinds.setdefault(own, []).append(path)
    path = chance.choice(kinds[chance.choice(sorted(kinds))])
    name, content = str(path.relative_to(tree)), path.read_bytes()
    if chance.random() < 0.08:
        return f"{name} {_replace(path, chance)}"
    how, data = "", content
    while data == content:
        how, data = _changed(path, content, chance)
    path.write_bytes(data)
    if (path.parent / "MANIFEST.json").exists() and path.name != "MANIFEST.json":
        how += _reseal(path) if chance.random() < 0.6 else ""
    return f"{name} {how}"


def _changed(path: Path, content: bytes, chance: random.Random) -> tuple[str, bytes]:
    if path.suffix in (".json", ".jsonl") and chance.random() < 0.7:
        return "with odd values", odd_json(content, chance)
    if path.suffix in (".yaml", ".yml") and chance.random() < 0.6:
        return _odd_yaml(content.decode(), chance)
    if path.suffix == ".safetensors" and chance.random() < 0.5:
        return _odd_header(content, chance)
    return "with other bytes", damaged(content, chance)


def _replace(path: Path, chance: random.Random) -> str:
    """Put something else in a file's place."""
    how = chance.choice(("empty", "missing", "folder", "pipe", "loop", "device", "vast"))
    path.unlink()
    match how:
        case "empty":
            path.touch()
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "loop":
            path.symlink_to(path.name)
        case "device":
            path.symlink_to("/dev/zero")
        case "vast":
            path.touch()
            os.truncate(path, 1 << 31)
    return f"replaced: {how}"


def _odd_yaml(text: str, chance: random.Random) -> tuple[str, bytes]:
    """Replace the value of a key, or take a line away."""
    lines = text.splitlines(keepends=True)
    at = chance.randrange(len(lines))
    odd = chance.choice(MISTYPED)
    if chance.random() < 0.2:
        del lines[at]
    else:
        lines[at] = re.sub(r":.*", lambda found: f": {odd}", lines[at], count=1)
    return f"line {at + 1}: {odd}", "".join(lines).encode()


def _odd_header(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    """Change what a file of tensors says about one of them."""
    size = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + size])
    except ValueError:
        return "with other bytes", damaged(content, chance)
    names = [name for name in header if name != "__metadata__"]
    if not names:
        return "with other bytes", damaged(content, chance)
    name = chance.choice(sorted(names))
    told = header[name]
    match chance.randrange(6):
        case 0:
            told["dtype"] = chance.choice(("F64", "I8", "BF16", "U8", "X", "BOOL"))
        case 1:
            told["shape"] = chance.choice(
                ([], [0], [-1], [2**40], [2**62, 4], told["shape"][::-1])
            )
        case 2:
            told["data_offsets"] = chance.choice(([0, 0], [0, 2**60], [-1, 4], [8, 4], "x"))
        case 3:
            del header[name]
        case 4:
            header[f"{name}.x"] = header.pop(name)
        case _:
            header[name] = chance.choice((None, [], 1, {}))
    text = json.dumps(header).encode()
    changed = len(text).to_bytes(8, "little") + text + content[8 + size :]
    return f"with another header of {name}", changed


def _reseal(path: Path) -> str:
    """Make the manifest of a checkpoint agree with a file that was changed."""
    manifest = path.parent / "MANIFEST.json"
    told, data = json.loads(manifest.read_bytes()), path.read_bytes()
    if path.name not in told.get("files", {}):
        return ""
    entry = told["files"][path.name]
    entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    manifest.write_text(json.dumps(told))
    return ", resealed"


SUITE = Suite(
    "files", "Odd files for each command", PROMISES, prepare, trial,
    every=lambda setup: len(setup.turns),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(command(SUITE))
