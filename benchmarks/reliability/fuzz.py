"""Recipes and files that are wrong in every way: each is read, or refused in so many words.

Recipes are read in this process: shipped ones with each key taken away, misspelt and mistyped,
bytes and structures changed, odd `--set`, and YAML bombs. Files go through the commands, each in
a fork whose peak memory is measured.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import resource
import shutil
import sys
import tarfile
import time
import traceback
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import attrs

from benchmarks.reliability import runs
from benchmarks.reliability.trials import Suite, Trial, command

PROMISES = {
    "traceback": "no recipe and no file leads to a traceback",
    "located": "every problem of a recipe has its file, line and column, or the number of its "
    "--set",
    "named": "of a misspelt key of four letters or more, the right one is named",
    "slow": "no recipe takes more than two seconds of CPU",
    "code": "a command that refuses a file ends with a documented code, and by itself",
    "memory": f"a file of some kilobytes never takes {400} MB",
}
MOST_MEMORY = 400
SHIPPED = Path(__file__).resolve().parents[2] / "recipes"
MISTYPED = ("[]", "{a: 1}", "'x'", "1.5", "-1", "no", "null", ".nan", "[[1]]")
CODES = {0, 2, 3, 4, 5, 6, 7, 8, 9}
PLACE = re.compile(r":\d+:\d+$|^--set \d+$")
KEY = re.compile(r"(?m)(?:^[ ]*(?:- )?|[{,] ?)([a-z][a-z0-9_]*):(?= |$)")


@attrs.frozen
class Setup:
    """Shipped recipes by name, single changes of each of their keys, and files to damage."""

    recipes: dict[str, str]
    changes: tuple[tuple[str, str, int, int], ...]
    door: tuple[Door, ...]
    place: Path


@attrs.frozen
class Door:
    """A file that a command reads: its name, its content, and the command for a damaged one."""

    kind: str
    name: str
    content: bytes
    words: Callable[[Path], list[str]]
    run: Path | None = None
    fits: bool = True
    """Whether the command ends with 0 where the file is whole."""


def prepare(place: Path, *, files: bool = True) -> Setup:
    """Read the shipped recipes, and make a small file of each kind, which only `files` need."""
    place.mkdir(parents=True, exist_ok=True)
    recipes = {p.stem: p.read_text() for p in sorted(SHIPPED.rglob("*.yaml"))}
    recipes = {name: text for name, text in recipes.items() if _valid(name, text)}
    recipes["tiny"] = runs.recipe(runs.FULL)
    changes = tuple(
        (name, how, *found.span(1))
        for name, text in recipes.items()
        for found in KEY.finditer(_without_comments(text))
        for how in ("removed", "misspelt", "misspelt", "mistyped")
    )
    return Setup(recipes, changes, tuple(_doors(place)) if files else (), place)


def _valid(name: str, text: str) -> bool:
    """Return whether a recipe can be read with the plugins that are installed."""
    from e2ediff.errors import E2EDiffError

    try:
        _read(text, name)
    except E2EDiffError:
        return False
    return True


def _without_comments(text: str) -> str:
    return re.sub(r"#.*", lambda found: " " * len(found[0]), text)


def _read(text: str, name: str, overrides: tuple[str, ...] = ()) -> object:
    from e2ediff.host.plugins import load
    from e2ediff.host.recipe import parse_recipe

    global _HOST
    _HOST = _HOST or load()
    return parse_recipe(_HOST, text, f"{name}.yaml", overrides)


_HOST = None


def trial(setup: Setup, trial: Trial) -> None:
    """Three of four trials are recipes, the fourth is a file."""
    if trial.number % 4 == 3:
        _file(setup, trial)
        return
    turn = trial.number // 4 * 3 + trial.number % 4
    if turn % 3 == 0:
        _single_change(setup, trial, turn // 3)
    elif turn % 3 == 1:
        _damaged_text(setup, trial)
    else:
        (_bomb if turn % 15 == 2 else _override)(setup, trial)


# Recipes


def _single_change(setup: Setup, trial: Trial, turn: int) -> None:
    name, how, start, end = setup.changes[turn * 7919 % len(setup.changes)]
    text = setup.recipes[name]
    key = text[start:end]
    if how == "removed":
        line_start = text.rfind("\n", 0, start) + 1
        block = text[line_start:start].strip(" -") == ""
        stop = text.find("\n", end) if block else end + 1
        new = text[: line_start if block else start] + text[stop:]
    elif how == "misspelt":
        new = text[:start] + _misspelt(key, trial.chance) + text[end:]
    else:
        odd = trial.chance.choice(
            ["[]", "{a: 1}", "'x'", "1.5", "-1", "no", "null", ".nan", "[[1]]"]
        )
        stop = re.compile(r"[\n,}]").search(text, end)
        new = text[: end + 1] + f" {odd}" + text[stop.start() if stop else len(text) :]
    said = _parse(trial, new, name, (), f"{name}: {key} {how}")
    if how == "misspelt":
        named = re.search(rf"\b{re.escape(key)}\b", said or "") is not None
        trial.facts[f"misspelt keys {'named' if named else 'not named'}"] += 1
        if said and not named and len(key) >= 4:
            trial.fail("named", f"{name}: {key} as {new[start : start + 24]!r}: {said[:300]}")


def _misspelt(word: str, chance: random.Random) -> str:
    """Return a word with one letter left out, added, changed, or exchanged with the next."""
    place = chance.randrange(len(word))
    letter = chance.choice("abcdefghijklmnopqrstuvwxyz")
    choices = [
        word[:place] + word[place + 1 :],
        word[:place] + letter + word[place:],
        word[:place] + letter + word[place + 1 :],
        word[:place] + word[place + 1 : place + 2] + word[place] + word[place + 2 :],
    ]
    found = chance.choice(choices)
    return found if found != word and found else word + letter


def _damaged_text(setup: Setup, trial: Trial) -> None:
    chance = trial.chance
    name = chance.choice(sorted(setup.recipes))
    text = setup.recipes[name]
    for _ in range(chance.choice((1, 1, 2, 5))):
        place = chance.randrange(len(text) + 1)
        match chance.randrange(6):
            case 0:
                text = text[:place] + chance.choice("{}[],:#&*!|>'\"%@`\t\n -\\") + text[place:]
            case 1:
                text = text[:place] + chr(chance.choice((0, 7, 27, 133, 8232, 65279, 128512)))
                text += setup.recipes[name][place:]
            case 2:
                text = text[:place] + text[place + chance.randrange(1, 40) :]
            case 3:
                lines = text.splitlines(keepends=True)
                chance.shuffle(lines)
                text = "".join(lines)
            case 4:
                odd = ("- a\n", "? x\n", "<<: *a\n", "a: &b [*b]\n", "!!python/none x\n", "---\n")
                text = text[:place] + chance.choice(odd) + text[place:]
            case _:
                text = text[:place]
    _parse(trial, text, name, (), f"{name} damaged")


ODD = ("", "=", "a", "a=", "=1", "..=1", "optimizer.lr=", "steps=1e999", "steps=.nan", "steps=[[",
       "data=null", "backbone=[]", "ema={}", "ema=[{}]", "seed=-1", "seed=1_0", "batch=0x10",
       "objective.name=dsd", "objective..weight=1", "cadence=5", "steps=true", "name=../x",
       "name='\x1b[31m'", "requires=[e2ediff-nothing]", "optimizer={name: adamw, lr: {a: 1}}",
       "probe.times=[2]", "microshards=3", "images=8", "data.size=0", "data={a: [1]}")  # fmt: skip


def _override(setup: Setup, trial: Trial) -> None:
    chance = trial.chance
    name = chance.choice(sorted(setup.recipes))
    words = []
    for _ in range(chance.choice((1, 1, 2))):
        word = chance.choice(ODD)
        if chance.random() < 0.6:
            keys = KEY.findall(_without_comments(setup.recipes[name]))
            path = ".".join(chance.sample(keys, chance.choice((1, 1, 2))))
            value = chance.choice(["1", "-1", "x", "[]", "{", "null", ".inf", "'", "a: b", "&x 1"])
            word = f"{path}={value}"
        words.append(word)
    _parse(trial, setup.recipes[name], name, tuple(words), f"{name} with --set {words}")


def _bomb(setup: Setup, trial: Trial) -> None:
    chance = trial.chance
    size = chance.choice((1_000, 20_000, 100_000))
    levels = "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
    bombs = {
        "aliases": "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + levels,
        "brackets": "[" * size,
        "braces": "{a: " * size,
        "dashes": "- " * size,
        "scalar": "name: " + "x" * (10 * size),
        "keys": "".join(f"k{i}: 1\n" for i in range(size // 10)),
        "recursion": "a: &a {b: *a}\n",
        "merge": "a: &a {<<: *a}\n",
        "tag": "!!python/object/apply:os.system ['true']\n",
        "number": "steps: " + "9" * (size // 10),
        "nul": "\0" * 100,
        "quotes": "name: '" + "''" * size,
        "documents": "---\n" * (size // 10),
        "folded": "name: >\n" + "  x\n\n" * (size // 10),
        "anchors": "".join(f"k{i}: &k{i} 1\n" for i in range(size // 10)),
    }
    kind = chance.choice(sorted(bombs))
    text = bombs[kind]
    if chance.random() < 0.5:
        text = setup.recipes["tiny"] + text
    trial.facts["bombs"] += 1
    _parse(trial, text, "bomb", (), f"bomb of {kind}, {size}")


def _parse(
    trial: Trial, text: str, name: str, overrides: tuple[str, ...], story: str
) -> str | None:
    """Read a recipe; return what was said against it, None if it was taken."""
    from e2ediff.errors import E2EDiffError, RecipeError

    since = time.process_time()
    said = None
    try:
        _read(text, name, overrides)
        trial.facts["recipes taken"] += 1
    except RecipeError as error:
        said = str(error)
        trial.facts["recipes refused"] += 1
        for problem in error.problems:
            if not PLACE.search(problem.line):
                trial.fail("located", f"{problem.line!r}: {problem} ({story})")
    except E2EDiffError as error:
        said = str(error)
        trial.facts[f"recipes refused by {type(error).__name__}"] += 1
    except Exception:
        trial.fail("traceback", f"{traceback.format_exc(limit=-2)} ({story})")
    took = time.process_time() - since
    trial.figures["CPU seconds of a recipe"] = round(took, 4)
    if took > 2:
        trial.fail("slow", f"{took:.1f} s ({story})")
    return said


# Files


def _doors(place: Path) -> list[Door]:
    """Make a small file of each kind, and the command that reads it."""
    import numpy as np
    import torch
    from PIL import Image
    from safetensors.torch import save

    recipe = place / "tiny.yaml"
    recipe.write_text(runs.recipe({"steps": "1"}))
    runs.warm(place, recipe.read_text())
    good = place / "good"
    for number in range(12):
        path = good / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    run = place / "run"
    ended = runs.fork(runs.train_words(recipe, run), place / "log", runs.without_drawing)
    if ended.code != 0:
        raise RuntimeError(ended.said)

    def score(*words: str) -> list[str]:
        network = ["--features", "{name: random_projection, width: 4}"]
        network = [] if "--features" in words else network
        return ["eval", *words, *network, "--metrics", "[fid]", "--threads", "1",
                "--cache", str(place / "cache"), "--out", str(place / "scores")]  # fmt: skip

    def train(data: str, path: Path) -> list[str]:
        words = ["run", str(recipe), "--set", f"data={data.format(path)}", "--threads", "1"]
        return [*words, "--out", f"{path}.run"]

    pixels = np.random.default_rng(0).integers(0, 255, (12, 8, 8, 3), np.uint8)
    labels = np.arange(12) % 2

    def written(write: Callable[[io.BytesIO], object]) -> bytes:
        buffer = io.BytesIO()
        write(buffer)
        return buffer.getvalue()

    image = Image.fromarray(pixels[0])
    npz = written(lambda f: np.savez(f, arr_0=pixels, arr_1=labels))
    statistics = written(lambda f: np.savez_compressed(f, mu=np.zeros(2048), sigma=np.eye(2048)))
    npy = written(lambda f: np.save(f, pixels))
    idx = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (12, 8, 8))
    idx += pixels[..., 0].tobytes()
    state = {"a.weight": torch.zeros(3, 4), "b": torch.ones(2)}
    tar = _tar(written(lambda f: image.save(f, "png")))
    weights = score(str(good), "--reference", str(good), "--features", "inception2015")
    doors = [
        *(
            Door("images", f"x.{kind}", written(lambda f, k=kind: image.save(f, k)),
                 lambda p: score(str(p.parent), "--reference", str(good)))
            for kind in ("png", "jpeg", "webp", "bmp", "gif")
        ),
        Door("npz", "x.npz", npz, lambda p: score(str(p), "--reference", str(good))),
        Door("npz", "x.npz", npz, lambda p: score(str(good), "--reference", str(p))),
        Door("statistics", "x.npz", statistics,
             lambda p: score(str(good), "--reference", str(p)), fits=False),
        Door("weights", "x.pt", written(lambda f: torch.save(state, f)),
             lambda p: [*weights, "--weights-file", str(p)], fits=False),
        Door("weights", "x.safetensors", save(state),
             lambda p: [*weights, "--weights-file", str(p)], fits=False),
    ]  # fmt: skip
    if find_spec("e2ediff_sources"):
        arrays = "{{name: arrays, images: {}, classes: 0, size: 8}}"
        doors += [
            Door("npy", "x.npy", npy, lambda p: train(arrays, p)),
            Door("idx", "x-idx3-ubyte", idx, lambda p: train(arrays, p)),
            Door("tars", "x.tar", tar,
                 lambda p: train("{{name: tar_shards, path: {}, size: 8, classes: 2}}", p)),
        ]  # fmt: skip
    if find_spec("e2ediff_features"):
        program = _program()
        name = "{{name: exported, weights: {}, size: 8}}"
        doors += [
            Door("programs", "x.pt2", program, lambda p: score(
                str(good), "--reference", str(good), "--features", name.format(p)))
        ]  # fmt: skip
    for file in ("status.json", "metrics.jsonl", "events.jsonl", "run.json", "figures.json"):
        content = (run / file).read_bytes()
        doors.append(Door("records", file, content,
                          lambda p: ["compare", str(p.parent), str(run)], run))  # fmt: skip
    resolved = (run / "resolved.yaml").read_bytes()
    doors.append(Door("records", "resolved.yaml", resolved, lambda p: [
        "sample", str(p.parent), "--count", "1", "--threads", "1"], run))  # fmt: skip
    doors.append(Door("records", "status.json", (run / "status.json").read_bytes(), lambda p: [
        "run", "--resume", str(p.parent), "--threads", "1"], run))  # fmt: skip
    doors.append(Door("records", "metrics.jsonl", (run / "metrics.jsonl").read_bytes(), lambda p: [
        "run", "--resume", str(p.parent), "--threads", "1", "--set", "steps=2"], run))  # fmt: skip
    return doors


def _tar(image: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(8):
            for suffix, data in (("png", image), ("cls", b"%d" % (number % 2))):
                info = tarfile.TarInfo(f"{number:06}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _program() -> bytes:
    """Export a tiny network in a fork, as tracing imports much."""
    import tempfile

    import torch

    class Network(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, :4].relu()

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "x.pt2")

        def act() -> int:
            batches = ({0: torch.export.Dim("batch")},)
            example = (torch.zeros(2, 3, 8, 8),)
            torch.export.save(
                torch.export.export(Network(), example, dynamic_shapes=batches), file
            )
            return 0

        log = Path(folder, "log")
        runs.wait(runs.begin(act, log), log, time.monotonic(), 120)
        return file.read_bytes()


def check_doors(setup: Setup) -> None:
    """Check that each command reads its file where it is whole: else nothing would be tried."""
    for number, door in enumerate(setup.door):
        path = _entry(setup, door, setup.place / f"door{number}")
        ended = runs.fork(door.words(path), setup.place / "log", runs.without_drawing)
        if (ended.code == 0) != door.fits:
            raise RuntimeError(f"{door.kind} {door.name}: exit {ended.code}: {ended.last}")


def _entry(setup: Setup, door: Door, folder: Path) -> Path:
    """Make a folder with a whole file of a kind, and what belongs beside it; return its path."""
    if door.run:
        shutil.copytree(door.run, folder)
    else:
        folder.mkdir()
    if door.kind == "images":
        shutil.copy(next((setup.place / "good").rglob("*.png")), folder / "first.png")
    (folder / door.name).write_bytes(door.content)
    return folder / door.name


def _file(setup: Setup, trial: Trial) -> None:
    door = setup.door[trial.number // 4 % len(setup.door)]
    chance = trial.chance
    path = _entry(setup, door, trial.place / "file")
    if path.suffix in (".json", ".jsonl") and chance.random() < 0.7:
        data = odd_json(door.content, chance)
    else:
        data = damaged(door.content, chance)
    path.write_bytes(data)
    words = door.words(path)
    story = f"{door.kind} {door.name}: {' '.join(words[:3])}"
    ended = with_memory(trial, words, f"{len(data):,} bytes, {story}", 60)
    trial.facts[f"{door.kind}: exit {ended.code}"] += 1
    if ended.crashed:
        trial.fail("traceback", f"{ended.last} ({story})")
    elif ended.code not in CODES:
        trial.fail("code", f"exit {ended.code}: {ended.last} ({story})")


def with_memory(trial: Trial, words: list[str], story: str, seconds: float) -> runs.Ended:
    """Run a command in a fork, with a cache of its own, and check the memory that it takes."""
    memory, log, before = trial.place / "memory", trial.place / "log", _resident()

    def act() -> int:
        os.environ["E2EDIFF_CACHE"] = str(trial.place / "cache")
        try:
            return runs.command(words)
        finally:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            memory.write_text(f"{peak - before}")

    since = time.monotonic()
    ended = runs.wait(runs.begin(act, log, runs.without_drawing), log, since, seconds)
    if memory.exists():
        used = float(memory.read_text())
        trial.figures["MB of memory for a file"] = round(used, 1)
        if used > MOST_MEMORY:
            trial.fail("memory", f"{used:.0f} MB ({story})")
    return ended


def _resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Change bytes anywhere, or a member of a zip."""
    data = bytearray(content)
    kind = chance.randrange(9)
    if kind == 8 and content[:2] == b"PK":
        return odd_zip(content, chance)
    for _ in range(chance.choice((1, 1, 3, 20))):
        place = chance.randrange(min(len(data), chance.choice((64, 512, 1 << 30))) or 1)
        match kind:
            case 0 | 1 | 2:
                data[place : place + 1] = bytes([chance.randrange(256)])
            case 3:
                data = data[: max(1, place)]
            case 4:
                data[place : place + 4] = chance.choice(
                    (b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff")
                )
            case 5:
                data[place:place] = data[: chance.randrange(1, 64)]
            case 6:
                del data[place : place + chance.randrange(1, 32)]
            case _:
                data[place : place + 16] = bytes(16)
        if kind == 3:
            break
    return bytes(data)


def odd_zip(content: bytes, chance: random.Random) -> bytes:
    """Rewrite a zip with one member replaced: by nothing, by zeros that pack well, by others'."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old:
        names = old.namelist()
        victim = chance.choice(names)
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
            for name in names:
                data = old.read(name)
                if name == victim:
                    match chance.randrange(5):
                        case 0:
                            continue
                        case 1:
                            data = b""
                        case 2:
                            data = data[:120] + bytes(200_000_000)
                        case 3:
                            data = old.read(chance.choice(names))
                        case _:
                            name = chance.choice(("../x", "/x", "x" * 300, "a/b/c", name.upper()))
                new.writestr(name, data)
    return buffer.getvalue()


def odd_json(content: bytes, chance: random.Random) -> bytes:
    """Give values of other kinds to some keys, in one line or all."""
    odd = [
        None,
        -1,
        1e999,
        float("nan"),
        "x",
        [],
        {},
        True,
        2**70,
        [[[]]],
        "\x1b[31mred",
        -(2**63),
    ]
    lines = content.splitlines() or [b"{}"]
    whole = chance.random() < 0.1
    if whole:
        return chance.choice(
            (b"[]", b"null", b"{", b"[" * 100_000, b"\xff\xfe", b'{"a":' * 9999, b"")
        )
    try:
        documents = [json.loads(line) for line in lines]
    except ValueError:
        documents, lines = [json.loads(content)], [content]
    document = chance.choice(documents)
    if isinstance(document, dict) and document:
        for _ in range(chance.choice((1, 1, 2))):
            key = chance.choice(sorted(document))
            inner = document[key]
            if isinstance(inner, dict) and inner and chance.random() < 0.5:
                inner[chance.choice(sorted(inner))] = chance.choice(odd)
            else:
                document[key] = chance.choice(odd)
    return b"".join(json.dumps(d).encode() + b"\n" for d in documents)


def prepared(place: Path) -> Setup:
    """Prepare, and check that every door is open."""
    setup = prepare(place)
    check_doors(setup)
    return setup


SUITE = Suite("fuzz", "Odd recipes and files", PROMISES, prepared, trial)

if __name__ == "__main__":
    sys.exit(command(SUITE))
