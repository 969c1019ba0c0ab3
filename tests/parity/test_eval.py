"""`e2ediff eval`: the same images score alike however they are stored, shared out or cached."""

from __future__ import annotations

import functools
import json
import pickle
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
from command_line import e2ediff, needs
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

from e2ediff.data import to_pixels
from e2ediff.errors import DataError, UnlikeScoresError
from e2ediff.evaluate.images import Samples
from e2ediff.evaluate.passes import Pass, View
from e2ediff.evaluate.passport import read_card, write_card
from e2ediff.evaluate.ranking import differences, rank
from e2ediff.evaluate.reconstruction import reconstruct
from e2ediff.evaluate.reference import open_reference, reference_features
from e2ediff.evaluate.subject import run_subject
from e2ediff.host.recipe import load_recipe
from e2ediff.metric import moments_of
from e2ediff.model.labels import lay_out
from e2ediff.parts.features.inception import Inception2015
from e2ediff.parts.features.networks import Inception, RandomProjection
from e2ediff.sample.load import ModelRef, load_model
from e2ediff.train.session import train

COUNT = 24
NETWORK = ("--features", "{name: random_projection, width: 6}", "--count", COUNT)
FD = "FD-RandomProjection6"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Features of references lie in the test's own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("E2EDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory, host, tiny_text):
    """A run of three steps, with guidance."""
    root = tmp_path_factory.mktemp("run")
    guided = tiny_text + "guidance: {name: classifier_free, scale: 2.0}\n"
    (root / "tiny.yaml").write_text(guided)
    train(host, str(root / "tiny.yaml"), ["steps=3"], str(root / "tiny"))
    return str(root / "tiny")


def scored(*words):
    """The cards that a command wrote, by convention."""
    done = e2ediff("eval", *words)
    assert done.code == 0, done.err
    cards = [read_card(line) for line in done.out.splitlines() if line.endswith(".json")]
    return {str(card.passport.protocol["convention"]): card for card in cards}


def values(card):
    return {name: score.value for name, score in card.scores.items()}


def samples(run, rounding, law="balanced"):
    labels = [i % 4 for i in range(COUNT)] if law == "balanced" else law
    x = load_model(run, device="cpu").sample(labels)
    return to_pixels(x, rounding).permute(0, 2, 3, 1).numpy()


def test_a_run_a_folder_and_an_npz_of_the_same_images_score_alike(run, tmp_path) -> None:
    array = samples(run, "nearest")
    np.savez(tmp_path / "made.npz", arr_0=array)
    (tmp_path / "made").mkdir()
    for i, pixels in enumerate(array):
        Image.fromarray(pixels).save(tmp_path / "made" / f"{i:03d}.png")
    own = values(scored(run, *NETWORK, "--out", tmp_path / "a")["e2ediff"])
    source = "{name: synthetic, size: 16, classes: 4, count: 60}"
    for place in ("made.npz", "made"):
        words = (tmp_path / place, *NETWORK, "--reference", source, "--out", tmp_path / "b")
        assert values(scored(*words)["e2ediff"]) == pytest.approx(own, rel=1e-9)
    assert {FD, "KD-RandomProjection6", "recall-RandomProjection6"} <= set(own)


SOLVERS = ("sampler=heun", "sampler={name: dopri5, rtol: 0.01, atol: 0.01}")
"""The second chooses the steps of all images of a tile by all of them."""


@pytest.fixture(scope="module")
def tiled(run):
    """Sixty-nine samples by a solver: two tiles of 32 rows, and a part of one."""
    labels = lay_out(range(4), 69, "balanced", 0)

    @functools.cache
    def samples(solver: str) -> Samples:
        model = load_model(run, device="cpu", overrides=[solver])
        return Samples(ModelRef(run=""), labels, model=model)

    return samples


