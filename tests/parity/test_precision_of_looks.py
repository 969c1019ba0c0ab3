"""What a run measures in which precision: pictures and scores as steps, diagnoses in float32."""

from __future__ import annotations

import pytest
import torch
from tiny_recipe import tiny

from e2ediff.distributed.world import World
from e2ediff.host.plugins import load
from e2ediff.host.recipe import parse_recipe
from e2ediff.monitor.monitor import Monitor
from e2ediff.step.assembly import assemble

CPU = torch.device("cpu")
SCORES = "{every: 16, images: 8, features: {name: random_projection, width: 4, side: 4}, \
metrics: [fid]}"
LOOKS = {
    "preview": lambda monitor: monitor.preview("title"),
    "scores": lambda monitor: monitor.score(),
    "diagnosis": lambda monitor: monitor.observer.measure(
        monitor.parts.step, [], survey=True, progress=0.0
    ),
}


@pytest.mark.parametrize(
    ("precision", "look", "expected"),
    [
        ("bfloat16", "preview", torch.bfloat16),
        ("bfloat16", "scores", torch.bfloat16),
        ("bfloat16", "diagnosis", torch.float32),
        ("float32", "preview", torch.float32),
        ("float32", "scores", torch.float32),
        ("float32", "diagnosis", torch.float32),
    ],
)
def test_a_look_multiplies_matrices_in(precision, look, expected) -> None:
    host = load()
    recipe = parse_recipe(host, tiny(precision=precision, scores=SCORES), "tiny")
    parts, source = assemble(recipe, CPU), recipe.data.open()
    monitor = Monitor.open(host, recipe, parts, World(), (source, source), CPU)
    seen: set[torch.dtype] = set()
    for average in parts.averages.values():
        for module in average.net.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda net, given, out: seen.add(out.dtype))
    for embedding in (m for a in parts.averages.values() for m in [a.net.embed_time]):
        embedding.layers[0]._forward_hooks.clear()  # in float32 by intent, wherever it is called
    LOOKS[look](monitor)
    assert seen == {expected}
