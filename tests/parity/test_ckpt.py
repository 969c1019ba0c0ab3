"""`e2ediff ckpt`: what lies in a run is shown, verified, deleted, taken out and put in."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from click.shell_completion import ShellComplete
from command_line import Done, e2ediff
from resealing import edit_json
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import e2ediff as package
from e2ediff.cli import group
from e2ediff.host.plugins import load
from e2ediff.host.recipe import load_recipe
from e2ediff.model.build import fresh_nets
from e2ediff.store.run_directory import RunDirectory
from e2ediff.store.storage import Store

RUN = Path(__file__).parents[1] / "golden" / "format_1"
NAME = "images-000000000024"
LATER = "images-000000000032"
EARLIER = "images-000000000016"


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run with an earlier, a damaged, a quarantined and an abandoned checkpoint."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(RUN, "run")
    folder = Path("run/checkpoints")
    for name, images, step in ((EARLIER, 16, 2), (LATER, 32, 4)):
        shutil.copytree(folder / NAME, folder / name)
        edit_json(folder / name, "MANIFEST.json", lambda b: b.update(images=images, step=step))  # noqa: B023
    data = bytearray((folder / LATER / "target.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / LATER / "target.safetensors").write_bytes(data)
    shutil.copytree(folder / LATER, folder / f".bad-{LATER}-0123abcd")
    shutil.copytree(folder / EARLIER, folder / f"abandoned-{EARLIER}")
    return folder


def ckpt(*words: object) -> Done:
    return e2ediff("ckpt", *words)


def test_list_shows_every_checkpoint_and_which_one_a_run_goes_on_from(run) -> None:
    (run / LATER / "state.json").unlink()
    done = ckpt("list", "run")
    assert done.code == 0
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [
        EARLIER, NAME, LATER, f"abandoned-{EARLIER}", f".bad-{LATER}-0123abcd"
    ]  # fmt: skip
    states = ["intact", "--resume takes it", "damaged", "abandoned", "quarantined"]
    assert all(line.endswith(state) for line, state in zip(lines[1:], states, strict=True))
    assert "missing: state.json" in done.err
    found = json.loads(ckpt("list", "run", "--json").out)
    assert [one["name"] for one in found if one["resumed"]] == [NAME]
    assert [one["step"] for one in found] == [2, 3, None, 2, 4]
    assert all(one["bytes"] > 100_000 for one in found)


def test_verify_hashes_every_file_and_ends_with_6_if_one_is_bad(run) -> None:
    shutil.copytree(run / EARLIER, f"run/post_hoc/checkpoints/{EARLIER}")
    done = ckpt("verify", "run")
    assert done.code == 6
    rows = {line.split()[0]: line.split()[1] for line in done.out.splitlines()}
    assert rows == {
        EARLIER: "ok", NAME: "ok", LATER: "BAD", f"abandoned-{EARLIER}": "ok",
        f"post_hoc/{EARLIER}": "ok",
    }  # fmt: skip
    assert "target.safetensors does not match its hash" in done.err
    assert "4 of 5 verify. SHA-256 beside the data shows" in done.err
    assert ckpt("verify", "run", NAME, f"post_hoc/{EARLIER}").code == 0
    assert json.loads(ckpt("verify", "run", LATER, "--json").out)[LATER]["state"] == "damaged"
    done = ckpt("verify", "run", "images-000000000025")
    assert (done.code, f"or '{NAME}'" in done.err) == (6, True), done.err


def test_a_checkpoint_that_was_saved_and_is_not_there_is_named(run) -> None:
    """By `list`, `verify` and `doctor`; `run --resume` refuses to begin again."""
    snapshot = Path(f"run/post_hoc/checkpoints/{EARLIER}")
    shutil.copytree(run / EARLIER, snapshot)
    Path("run/events.jsonl").write_text(f'{{"kind": "committed", "name": "{NAME}"}}\n')
    for name in (LATER, NAME):
        shutil.rmtree(run / name)
    shutil.rmtree(run / f".bad-{LATER}-0123abcd")
    for words in (("list", "run"), ("verify", "run")):
        done = ckpt(*words)
        assert done.code == (6 if "verify" in words else 0)
        assert f"{NAME}: is not there, though the records" in done.err
    assert json.loads(ckpt("verify", "run", "--json").out)[NAME]["state"] == "missing"
    assert ckpt("verify", "run", EARLIER).code == 0
    shutil.rmtree(run)
    assert ckpt("verify", "run").code == 6, "though the snapshot is intact"
    done = e2ediff("doctor", "run", "--json")
    (about,) = [one for one in json.loads(done.out) if one["name"] == "run"]
    assert (about["state"], f"{NAME} is missing" in about["what"]) == ("warning", True), about


@pytest.mark.parametrize("content", [b'{"a": ', None], ids=["damaged", "missing"])
def test_checkpoints_of_a_run_that_cannot_be_opened_are_listed_and_verified(run, content) -> None:
    Path("run/run.json").unlink()
    if content:
        Path("run/run.json").write_bytes(content)
    names = sorted(path.name for path in run.iterdir())
    listed, verified = ckpt("list", "run"), ckpt("verify", "run")
    assert (listed.code, verified.code) == (6, 6)
    assert all(f"{name} " in listed.out for name in names)
    assert re.search(r"^images-000000000024 +ok ", verified.out, re.MULTILINE)
    assert re.search(r"^images-000000000032 +BAD ", verified.out, re.MULTILINE)
    assert "--resume takes it" not in listed.out
    assert "run.json" in listed.err
    assert "run.json" in verified.err
    assert [one["resumed"] for one in json.loads(ckpt("list", "run", "--json").out)] == [
        False for _ in names
    ]


def test_the_folder_of_checkpoints_leads_to_its_run(run) -> None:
    done = ckpt("list", run)
    assert (done.code, "Did you mean run?" in done.err) == (6, True)


@pytest.mark.parametrize("content", [b"hello\n", b"e2ediff: 1\nname: x\n", b"", b"\x80\x02."])
def test_a_file_that_holds_no_weights_is_called_so(run, content) -> None:
    Path("other.pt").write_bytes(content)
    done = ckpt("import", "run/resolved.yaml", "other.pt", "new")
    assert done.code == 5
    assert re.search(r"other.pt is not a file of tensors: [a-zA-Z ,]{20}", done.err), done.err


def test_a_name_in_a_damaged_checkpoint_begins_no_line_of_its_own(run) -> None:
    (run / NAME / "x\nerror: all is well").write_text("")
    for words in (("list", "run"), ("verify", "run"), ("info", "run")):
        done = ckpt(*words)
        assert "all is well" in done.err
        assert not [line for line in done.err.splitlines() if line.startswith("error: all")]


def test_info_tells_what_a_checkpoint_holds(run) -> None:
    done = ckpt("info", "run", "--json")
    assert "skipped" in done.err
    found = json.loads(done.out)
    assert (found["name"], found["step"], found["format"]) == (NAME, 3, 1)
    assert found["weights"]["slow"]["updates"] == 3
    assert found["weights"]["target"]["types"] == ["float32"]
    count = sum(t.numel() for t in load_file(run / NAME / "target.safetensors").values())
    assert found["weights"]["target"]["values"] == count
    text = ckpt("info", "run", NAME).out
    assert f"target: {count:,} values" in text
    assert "4 tokens x 4" in text


def test_prune_keeps_the_newest_intact_ones_and_all_later(run) -> None:
    edit_json(run / NAME, "state.json", lambda state: state["alarm"].update(anchor=None))
    before = sorted(os.listdir(run))
    done = ckpt("prune", "run", "--keep", 1, "--bad", "--dry-run")
    assert (done.code, sorted(os.listdir(run))) == (0, before)
    assert ckpt("prune", "run", "--keep", 1, "--bad").out == done.out
    assert sorted(os.listdir(run)) == [f"abandoned-{EARLIER}", NAME, LATER]
    assert [line.split()[0] for line in done.out.splitlines()] == [
        EARLIER, f".bad-{LATER}-0123abcd"
    ]  # fmt: skip
    assert "nothing to delete" in ckpt("prune", "run", "--keep", 1).err
    assert ckpt("prune", "run").code == 2


def test_prune_deletes_nothing_where_none_is_intact_or_the_run_is_trained(run) -> None:
    with RunDirectory.open("run") as directory:
        directory.lock()
        assert "is training in it" in ckpt("prune", "run", "--keep", 1).err
    for name in (NAME, EARLIER):
        (run / name / "state.json").write_text("{")
    before = sorted(os.listdir(run))
    done = ckpt("prune", "run", "--keep", 1)
    assert (done.code, sorted(os.listdir(run))) == (6, before)
    assert "no checkpoint is intact, so none is deleted" in done.err


def test_prune_keeps_the_checkpoint_of_a_rollback(run) -> None:
    edit_json(run / NAME, "state.json", lambda state: state["alarm"].update(anchor=16))
    assert ckpt("prune", "run", "--keep", 1).code == 0
    assert EARLIER in os.listdir(run)


def test_exported_weights_load_by_name_and_make_the_same_images_when_imported(run) -> None:
    """In a run that is sampled and goes on."""
    done = ckpt("export", "run", "w.safetensors")
    assert (done.code, done.out) == (0, "w.safetensors\n"), done.err
    net, _, _ = fresh_nets(load_recipe(load(), "run/recipe.yaml"), torch.device("cpu"))
    net.load_state_dict(load_file("w.safetensors"))
    with safe_open("w.safetensors", "pt") as file:
        said = file.metadata()
    assert (said["run"], said["weights"], said["step"]) == ("format-1", "slow", "3"), said
    assert json.loads(said["latent"])["tokens"] == 4
    assert ckpt("export", "run", "again.safetensors").code == 0
    assert Path("again.safetensors").read_bytes() == Path("w.safetensors").read_bytes()
    done = ckpt("export", "run", "x.safetensors", "--weights", "optimizer-joint")
    assert (done.code, "it has online, slow, target." in done.err) == (6, True), done.err
    done = ckpt("import", "run/recipe.yaml", "w.safetensors", "new")
    assert (done.code, done.out) == (0, "new\n"), done.err
    first, second = (package.load(place).sample([0, 1], seed=3) for place in ("run", "new"))
    assert torch.equal(first, second)
    for weights in ("online", "target", "slow"):
        assert torch.equal(package.load("new", weights=weights).sample([0, 1], seed=3), first)
    assert ckpt("verify", "new").code == 0
    done = e2ediff("run", "--resume", "new", "--threads", 1)
    assert done.code == 0, done.err
    assert "resumed new at step 0" in done.err
    assert [e["kind"] for e in RunDirectory.open("new").read_events()][:2] == ["imported", "saved"]


def test_weights_of_other_names_shapes_and_values_are_all_listed(run) -> None:
    tensors = load_file(run / NAME / "online.safetensors")
    names = sorted(tensors)
    tensors[f"{names[0]}s"] = tensors.pop(names[0])
    tensors[names[1]] = tensors[names[1]][..., :1].clone()
    tensors[names[2]] = torch.full_like(tensors[names[2]], float("nan"))
    torch.save(tensors, "w.pt")
    done = ckpt("import", "run/recipe.yaml", "w.pt", "new")
    assert done.code == 6
    assert f"missing: {names[0]} " in done.err
    assert f"not of the network: {names[0]}s " in done.err
    assert f"did you mean {names[0]}?" in done.err
    assert f"{names[1]} is " in done.err
    assert f"{names[2]} holds nan or inf" in done.err
    assert not Path("new").exists()


def test_names_that_begin_otherwise_are_renamed(run) -> None:
    tensors = load_file(run / NAME / "online.safetensors")
    save_file({f"model.{n}": t.double() for n, t in tensors.items()}, "w.safetensors")
    assert ckpt("import", "run/recipe.yaml", "w.safetensors", "new").code == 6
    done = ckpt("import", "run/recipe.yaml", "w.safetensors", "new", "--map", "model.=")
    assert done.code == 0, done.err
    assert "torch.float64 is converted" in done.err
    done = ckpt("import", "run/recipe.yaml", "w.safetensors", "other", "--map", "x.=")
    assert "no name begins so" in done.err
    Path("w.pt").write_bytes(b"PK\x03\x04" + bytes(100))
    done = ckpt("import", "run/recipe.yaml", "w.pt", "other")
    assert (done.code, "feature network" in done.err) == (5, False), done.err


def test_migrate_says_that_the_only_format_needs_nothing(run) -> None:
    shutil.rmtree(run / LATER)
    done = ckpt("migrate", "run")
    assert (done.code, done.out) == (0, "")
    assert "nothing to do: checkpoints of run have format 1" in done.err


def test_the_group_completes_its_commands() -> None:
    complete = ShellComplete(group, {}, "e2ediff", "_E2EDIFF_COMPLETE")
    found = {item.value for item in complete.get_completions(["ckpt"], "")}
    assert found == {"list", "verify", "info", "prune", "export", "import", "migrate"}
    assert [item.value for item in complete.get_completions(["ckpt"], "ver")] == ["verify"]


def test_the_commands_of_a_run_elsewhere_work_too(run) -> None:
    store = Store("memory://ckpt/run")
    for path in Path("run").rglob("*"):
        if path.is_file() and ".bad" not in str(path):
            store.write(str(path.relative_to("run")), path.read_bytes())
    assert ckpt("verify", "memory://ckpt/run", NAME).code == 0
    assert ckpt("prune", "memory://ckpt/run", "--keep", 1).code == 0
    assert EARLIER not in store.list("checkpoints")