@pytest.mark.parametrize(
    "solver", [SOLVERS[0], pytest.param(SOLVERS[1], marks=needs("e2ediff-sampling"))]
)
@pytest.mark.parametrize("batch", [1, 7, 48])
def test_a_sample_is_the_same_to_the_bit_in_any_batch_and_share(tiled, solver, batch) -> None:
    samples = tiled(solver)
    whole = torch.cat(list(samples.batches(0, 69, 64)))
    assert torch.equal(whole, samples.model.sample(samples.labels))
    slices = list(samples.batches(0, 69, batch))
    assert max(map(len, slices)) <= batch
    assert torch.equal(torch.cat(slices), whole)
    for start, stop in ((32, 64), (31, 33), (40, 41), (64, 69)):
        assert torch.equal(torch.cat(list(samples.batches(start, stop, batch))), whole[start:stop])


def test_small_batches_cost_no_further_network_calls(tiled) -> None:
    samples, calls = tiled(SOLVERS[0]), []
    watch = register_module_forward_pre_hook(lambda *_: calls.append(1))
    counts = []
    for batch in (64, 1):
        calls.clear()
        list(samples.batches(0, 69, batch))
        counts.append(len(calls))
    watch.remove()
    assert counts[0] == counts[1] > 0


@needs("e2ediff-sampling")
@pytest.mark.usefixtures("forks")
def test_two_processes_and_any_batch_score_as_one(run, tmp_path) -> None:
    words = (run, *NETWORK[:2], "--count", 69, "--metrics", "fid,density_coverage,reconstruction")
    words = (*words, "--set", SOLVERS[1], "--out", tmp_path, "--batch")
    one = values(scored(*words, 64)["e2ediff"])
    for further in ((7, "--processes", 2), (1,)):
        assert values(scored(*words, *further)["e2ediff"]) == pytest.approx(one, rel=1e-6)


def test_conventions_share_one_sample_set_and_differ_by_their_own_rounding(run, tmp_path) -> None:
    words = ("--metrics", "fid", "--convention", "unite", "--convention", "jit")
    cards = scored(run, *NETWORK, *words, "--out", tmp_path)
    found = {name: values(card)[FD] for name, card in cards.items()}
    source = "{name: synthetic, size: 16, classes: 4, count: 60}"
    for name, rounding in (("unite", "down"), ("jit", "nearest")):
        np.savez(tmp_path / f"{name}.npz", arr_0=samples(run, rounding))
        words = (tmp_path / f"{name}.npz", *NETWORK, "--metrics", "fid", "--reference", source)
        (stored,) = scored(*words).values()
        assert found[name] == pytest.approx(values(stored)[FD], rel=1e-9)
    assert found["unite"] != found["jit"]
    assert cards["unite"].notes["departs"] == ["24 images instead of 50000"]


def test_a_convention_whose_label_law_was_not_followed_says_so(run, tmp_path) -> None:
    words = ("--metrics", "fid", "--convention", "adm", "--convention", "jit")
    cards = scored(run, *NETWORK, *words, "--out", tmp_path)
    assert "labels are uniform instead of balanced" in cards["jit"].notes["departs"]
    assert cards["jit"].passport.protocol["label_law"] == "uniform, 4 classes"


def test_chosen_classes_are_scored_against_their_own_images(run, tmp_path, host) -> None:
    labels = [1, 3] * 12
    x, y = load_recipe(host, f"{run}/resolved.yaml").data.open().read(range(60))
    real = x[(y == 1) | (y == 3)].permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "made.npz", arr_0=samples(run, "nearest", labels))
    np.savez(tmp_path / "real.npz", arr_0=real)
    words = (*NETWORK, "--out", tmp_path)
    stored = (tmp_path / "made.npz", "--reference", tmp_path / "real.npz")
    card = scored(run, "--label", 3, "--label", 1, "--label", 3, *words)["e2ediff"]
    assert values(card) == pytest.approx(values(scored(*stored, *words)["e2ediff"]), rel=1e-9)
    protocol = card.passport.protocol
    assert protocol["label_law"] == "balanced, 4 classes, class 1, class 3 alone"
    assert protocol["reference_images"] == len(real)
    assert "samples are of class 1, class 3 alone" in card.notes["departs"]
    free = scored(run, "--label", "none", "--metrics", "fid", *words)["e2ediff"]
    assert free.passport.protocol["reference_images"] == 60


