"""The stage from end to end on a tiny policy, and every input it must refuse."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY_GPT, write_tiny
from PIL import Image
from safetensors.torch import load_file

from vapi import data, evaluate, models, references
from vapi.config import EvaluateConfig, ModelConfig, TuneConfig
from vapi.evaluate import Sampler
from vapi.metrics import features as judges
from vapi.metrics import stream
from vapi.models import features as networks
from vapi.models import memory, weights
from vapi.models.sampler import image_seed
from vapi.references import Subjects
from vapi.run import Run


def write_images(path: Path, count: int, seed: int, size: int = 16, labels: np.ndarray | None = None) -> str:
    """Smooth coloured blobs, sorted by class, as Hugging Face writes images."""
    rng = np.random.default_rng(seed)
    labels = np.sort(np.arange(count) % 10) if labels is None else labels
    rows = []
    for label in labels:
        small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8) // 2 + np.uint8(10 * (label % 10))
        buffer = io.BytesIO()
        Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": ""})
    pq.write_table(pa.table({"image": rows, "label": labels}), path)
    return str(path)


def write_tune(folder: Path, model: ModelConfig, generator_seed: int = 1) -> Path:
    """A folder as the stage tune leaves it: other weights of the same shape."""
    other = write_tiny(folder.parent / "other", seed=generator_seed)
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(Path(other.generator).read_bytes())
    looks = [{"step": step, "holdout/reward": -0.5 + step / 10, "holdout/ce": 3.0, "holdout/entropy": 2.5} for step in (0, 1, 2)]
    lines = [looks[0], *({"tune/reward": -0.4, "tune/ce": 3.1, "tune/entropy": 2.4, **look} for look in looks[1:])]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data.write_json(folder / "summary.json", {"holdout": {"images": 8, "first": looks[0], "last": looks[-1]}})
    inputs = {"generator": data.file_digest(Path(model.generator)), "tokenizer": data.file_digest(Path(model.tokenizer))}
    data.describe(folder, "tune", {"model": model, "tune": TuneConfig()}, inputs, 1.0)
    return folder


@dataclass
class World:
    """Everything the stage needs, in a folder that is a project of its own."""

    root: Path
    model: ModelConfig
    config: EvaluateConfig
    tune: Path

    def run(self, out: str = "out", run: Run | None = None, **changes: object) -> dict:
        config = dataclasses.replace(self.config, **changes)
        evaluate.evaluate(self.model, config, self.tune, self.root / out, run or Run())
        return json.loads((self.root / out / "metrics.json").read_text())


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    model = write_tiny(tmp_path / "base")
    images = torch.randint(256, (64, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    weights.save(judges.calibrated(networks.random_twin(7), images), tmp_path / "metric.safetensors", {})
    config = EvaluateConfig(
        samples=40, seeds=[0], temperatures=[0.8, 1.0], guidances=[1.0], sweep_samples=20, images_per_batch=16, sheet_images=10,
        reference=write_images(tmp_path / "reference.parquet", 50, 0), validation=write_images(tmp_path / "validation.parquet", 30, 1),
        extractor=str(tmp_path / "metric.safetensors"),
    )  # fmt: skip
    yield World(tmp_path, model, config, write_tune(tmp_path / "tune", model))


class Memory(Run):
    """Keeps what a stage reports."""

    def __init__(self) -> None:
        self.numbers: dict[str, float] = {}
        self.shown: list[str] = []

    def metrics(self, values: dict[str, float], step: int | None = None) -> None:
        self.numbers |= values

    def image(self, key: str, image: object, step: int | None = None) -> None:
        assert Path(str(image)).is_file()
        self.shown.append(key)

    def artifact(self, path: Path | str, folder: str = "") -> None:
        assert Path(path).is_file()
        self.shown.append(Path(path).name)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "provenance.json"}


# --- the whole stage ---------------------------------------------------------------------------


def test_from_end_to_end(world: World) -> None:
    memory = Memory()
    results = world.run(run=memory)
    for name in ("base", "tuned", "base_best", "tuned_best"):
        found = results[name]
        assert found["images"] == 40 and found["fid"] > 0 and found["fid_std"] is None
        assert {"kid", "inception_score", "precision", "recall", "class_accuracy", "fid_random"} <= set(found)
    assert results["base"]["fid"] != results["tuned"]["fid"]
    assert (results["base"]["reward"], results["tuned"]["reward"]) == (-0.5, -0.3)
    assert set(results["anchors"]) == {"real", "reconstruction"} and results["anchors"]["real"]["images"] == 30
    assert results["anchors"]["real"]["fid"] < results["base"]["fid"]
    gap = results["exposure"]["base"]
    assert gap["gap"] == pytest.approx(gap["fid_free_running"] - gap["fid_teacher_forced"], abs=1e-4) and gap["images"] == 30
    assert len(results["sweep"]) == 4
    with (world.root / "out" / "sweep.csv").open() as file:
        assert [row["model"] for row in csv.DictReader(file)] == ["base", "base", "tuned", "tuned"]
    with (world.root / "out" / "curves.csv").open() as file:
        assert next(csv.DictReader(file))["tune/reward"] == ""
    assert memory.numbers["base/fid"] == results["base"]["fid"] and "tuned_exposure/gap" in memory.numbers
    assert memory.shown == ["samples/before_after", "samples/best", "metrics.json"]
    with (world.root / "out" / "classes.csv").open() as file:
        classes = list(csv.DictReader(file))
    assert [row["samples"] for row in classes] == ["4"] * 10
    for name in ("base", "tuned"):
        assert np.mean([float(row[name]) for row in classes]) == pytest.approx(results[name]["class_accuracy"], abs=1e-5)
    names = {"metrics.json", "report.html", "config.json", "sheet-before-after.png", "sheet-best.png", "sheet-anchors.png"}
    assert names <= set(files(world.root / "out"))


def test_best_is_the_best_of_the_sweep(world: World) -> None:
    results = world.run()
    for name in ("base", "tuned"):
        best = min((point for point in results["sweep"] if point["model"] == name), key=lambda point: point["fid"])
        assert results[f"{name}_best"]["temperature"] == best["temperature"]
        if best["temperature"] == 1.0:
            assert results[f"{name}_best"]["fid"] == results[name]["fid"]


def test_the_same_bytes_with_and_without_features_from_before(world: World) -> None:
    world.run()
    first = files(world.root / "out")
    world.run()
    assert files(world.root / "out") == first
    for folder in data.state_dir("evaluate").iterdir():  # as if nothing had ever been drawn
        for part in folder.glob("*.safetensors"):
            part.unlink()
    world.run()
    assert files(world.root / "out") == first


def test_the_same_weights_give_the_same_numbers(world: World) -> None:
    (world.tune / "model.safetensors").write_bytes(Path(world.model.generator).read_bytes())
    results = world.run()
    for pair in (("base", "tuned"), ("base_best", "tuned_best")):
        one, other = ({k: v for k, v in results[name].items() if k != "reward"} for name in pair)
        assert one == other
    assert results["exposure"]["base"] == results["exposure"]["tuned"]


def test_seeds_give_a_spread(world: World) -> None:
    results = world.run(seeds=[0, 1, 2])
    assert results["base"]["fid_std"] > 0 and results["exposure"]["base"]["gap_std"] > 0
    assert results["base"]["reward"] == -0.5


def test_batch_size_does_not_matter(world: World) -> None:
    one, other = world.run(), world.run(images_per_batch=7)
    for name in ("base", "tuned"):
        for key in ("fid", "kid", "inception_score", "recall", "class_accuracy", "fid_random"):
            assert other[name][key] == pytest.approx(one[name][key], rel=1e-3, abs=1e-6)


def test_cores_do_not_matter(world: World) -> None:
    world.run()
    one = files(world.root / "out")
    shutil.rmtree(world.root / ".vapi")
    torch.set_num_threads(2)
    world.run()
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert files(world.root / "out") == one


def test_guidance_is_swept_too(world: World) -> None:
    results = world.run(guidances=[1.0, 1.5], temperatures=[1.0])
    assert [(point["temperature"], point["guidance"]) for point in results["sweep"][:2]] == [(1.0, 1.0), (1.0, 1.5)]
    assert results["sweep"][0]["fid"] != results["sweep"][1]["fid"]


def test_samples_can_be_scaled_before_they_are_judged(world: World) -> None:
    reference = write_images(world.root / "small.parquet", 30, 4, size=8)
    results = world.run(resize=8, reference=reference)
    assert results["protocol"]["resize"] == "bicubic to 8, before uint8"
    with pytest.raises(ValueError, match="16 x 16 pixels, but 8 x 8 are compared"):
        world.run(resize=8)


def test_guidance_may_be_compared_beside_none(world: World) -> None:
    results = world.run(guided=2.0)
    assert results["base_guided"]["guidance"] == 2.0 and results["base_guided"]["fid"] != results["base"]["fid"]
    assert results["tuned_guided"]["images"] == 40
    page = (world.root / "out" / "report.html").read_text()
    assert "base guided" in page and "guidance 2" in page


def test_random_labels_follow_the_image_alone(world: World) -> None:
    results = world.run(labels="random")
    assert "drawn for each image" in results["protocol"]["labels"] and results["base"]["fid"] != world.run("second")["base"]["fid"]
    bench = evaluate.Bench.of(world.model, dataclasses.replace(world.config, labels="random"), models.load(world.model))
    make = evaluate.Contestant(bench, "base", models.Networks.base(world.model)).draw(Sampler(), seed=3)
    images, labels = make(range(20))
    alone, label = make(range(13, 14))
    assert torch.equal(alone[0], images[13]) and label == labels[13]
    many = torch.tensor([Subjects(10, how="random").label(0, number) for number in range(5000)])
    assert many.bincount().tolist() == pytest.approx([500] * 10, abs=5 * 500**0.5) and many[:10].tolist() != list(range(10))


def test_deterministic_kernels_are_asked_for_and_given_back(world: World) -> None:
    seen: list[bool] = []
    with evaluate.reproducible(True):
        seen.append(torch.are_deterministic_algorithms_enabled())
    assert seen == [True] and not torch.are_deterministic_algorithms_enabled()
    one, other = world.run(), world.run("second", deterministic=True)
    assert {k: v for k, v in one.items() if k != "protocol"} == {k: v for k, v in other.items() if k != "protocol"}  # on a CPU, anyway


@pytest.fixture
def adm(world: World, inception_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A published reference and Inception's weights in their layouts, small and with random numbers; tuned is base."""
    monkeypatch.setattr(judges, "INCEPTION_SHA256", judges.sha256(inception_file)[:8])
    rng = np.random.default_rng(0)
    arrays = {"arr_0": rng.integers(256, size=(5, 16, 16, 3), dtype=np.uint8)}
    for mean, covariance, dim in (("mu", "sigma", 2048), ("mu_s", "sigma_s", 2023)):
        arrays |= {mean: rng.random(dim), covariance: np.diag(rng.random(dim))}
    np.savez(tmp_path / "reference.npz", **arrays)
    (world.tune / "model.safetensors").write_bytes(Path(world.model.generator).read_bytes())
    world.config = dataclasses.replace(
        world.config, extractor="inception", extractor_weights=str(inception_file),
        reference=str(tmp_path / "reference.npz"), labels="random",
        samples=5, sweep_samples=5, temperatures=[1.0], validation=write_images(tmp_path / "few.parquet", 5, 2),
    )  # fmt: skip
    return world


