"""Muon: whose matrices, what a step does to them, and that the rest is AdamW's."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from e2ediff.data import ImageSpec
from e2ediff.parts.backbones import ViTConfig
from e2ediff.parts.optimizers.muon import ByShape, Muon, MuonRest, orthogonal
from e2ediff.parts.optimizers.scheduled import AdamW

CONFIG = ViTConfig(
    width=16, depth=2, heads=2, patch=4, latent_dim=4, refine=2, modulation="shared"
)
IMAGE = ImageSpec(channels=3, height=8, width=8, classes=3)


def matrix(rows: int, columns: int) -> nn.Parameter:
    g = torch.Generator().manual_seed(rows)
    return nn.Parameter(torch.randn(rows, columns, generator=g))


def test_muon_takes_the_matrices_of_the_trunk_and_nothing_else() -> None:
    """Written out, because the names are what decides."""
    named = [(f"online.{n}", p) for n, p in CONFIG.build(IMAGE).named_parameters()]
    named += [("heads.align.0.weight", matrix(16, 16))]
    inside = {"attention.qkv", "attention.out", "mlp.inner", "mlp.outer"}
    expected = {f"online.trunks.all.blocks.{i}.{name}.weight" for i in (0, 1) for name in inside}
    expected |= {"online.trunks.all.common.weight", "online.trunks.all.final.weight"}
    assert {n for n, p in named if Muon().hidden(n, p)} == expected
    groups = Muon(adamw=MuonRest(weight_decay=0.1)).build(named).param_groups
    names = {p: n for n, p in named}
    assert {names[p] for p in groups[0]["params"]} == expected
    assert [g["weight_decay"] for g in groups] == [0.0, 0.1, 0.0]


def test_a_backbone_with_other_names_says_which_matrices_are_not_hidden() -> None:
    w = matrix(4, 4)
    assert Muon().hidden("online.stem.weight", w)
    assert not Muon(exclude=("stem",)).hidden("online.stem.weight", w)
    assert Muon(exclude=("stem",)).hidden("online.system.weight", w), "words, not letters"


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (24, 8), (8, 24)])
def test_a_step_moves_a_matrix_along_the_orthogonal_factor_of_its_gradient(rows, columns) -> None:
    """All singular values of the step are about lr times the scale, whatever the gradient's.

    About: the iteration of torch.optim.Muon leaves them between 0.5 and 1.5, in bfloat16.
    """
    w, lr = matrix(rows, columns), 0.01
    optimizer = Muon(lr=lr).build([("online.w", w)])
    before, w.grad = w.detach().clone(), matrix(columns, rows).T.contiguous() * 100
    optimizer.step()
    step = (before - w.detach()) / (lr * 0.2 * max(rows, columns) ** 0.5)
    values = torch.linalg.svdvals(step)
    assert 0.4 < float(values.min()) <= float(values.max()) < 1.6
    u, _, v = torch.linalg.svd(w.grad, full_matrices=False)
    cosine = nn.functional.cosine_similarity(step.flatten(), (u @ v).flatten(), dim=0)
    assert cosine > 0.95


@pytest.mark.parametrize("scale", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("batch", [2**20, 200])
def test_matrices_of_a_shape_move_together_as_torch_moves_each(monkeypatch, scale, batch) -> None:
    """By a hundredth of their way, bfloat16's rounding; one without a gradient stays."""
    monkeypatch.setattr("e2ediff.parts.optimizers.muon._BATCH", batch)
    shapes = [(8, 8), (24, 8), (8, 24), (24, 8), (24, 8), (8, 24), (6, 5)]

    def train(kind: type[torch.optim.Muon]) -> tuple[list[torch.Tensor], torch.optim.Muon]:
        g = torch.Generator().manual_seed(0)
        matrices = [nn.Parameter(torch.randn(*shape, generator=g)) for shape in shapes]
        optimizer = kind(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn=scale)
        for i in range(4):
            if i == 2:  # the state is torch's: either goes on with the other's
                state, optimizer = optimizer.state_dict(), torch.optim.Muon(matrices)
                optimizer.load_state_dict(state)
            for p in matrices[:-1]:
                p.grad = torch.randn(p.shape, generator=g)
            optimizer.step()
        return [p.detach() for p in matrices], optimizer

    (mine, ours), (theirs, other) = train(ByShape), train(torch.optim.Muon)
    before = torch.Generator().manual_seed(0)
    for a, b in zip(mine, theirs, strict=True):
        way = (b - torch.randn(b.shape, generator=before)).norm()
        assert float((a - b).norm()) <= 0.01 * float(way)
    assert torch.equal(mine[-1], theirs[-1])
    assert len(ours.state_dict()["state"]) == len(other.state_dict()["state"]) == len(shapes) - 1


class Products(TorchDispatchMode):
    """Keeps the types in which matrices are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            self.types.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(3, 32, 48), (2, 48, 32), (1, 8, 8)])
def test_a_cpu_without_bfloat16_multiplies_float32_and_rounds_as_bfloat16(
    monkeypatch, shape
) -> None:
    """Both come to the same but for the order of sums, and to numbers of bfloat16 alone."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = {}
    for computes, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("e2ediff.parts.optimizers.muon._CPU_COMPUTES_BFLOAT16", computes)
        with Products() as products:
            found[computes] = orthogonal(x, (3.4445, -4.775, 2.0315), 5, 1e-7)
        assert products.types == {dtype}
        assert torch.equal(found[computes], found[computes].bfloat16().float())
    far = (found[True] - found[False]).norm() / found[True].norm()
    assert float(far) < 0.01


def test_the_rest_moves_as_adamw_alone_moves_it() -> None:
    def train(config: Muon | AdamW) -> list[torch.Tensor]:
        named = [("online.embed.weight", matrix(6, 4)), ("online.b", nn.Parameter(torch.ones(5)))]
        optimizer = config.build(named)
        for i in range(3):
            for _, p in named:
                p.grad = torch.full_like(p, 0.1 * (i + 1))
            optimizer.step()
        return [p.detach() for _, p in named]

    mine = train(Muon(lr=0.5, adamw=MuonRest(lr=0.01, betas=(0.8, 0.9))))
    assert all(map(torch.equal, mine, train(AdamW(lr=0.01, betas=(0.8, 0.9)))))


def test_the_schedule_multiplies_the_rates_of_both() -> None:
    """The engine multiplies each group's peak by the factor; a factor of 0 moves nothing."""
    named = [("online.w", matrix(4, 4)), ("online.b", nn.Parameter(torch.ones(5)))]
    optimizer = Muon(lr=0.1, adamw=MuonRest(lr=0.01)).build(named)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.01]
    kept = [p.detach().clone() for _, p in named]
    for group, (_, p) in zip(optimizer.param_groups, named, strict=True):
        group["lr"] *= 0.0
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(torch.equal(k, p) for k, (_, p) in zip(kept, named, strict=True))