def test_classes_are_chosen_as_sample_does_and_of_a_run_alone(run, tmp_path) -> None:
    for words, code, said in (
        ((run, "--label", 4), 5, "--label 4: no such class. Expected an index from 0 to 3"),
        ((tmp_path, "--label", 1), 5, f"--label: only a run has classes; {tmp_path} is none"),
        ((run, "--label", 1, "--metrics", "latents"), 2, "latents are of all classes"),
    ):
        done = e2ediff("eval", *words, *NETWORK)
        assert (done.code, said in done.err) == (code, True), done


def test_a_passport_pins_what_decided_the_score(run, tmp_path) -> None:
    card = scored(run, *NETWORK, "--metrics", "kid", "--out", tmp_path)["e2ediff"]
    protocol, subject = card.passport.protocol, card.passport.subject
    assert protocol["network_calls"] == 6  # Heun with 2 steps calls 3 times, guidance doubles
    assert protocol["guidance"]["scale"] == 2.0
    assert protocol["sampler"]["name"] == "heun"
    assert protocol["rounding"] == "nearest"
    assert (protocol["images"], protocol["reference_images"]) == (COUNT, 60)
    assert subject["weights"] == "target"
    assert (subject["step"], subject["images_trained"], subject["seed"]) == (3, 24, 0)
    for field in ("recipe_sha256", "weights_sha256"):
        assert len(subject[field]) == 64
    assert card.scores["KD-RandomProjection6"].metric["subsets"] == 100
    assert card.passport.machine["versions"]["torch"] == str(torch.__version__)
    online = scored(run, *NETWORK, "--metrics", "kid", "--weights", "online", "--out", tmp_path)
    assert online["e2ediff"].passport.subject["weights_sha256"] != subject["weights_sha256"]


@needs("e2ediff-sampling")
def test_a_network_that_guides_is_pinned_by_its_content(tmp_path, host, tiny_text) -> None:
    """`newest` of another run is another network once that run has gone on."""
    # Latents without statistics, which two runs can share.
    (tmp_path / "tiny.yaml").write_text(tiny_text.replace("norm: batch", "norm: layer"))
    run, weak, cards = str(tmp_path / "run"), tmp_path / "weak", []
    train(host, str(tmp_path / "tiny.yaml"), ["steps=3"], run)
    words = (run, *NETWORK, "--metrics", "{name: kid, subsets: 5, size: 10}", "--set")
    for steps in (2, 4):
        train(host, str(tmp_path / "tiny.yaml"), [f"steps={steps}"], str(weak), resume=steps > 2)
        guided = f"guidance={{name: autoguidance, scale: 2.0, run: {weak}}}"
        cards.append(scored(*words, guided, "--out", tmp_path / f"{steps}")["e2ediff"])
    (before,), (after,) = (card.passport.protocol["guided_by"] for card in cards)
    assert (len(before["sha256"]), before["weights"]) == (64, "target")
    assert before["sha256"] != after["sha256"]
    done = e2ediff("compare", *(card.place for card in cards))
    assert done.code == 9
    assert "  guided_by: " in done.err
    given = [f"guidance={{name: autoguidance, run: {weak}}}"]
    sent = pickle.dumps(
        run_subject(host, ModelRef(run=run, overrides=tuple(given)), 3, "balanced").images
    )
    assert len(list(pickle.loads(sent).batches(0, 3, 3))) == 1
    train(host, str(tmp_path / "tiny.yaml"), ["steps=6"], str(weak), resume=True)
    with pytest.raises(DataError, match=r"saved a newer .* guidance.checkpoint=images"):
        next(pickle.loads(sent).batches(0, 3, 3))
    own = scored(*words, "guidance={name: autoguidance, scale: 2.0}", "--out", tmp_path / "own")
    passport = own["e2ediff"].passport
    assert "guided_by" not in passport.protocol
    assert len(passport.subject["guided_by"]) == 1


def test_a_changed_reference_is_not_taken_from_the_cache(run, tmp_path) -> None:
    array = samples(run, "nearest")
    np.savez(tmp_path / "made.npz", arr_0=array)

    def score():
        words = (tmp_path / "made.npz", *NETWORK, "--metrics", "fid")
        (card,) = scored(*words, "--reference", tmp_path / "real.npz").values()
        return values(card)[FD]

    np.savez(tmp_path / "real.npz", arr_0=array[::-1])
    assert score() == pytest.approx(0, abs=1e-6)
    assert score() == pytest.approx(0, abs=1e-6)  # from the cache
    np.savez(tmp_path / "real.npz", arr_0=255 - array)
    assert score() > 1e-3