def test_a_published_reference_from_end_to_end(adm: World) -> None:
    results = adm.run()
    for name in ("base", "tuned", "base_best"):
        assert {"sfid", "inception_score_adm", "precision_adm", "recall_adm", "fid_random", "kid"} <= set(results[name])
        assert "class_accuracy" not in results[name]  # Inception's classes are not the model's ten
    protocol = results["protocol"]
    assert protocol["reference"]["images"] == 5 and protocol["reference"]["moments"].startswith("published")
    assert protocol["reference"]["sha256"] == data.file_digest(Path(adm.config.reference))
    assert protocol["extractor"]["sha256"] == data.file_digest(Path(adm.config.extractor_weights))
    drawn = next(path for path in data.state_dir("evaluate").rglob("*.safetensors"))
    assert load_file(drawn)["spatial"].shape == (5, 2023)
    # the mean of the published moments is what FID is far from
    assert results["base"]["fid"] > 0.3 * 2048 / 12
    page = (adm.root / "out" / "report.html").read_text()
    assert "sFID" in page and "published of many more" in page


def test_bad_published_references(adm: World) -> None:
    refused(adm, "set evaluate.extractor to inception", extractor=str(adm.root / "metric.safetensors"))
    refused(adm, "16 x 16 pixels, but 8 x 8 are compared", resize=8)
    refused(adm, "nowhere.npz, which is not here", reference=str(adm.root / "nowhere.npz"))
    with np.load(adm.config.reference) as file:
        np.savez(adm.root / "samples.npz", arr_0=file["arr_0"])
        np.savez(adm.root / "few.npz", **{name: file[name][:4] if name == "arr_0" else file[name] for name in file})
    refused(adm, "lacks mu, sigma, mu_s, sigma_s; it holds samples", reference=str(adm.root / "samples.npz"))
    refused(adm, "holds 4 images", reference=str(adm.root / "few.npz"))
    refused(adm, "evaluate.validation is .*gone.parquet, which is not here", validation=str(adm.root / "gone.parquet"))
    refused(adm, "half-downloaded or another network", extractor_weights=str(adm.tune / "model.safetensors"))
    refused(adm, "give a folder with config.json and model.safetensors", dinov2=str(adm.root))


