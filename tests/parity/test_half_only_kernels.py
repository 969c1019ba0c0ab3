"""A network answers in every type that it is asked in, whatever kernel its steps compute by.

Flash and cuDNN attention exist for half types alone. The kernel here refuses as they do, in the
place of one of torch's, so that a CPU shows what happens to a run on a GPU.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from command_line import e2ediff, needs_dsd, trained
from half_only import IN_FLOAT32, HalfOnly, offer_half_only
from tiny_recipe import tiny
from torch import nn

import e2ediff as package
from e2ediff.errors import KernelError, ResourceError
from e2ediff.nn import attention
from e2ediff.nn.attention import BACKENDS, choose_attention, sdpa, use_attention
from e2ediff.nn.layers import SelfAttention

CPU = torch.device("cpu")
QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


@pytest.fixture
def half_only(monkeypatch: pytest.MonkeyPatch) -> HalfOnly:
    return offer_half_only(monkeypatch)


# Runs

SCORES = "{every: 16, images: 8, features: {name: random_projection, width: 4, side: 4}, \
metrics: [fid]}"


def recipe(kernel: str) -> str:
    """One that looks, previews, surveys, scores and saves in four steps."""
    backbone = "{name: vit, width: 16, depth: 1, heads: 1, patch: 8, latent_dim: 4, "
    return tiny(
        precision="bfloat16",
        data="{name: synthetic, size: 16, classes: 2, count: 64}",
        backbone=f"{backbone}latent_norm: batch, attention: {kernel}}}",
        cadence="{log: 1, diagnose: 2, survey: 4, preview: 2, checkpoint: 2}",
        ema="[{name: slow, decay: 0.9}]",
        post_hoc="{every: 1}",
        scores=SCORES,
    )


def kernels(run: Path) -> dict[str, str]:
    """What the run recorded of its kernels."""
    lines = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    (found,) = [line for line in lines if line["kind"] == "kernels"]
    return found


@pytest.mark.parametrize("kernel", ["auto", "sdpa_flash"])
def test_a_run_in_bfloat16_goes_from_its_first_look_to_its_scores(
    kernel, half_only, tmp_path
) -> None:
    run = trained(tmp_path, recipe(kernel))
    steps = len(half_only.answered)
    assert steps > 4
    assert set(half_only.answered) == {torch.bfloat16}
    name = "sdpa" if kernel == "auto" else kernel
    said = kernels(run)
    assert said["attention"].startswith(f"{name} (")
    assert said["attention in float32"] == f"sdpa ('{name}' does not run: {IN_FLOAT32})"
    assert {p.name for p in (run / "samples").glob("step-*.png")} == {
        "step-00000002.png",
        "step-00000004.png",
    }
    figures = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("gFD-RandomProjection4" in line for line in figures)
    assert not any("off" in event["kind"] for event in map(
        json.loads, (run / "events.jsonl").read_text().splitlines()))  # fmt: skip

    features = ("--features", "random_projection")
    for words in (
        ("sample", run, "--count", 2, "--out", tmp_path / "samples"),
        ("sample", run, "--count", 2, "--precision", "bfloat16", "--out", tmp_path / "half"),
        ("reconstruct", run, "--count", 4, "--out", tmp_path / "pairs"),
        ("interpolate", run, "--seeds", 0, 1, "--out", tmp_path / "strip.png"),
        ("eval", run, "--count", 8, "--metrics", "fid,reconstruction,latents", *features),
        ("sample", run, "--count", 2, "--weights", "ema:0.1", "--out", tmp_path / "width"),
    ):
        done = e2ediff(*words)
        assert done.code == 0, f"{words}: {done.err}"


@pytest.mark.parametrize("kernel", ["auto", "sdpa_flash"])
def test_a_run_in_bfloat16_is_stopped_and_resumed_with_the_same_kernels(
    kernel, half_only, tmp_path
) -> None:
    run = trained(tmp_path, recipe(kernel))
    (tmp_path / "longer.yaml").write_text(recipe(kernel).replace("steps: 4", "steps: 6"))
    done = e2ediff("run", tmp_path / "longer.yaml", "--out", run, "--resume")
    assert done.code == 0, done.err
    said = f"attention in float32: sdpa ('{'sdpa' if kernel == 'auto' else kernel}' does not run"
    assert said in done.out + done.err


@needs_dsd
def test_the_quickstart_trains_and_is_used_in_bfloat16(half_only, tmp_path) -> None:
    words = ["precision=bfloat16", "steps=2",
             "backbone.width=16", "backbone.depth=1", "backbone.heads=2",
             "cadence={log: 1, diagnose: 1, preview: 1, checkpoint: 1}", "preview.rows=1",
             "probe={images: 8, calibration: 8, times: [0.5]}"]  # fmt: skip
    given = [word for text in words for word in ("--set", text)]
    run = tmp_path / "run"
    done = e2ediff("run", QUICKSTART, "--out", run, *given)
    assert done.code == 0, done.err
    assert "attention in float32: sdpa ('sdpa' does not run" in done.out + done.err
    done = e2ediff("sample", run, "--count", 1, "--label", "bag", "--out", tmp_path / "samples")
    assert done.code == 0, done.err
    assert set(half_only.answered) == {torch.bfloat16}


def test_in_a_run_in_float32_a_kernel_asked_for_by_name_is_still_refused(
    half_only, tmp_path
) -> None:
    text = recipe("sdpa_flash").replace("precision: bfloat16", "precision: float32")
    (tmp_path / "tiny.yaml").write_text(text)
    done = e2ediff("run", tmp_path / "tiny.yaml", "--out", tmp_path / "run")
    assert done.code == ResourceError.exit_code
    assert (
        "attention on cpu in float32 with head width 16: 'sdpa_flash' does not run: "
        f"{IN_FLOAT32}. Set backbone.attention: auto"
    ) in done.err


def test_a_run_is_used_where_the_kernel_of_its_recipe_is_not_and_says_so(
    half_only, tmp_path, monkeypatch
) -> None:
    """As on a CPU, after training on a GPU; `--set` could not change the recipe's kernel."""
    run = trained(tmp_path, recipe("sdpa_flash"))

    def gone():
        raise ImportError("it is not installed here")

    monkeypatch.setattr(attention, "candidates", lambda: {"sdpa_flash": gone})
    done = e2ediff("sample", run, "--count", 2, "--out", tmp_path / "samples")
    assert done.code == 0, done.err
    said = "'sdpa_flash' does not run: it is not installed here; the network uses the "
    assert said in done.out + done.err
    told: list[str] = []
    model = package.load(str(run), device="cpu", warn=told.append)
    assert len(told) == 1
    assert said in told[0]
    assert model.to("cpu").sample([0]).isfinite().all()


