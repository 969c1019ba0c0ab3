"""A training step in two processes: `python -m e2ediff_testing.parallel SPEC RANK`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from e2ediff.host.plugins import load
from e2ediff.host.recipe import dump_recipe, parse_recipe
from e2ediff.step.assembly import assemble
from e2ediff.terminal import echo
from e2ediff_testing.source import Source
from e2ediff_testing.trials import Trial, compare, gradients

_HERE = "127.0.0.1"
_LIMIT = 180.0  # seconds for both processes, imports included
_PATIENCE = timedelta(seconds=120)  # of one for the other, so that it reports what it waits for


def two_processes(trial: Trial, source: Source | None) -> None:
    """Check that two processes' step under DDP has the gradients of two micro-shards in one.

    Args:
        trial: The part in its recipe.
        source: The plugin's folder, where it is not installed.
    """
    spec = trial.folder / "processes.json"
    out = str(trial.folder / "gradients.safetensors")
    store = TCPStore(_HERE, 0, is_master=True, wait_for_workers=False)  # on a port that is free
    body: dict[str, str | int | list[str]] = {
        "recipe": dump_recipe(trial.host, trial.recipe),
        "source": str(source.folder) if source else "",
        "port": store.port,
        "out": out,
    }
    spec.write_text(json.dumps(body), encoding="utf-8")
    path = os.pathsep.join(os.path.abspath(entry or ".") for entry in sys.path)
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    errors = [trial.folder / f"rank{rank}.txt" for rank in range(2)]
    processes = []
    for rank, error in enumerate(errors):
        with open(error, "w", encoding="utf-8") as file:
            words = [sys.executable, "-P", "-m", "e2ediff_testing.parallel", str(spec), str(rank)]
            processes.append(subprocess.Popen(words, env=env, stdout=file, stderr=file))  # noqa: S603
    try:
        codes = [process.wait(_LIMIT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    said = [error.read_text(encoding="utf-8").strip().rpartition("\n")[2] for error in errors]
    failed = [text or f"exit code {code}" for code, text in zip(codes, said, strict=True) if code]
    assert not failed, (
        f"a step in two processes failed: {failed[0]}; use no parameter that `nets` does not "
        "hold, and make both processes take the same passes"
    )
    plain = gradients(trial.recipe, assemble(trial.recipe, torch.device("cpu")))
    compare(plain, load_file(out), "DDP of two processes")


def main() -> None:
    """Run one of the two processes."""
    spec, rank = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), int(sys.argv[2])
    try:
        _step(spec, rank)
        code = 0
    except Exception:
        echo(traceback.format_exc(), err=True, lines=True, end="")
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Not by sys.exit: a thread of the group that asks for the interpreter while it shuts down
    # ends the process with SIGABRT, and its message would hide the error.
    os._exit(code)


def _step(spec: Mapping[str, Any], rank: int) -> None:
    host = Source.read(spec["source"]).host() if spec["source"] else load()
    recipe = parse_recipe(host, spec["recipe"], "the trial's recipe")
    torch.distributed.init_process_group(
        "gloo", store=TCPStore(_HERE, spec["port"]), rank=rank, world_size=2, timeout=_PATIENCE
    )
    wrap = partial(nn.parallel.DistributedDataParallel, find_unused_parameters=True)
    found = gradients(recipe, assemble(recipe, torch.device("cpu")), shares=(rank,), wrap=wrap)
    if rank == 0:
        save_file(found, spec["out"])
    torch.distributed.barrier()  # neither exits while the other still reads from it
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
