"""`deterministic: true`: the same bits again, or the name of what cannot give them."""

from __future__ import annotations

import json
import re

import pytest
import torch
from command_line import e2ediff
from processes import together
from tiny_recipe import tiny

from e2ediff.errors import ResourceError
from e2ediff.model.repeatable import repeatable

# An assignment at repeated places has no order: torch refuses this on every device.
FILE = '''
"""An objective whose loss needs an operator without a deterministic form."""

import attrs
import torch
from e2ediff import hookimpl
from e2ediff.parts.objectives import Detached


@attrs.frozen(kw_only=True)
class Scattering(Detached):
    """Detached, and a tensor that is put together in no order."""

    def terms(self, nets, batch, draw, phase):
        torch.zeros(4).put_(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]))
        return super().terms(nets, batch, draw, phase)


@hookimpl
def register(add):
    add("objectives", "scattering", Scattering)
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    (tmp_path / "tiny.yaml").write_text(tiny(deterministic="true"))
    return tmp_path


def weights(run) -> dict[str, bytes]:
    (last,) = sorted((run / "checkpoints").glob("images-*"))[-1:]
    return {file.name: file.read_bytes() for file in last.glob("*.safetensors")}


def events(run, kind: str) -> list[dict[str, object]]:
    lines = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def test_a_run_is_stopped_resumed_and_used_and_torch_is_left_as_it_was(folder) -> None:
    for words in (
        ("run", "tiny.yaml", "--out", "one"),
        ("run", "tiny.yaml", "--out", "two", "--set", "steps=2"),
        ("run", "tiny.yaml", "--out", "two", "--resume"),
        ("sample", "two", "--count", "2"),
        ("reconstruct", "two", "--count", "2"),
    ):
        done = e2ediff(*words)
        assert done.code == 0, done.err
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.utils.deterministic.fill_uninitialized_memory
    assert weights(folder / "one") == weights(folder / "two")


def test_torch_uses_deterministic_algorithms_in_every_step(folder) -> None:
    note = folder / "note"
    text = FILE.replace(
        "torch.zeros(4).put_(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]))",
        "torch.are_deterministic_algorithms_enabled() or "
        f"__import__('pathlib').Path({str(note)!r}).touch()",
    )
    (folder / "mine.py").write_text(text)
    words = ("run", "tiny.yaml", "--plugin", "mine.py", "--set", "objective=scattering")
    done = e2ediff(*words, "--out", "run", "--set", "steps=2", "--set", "batch=4")
    assert done.code == 0, done.err
    assert not note.exists()
    done = e2ediff(*words, "--out", "other", "--set", "steps=2", "--set", "deterministic=false")
    assert done.code == 0, done.err
    assert note.exists()


def test_an_operator_without_a_deterministic_form_ends_the_run_with_its_name_and_place(
    folder,
) -> None:
    (folder / "mine.py").write_text(FILE)
    words = ("run", "tiny.yaml", "--plugin", "mine.py", "--set", "objective=scattering")
    done = e2ediff(*words, "--out", "run")
    assert done.code == ResourceError.exit_code
    assert re.search(
        r"deterministic: true: the operator put_, called in \S*mine \(line 15\), has no "
        r"deterministic form on this device; replace the part that uses it, or set "
        r"`deterministic: false`",
        done.err,
    ), done.err
    assert "Traceback" not in done.err
    assert "put_" in json.loads((folder / "run" / "status.json").read_text())["reason"]
    done = e2ediff(*words, "--out", "other", "--set", "deterministic=false")
    assert done.code == 0, done.err


def test_a_workspace_in_which_products_differ_is_refused(folder, monkeypatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    done = e2ediff("run", "tiny.yaml", "--out", "run")
    assert done.code == ResourceError.exit_code
    assert "CUBLAS_WORKSPACE_CONFIG to be :4096:8 or :16:8, and it is ':0:0' here" in done.err
    assert not (folder / "run").exists()


def test_a_process_that_began_without_the_workspace_is_told_how_to_begin() -> None:
    said = "Deterministic behavior was enabled, but it is not deterministic because it uses CuBLAS"
    with (
        pytest.raises(ResourceError, match="start it with CUBLAS_WORKSPACE_CONFIG=:4096:8"),
        repeatable(deterministic=True),
    ):
        raise RuntimeError(said)


def test_an_operator_that_fails_in_a_backward_pass_is_named_without_a_place(
    folder, monkeypatch
) -> None:
    text = FILE.replace(
        "torch.zeros(4).put_(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]))",
        "class Put(torch.autograd.Function):\n"
        "            @staticmethod\n"
        "            def forward(ctx, x):\n"
        "                return x.clone()\n"
        "            @staticmethod\n"
        "            def backward(ctx, pull):\n"
        "                return pull.put_(torch.tensor([0, 0]), torch.zeros(2))\n"
        "        batch = attrs.evolve(batch, x=Put.apply(batch.x.requires_grad_()))",
    )
    (folder / "mine.py").write_text(text)
    words = ("run", "tiny.yaml", "--plugin", "mine.py", "--set", "objective=scattering")
    done = e2ediff(*words, "--out", "run")
    assert done.code == ResourceError.exit_code
    assert re.search("the operator put_(, called in |  ?in a backward pass)", done.err), done.err


def test_without_it_nothing_is_set(folder) -> None:
    with repeatable(deterministic=False):
        assert not torch.are_deterministic_algorithms_enabled()
        torch.zeros(4).put_(torch.tensor([1, 1]), torch.tensor([1.0, 2.0]))


def test_another_error_inside_keeps_its_kind(folder) -> None:
    with pytest.raises(RuntimeError, match="mine"), repeatable(deterministic=True):
        raise RuntimeError("mine")


def test_no_command_times_threads_for_a_deterministic_run(folder) -> None:
    """In a process of its own: forks of one that has used two threads wait for ever."""

    def act(rank):
        torch.set_num_threads(2)
        said = []
        for words in (
            ("run", "tiny.yaml", "--out", "run"),
            ("sample", "run", "--count", 2),
            ("reconstruct", "run", "--count", 2),
            (
                "eval",
                "run",
                "--count",
                8,
                "--metrics",
                "latents",
                "--features",
                "random_projection",
            ),
        ):
            done = e2ediff(*words, "--threads", "auto")
            said.append([done.code, "thread" in done.out + done.err])
        return [said, torch.get_num_threads()]

    ((said, threads),) = together(act, size=1)
    assert said == [[0, False]] * 4
    assert threads == 2
    assert events(folder / "run", "threads") == []


def test_a_run_may_take_it_on_when_it_goes_on(folder) -> None:
    assert e2ediff("run", "tiny.yaml", "--out", "run", "--set", "deterministic=false").code == 0
    done = e2ediff("run", "--resume", "run", "--set", "deterministic=true", "--set", "steps=6")
    assert done.code == 0, done.err