# The choice


class Foreign(nn.Module):
    """A network of somebody else's, with two shapes of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = SelfAttention(16, 2, qk_norm=True)
        self.second = SelfAttention(16, 1, qk_norm=False)
        self.twin = SelfAttention(16, 2, qk_norm=True)

    def forward(self, x):
        return self.twin(self.second(self.first(x, None), None), None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_type_that_a_network_is_asked_in_has_a_kernel_that_answers(dtype, half_only) -> None:
    net, x = Foreign(), torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    plain = copy.deepcopy(net)
    said = use_attention(net, "auto", CPU, dtype, 5)
    refused = f"sdpa ('sdpa' does not run: {IN_FLOAT32})"
    assert said == {
        "attention": "sdpa (xformers has no kernels for cpu)",
        "attention in float32": refused,
        "attention of 1 heads of width 16": "sdpa (xformers has no kernels for cpu)",
        "attention in float32 of 1 heads of width 16": refused,
    }
    half_only.answered.clear()
    with torch.autocast("cpu", dtype):
        net(x)
    assert half_only.answered == 3 * [dtype]
    assert torch.equal(net(x), plain(x))
    q = torch.randn(1, 5, 2, 8, dtype=torch.float64)
    assert torch.equal(net.first.attend(q, q, q), sdpa(q, q, q))
    assert half_only.answered == 3 * [dtype]
    assert net.first.attend is net.twin.attend


def test_a_kernel_that_serves_both_types_is_kept_for_both() -> None:
    net = Foreign()
    assert use_attention(net, "sdpa_flash", CPU, torch.bfloat16, 5) == {
        "attention": "sdpa_flash (asked for)",
        "attention in float32": "sdpa_flash (as in bfloat16)",
        "attention of 1 heads of width 16": "sdpa_flash (asked for)",
        "attention in float32 of 1 heads of width 16": "sdpa_flash (as in bfloat16)",
    }
    assert net.first.attend is not sdpa
    use_attention(net, "auto", CPU, torch.bfloat16, 5)
    assert net.first.attend is sdpa  # nothing to decide at every call


def test_auto_falls_back_on_torchs_own_where_no_kernel_of_the_table_runs(half_only) -> None:
    found = choose_attention("auto", CPU, torch.float32, 8, tokens=16)
    assert found.record() == {
        "attention": "sdpa (no other kernel runs here)",
        "attention refused": f"sdpa: {IN_FLOAT32}",
    }
    assert found.attend is sdpa


def test_a_kernel_that_disagrees_in_float32_alone_is_not_asked_there(monkeypatch) -> None:
    def coarse(q, k, v):
        return sdpa(q, k, v) * (1.01 if q.dtype == torch.float32 else 1)

    monkeypatch.setattr(attention, "candidates", lambda: {"sdpa_flash": lambda: coarse})
    net = Foreign()
    said = use_attention(net, "sdpa_flash", CPU, torch.bfloat16, 5)
    assert said["attention"] == "sdpa_flash (asked for)"
    assert said["attention in float32"].startswith(
        "sdpa ('sdpa_flash' does not run: its answer differs from the formula by 0.0"
    )
    q = torch.randn(1, 5, 2, 8)
    assert torch.equal(net.first.attend(q, q, q), sdpa(q, q, q))


def test_float32_is_not_timed_beside_the_type_of_the_steps(half_only, monkeypatch) -> None:
    timed = []
    monkeypatch.setattr(attention, "both_ways", lambda attend, q, k, v: timed.append(q.dtype))
    table = {"one": lambda: half_only, "other": lambda: sdpa}
    choose_attention("auto", CPU, torch.bfloat16, 8, tokens=16, known=table)
    assert timed
    count = len(timed)
    use_attention(Foreign(), "auto", CPU, torch.bfloat16, 16)
    assert len(timed) == count


def test_a_refusal_leaves_every_module_as_it_was(half_only) -> None:
    net = Foreign()
    with pytest.raises(KernelError, match="in float32 with head width 8: 'sdpa_flash' does not"):
        use_attention(net, "sdpa_flash", CPU, torch.float32, 5)
    assert all(m.attend is sdpa for m in net.children())


def test_looking_for_a_kernel_warns_of_none_of_those_that_refuse(half_only, recwarn) -> None:
    """Torch warns of every reason; the choice records why a kernel was refused."""
    table = {"half": lambda: half_only, "plain": lambda: sdpa}
    found = choose_attention("auto", CPU, torch.float32, 8, tokens=16, known=table)
    assert found.refused == {"half": IN_FLOAT32}
    use_attention(Foreign(), "sdpa_flash", CPU, torch.bfloat16, 5)
    assert [str(w.message) for w in recwarn] == []
    with pytest.raises(KernelError, match=f"'sdpa_flash' does not run: {re.escape(IN_FLOAT32)}"):
        choose_attention("sdpa_flash", CPU, torch.float32, 8)
    assert [str(w.message) for w in recwarn] == []


@pytest.mark.parametrize("autocast", [True, False])
def test_a_compiled_network_chooses_by_type_without_a_break_in_its_graph(
    autocast, half_only
) -> None:
    net, x = Foreign(), torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    use_attention(net, "sdpa_flash", CPU, torch.bfloat16, 5)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, theirs = compiled(x), net(x)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernel", BACKENDS)
def test_on_a_gpu_every_kernel_for_bfloat16_leaves_float32_answered(kernel) -> None:
    net, device = Foreign().cuda(), torch.device("cuda")
    x = torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0)).cuda()
    expected = net(x)
    try:
        said = use_attention(net, kernel, device, torch.bfloat16, 64)
    except KernelError as refused:
        pytest.skip(str(refused))
    assert "attention in float32" in said
    torch.testing.assert_close(net(x), expected, rtol=0.0, atol=2e-3)  # TF32 products
    with torch.autocast("cuda", torch.bfloat16):
        torch.testing.assert_close(net(x).float(), expected, rtol=0.0, atol=0.03)
