"""Plugins whose images are conditioned on vectors and on tokens: no part of ours is told.

Each is a small source alone. What trains on it are the shipped objectives and backbones.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from command_line import e2ediff, needs
from e2ediff_testing import check_backbone, check_source
from PIL import Image
from tiny_recipe import tiny

import e2ediff as library
from e2ediff.condition import Tokens, Vectors, concatenate
from e2ediff.data import to_pixels
from e2ediff.errors import DataError
from e2ediff.host.plugins import load
from e2ediff.loading.batches import fixed_images
from e2ediff.model.inference import Model
from e2ediff.store.checkpoint import open_checkpoint
from e2ediff.store.storage import Store

SOURCE = """
import attrs
import torch
from e2ediff import hookimpl
from e2ediff.condition import Tokens, TokenSpec, Vectors, VectorSpec
from e2ediff.data import DataSource, ImageSpec, SourceConfig

@attrs.frozen(kw_only=True)
class Patches(SourceConfig):
    "Images of one colour, which is what is known of them. `count` and `sampling` as everywhere."
    count: int = 48
    workers: int = 0
    on_bad_image: str = "stop"
    sampling: str = "natural"

    @property
    def image(self):
        return ImageSpec(3, 16, 16, 0, conditioning=SPEC)

    def open(self, *, held_out=False):
        return _Patches(self.count, 7 if held_out else 1)

class _Patches(DataSource):
    def __init__(self, count, factor):
        self.count, self.factor = count, factor

    def __len__(self):
        return self.count

    def read(self, indices):
        index = self.factor * torch.as_tensor(list(indices))
        colour = torch.stack([index * k % 11 for k in (3, 5, 7)], dim=1) / 10  # (B, 3)
        x = (colour * 255).to(torch.uint8)[..., None, None].expand(-1, -1, 16, 16).clone()
        return x, condition(2 * colour - 1, index)

@hookimpl
def register(add):
    add("sources", "patches", Patches)
"""
VECTORS = """
SPEC = VectorSpec(3)

def condition(colour, index):
    return Vectors(colour, index % 5 != 4)
"""
TOKENS = """
SPEC = TokenSpec(4, 3)

def condition(colour, index):
    "The colour as one to four tokens, of which one is the colour and others its channels."
    tokens = torch.cat([colour[:, None], torch.diag_embed(colour)], dim=1)
    return Tokens(tokens, torch.arange(4) <= index[:, None] % 4)
