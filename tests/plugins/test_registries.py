"""Every registry earns its place: two parts at least, one a stranger's, and all of them used."""

from __future__ import annotations

import ast
from pathlib import Path

import one_of_each
import pytest
from part_checks import CHECKS

from e2ediff.host.discovery import BUILTIN
from e2ediff.host.plugins import load
from e2ediff.host.registry import KINDS
from e2ediff.sample.load import load_model
from e2ediff.train.session import train

HOST = load(one_of_each, entry_points=False)
PLURALS = [plural for plural, _, _ in KINDS]


@pytest.mark.parametrize("plural", PLURALS)
def test_a_registry_has_two_parts_one_of_them_from_a_plugin(plural) -> None:
    origins = [part.plugin.name for part in HOST.registries[plural]]
    assert len(origins) >= 2
    assert BUILTIN in origins
    assert set(origins) - {BUILTIN}


@pytest.mark.parametrize("plural", CHECKS)
def test_the_stranger_s_part_keeps_its_contract(plural) -> None:
    """Those of trackers and features are kept below, in a run."""
    (part,) = [p for p in HOST.registries[plural] if p.plugin.name != BUILTIN]
    CHECKS[plural](part.cls())


def test_the_plugin_uses_what_a_stranger_may_use() -> None:
    tree = ast.parse(Path(one_of_each.__file__).read_text())
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    ours = {m for m in modules if m.startswith("e2ediff")}
    assert ours
    assert not [m for m in ours if m.count(".") > 1 or m in ("e2ediff.host", "e2ediff.train")]


RECIPE = """\
e2ediff: 1
name: strange
steps: 4
batch: 8
data: ramps
backbone: tiny
interpolant: quadratic
times: arcsine
objective: {objective}
target: last_few
regularizers: [squared_mean]
optimizer: rmsprop
sampler: half_way
guidance: blend
diagnostics: [largest_latent]
trackers: [notebook]
cadence: {{log: 1, diagnose: 2, preview: 4, checkpoint: 4}}
probe: {{images: 8, glance: 4, calibration: 8}}
scores: {{every: 16, images: 8, features: random_projection, metrics: [mean_gap]}}
preview: {{rows: 1}}
device: cpu
"""
WITH_FEATURES = "{name: detached, reconstruction: {perceptual: blurs}}"


@pytest.mark.parametrize("objective", ["decode_clean", WITH_FEATURES], ids=["own", "features"])
def test_a_run_of_nothing_but_a_stranger_s_parts_trains_and_samples(objective, tmp_path) -> None:
    (tmp_path / "strange.yaml").write_text(RECIPE.format(objective=objective))
    out = str(tmp_path / "run")
    outcome = train(HOST, str(tmp_path / "strange.yaml"), (), out, resume=False)
    assert outcome.exit_code == 0, outcome.reason
    lines = (tmp_path / "run" / "notebook.txt").read_text().splitlines()
    assert sum("loss/denoising" in line for line in lines) == 4
    assert any("'largest'" in line for line in lines)
    assert any("mean_gap" in line for line in lines)
    assert any("samples" in line and "(2, 3, 16, 16)" in line for line in lines)
    assert lines[-1] == "closed"
    x = load_model(out, host=HOST).sample([0, 1])
    assert x.shape == (2, 3, 16, 16)
    assert x.isfinite().all()
