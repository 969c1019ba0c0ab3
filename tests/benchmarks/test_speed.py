"""Each command of `benchmarks/speed` runs at its smallest, and its figures mean what they say."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from command_line import needs, needs_dsd
from tiny_recipe import tiny
from torch import nn

from e2ediff.distributed.world import World
from e2ediff.host.plugins import load
from e2ediff.host.recipe import load_recipe
from e2ediff.parts.optimizers.muon import Muon
from e2ediff.step.count import count

ROOT = Path(__file__).resolve().parents[2]
SPEED = ROOT / "benchmarks" / "speed"
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("forks")


def ran(name: str, *words: object, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SPEED / f"{name}.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, **more)


def measured(name: str, *words: object, rounds: int = 1, **more: Any) -> dict[str, Any]:
    """What a command prints as JSON."""
    done = ran(name, *words, "--rounds", rounds, "--json", **more)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["benchmark"] == name
    assert (found["threads"], found["torch"]) == (1, torch.__version__)
    assert found["rows"]
    assert isinstance(found, dict)
    return found


def refused(name: str, *words: object, code: int = 2) -> str:
    """What a command says that refuses its input before it measures anything."""
    done = ran(name, *words)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not [line for line in done.stdout.splitlines() if not line.startswith("benchmark ")]
    return done.stderr.partition("Error: ")[2]


@pytest.fixture
def module() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of the folder, and forgets all of them: other folders have such names."""
    names = {path.stem for path in SPEED.glob("*.py")}
    before = {name: sys.modules.pop(name) for name in names & {*sys.modules}}
    sys.path.insert(0, str(SPEED))
    yield importlib.import_module
    sys.path.remove(str(SPEED))
    for name in names & {*sys.modules}:
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture
def measuring(module) -> ModuleType:
    return module("measuring")


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny(predicts="x0"))
    return str(path)


# ---- the clock and the turns