"""
KINDS = {"vectors": VECTORS, "tokens": TOKENS}
PARTS = {
    "vit and detached": {},
    "vit and dsd": {"objective": "{name: dsd, class_weight: 0}"},
    "jit and pixel": {
        "backbone": "{name: jit, width: 16, depth: 2, heads: 2, patch: 8, bottleneck: 8, "
        "context: 2, context_start: 1}",
        "objective": "pixel",
    },
}
NEEDS = {"vit and detached": (), "vit and dsd": (needs("e2ediff-dsd"),),
         "jit and pixel": (needs("e2ediff-jit"),)}  # fmt: skip
each_kind = pytest.mark.parametrize("kind", KINDS)
each_parts = pytest.mark.parametrize(
    "parts", [pytest.param(name, marks=NEEDS[name]) for name in PARTS]
)


@pytest.fixture
def folder(request, tmp_path, monkeypatch) -> Path:
    """The working directory, with the plugin `source.py` of the test's kind."""
    kind = request.getfixturevalue("kind") if "kind" in request.fixturenames else "vectors"
    (tmp_path / "source.py").write_text(SOURCE + KINDS[kind])
    monkeypatch.setenv("E2EDIFF_PLUGIN_FILES", str(tmp_path / "source.py"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Without flips, and long enough that the condition is made use of.
LINES = {
    "data": "patches",
    "steps": "24",
    "backbone": "{name: vit, width: 32, depth: 1, heads: 2, patch: 8, latent_dim: 4}",
    "optimizer": "{name: adamw, lr: 0.01}",
    "label_drop": "0.25",
    "sampler": "{name: euler, steps: 4}",
    "guidance": "{name: classifier_free, scale: 2.0}",
    "cadence": "{log: 1, diagnose: 8, survey: 8, preview: 24, checkpoint: 8}",
    "preview": "{rows: 2, classes: 3}",
    "scores": "{every: 96, images: 32, features: random_projection, metrics: [kid]}",
}


def run(out: str, *words: object, parts: str = "vit and detached", **lines: str) -> None:
    Path("recipe.yaml").write_text(tiny(**{**LINES, **PARTS[parts], **lines}))
    done = e2ediff("run", "recipe.yaml", "--out", out, *words)
    assert done.code == 0, done.err


@pytest.fixture(scope="module")
def finished() -> dict[tuple[str, str], Path]:
    """Runs by kind and parts, each trained for the first test that asks for it."""
    return {}


@pytest.fixture
def copied(folder, finished, tmp_path_factory):
    """Puts a run of these parts, and its recipe, into the working directory."""

    def copy(out: str, parts: str) -> None:
        key = (folder / "source.py").read_text(), parts
        if key not in finished:
            run("run", parts=parts)
            finished[key] = tmp_path_factory.mktemp("finished")
            shutil.move("run", finished[key])
            shutil.copy("recipe.yaml", finished[key])
        shutil.copytree(finished[key] / "run", out)
        shutil.copy(finished[key] / "recipe.yaml", folder)

    return copy


def weights(out: str) -> dict[str, torch.Tensor]:
    found = open_checkpoint(Store(out))
    return {f"{f}:{k}": t for f in found.files for k, t in found.tensors(f).items()}


def model_of(out: str, **options: object) -> Model:
    return library.load(out, **options)


# Training


@each_kind
@each_parts
def test_a_run_is_resumed_to_the_bit(copied, kind, parts) -> None:
    copied("whole", parts)
    run("cut", parts=parts, steps="16")
    run("cut", "--resume", parts=parts)
    whole, cut = weights("whole"), weights("cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@each_kind
@each_parts
def test_what_is_trained_depends_on_the_condition(copied, kind, parts) -> None:
    """Of single rows, and on average: the clean estimate is nearer with the condition."""
    copied("run", parts)
    model = model_of("run", overrides=["guidance=null"])
    data = model.recipe.data
    batch = fixed_images(data.open(held_out=True), data.image.conditioning, 32, 0, "t", "cpu")
    latents = model.latents(batch.x)
    noise = torch.randn(latents.z.shape, generator=torch.Generator().manual_seed(0))
    z_t = type(latents)(0.2 * latents.z + 0.8 * noise, latents.contract)
    errors = []
    for condition in (batch.condition, batch.condition.null()):
        found = model.denoise(z_t, 0.2, condition).z
        errors.append((found - latents.z).square().mean(dim=(1, 2)))
    told = batch.condition.known if kind == "vectors" else batch.condition.mask.any(dim=1)
    assert (errors[0] - errors[1])[told].abs().min() > 0
    assert torch.equal(errors[0][~told], errors[1][~told])
    assert errors[0][told].mean() < 0.97 * errors[1][told].mean()


@each_kind
def test_rows_are_dropped_as_often_as_label_drop_says_and_no_others(folder, kind) -> None:
    from e2ediff.host.recipe import parse_recipe
    from e2ediff.step.draws import draw_for

    host = load()
    recipe = parse_recipe(host, tiny(**LINES), "recipe")
    conditioning = recipe.data.image.conditioning
    given = concatenate([conditioning.example(100)] * 10)
    drawn = draw_for(recipe, given, "test").condition
    values = zip(drawn.tensors()["value"], given.tensors()["value"], strict=True)
    dropped = torch.tensor([not torch.equal(a, b) for a, b in values])
    assert 0.2 < dropped.float().mean() < 0.3
    null = drawn.rows(dropped.nonzero()[:, 0])
    assert all(map(torch.equal, null.tensors().values(), null.null().tensors().values()))


@each_kind
def test_the_source_and_the_backbone_keep_their_contracts(folder, kind) -> None:
    host = load()
    config = host.registries["sources"].get("patches")()
    check_source(config)
    vit = host.registries["backbones"].get("vit")
    check_backbone(vit(width=16, depth=1, heads=2, patch=8, latent_dim=4), config.image)


def test_the_kit_passes_a_source_of_another_kind(folder) -> None:
    done = e2ediff("plugins", "check", "source.py")
    assert done.code == 0, done.out


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("kind", ["tokens"])
def test_a_compiled_step_sees_through_conditions(folder, kind, monkeypatch) -> None:
    """Traced as for any compiler, and run by torch's own kernels: they are quicker to have."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    found = []
    for how in ("off", "step"):
        run(how, steps="4", compile=how, scores="null", cadence="{log: 1}")
        lines = [json.loads(line) for line in Path(how, "metrics.jsonl").read_text().splitlines()]
        found.append([line["loss/denoising"] for line in lines if "loss/denoising" in line])
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    assert len(found[0]) == 4


@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize("kind", ["tokens"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_hand_conditions_on(folder, parallel, kind) -> None:
    """As one process with two micro-shards: to the bit by DDP, as near as sums go by FSDP2."""
    lines = {
        "microshards": "2",
        "steps": "4",
        "scores": "null",
        "optimizer": "{name: adamw, lr: 0.001}",
    }
    run("one", **lines)
    run("two", "--nproc", "2", parallel=parallel, **lines)
    one, two = weights("one"), weights("two")
    assert one.keys() == two.keys()
    for name, value in one.items():
        near = {"rtol": 0, "atol": 0} if parallel == "ddp" else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(two[name], value, **near)


def test_workers_and_skipping_hand_conditions_on(copied) -> None:
    copied("alone", "vit and detached")
    run("workers", data="{name: patches, workers: 2, on_bad_image: skip}")
    alone, workers = weights("alone"), weights("workers")
    assert all(torch.equal(alone[name], workers[name]) for name in alone)


# Samples


@pytest.fixture
def trained(copied, folder) -> Path:
    copied("run", "vit and detached")
    return folder / "run"


@each_kind
def test_guidance_goes_away_from_the_answer_to_nothing(kind, trained) -> None:
    """With scale s each step's estimate is extrapolated; without a condition all are alike."""
    models = {s: model_of("run", overrides=[f"guidance.scale={s}"]) for s in (0, 1, 2)}
    conditioning = models[1].image.conditioning
    some, z_t = conditioning.example(4), torch.randn(4, 4, 4)
    x0 = {s: m.denoiser()(z_t, 0.4, some).x0 for s, m in models.items()}
    torch.testing.assert_close(x0[2] - x0[1], x0[1] - x0[0])
    assert (x0[1] - x0[0]).abs().max() > 1e-3
    torch.testing.assert_close(x0[0], models[1].denoiser()(z_t, 0.4, some.null()).x0)
    guided, plain = (models[s].sample(some, seed=1) for s in (2, 1))
    assert (guided - plain).abs().max() > 1e-3
    blank = conditioning.null(4)
    torch.testing.assert_close(models[2].sample(blank), models[1].sample(blank))


@each_kind
def test_an_image_depends_on_its_condition_and_number_alone(kind, trained) -> None:
    model = model_of("run")
    some = model.image.conditioning.example(40)
    whole = model.sample(some, seed=2)
    assert torch.equal(model.sample(some.rows(slice(33, 36)), seed=2, first=33), whole[33:36])
    other = some.where(torch.arange(40) == 5, some.null())
    changed = (model.sample(other, seed=2) != whole).flatten(1).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [5]


@each_kind
def test_a_set_takes_the_conditions_of_held_out_images_in_order(kind, trained) -> None:
    done = e2ediff("sample", "run", "--count", "50", "--seed", "3", "--threads", "1")
    assert done.code == 0, done.err
    place = Path(done.out.strip())
    entries = json.loads((place / "samples.json").read_text())
    assert [e["held_out_image"] for e in entries] == [*range(48), 0, 1]
    assert json.loads((place / "set.json").read_text())["labels"]["law"] == "held_out"
    model = model_of("run")
    source = model.recipe.data.open(held_out=True)
    expected = model.sample(source.read([*range(48), 0, 1])[1], seed=3)
    for entry, x in zip(entries, to_pixels(expected), strict=True):
        with Image.open(place / entry["file"]) as image:
            assert image.tobytes() == x.permute(1, 2, 0).numpy().tobytes()


@pytest.mark.usefixtures("forks")
def test_several_processes_make_the_same_set(trained) -> None:
    for out, more in (("one", ()), ("two", ("--processes", "2"))):
        words = ("--count", "40", "--batch", "32", "--rows", "8", "--threads", "1", "--out", out)
        done = e2ediff("sample", "run", *words, *more)
        assert done.code == 0, done.err
    for file in sorted(Path("one/images").iterdir()):
        assert file.read_bytes() == (Path("two/images") / file.name).read_bytes()


def test_frames_between_two_seeds_have_one_condition(trained) -> None:
    model = model_of("run")
    one = model.image.conditioning.example(3).rows(slice(2, 3))
    ends = model.interpolate((1, 2), one, frames=3)[[0, 2]]
    assert torch.equal(ends, torch.cat([model.sample(one, seed=s) for s in (1, 2)]))
    done = e2ediff("interpolate", "run", "--seeds", 1, 2, "--threads", "1")
    assert done.code == 0, done.err


def test_scores_and_sheets_are_of_conditions_of_held_out_images(trained) -> None:
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    names = {name for line in lines for name in line}
    assert any(name.startswith("gKD-") for name in names)
    assert not {"knn", "knn_mean"} & names, "there are no classes"
    (sheet,) = (trained / "samples").glob("step-*24.png")
    with Image.open(sheet) as image:
        assert image.width > image.height, "three conditions in two rows"
    words = ("--count", "48", "--features", "random_projection", "--metrics", "kid")
    done = e2ediff("eval", "run", *words, "--threads", "1")
    assert done.code == 0, done.err
    (scores,) = (f for f in trained.rglob("*.json") if "passport" in f.read_text())
    assert '"label_law": "held_out"' in scores.read_text()


# Refusals


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("sample", "run", "--label", "3"), "--label: the run is conditioned on vectors of 3"),
        (("sample", "run", "--labels", "0-4"), "--labels: the run is conditioned on vectors of 3"),
        (("sample", "run", "--random", "8"), "--random: the run is conditioned on vectors of 3"),
        (("interpolate", "run", "--seeds", "1", "2", "--label", "3"), "--label: the run is"),
        (
            (
                "eval",
                "run",
                "--labels",
                "uniform",
                "--count",
                "8",
                "--features",
                "random_projection",
                "--metrics",
                "kid",
            ),
            "--labels: the run is not",
        ),
        pytest.param(
            ("data", "prepare", "recipe.yaml", "shards", "--size", "16"),
            "shards hold",
            marks=needs("e2ediff-data"),
        ),
    ],
    ids=lambda words: " ".join(words[:3]) if isinstance(words, tuple) else "",
)
def test_classes_are_refused_in_words_where_there_are_none(words, said, trained) -> None:
    done = e2ediff(*words)
    assert done.code != 0
    assert said in done.err