def test_dinov2_looks_too(world: World) -> None:
    transformers = pytest.importorskip("transformers", reason="pip install 'vapi-align[dinov2]'")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(hidden_size=48, num_hidden_layers=2, num_attention_heads=3)
    folder = world.root / "dinov2"
    transformers.Dinov2Model(config).save_pretrained(folder)
    network = judges.DinoV2(folder)
    image = torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    white = (1 - torch.tensor(judges.DINOV2_MEAN)) / torch.tensor(judges.DINOV2_STD)
    expected = network.network(pixel_values=white.view(1, 3, 1, 1).expand(1, 3, 224, 224)).pooler_output
    torch.testing.assert_close(network(image), expected, rtol=1e-4, atol=1e-5)
    results = world.run(samples=6, sweep_samples=5, temperatures=[1.0], dinov2=str(folder))
    assert results["base"]["fd_dinov2"] > 0
    assert results["protocol"]["extractor"]["dinov2"] == data.file_digest(folder / "model.safetensors")


def test_a_protocol_is_a_promise() -> None:
    adm = {"samples": 50_000, "extractor": "inception", "resize": 256, "labels": "random", "reference": "VIRTUAL_imagenet256_labeled.npz"}
    assert EvaluateConfig(protocol="adm-256-50k", **adm).labels == "random"
    for name, value in {"samples": 5000, "resize": 0, "labels": "balanced", "reference": "val.parquet", "top_k": 100}.items():
        with pytest.raises(ValueError, match=f"adm-256-50k .*evaluate.{name}"):
            EvaluateConfig(protocol="adm-256-50k", **adm | {name: value})
    assert EvaluateConfig(protocol="adm-256-50k-balanced", **adm | {"labels": "balanced"})