class Clock:
    """Seconds that pass when work says so, in place of the process's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, measuring: ModuleType) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr(measuring, "cpu_seconds", lambda: self.now)

    def work(self, name: str, seconds: float) -> Callable[[], None]:
        def work() -> None:
            self.calls.append(name)
            self.now += seconds

        return work


@pytest.fixture
def passing(monkeypatch, measuring) -> Clock:
    return Clock(monkeypatch, measuring)


def test_work_that_is_twice_as_long_has_a_ratio_of_two(measuring, passing) -> None:
    works = {"long": passing.work("long", 2.0), "short": passing.work("short", 1.0)}
    found = measuring.contest(works, CPU, 5)
    assert found.seconds == {"long": [2.0] * 5, "short": [1.0] * 5}
    assert found.ratio("long", "short") == 2
    assert found.against("long", "short") == "2.000x short (2.000 to 2.000)"


def test_every_contestant_begins_a_round_in_its_turn(measuring, passing) -> None:
    works = {name: passing.work(name, 1.0) for name in "abc"}
    measuring.contest(works, CPU, 4, warm=1)
    assert "".join(passing.calls) == "aabbcc" + "abc" + "bca" + "cab" + "abc"


def test_short_work_is_measured_by_many_calls(measuring, passing) -> None:
    found = measuring.contest({"a": passing.work("a", 0.001)}, CPU, 2, warm=0)
    assert len(passing.calls) == 1 + 2 * 20
    assert found.median("a") == pytest.approx(0.001)


def test_what_comes_before_each_call_is_outside_the_clock(measuring, passing) -> None:
    works = {name: passing.work(name, one) for name, one in {"a": 0.004, "b": 0.002}.items()}
    found = measuring.contest(works, CPU, 3, warm=1, before=passing.work("-", 1.0))
    assert found.ratio("a", "b") == pytest.approx(2)
    assert found.median("b") == pytest.approx(0.002)
    assert {*passing.calls[::2]} == {"-"}
    assert "-" not in passing.calls[1::2]


def test_a_report_says_how_far_ceilings_spread(measuring, monkeypatch, capsys) -> None:
    rates = iter([100e9, 80e9, 90e9])
    monkeypatch.setattr(measuring, "matmul", lambda device, dtype: next(rates))
    report = measuring.Report("name", CPU, 1, "-")
    assert [report.probe() / 1e9 for _ in range(3)] == [100, 100, 100]
    report.row("text", a=1)
    report.end()
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["ceiling_gflops"], found["rows"]) == (100, [{"a": 1}])
    assert found["spread"] == pytest.approx(0.2)
    assert "spread 20%, noisy" in err


def test_ceilings_of_different_types_are_never_mixed(measuring, monkeypatch) -> None:
    rates = {torch.float32: 10.0, torch.bfloat16: 300.0}
    monkeypatch.setattr(measuring, "matmul", lambda device, dtype: rates[dtype])
    report = measuring.Report("name", CPU, 1, "-")
    assert (report.probe(torch.bfloat16), report.probe()) == (300, 10)


def test_freed_memory_is_kept_from_before_a_device_is_used(measuring, monkeypatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(measuring, "keep_freed_memory", lambda: done.append("kept"))
    found = measuring.device_named
    monkeypatch.setattr(measuring, "device_named", lambda n: (done.append("device"), found(n))[1])

    def work(report: Any, rounds: int) -> None:
        done.append("measured")

    CliRunner().invoke(measuring.benchmark(rounds=1)(work), catch_exceptions=False)
    assert done == ["kept", "device", "measured"]


# ---- FLOPs


@needs_dsd
@pytest.mark.parametrize(
    "changes",
    [
        ["optimizer={name: adamw}"],
        ["optimizer={name: muon}"],
        ["optimizer={name: adamw}", "checkpoint_activations=true"],
    ],
    ids=["adamw", "muon", "recomputed"],
)
def test_flops_of_a_step_are_those_of_check(module, changes) -> None:
    sets = [word for line in changes for word in ("--set", line)]
    (row, *_) = measured("train_step", "--size", "block", *sets)["rows"]
    flops = count(module("networks").read("block")).flops
    assert row["gflop_per_image"] == pytest.approx(sum(flops.values()) / 1e9)
    assert row["name"] == "ours, off"
    assert row["images_per_second"] == pytest.approx(1000 * row["batch"] / row["ms"])
    assert 0 < row["share_of_ceiling"] < 1


@needs_dsd
def test_flops_of_check_are_those_of_the_gradients_of_a_step(module) -> None:
    networks = module("networks")
    read = networks.read("block", "optimizer={name: adamw}")
    step, _ = networks.stepper(read, CPU)
    assert networks.counted(step) / read.batch == sum(count(read).flops.values())


def test_attention_is_counted_on_a_cpu(module) -> None:
    q = torch.randn(2, 3, 5, 8)
    found = module("networks").counted(lambda: nn.functional.scaled_dot_product_attention(q, q, q))
    assert found == 2 * (2 * 2 * 3 * 5 * 5 * 8)


# ---- peers

SIT = """
import timm_stand_in
import torch
from torch import nn

class SiT(nn.Module):
    def __init__(self, input_size, patch_size, in_channels, hidden_size, depth, num_heads,
                 num_classes):
        super().__init__()
        self.patch_size = patch_size
        self.first = nn.Linear(in_channels, in_channels)
        self.built = torch.compile(lambda x: 2 * x)

    def forward(self, x, t, y):
        return self.built(self.first(x.movedim(1, -1)).movedim(-1, 1))
"""
TRANSPORT = """
class Transport:
    def training_losses(self, net, z, options):
        return {"loss": (net(z, None, options["y"]) ** 2).mean(dim=(1, 2, 3))}

def create_transport():
    return Transport()