def test_labels_and_conditions_of_another_kind_are_refused_by_the_model(trained) -> None:
    model = model_of("run")
    with pytest.raises(DataError, match=r"conditioned on vectors of 3 numbers; give a Vectors"):
        model.sample([0, 1])
    with pytest.raises(DataError, match=r"the caller: gives value \(2, 4\)"):
        model.sample(Vectors(torch.zeros(2, 4), torch.ones(2, dtype=torch.bool)))
    with pytest.raises(DataError, match="the caller: gives Tokens"):
        model.sample(Tokens(torch.zeros(2, 4, 3), torch.ones(2, 4, dtype=torch.bool)))


def test_class_balanced_order_and_other_conditions_than_promised_end_a_run(folder) -> None:
    Path("recipe.yaml").write_text(tiny(**{**LINES, "scores": "null"}))
    data = "data={name: patches, sampling: class_balanced}"
    done = e2ediff("run", "recipe.yaml", "--out", "a", "--set", data)
    assert (done.code, "class_balanced needs class labels" in done.err) == (5, True), done.err
    text = Path("source.py").read_text()
    Path("source.py").write_text(text.replace("x, condition(2 * colour - 1, index)", "x, index"))
    done = e2ediff("run", "recipe.yaml", "--out", "b")
    assert done.code == 5
    assert "data: gives class labels, where conditions are vectors of 3 numbers" in done.err


def test_checks_and_figures_name_the_kind(trained) -> None:
    assert "vectors of 3 numbers" in e2ediff("check", "recipe.yaml").out
    assert e2ediff("plan", "recipe.yaml").code == 0


@needs("e2ediff-data")
def test_stats_of_data_name_the_kind(trained) -> None:
    stats = e2ediff("data", "stats", "recipe.yaml")
    assert "conditioned on vectors of 3 numbers" in stats.out, stats.err