def test_a_cache_that_was_cut_short_is_made_again(run, tmp_path) -> None:
    words = (run, *NETWORK, "--metrics", "fid", "--cache", tmp_path, "--out", tmp_path / "s")
    first = values(scored(*words)["e2ediff"])
    (file,) = tmp_path.glob("features-*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    assert values(scored(*words)["e2ediff"]) == first


def test_a_run_has_reconstruction_latent_and_memorisation_scores(run, tmp_path) -> None:
    sections = "reconstruction,latents,memorisation,fid"
    card = scored(run, *NETWORK, "--metrics", sections, "--out", tmp_path)["e2ediff"]
    names = {FD, f"r{FD}", "PSNR", "SSIM", "knn", "knn_mean", "probe", "probe_mean", "copied"}
    assert names <= set(card.scores)
    assert len(card.notes["closest_pairs"]) == 10


@pytest.fixture(scope="module")
def two_data_sets(run, tmp_path_factory, host, tiny_text):
    """Cards of runs on different data, scored against one npz; and a further one of the first."""
    root = tmp_path_factory.mktemp("other")
    other = tiny_text.replace("count: 60", "count: 80")
    (root / "tiny.yaml").write_text(other + "guidance: {name: classifier_free, scale: 2.0}\n")
    train(host, str(root / "tiny.yaml"), ["steps=3"], str(root / "tiny"))
    np.savez(root / "real.npz", arr_0=samples(run, "nearest")[::-1])
    sections = "[reconstruction, latents, memorisation, fid, {name: kid, subsets: 5, size: 10}]"
    words = (*NETWORK, "--metrics", sections, "--reference", root / "real.npz")
    same = {"--set": "guidance.scale=3", "--weights": "online"}
    return (
        scored(run, *words, "--out", root / "a")["e2ediff"],
        scored(root / "tiny", *words, "--out", root / "b")["e2ediff"],
        scored(run, *words, "--out", root / "c", *(w for pair in same.items() for w in pair))[
            "e2ediff"
        ],
    )


PAIRS = {"held_out_sha256", "held_out_images"}
SIDES = {*PAIRS, "training_sha256", "training_images"}


@pytest.mark.parametrize(
    ("score", "pinned"),
    [
        ("PSNR", PAIRS),
        ("SSIM", PAIRS),
        (f"r{FD}", PAIRS),
        ("rKD-RandomProjection6", {*PAIRS, "subsets", "size", "seed"}),
        ("knn", {*SIDES, "k"}),
        ("probe_mean", {*SIDES, "weight_decay"}),
        ("copied", SIDES),
    ],
)
def test_scores_on_other_images_than_samples_say_which_and_are_not_ranked_across_data(
    two_data_sets, score, pinned
) -> None:
    """One common reference of the samples does not make their held-out images the same."""
    a, b, c = two_data_sets
    assert pinned <= set(a.scores[score].metric)
    digests = [card.passport.protocol_digest(card.scores[score]) for card in (a, b)]
    assert digests[0] != digests[1]  # so reports give them columns of their own
    with pytest.raises(UnlikeScoresError, match=f"{score} was not measured in the same way") as e:
        rank([a, b], score)
    assert e.value.exit_code == 9
    assert "metric.held_out_sha256: " in str(e.value)
    # What decides samples alone does not keep reconstructions and latents from being ranked.
    apart = differences([a, c], score)
    assert set(apart) == ({"guidance"} if score == "copied" else set())


def test_compare_names_the_held_out_images_that_differ(two_data_sets) -> None:
    a, b, _ = two_data_sets
    done = e2ediff("compare", a.place, b.place)
    assert done.code == 9
    assert "  metric.held_out_sha256: " in done.err


def test_a_perceptual_distance_names_its_network_and_its_heads() -> None:
    from e2ediff.evaluate.reconstruction import Perceptual

    network = RandomProjection(width=6).build()
    one, two = (Perceptual(network, (torch.full((6,), v),)) for v in (1.0, 2.0))
    assert one.identity["perceptual_sha256"] == two.identity["perceptual_sha256"]
    assert one.identity["heads_sha256"] != two.identity["heads_sha256"]
    assert Perceptual(network).identity["heads_sha256"] is None


def test_reconstructions_too_few_for_a_metric_are_refused(run, tmp_path) -> None:
    real = "{name: synthetic, size: 16, classes: 4, count: 80}"
    words = (run, *NETWORK[:2], "--count", 70, "--reference", real, "--out", tmp_path)
    done = e2ediff("eval", *words, "--metrics", "reconstruction,{name: density_coverage, k: 64}")
    assert done.code == 5
    assert "60 held-out images, and DensityCoverage needs 65" in done.err


def test_inception_scores_with_other_weights_are_never_called_fid(tmp_path, host) -> None:
    """And statistics in an npz are those of its images."""
    network = Inception2015()
    g = torch.Generator().manual_seed(0)
    for value in network.state_dict().values():
        if value.ndim > 1:
            value.copy_((2 / value[0].numel()) ** 0.5 * torch.randn(value.shape, generator=g))
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    made, real = (
        torch.randint(256, (2, 16, 16, 3), generator=g, dtype=torch.uint8) for _ in range(2)
    )
    np.savez(tmp_path / "made.npz", arr_0=made.numpy())
    np.savez(tmp_path / "real.npz", arr_0=real.numpy())
    network = Inception(weights=str(tmp_path / "inception.pth")).build()
    taps = network.vectors(real.permute(0, 3, 1, 2).float(), ("pool", "spatial"))
    pool, spatial = (moments_of(taps[tap]) for tap in ("pool", "spatial"))
    np.savez(
        tmp_path / "statistics.npz",
        mu=pool.mean.numpy(), sigma=pool.covariance.numpy(),
        mu_s=spatial.mean.numpy(), sigma_s=spatial.covariance.numpy(),
    )  # fmt: skip
    work, view = Pass(network, ("pool", "spatial"), ()), View("nearest", "network")
    images, statistics = (
        reference_features(
            open_reference(str(tmp_path / name), host, None), work, view, cache=str(tmp_path)
        )
        for name in ("real.npz", "statistics.npz")
    )
    for tap in ("pool", "spatial"):
        near = {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(images.moments[tap].mean, statistics.moments[tap].mean, **near)
        known = statistics.moments[tap].covariance
        torch.testing.assert_close(images.moments[tap].covariance, known, **near)

    words = (tmp_path / "made.npz", "--weights-file", tmp_path / "inception.pth", "--metrics")
    (card,) = scored(*words, "fid", "--reference", tmp_path / "statistics.npz").values()
    assert list(card.scores) == ["FD-Inception2015"]
    done = e2ediff("eval", *words, "kid", "--reference", tmp_path / "statistics.npz")
    assert done.code == 5
    assert "has only statistics, but the metrics need features of images" in done.err
    broken = (*words, "fid", "--reference", tmp_path / "real.npz", "--sha256", "0" * 64)
    done = e2ediff("eval", *broken)
    assert done.code == 5
    assert "these are other weights" in done.err


def test_images_that_are_not_finite_are_refused_and_not_scored_as_black_ones(run) -> None:
    model = load_model(run, device="cpu")
    samples = Samples(ModelRef(run=run), [0] * 40, model=model)
    for weight in model.net.parameters():
        weight.data.fill_(torch.nan)
    with pytest.raises(DataError, match=r"samples are not finite, .* number 32: the weights"):
        next(samples.batches(33, 40, 64))
    work = Pass(RandomProjection(width=6).build(), ("pool",), ())
    source = model.recipe.data.open(held_out=True)
    with pytest.raises(DataError, match="reconstructions of held-out images are not finite"):
        reconstruct(model, source, 8, work, View("nearest", "network"))


def test_scores_are_ranked_only_if_they_were_measured_in_the_same_way(run, tmp_path) -> None:
    metrics = ("--metrics", "{name: kid, subsets: 5, size: 10}")
    scored(run, *NETWORK, *metrics, "--out", tmp_path / "a")
    scored(run, *NETWORK, *metrics, "--weights", "online", "--out", tmp_path / "b")
    scored(run, *NETWORK[:2], "--count", 20, *metrics, "--out", tmp_path / "c")
    a, b, c = (next(Path(tmp_path, name).glob("*.json")) for name in "abc")
    done = e2ediff("compare", a, b)
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0] == "KD-RandomProjection6, best first"
    first, second = (float(line.split()[0]) for line in lines[1:])
    assert first <= second
    done = e2ediff("compare", a, c)
    assert done.code == 9
    assert "was not measured in the same way:\n  images: 24 against 20\n" in done.err
    assert done.out == ""
    done = e2ediff("compare", a, c, "--regardless")
    assert done.code == 0
    assert "unlike measurements ranked regardless" in done.out


def test_a_bootstrap_gives_every_comparison_an_interval_in_print_and_in_the_card(
    run, tmp_path
) -> None:
    metrics = "[fid, {name: kid, subsets: 2, size: 10}, density_coverage, reconstruction]"
    words = (run, *NETWORK, "--metrics", metrics)
    plain = scored(*words, "--out", tmp_path / "plain")["e2ediff"]
    done = e2ediff("eval", *words, "--bootstrap", 8, "--out", tmp_path / "drawn")
    assert done.code == 0
    lines = {line.split()[0]: line for line in done.out.splitlines() if "+-" in line}
    drawn = read_card(done.out.splitlines()[-1])
    assert drawn.notes["bootstrap"] == 8
    compared = [n for n in drawn.scores if n.endswith("RandomProjection6")]
    assert len(compared) == 8  # FD, KD, density and coverage of samples and of reconstructions
    for name in compared:
        score = drawn.scores[name]
        low, high = score.interval
        assert low <= score.value <= high
        assert score.error > 0 or "D-" not in name  # a share may be the same in all sets
        assert lines[name].endswith(f"+- {score.error:.2g} [{low:.6g}, {high:.6g}]")
        assert plain.scores[name].interval is None
        assert differences([plain, drawn], name) == {}  # an error is no way of measuring
    assert values(plain) == pytest.approx(values(drawn), rel=1e-12)
    assert plain.scores["KD-RandomProjection6"].error > 0  # of few images, without any bootstrap


def test_compare_notes_other_versions_and_ranks_all_the_same(run, tmp_path) -> None:
    words = (run, *NETWORK, "--metrics", "{name: kid, subsets: 5, size: 10}")
    card = scored(*words, "--out", tmp_path)["e2ediff"]
    machine = json.loads(json.dumps(card.passport.machine))
    own = machine["versions"]["torch"]
    machine["versions"]["torch"] = "1.13"
    del machine["libraries"]["pillow"]
    machine["git"] = {**(machine["git"] or {"dirty": False}), "commit": "abc"}
    other = attrs.evolve(card, passport=attrs.evolve(card.passport, machine=machine))
    place = write_card(str(tmp_path / "other"), other)
    assert e2ediff("compare", card.place, card.place).err == ""
    done = e2ediff("compare", card.place, place)
    assert done.code == 0
    assert len(done.out.splitlines()) == 3
    notes = done.err.splitlines()
    assert f"note: torch differs: {own} ({card.place}), 1.13 ({place})" in notes
    assert any(n.startswith("note: git commit differs: ") and f"abc ({place})" in n for n in notes)
    pillow = [note for note in notes if note.startswith("note: pillow differs: ")]
    assert [note.endswith(f"unknown ({place})") for note in pillow] == [True]
    assert not [note for note in notes if "torchvision" in note]  # which is the same


def test_a_report_has_the_scores_of_a_run(run, host) -> None:
    from e2ediff.report.gather import gather

    card = scored(run, *NETWORK, "--metrics", "fid")["e2ediff"]
    (found,) = gather(host, run).runs
    keys = [k for k in found.figures if k.startswith(f"{FD}@e2ediff-")]
    assert found.figures[keys[0]] == values(card)[FD]


def test_the_file_is_json_with_its_own_digest(run, tmp_path) -> None:
    card = scored(run, *NETWORK, "--metrics", "fid", "--out", tmp_path)["e2ediff"]
    content = json.loads(Path(card.place).read_text())
    assert content["digest"] == card.passport.digest
    assert card.passport.digest[:8] in card.place
