"""`e2ediff doctor` says of each thing whether it is well, what to do, and packs no secrets."""

from __future__ import annotations

import json
import shlex
import shutil
import zipfile
from pathlib import Path

import pytest
from command_line import e2ediff

from e2ediff.cli.doctor import _table
from e2ediff.doctor.finding import Finding
from e2ediff.doctor.scrubbing import Scrubber

RUN = Path(__file__).parents[1] / "golden" / "format_1"
TOKEN, PASSWORD, SIGNED = "planted-t0ken-0123", "planted-passw0rd", "planted-signature"
USER, HOST = "annikaexample", "boxexample"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home with a run in it, whose user and host have names."""
    home = tmp_path / "all people" / USER
    shutil.copytree(RUN, home / "run")
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "HOME": str(home), "USER": USER, "LOGNAME": USER, "HOSTNAME": HOST,
        "E2EDIFF_RUNS": str(home / "runs"), "HF_TOKEN": TOKEN,
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("socket.gethostname", lambda: f"{HOST}.example.org")
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    return home


def found(*words: object) -> tuple[int, dict[str, Finding]]:
    done = e2ediff("doctor", *words, "--json")
    findings = [Finding(**entry) for entry in json.loads(done.out)]
    for finding in findings:
        assert finding.state == "ok" or finding.hint, finding
    return done.code, {finding.name: finding for finding in findings}


def test_everything_that_training_needs_is_looked_at(home) -> None:
    code, findings = found(home / "run")
    assert {"python", "torch", "gpu", "attention", "torchvision", "xformers"} < {*findings}
    assert {"shared memory", "temporary files", "cache", "threads", "stores"} < {*findings}
    assert findings["runs"].what.startswith(str(home))
    assert "fsync and rename take" in findings["runs"].what
    assert "auto takes" in findings["attention"].what
    assert findings["run"].what.endswith("intact by names and sizes of their files: 1")
    assert findings["processes"].state == "ok"
    assert sorted(p.name for p in home.iterdir()) == ["run"], "nothing is left behind"
    assert code == (8 if any(f.state == "problem" for f in findings.values()) else 0)


def test_problems_end_with_8_and_say_what_to_do(home, monkeypatch, tmp_path) -> None:
    """A store that is none, a plugin that fails, a damaged checkpoint, and no run."""
    monkeypatch.setenv("E2EDIFF_RUNS", "nonsense://x")
    package = tmp_path / "site" / "broken_plugin-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-plugin\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[e2ediff]\nbroken = broken_plugin\n")
    (tmp_path / "site" / "broken_plugin.py").write_text("raise RuntimeError('out of order')\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    next((home / "run" / "checkpoints").iterdir()).joinpath("state.json").unlink()
    code, findings = found(home / "run")
    assert code == 8
    assert findings["runs"].state == "problem"
    assert findings["plugin broken"].state == "problem"
    assert "out of order" in findings["plugin broken"].what
    assert findings["run"].state == "warning"
    assert f"ckpt verify {shlex.quote(str(home / 'run'))} says" in findings["run"].hint
    code, findings = found("nowhere")
    assert (code, findings["run"].state) == (8, "problem")


def test_a_terminal_of_any_width_gets_lines_that_fit() -> None:
    findings = [
        Finding("python", "ok", "3.11.7 on Linux"),
        Finding("shared memory", "problem", "word " * 30, "do this " * 10),
    ]
    for width in (30, 48, 80, 200):
        lines = [*_table(findings, width)]
        assert all(len(line) <= width and line.isprintable() for line in lines), (width, lines)
        assert any("-> do this" in line for line in lines)


def test_a_bundle_names_neither_person_nor_machine_and_has_no_secret(home) -> None:
    """Wherever they stand: keys, values, comments, addresses, arguments, events, damaged lines."""
    run = home / "run"
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(
        f"# of {USER}, api_key: {PASSWORD}\n{recipe}"
        f"trackers: [{{name: x, token: '{PASSWORD}', dir: {home}/logs}}]\n"
        f"credentials:\n  - {PASSWORD}\n  - user: {USER}\n"
        f"address: s3://{USER}:{PASSWORD}@bucket/x?Signature={SIGNED}\n"
        f"url: https://x.org/a.zip?X-Amz-Signature={SIGNED}\nother: hf_{'a' * 30}\n"
    )
    record = json.loads((run / "run.json").read_text())
    record["argv"] = ["e2ediff", "--token", PASSWORD, f"password={PASSWORD}", f"{home}/x"]
    record["secret"] = {"deep": [PASSWORD]}
    record["where"] = f"/home/{USER}-2/data on {HOST}"
    (run / "run.json").write_text(json.dumps(record))
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "x", "error": f"{TOKEN} at {HOST}.example.org"}) + "\n")
        file.write(f'{{"password": "{PASSWORD}", torn at {home}\n')
    done = e2ediff("doctor", run, "--bundle", "b.zip")
    with zipfile.ZipFile("b.zip") as archive:
        texts = {name: archive.read(name).decode() for name in archive.namelist()}
    assert {"doctor.json", "environment.json", "packages.txt", "plugins.json"} < {*texts}
    assert {f"run/{f}" for f in ("recipe.yaml", "resolved.yaml", "run.json", "events.jsonl",
                                 "metrics.jsonl")} < {*texts}  # fmt: skip
    for name, text in texts.items():
        assert f"b.zip: {name}, " in done.err
        for word in (USER, HOST, TOKEN, PASSWORD, SIGNED, str(home), "hf_aaa"):
            assert word.lower() not in text.lower(), (name, word)
    assert "dir: ~/logs" in texts["run/recipe.yaml"]
    assert "backbone:" in texts["run/recipe.yaml"]
    assert len(texts["run/metrics.jsonl"].splitlines()) > 3


def test_a_bundle_of_a_run_that_cannot_be_opened_has_what_is_there(home) -> None:
    for text in ("{", None):
        path = home / "run" / "run.json"
        path.write_text(text) if text else path.unlink()
        e2ediff("doctor", home / "run", "--bundle", "b.zip")
        with zipfile.ZipFile("b.zip") as archive:
            assert ("run/run.json" in archive.namelist()) == (text is not None)
            assert "backbone:" in archive.read("run/resolved.yaml").decode()
    done = e2ediff("doctor", home / "nothing", "--bundle", "c.zip")
    assert (done.code, "not a run directory" in done.err) == (6, True), done.err


def test_of_long_records_the_last_lines_are_packed(home) -> None:
    line = json.dumps({"step": 1, "images": 8, "text": "x" * 100}) + "\n"
    (home / "run" / "metrics.jsonl").write_text(line * 1000 + '{"step": 2, "images": 16}\n')
    e2ediff("doctor", home / "run", "--bundle", "b.zip")
    with zipfile.ZipFile("b.zip") as archive:
        lines = archive.read("run/metrics.jsonl").decode().splitlines()
    assert (len(lines), json.loads(lines[-1])["step"]) == (200, 2)


def test_values_that_are_no_secrets_stay(home) -> None:
    """Numbers under a key such as `tokens`, and the option `root`."""
    text = "backbone: {tokens: 256, name: vit}\ndata: {root: images, size: 16}\nkey: auto"
    assert Scrubber({"USER": "root", "LOGNAME": "root"}).text(text) == text
    assert Scrubber({}).json({"tokens": 4, "token": "x"}) == {"tokens": 4, "token": "***"}