def test_validation_may_be_a_folder_of_photographs(world: World) -> None:
    """As ImageNet comes: class folders, all sizes; cropped like training images, a fair draw of a large folder."""
    pixels, labels, _ = data.read_images(Path(world.config.validation))
    for number, (image, label) in enumerate(zip(pixels, labels)):
        folder = world.root / "photos" / f"n{label:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        tall = Image.fromarray(np.pad(image, ((3, 4), (0, 0), (0, 0)))) if number % 2 else Image.fromarray(image)
        tall.save(folder / f"{number}.png")
    bench = evaluate.Bench.of(
        world.model, dataclasses.replace(world.config, validation=str(world.root / "photos")), models.load(world.model)
    )
    assert bench.real.pixels.shape == (30, 3, 16, 16) and bench.real.labels.bincount().tolist() == [3] * 10
    as_rows = {image.numpy().tobytes() for image in bench.real.pixels.permute(0, 2, 3, 1)}
    assert {image.tobytes() for image in pixels[::2]} <= as_rows  # what has the right size is taken as it is
    few, classes, _ = references.cropped(str(world.root / "photos"), 16, 10, 12)
    assert len(few) == 12 and len(set(classes.tolist())) > 4
    (world.root / "photos" / "n03" / "3.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="photos: n03/3.png not an image"):
        references.cropped(str(world.root / "photos"), 16, 10, 0)


# --- samples, and features kept ----------------------------------------------------------------


def test_a_killed_run_goes_on_where_it_stopped(world: World) -> None:
    drawn: list[range] = []
    policy = models.load(world.model)
    bench = evaluate.Bench.of(world.model, world.config, policy)
    make = evaluate.Contestant(bench, "base", models.Networks.base(world.model)).draw(Sampler(), seed=0)

    def dies_in_the_third_batch(numbers: range) -> tuple[torch.Tensor, torch.Tensor]:
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(numbers)
        return make(numbers)

    with pytest.raises(KeyboardInterrupt):
        bench.judge.features({"set": "test"}, 40, dies_in_the_third_batch, "")
    whole = bench.judge.features({"set": "other"}, 40, make, "")
    drawn.clear()

    def counts(numbers: range) -> tuple[torch.Tensor, torch.Tensor]:
        drawn.append(numbers)
        return make(numbers)

    again = bench.judge.features({"set": "test"}, 40, counts, "")
    assert [numbers.start for numbers in drawn] == [32]
    assert torch.equal(again.pooled, whole.pooled) and torch.equal(again.labels, whole.labels)


def test_the_base_is_drawn_once_for_many_tunings(world: World) -> None:
    world.run()
    known = {folder.name for folder in data.state_dir("evaluate").iterdir()}
    (world.root / "second").mkdir()
    world.tune = write_tune(world.root / "second" / "tune", world.model, generator_seed=2)
    results = world.run("second-out")
    new = {folder.name for folder in data.state_dir("evaluate").iterdir()} - known
    plain_sweep_best_forced = 1 + 2 + (results["tuned_best"]["temperature"] != 1.0) + 1
    assert len(new) == plain_sweep_best_forced


def test_a_tuned_tokenizer_paints_what_the_base_draws(world: World) -> None:
    """With the base's own file as the tuned one nothing changes; with another one it is the pictures that do, and are told apart."""
    (world.tune / "model.safetensors").unlink()
    tuned = world.tune / models.TUNED["tokenizer"]
    tuned.write_bytes(Path(world.model.tokenizer).read_bytes())
    same = world.run("same")
    assert same["base"] == pytest.approx({**same["tuned"], "reward": same["base"]["reward"]})
    tuned.write_bytes(Path(write_tiny(world.root / "another", seed=3).tokenizer).read_bytes())
    other = world.run("others")
    assert other["base"] == same["base"] and other["tuned"]["fid"] != same["tuned"]["fid"]
    assert other["weights"]["tuned"] == data.file_digest(tuned) != other["weights"]["base"]


def test_old_features_are_thrown_away_when_there_are_too_many(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.run()
    monkeypatch.setattr(stream, "KEEP_BYTES", 1)
    stream.prune()
    assert any(data.state_dir("evaluate").iterdir())  # too young
    monkeypatch.setattr(stream, "KEEP_SECONDS", 0)
    stream.prune()
    assert not any(data.state_dir("evaluate").iterdir())


def test_labels_are_balanced_and_images_do_not_depend_on_their_batch(world: World) -> None:
    bench = evaluate.Bench.of(world.model, world.config, models.load(world.model))
    make = evaluate.Contestant(bench, "base", models.Networks.base(world.model)).draw(Sampler(), seed=3)
    images, labels = make(range(20))
    assert labels.bincount().tolist() == [2] * 10
    alone, label = make(range(13, 14))
    assert torch.equal(alone[0], images[13]) and label.item() == 3


def test_settings_of_the_sampler_reach_the_samples(world: World) -> None:
    bench = evaluate.Bench.of(world.model, dataclasses.replace(world.config, images_per_batch=0), models.load(world.model))
    assert bench.judge.images_per_batch == memory.MOST_IMAGES  # 0: what fits, and these are tiny
    contestant = evaluate.Contestant(bench, "base", models.Networks.base(world.model))
    settings = [Sampler(), Sampler(guidance=3.0), Sampler(guidance=3.0, guidance_schedule="power-cosine")]
    settings += [dataclasses.replace(settings[-1], guidance_power=8.0), Sampler(top_k=3), Sampler(top_p=0.3), Sampler(temperature=0.3)]
    drawn = [contestant.draw(how, 0)(range(6))[0] for how in settings]
    assert not [pair for pair in itertools.combinations(drawn, 2) if torch.equal(*pair)]
    config = dataclasses.replace(world.config, guidance=3.0, guidance_schedule="power-cosine", guidance_power=8.0)
    assert evaluate.plain_sampler(config) == settings[3]


def test_sample_seeds_never_meet() -> None:
    seeds = [evaluate.SWEEP_SEED, *range(20)]
    blocks = sorted(image_seed(seed, 0) for seed in seeds)
    assert min(b - a for a, b in zip(blocks, blocks[1:])) > 10_000_000
    assert all(0 <= image_seed(seed, 49_999) < 2**32 for seed in seeds)


def test_teacher_forced_draws_follow_the_policy(world: World) -> None:
    """At a temperature near zero a draw is the likeliest code; here: a peaked policy redraws what it predicts."""
    bench = evaluate.Bench.of(world.model, world.config, models.load(world.model))
    contestant = evaluate.Contestant(bench, "base", models.Networks.base(world.model))
    with torch.no_grad():
        contestant.policy.generator.output.weight.mul_(1e4)
    labels = bench.real.labels[:6]
    true = contestant.policy.encode(evaluate._floats(bench.real.pixels, range(6), contestant.policy))
    drawn = contestant._redraw(true, labels, torch.arange(6), seed=0)
    likeliest = contestant.policy.logits(contestant.policy.condition(labels), true).argmax(-1)
    assert (drawn == likeliest).float().mean() > 0.98


# --- what is refused, before anything is drawn ---------------------------------------------------


def refused(world: World, match: str, **changes: object) -> None:
    with pytest.raises(ValueError, match=match):
        world.run(**changes)
    assert not (world.root / "out").exists() and not list(world.root.glob(".out*"))


def test_missing_reference(world: World) -> None:
    refused(world, "evaluate.reference is .*nowhere.parquet, which is not here", reference=str(world.root / "nowhere.parquet"))


def test_reference_of_another_size(world: World) -> None:
    wrong = write_images(world.root / "wide.parquet", 20, 3, size=24)
    refused(world, "24 x 24 pixels, but 16 x 16 are compared", reference=wrong)
    refused(world, "evaluate.validation .* 24 x 24", validation=wrong)


def test_classes_out_of_range(world: World) -> None:
    wrong = write_images(world.root / "classes.parquet", 20, 3, labels=np.arange(20))
    refused(world, r"labels 0 \.\. 19, but the model draws classes 0 \.\. 9", reference=wrong)
    none = write_images(world.root / "none.parquet", 20, 3, labels=np.full(20, -1))
    refused(world, r"labels -1 \.\. -1", validation=none)


def test_too_few_images(world: World) -> None:
    refused(world, "evaluate.samples is 4; precision and recall need at least 5", samples=4)
    refused(world, "evaluate.sweep_samples is 3", sweep_samples=3)
    refused(world, "holds 4 images", reference=write_images(world.root / "few.parquet", 4, 3))


def test_extractor_that_is_none(world: World) -> None:
    refused(world, "evaluate.extractor is 'incepton'.*did you mean 'inception'", extractor="incepton")
    refused(world, "data/models/nowhere.safetensors is not here", extractor="data/models/nowhere.safetensors")
    refused(world, "does not fit the network", extractor=world.model.tokenizer)
    refused(world, r"inception\.pth is not here", extractor="inception", extractor_weights=str(world.root / "inception.pth"))


def test_extractor_with_damaged_weights(world: World) -> None:
    state, _ = weights.read(world.config.extractor)
    network = networks.FeatureNet()
    network.load_state_dict(state)
    with torch.no_grad():
        network.head.bias[0] = float("nan")
    weights.save(network, world.root / "damaged.safetensors", {})
    refused(world, "not finite", extractor=str(world.root / "damaged.safetensors"))


def test_no_tuned_weights(world: World) -> None:
    (world.tune / "model.safetensors").unlink()
    refused(world, "make it with: vapi tune")


def test_tuned_from_another_base(world: World) -> None:
    other = write_tiny(world.root / "elsewhere", seed=9)
    world.model = dataclasses.replace(world.model, generator=other.generator)
    refused(world, "tuned with another generator than")
    world.model = dataclasses.replace(world.model, generator=str(world.root / "base" / "generator.safetensors"), tokenizer=other.tokenizer)
    refused(world, "tuned with another tokenizer than")
    world.model = dataclasses.replace(world.model, image_size=32)
    refused(world, "model.image_size 16, and now it is 32")


def test_tuned_checkpoint_of_another_size(world: World) -> None:
    wide = write_tiny(world.root / "wide", gpt_config=dataclasses.replace(TINY_GPT, codes=64))
    (world.tune / "model.safetensors").write_bytes(Path(wide.generator).read_bytes())
    refused(world, "64 codes")


def test_a_folder_that_is_not_ours_is_left_alone(world: World) -> None:
    (world.root / "out").mkdir()
    (world.root / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="no stage of vapi wrote"):
        world.run()
    assert (world.root / "out" / "thesis.txt").read_text() == "years of work"