"""


@pytest.fixture
def sit(tmp_path: Path) -> Path:
    """A project that looks like SiT, of one layer."""
    root = tmp_path / "sit"
    (root / "transport").mkdir(parents=True)
    (root / "models.py").write_text(SIT)
    (root / "timm_stand_in.py").touch()
    (root / "transport" / "__init__.py").write_text(TRANSPORT)
    return root


def test_a_peer_takes_part_uncompiled_and_compiled_against_steps_alike(
    sit, recipe, monkeypatch
) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compile_(*a, **k | {"backend": "eager"}))
    kinds = ["--compile", "off", "--compile", "blocks"]
    found = measured("train_step", "--size", recipe, "--peer", sit, *kinds)["rows"]
    rows = {row["name"]: row for row in found if "ms" in row}
    assert [*rows] == ["ours, off", "ours, blocks", "sit, off", "sit, compiled"]
    assert rows["ours, off"]["peer"] == "sit, off"
    assert rows["ours, blocks"]["peer"] == "sit, compiled"
    # A layer of 4 x 4 at 32 x 32 places: two FLOPs each forward and for the layer's gradient; no
    # gradient of the images is needed.
    flops = 2 * 2 * 4 * 4 * 32 * 32
    assert rows["sit, off"]["gflop_per_image"] == pytest.approx(flops / 1e9)
    assert rows["sit, compiled"]["gflop_per_image"] == pytest.approx(flops / 1e9)
    ours, theirs = rows["ours, off"], rows["sit, off"]
    each = [row["ms"] / row["gflop_per_image"] for row in (theirs, ours)]
    assert ours["per_flop_of_peer"] == pytest.approx(each[0] / each[1])  # of the only round


def test_a_peer_is_defined_as_it_is_or_compiled(module, sit, monkeypatch) -> None:
    asked: list[object] = []

    def compiles(what: Any) -> Any:
        asked.append(what)
        return what

    monkeypatch.setattr(torch, "compile", compiles)
    monkeypatch.setattr(sys, "path", [*sys.path])
    known = {*sys.modules}
    peers = module("peers")
    try:
        plain = peers.load_peer(str(sit), 2, CPU, compiled=False)
        assert not asked
        compiled = peers.load_peer(str(sit), 2, CPU, compiled=True)
        assert len(asked) == 1
        assert type(plain.net) is not type(compiled.net)  # imported anew
        assert torch.compile is compiles
    finally:
        for name in {*sys.modules} - known:
            del sys.modules[name]


def test_what_a_peer_moves_to_a_gpu_stays_on_a_cpu_while_it_is_built(module, sit) -> None:
    (sit / "models.py").write_text(SIT + "\nassert torch.zeros(2).cuda().device.type == 'cpu'\n")
    move, path, known = torch.Tensor.cuda, [*sys.path], {*sys.modules}
    peers = module("peers")
    try:
        assert peers.load_peer(str(sit), 2, CPU, compiled=False).name == "sit"
        assert torch.Tensor.cuda is move
    finally:
        sys.path[:] = path
        for name in {*sys.modules} - known:
            del sys.modules[name]


def test_a_package_of_modules_that_is_missing_resolves_as_written(module, monkeypatch) -> None:
    stand_in = module("peers")._stand_in
    monkeypatch.setitem(sys.modules, "fairscale", None)  # as if it were not installed
    known = {*sys.modules}
    try:
        stand_in("fairscale")
        exec(
            "import fairscale.nn.model_parallel.initialize as init\n"
            "from fairscale.nn.model_parallel.layers import ColumnParallelLinear\n"
            "assert init.__name__ == 'fairscale.nn.model_parallel.initialize'\n"
        )
    finally:
        for name in {*sys.modules} - known:
            del sys.modules[name]


@needs_dsd
def test_a_peer_is_refused_before_anything_is_counted(tmp_path, sit) -> None:
    assert "there is no such folder" in refused("train_step", "--peer", tmp_path / "missing")
    said = refused("train_step", "--peer", tmp_path)
    assert said.strip().endswith("is no checkout of UNITE, LightningDiT, JiT or SiT.")
    (sit / "timm_stand_in.py").unlink()
    said = refused("train_step", "--size", "block", "--peer", sit)
    assert "needs timm_stand_in: pip install timm_stand_in" in said


# ---- updates


@needs_dsd
def test_optimizers_are_compared_with_their_own_kind(module) -> None:
    assert isinstance(module("networks").read("block").optimizer, Muon)
    rows = {row["what"]: row for row in measured("optimizer", "--size", "block")["rows"]}
    assert {*rows} == {"adamw", "muon"}
    assert {*rows["adamw"]["ms"]} == {"ours", "loop", "foreach"}
    assert {*rows["muon"]["ms"]} == {"ours", "torch's"}
    assert rows["adamw"]["parameters"] > rows["muon"]["parameters"]
    assert rows["muon"]["of_torchs"] == pytest.approx(
        rows["muon"]["ms"]["ours"] / rows["muon"]["ms"]["torch's"]
    )


def _adamw_step(p: torch.Tensor) -> torch.Tensor:
    """The first step at a rate of 1e-4 without weight decay, on gradients 0, 1, 2, ..."""
    return p - 1e-4 * (torch.arange(12.0).reshape(3, 4) > 0)


def test_forms_of_adamw_differ_in_their_form_alone(module) -> None:
    p = nn.Parameter(torch.ones(3, 4))
    forms = module("optimizer").forms_of_adamw([("weight", p)])
    for one in forms.values():
        assert type(one) is torch.optim.AdamW
        (group,) = one.param_groups
        group["params"][0].grad = torch.arange(12.0).reshape(3, 4)
        one.step()
        moved = group["params"][0].detach()
        torch.testing.assert_close(moved, _adamw_step(torch.ones(3, 4)))
    assert [one.param_groups[0]["fused"] for one in forms.values()] == [True, None, None]
    assert [one.param_groups[0]["foreach"] for one in forms.values()] == [None, False, True]


@needs_dsd
def test_every_clipping_of_the_second_case_scales(module, monkeypatch) -> None:
    """Gradients are twice what they were before each call, outside the clock."""
    clip, found = module("clip"), list[float]()
    clipped, contest = clip.clip_gradients, clip.contest
    given: list[bool] = []

    def own(trained: Any, largest: float, world: World, **options: Any) -> Any:
        norm = clipped(trained, largest, world, **options)
        found.append(float(norm) / largest if largest else 0)
        return norm

    def watched(works: Any, device: Any, rounds: int, *, before: Any) -> Any:
        given.append(before is not None)
        found.clear()
        return contest(works, device, rounds, before=before)

    monkeypatch.setattr(clip, "clip_gradients", own)
    monkeypatch.setattr(clip, "contest", watched)
    report = module("measuring").Report("clip", CPU, 1, "-")
    clip.compare(report, 1, "block", module("networks").read("block"))
    assert given == [False, True]
    first, *others = found
    assert first == pytest.approx(4, rel=1e-3)
    assert others == pytest.approx([2] * len(others), rel=1e-3)


@needs_dsd
@pytest.mark.parametrize("name", ["clip", "ema"])
def test_an_update_is_timed_beside_another_s(name) -> None:
    (row, *_) = measured(name, "--size", "block")["rows"]
    assert row["size"] == "block"
    assert all(0 < ms < 1000 for ms in row["ms"].values())


@needs_dsd
def test_the_engine_and_the_loop_are_compiled_alike(tmp_path) -> None:
    (row,) = measured("overhead", "--size", "block", "--steps", 2)["rows"]
    assert (row["steps"], row["compile"]) == (2, "off")  # the recipe says auto
    assert 0.2 < row["ratio"] < 5
    auto = refused("overhead", "--size", "block", "--set", "compile=auto")
    assert auto.startswith("--set compile=auto: name what both loops are")


# ---- files


def test_other_files_of_the_folder_are_kept(tmp_path, recipe) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    found = measured("checkpoint", recipe, "--out", out, rounds=2)["rows"]
    assert [row["what"] for row in found] == ["memory", "save", "save", "read"]
    assert found[1]["bytes"] > 10_000
    assert found[3]["verify"] > 0
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    refused("checkpoint", recipe, "--out", out / "mine.txt")
    assert (out / "mine.txt").read_text() == "mine"


@needs_dsd
def test_a_log_is_whole_before_every_rewinding() -> None:
    found = measured("growth", "--lines", 2000, "--files", 50, "--images", 100, rounds=2)["rows"]
    rows = {row["what"]: row for row in found}
    assert rows["rewind, nothing later"]["dropped"] == [0, 0]
    assert rows["rewind, to the middle"]["dropped"] == [999, 999]  # later than half of them
    assert "dropped" not in rows["read_metrics"]
    assert all(row["seconds"] >= 0 for row in found)


def test_a_whole_process_is_timed_and_says_why_it_failed(module) -> None:
    startup = module("startup")
    seconds, peak = startup.run(["-c", "x = b'x' * 50_000_000"], 1)
    assert 0 < seconds < 20
    assert peak > 50
    with pytest.raises(module("measuring").click.ClickException) as caught:
        startup.run(["-c", "import sys; print('the reason', file=sys.stderr); sys.exit(8)"], 1)
    assert caught.value.message.endswith("ended with code 8: the reason")
    assert caught.value.exit_code == 8


# ---- the other commands


def test_ceilings_are_of_products_and_copies() -> None:
    rows = {row["what"]: row for row in measured("ceiling")["rows"]}
    assert [*rows] == ["float32", "bfloat16", "copy"]
    assert all(0 < row["median"] <= row["best"] for row in rows.values())
    assert [row["unit"] for row in rows.values()] == ["GFLOP/s", "GFLOP/s", "GB/s"]


def test_an_evaluation_is_timed_part_by_part() -> None:
    found = measured("evaluate", "--batch", 1, "--size", 75, "--features", 16)["rows"]
    assert found[0]["milliseconds_an_image"] > 0
    others = [row["what"] for row in found if row["what"] != "network"]
    assert others == ["accumulate a batch of 50", "accumulate a batch of 500", "Fréchet distance"]


@needs("e2ediff-data")
def test_readers_are_timed_against_bare_decoders() -> None:
    found = measured("loader", "--only", "read", "--images", 4)["rows"]
    shares = {row["what"]: row["share"] for row in found}
    assert shares["bare folder"] == 1
    assert [*shares][1::2] == ["read folder", "read jpeg", "read png", "read raw"]
    assert all(0 < share < 3 for share in shares.values())


def test_sampling_is_timed_per_network_call(recipe) -> None:
    found = measured("sample", recipe, "--rows", 2)["rows"]
    assert [row["guidance"] for row in found] == ["plain", "guided"]
    for row in found:
        assert {*row["ms"]} == {"sample", "hand", "network"}
        assert 0.1 < row["against_hand"][0] < 10


# ---- input


@pytest.mark.parametrize("name", ["train_step", "clip", "ema", "optimizer", "overhead"])
def test_an_unknown_size_is_refused_with_the_known_ones(name) -> None:
    said = refused(name, "--size", "huge")
    assert said == (
        "--size huge: is no file of a recipe, and no size of quickstart, block, small, base.\n"
    )


@pytest.mark.parametrize("name", ["train_step", "sample", "checkpoint", "startup", "growth"])
def test_a_wrong_recipe_ends_with_its_problem_and_its_code(name, tmp_path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(tiny(steps="many"))
    option = {"train_step": ["--size"], "startup": ["--recipe"], "growth": ["--recipe"]}
    more = ["--out", str(tmp_path / "out")] if name == "checkpoint" else []
    said = refused(name, *option.get(name, []), path, *more, code=3)
    assert said.startswith(f"{path}: 1 problem")
    assert "steps" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["ceiling", "--device", "foo"], "--device foo: is cpu, cuda, or a GPU by number"),
        (["ceiling", "--device", "cuda:99"], "on this machine. Use cpu."),
        (["ceiling", "--json", "/nonexistent/x"], "there is no folder /nonexistent"),
        (["ceiling", "--json", "/"], "is a folder"),
        (["ema", "--averages", "0"], "0 is not in the range"),
        (["ema", "--averages", "-1"], "-1 is not in the range"),
        (["overhead", "--steps", "0"], "0 is not in the range"),
        (["sample", "--shape", "foo"], "--shape foo: is the number of blocks, x, and a width"),
        (["sample", "--shape", "6x100"], "a width that 64 divides"),
    ],
    ids=" ".join,
)
def test_bad_input_is_refused_in_words(words, reason) -> None:
    assert reason in refused(*words)


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch) -> None:
    (tmp_path / "diffusers.py").write_text("raise ModuleNotFoundError('none')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    said = refused("sample", "--shape", "1x64")
    assert said == "--shape needs diffusers: pip install diffusers\n"


def test_a_file_of_json_has_what_is_printed(tmp_path) -> None:
    done = ran("ceiling", "--rounds", 1, "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [f"{row['best']:.1f}" in done.stdout for row in rows] == [True] * 3


def test_every_command_of_the_folder_is_in_the_table_and_tested() -> None:
    table = (ROOT / "benchmarks" / "README.md").read_text()
    here = Path(__file__).read_text()
    names = [path.stem for path in SPEED.glob("*.py") if "__main__" in path.read_text()]
    assert len(names) == 12
    for name in names:
        assert f"| `{name}.py` |" in table
        assert f'("{name}"' in here or f'["{name}"' in here or f'"{name}"' in here


@needs_dsd
def test_recipes_of_sizes_are_those_of_the_repository(module) -> None:
    host = load()
    for path, changes in module("networks").SIZES.values():
        assert Path(path).is_absolute()
        assert load_recipe(host, path, changes).batch >= 1
