"""Stage ``evaluate``: base and tuned through the same code, beside everything that could explain the difference.

Image n of a seed has its own random numbers and its own class, so base and tuned answer the same
questions. Images stream into features; only the sheets are written. Beside the plain comparison stand

- ``base_best`` and ``tuned_best``: each model at the temperature and guidance at which it does best,
  chosen on the validation images with samples of their own, reported on the reference. Sharpening
  alone looks like progress at temperature 1; here it does not.
- ``anchors``: other real images, and the tokenizer's reconstructions of them, which bound what a
  generator of codes can reach.
- ``exposure``: what is lost between predicting on real contexts and running free (exposure bias).
- ``fid_random``: the same distance in a network that no reward can have flattered.
- ``prompts``: what a generator of captions makes of GenEval's (``prompted.py``), plain and at its best.
- ``base_guided`` and ``tuned_guided``, where ``evaluate.guided`` asks for them: papers print both.

The reference is a Parquet file of real images, or what OpenAI published for ADM's evaluation: moments of all
of ImageNet, and 10,000 of its images. Either way the sweep chooses on other images, the validation.

Left out: a bootstrap. It biases a Frechet distance upwards; several ``evaluate.seeds`` give an honest
standard deviation.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vapi import data, images, launch, metrics, models, prompted, references, report, report_prompts
from vapi.config import EvaluateConfig, ModelConfig, nearest
from vapi.launch import ALONE, World
from vapi.metrics import features as judges
from vapi.metrics import fid, neighbours, published
from vapi.metrics.fid import Features
from vapi.metrics.stream import Judge, Make, prune, stored, thread_per_batch
from vapi.models import Networks, Policy, memory, sampler, weights
from vapi.models import features as networks
from vapi.models.sampler import image_seed
from vapi.prompted import Panel
from vapi.references import RealImages, Subjects
from vapi.run import NO_RUN, Run

Scores = dict[str, Any]

SWEEP_SEED = -1  # the sweep draws images that no reported number is made of
SWEEP_METRICS = ("fid", "inception_score", "precision_recall", "class_accuracy")
LOGITS_AT_ONCE = {"cpu": 1 << 24, "cuda": 1 << 27}

judges.register(networks.load)


@dataclass(frozen=True)
class Sampler:
    """How codes are drawn from a model's predictions."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0
    guidance_schedule: Literal["constant", "power-cosine"] = "constant"
    guidance_power: float = 2.0


def plain_sampler(config: EvaluateConfig) -> Sampler:
    """How codes are drawn in the plain comparison."""
    return Sampler(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Sampler)})


@contextlib.contextmanager
def reproducible(deterministic: bool) -> Iterator[None]:
    """Full float32 for the judges whatever ran before; and if asked for, kernels that give the same bits every time.

    What has no such kernel warns: PyTorch counts every cumulative sum on a GPU among them, although the sampler's,
    along rows, adds in a fixed order.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    tf32, tuned = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark
    torch.backends.cuda.matmul.allow_tf32 = False
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts, which is later than here
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark = tf32, tuned


def evaluate(model: ModelConfig, evaluate: EvaluateConfig, tune: Path, out: Path, run: Run = NO_RUN) -> None:
    """Measure base (``model.generator``) and tuned (``tune``/model.safetensors, or tokenizer.safetensors with the base's generator).

    ``out``: metrics.json, sweep.csv, curves.csv, sheet-*.png, report.html, config.json, provenance.json; of captions, prompts.csv; of
    classes that the metric network knows, classes.csv. Raises ValueError, before anything is drawn, for a reference, checkpoint or
    feature network that is missing or does not fit. An evaluation that was killed is continued by the same call.
    """
    begin = time.perf_counter()
    tune, out = Path(tune), Path(out)
    world = launch.world(model.device)
    with (
        reproducible(evaluate.deterministic),
        world.first_enters(data.output_folder(out, "evaluate")) as folder,
        thread_per_batch(models.device_of(model)) as workers,
    ):
        _require_files(evaluate)
        compared = {"base": Networks.base(model), "tuned": _tuned(tune, model)}
        holdout = _holdout(tune)
        for networks in (compared["tuned"], compared["base"]):  # refuse one that does not fit before the other is drawn from
            policy = networks.load()
        bench = Bench.of(model, evaluate, policy, workers, world)
        del policy  # each contestant loads its own
        found = {name: Contestant(bench, name, networks).examine() for name, networks in compared.items()}
        anchors = bench.anchors()
        if folder is None:
            return
        results = _results(bench, found, holdout, anchors)
        sheets = {name: one.sheets for name, one in found.items()} | {"anchors": bench.sheets}
        inputs = _inputs(model, evaluate, tune, bench)
        _write(folder, results, sheets, tune, inputs, _shown(bench, found))
        if bench.panel:
            _write_csv(folder / "prompts.csv", prompted.by_prompt(bench.panel, _answers(found)))
        if classes := _by_class(found):
            _write_csv(folder / "classes.csv", classes)
        cost: dict[str, float | str] = {"processes": world.size, "device": models.device_name(models.device_of(model))}
        data.describe(folder, "evaluate", {"model": model, "evaluate": evaluate}, inputs, time.perf_counter() - begin, **cost)
    prune()
    _track(run, out, results, evaluate, inputs)
    print(report.verdict(results))


# --- inputs, checked ---------------------------------------------------------------------------


def _require_files(evaluate: EvaluateConfig) -> None:
    """Raises ValueError for what will be missing, before anything is loaded."""
    if Path(evaluate.reference).suffix == published.SUFFIX and Path(evaluate.reference).is_file():
        published.require(Path(evaluate.reference))
    for what, path in (("reference", evaluate.reference), ("validation", evaluate.validation)):
        if not Path(path).exists():
            adm, ours = "it is part of OpenAI's guided-diffusion evaluations", "the bundled data comes with: dvc pull data.dvc"
            raise ValueError(f"evaluate.{what} is {path}, which is not here; {adm if path.endswith(published.SUFFIX) else ours}")
    if evaluate.extractor == "inception":
        judges.require_inception(judges.inception_path(evaluate.extractor_weights))
    if evaluate.dinov2:
        judges.require_dinov2(Path(evaluate.dinov2))


def _tuned(tune: Path, model: ModelConfig) -> Networks:
    """What was tuned. Raises ValueError if it was tuned from another base than the one it is compared with."""
    tuned = Networks.tuned(model, tune)
    made = data.read_json(tune / "config.json")
    for name in ("policy", "image_size"):
        then, now = made["sections"]["model"][name], getattr(model, name)
        if then != now:
            raise ValueError(f"{tune} was tuned with model.{name} {then!r}, and now it is {now!r}; run: vapi tune")
    for name in ("generator", "tokenizer"):
        path = weights.locate(getattr(model, name))
        if made["inputs"][name] != data.known_digest(path):
            raise ValueError(f"{tune} was tuned with another {name} than {path}; run: vapi tune")
    if made["inputs"].get("text_encoder", "") != data.encoder_digest(model):
        raise ValueError(
            f"{tune} was tuned with another text encoder than {model.text_encoder or 'none'}; run: vapi tokens, then vapi tune"
        )
    return tuned


def _holdout(tune: Path) -> dict[str, float | None]:
    """Reward on the images held out of tuning, of base and tuned."""
    holdout = data.read_json(tune / "summary.json")["holdout"]
    return {name: holdout[look].get("holdout/reward") for name, look in (("base", "first"), ("tuned", "last"))}


def _extractor(evaluate: EvaluateConfig, reference: Tensor, device: torch.device) -> judges.Extractor:
    """The networks that the configuration names, beside one with random weights."""
    extractor = _metric_network(evaluate, reference, device)
    return judges.with_dinov2(extractor, Path(evaluate.dinov2)) if evaluate.dinov2 else extractor


def _metric_network(evaluate: EvaluateConfig, reference: Tensor, device: torch.device) -> judges.Extractor:
    random = judges.calibrated(networks.random_twin(), reference)
    if evaluate.extractor == "inception":
        return judges.inception(judges.inception_path(evaluate.extractor_weights), random, device)
    if not evaluate.extractor.endswith(".safetensors"):
        hint = nearest(evaluate.extractor, ["inception"])
        raise ValueError(f"evaluate.extractor is {evaluate.extractor!r}; give a .safetensors file, or inception ({hint})")
    return judges.small(weights.locate(evaluate.extractor), random, device)


def _require_samples(evaluate: EvaluateConfig) -> None:
    for name in ("samples", "sweep_samples"):
        count, least = getattr(evaluate, name), metrics.MIN_IMAGES
        if count < least:
            raise ValueError(f"evaluate.{name} is {count}; precision and recall need at least {least} images")


@functools.cache
def _code_digest() -> str:
    """The source that makes images, features and verdicts: when it changes, what was kept from before is not used again."""
    package = Path(__file__).parent
    files = [package / f"{name}.py" for name in ("evaluate", "geneval", "images", "prompted", "references")]
    files += [path for name in ("models", "metrics", "digits") for path in (package / name).glob("*.py")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()


def _inputs(model: ModelConfig, evaluate: EvaluateConfig, tune: Path, bench: Bench) -> dict[str, str]:
    """Digests of everything the result depends on."""
    made = {name: data.known_digest(weights.locate(getattr(model, name))) for name in ("generator", "tokenizer")}
    judges = {"extractor": bench.judge.extractor.sha256} | ({"dinov2": bench.judge.extractor.dinov2_sha256} if evaluate.dinov2 else {})
    judges |= {"panel": bench.panel.digest} if bench.panel else {}
    return {"tune": data.file_digest(tune), **made, "text_encoder": data.encoder_digest(model), **bench.digests, **judges}


# --- what both models are measured with --------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """Judge, references and anchors: what base and tuned have in common."""

    model: ModelConfig
    config: EvaluateConfig
    judge: Judge
    real: RealImages  # validation, at the model's size
    asked: Subjects  # of samples that are compared with the reference
    tried: Subjects  # of those that are compared with the validation images
    reference: Features
    validation: Features
    reconstructions: Features
    sheets: dict[str, np.ndarray]  # uint8 (N, H, W, 3): real, reconstruction
    digests: dict[str, str]  # of the two reference files
    panel: Panel | None  # who judges what captions ask for
    answers: prompted.Anchors  # its verdicts on real images

    @classmethod
    def of(cls, model: ModelConfig, evaluate: EvaluateConfig, policy: Policy, workers: int = 1, world: World = ALONE) -> Bench:
        """Read references and judge. Raises ValueError for what is missing or does not fit."""
        _require_samples(evaluate)
        panel = None if policy.num_classes else Panel.of(evaluate, policy.device)
        if panel:
            panel.fit(policy)
        size = evaluate.resize or model.image_size
        reference, moments = references.reference(evaluate, size, policy.num_classes)
        validation = references.real_images(evaluate.validation, "validation", model.image_size, policy.num_classes)
        pixels, labels = validation.pixels, validation.labels
        digests = world.once(lambda: {name: data.file_digest(Path(getattr(evaluate, name))) for name in ("reference", "validation")})
        extractor = _extractor(evaluate, reference.pixels, policy.device)
        # the random network is calibrated on the reference, so every feature depends on it
        key: Scores = {"extractor": extractor.sha256, "dinov2": extractor.dinov2_sha256, "reference": digests["reference"]}
        key |= {"image_size": model.image_size, "resize": evaluate.resize, "code": _code_digest(), "deterministic": evaluate.deterministic}
        key |= {"torch": torch.__version__, "device": policy.device.type, "precision": model.precision}
        at_once = evaluate.images_per_batch or min(world.gather(_images_that_fit(model, policy)))
        judge = Judge(extractor, key, at_once, evaluate.resize, workers, world)

        def real(numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
            return judge.pixels(_floats(pixels, numbers, policy)), labels[numbers[0] : numbers[-1] + 1]

        def reconstruct(numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
            codes = sampler.encode(policy, _floats(pixels, numbers, policy))
            return judge.pixels(sampler.decode(policy, codes)), labels[numbers[0] : numbers[-1] + 1]

        def decoded(some: Tensor) -> Tensor:
            return judge.pixels(sampler.decode(policy, sampler.encode(policy, images.to_float(some).to(policy.device))))

        tokenizer = data.tokenizer_digest(model)
        real_key = {"set": digests["reference"], "tokenizer": tokenizer}
        answers = panel.anchors(judge, reference, decoded, real_key) if panel else prompted.Anchors()
        chosen = _one_of_each(labels, evaluate.sheet_images)
        of_reference = judge.features({"set": "reference"}, len(reference), stored(reference.pixels, reference.labels), "reference")
        return cls(
            model, evaluate, judge, validation,
            Subjects(policy.num_classes, reference.captions, evaluate.labels),
            Subjects(policy.num_classes, validation.captions, evaluate.labels),
            dataclasses.replace(of_reference.to(policy.device), published=moments),
            judge.features({"set": digests["validation"]}, len(pixels), real, "validation"),
            judge.features({"set": digests["validation"], "tokenizer": tokenizer}, len(pixels), reconstruct, "reconstructions"),
            {"real": _rows(pixels[chosen]), "reconstruction": _rows(_reconstruction(policy, pixels[chosen]))},
            digests,
            panel,
            answers,
        )  # fmt: skip

    def names(self) -> list[str]:
        """The metrics that make sense here."""
        return metrics.known(self.reference, self.asked.classes)

    def score(self, generated: Features) -> Scores:
        """All metrics against the reference, and the number of images, without which a FID means nothing."""
        found = self.judge.world.once(lambda: metrics.score(self.here(generated), self.reference, self.names()))
        return {**_rounded(found), "images": len(generated)}

    def sweep_score(self, generated: Features) -> Scores:
        """The metrics that a sweep is read by, against the validation images."""
        names = [name for name in self.names() if name in SWEEP_METRICS]
        return self.judge.world.once(lambda: metrics.score(self.here(generated), self.here(self.validation), names))

    def here(self, features: Features) -> Features:
        """The same on the device where metrics are computed."""
        return features.to(self.judge.extractor.device)

    def distance(self, generated: Features) -> float:
        """FID alone."""
        return self.judge.world.once(lambda: fid.frechet(self.here(generated).moments, self.reference.moments))

    def anchors(self) -> dict[str, Scores]:
        """Other real images, and what the tokenizer makes of them."""
        count = min(self.config.samples, len(self.validation))
        return {"real": self.score(self.validation[:count]), "reconstruction": self.score(self.reconstructions[:count])}


def _images_that_fit(model: ModelConfig, policy: Policy) -> int:
    # as if all were guided, or the batch, which features are kept by, would hang on what else is to be compared
    with models.autocast(model.precision, policy.device):
        return memory.images_per_batch(policy.footprint(guided=True), policy.device)


def _floats(pixels: Tensor, numbers: Sequence[int], policy: Policy) -> Tensor:
    return images.to_float(pixels[numbers[0] : numbers[-1] + 1]).to(policy.device)


@torch.inference_mode()
def _reconstruction(policy: Policy, pixels: Tensor) -> Tensor:
    return images.to_uint8(sampler.decode(policy, sampler.encode(policy, images.to_float(pixels).to(policy.device))))


def _rows(pixels: Tensor) -> np.ndarray:
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def _one_of_each(labels: Tensor, count: int) -> Tensor:
    """Images whose labels run through the classes in turn, as samples do."""
    turns: dict[int, int] = {}
    order = []
    for number, label in enumerate(labels.tolist()):
        turns[label] = turns.get(label, -1) + 1
        order.append((turns[label], label, number))
    return torch.tensor([number for _, _, number in sorted(order)[:count]])


def _rounded(scores: Scores) -> Scores:
    """Six digits: more than any of these numbers is worth, fewer than any of them hides in."""
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in scores.items()}


# --- one model ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """What was measured on one model."""

    plain: Scores
    best: Scores
    guided: Scores  # empty where nobody asked
    sweep: list[Scores]
    exposure: Scores
    answers: dict[str, prompted.Verdicts]  # to prompts, by setting: "", _guided, _best; empty for classes
    sheets: dict[str, np.ndarray]  # uint8 (N, H, W, 3): plain, best
    recognised: list[tuple[int, int]]  # by class: plain samples, and those of them that look like it; empty where nobody can say
    sha256: str


@dataclass(frozen=True)
class Draw:
    """Free-running samples of a seed, as the judge sees them: a ``Make`` that can work ahead."""

    policy: Policy
    judge: Judge
    precision: str
    how: Sampler
    seed: int
    subjects: Subjects

    def __call__(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        return next(self.stream([numbers]))

    @torch.inference_mode()
    def stream(self, ranges: Sequence[Sequence[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """uint8 images and labels of each range of image numbers."""
        labels = [torch.tensor([self.subjects.label(self.seed, number) for number in numbers]) for numbers in ranges]
        seeds = [[image_seed(self.seed, number) for number in numbers] for numbers in ranges]
        batches = ((self.subjects.condition(self.policy, what), these) for what, these in zip(labels, seeds, strict=True))
        # a recorded loop has one shape; where there is none, fewer images (a sheet's) take less time
        at_once = self.judge.images_per_batch if self.policy.device.type == "cuda" else 0
        arithmetic = models.autocast(self.precision, self.policy.device)
        drawn = sampler.stream(self.policy, batches, at_once, arithmetic, **dataclasses.asdict(self.how))
        for decoded, what in zip(drawn, labels, strict=True):
            yield self.judge.pixels(decoded), what


class Contestant:
    """One model on the bench."""

    def __init__(self, bench: Bench, name: str, networks: Networks) -> None:
        self.bench, self.name, self.config = bench, name, bench.config
        self.policy = networks.load()
        self.sha256 = data.known_digest(networks.changed)
        others = {"tokenizer": data.tokenizer_digest(networks.model), "text_encoder": data.encoder_digest(networks.model)}
        self.made_by = {"generator": data.known_digest(networks.generator), **others}
        self.plain = plain_sampler(self.config)

    def examine(self) -> Found:
        """Everything about this model, the long part of the stage."""
        sweep = self.sweep()
        best = min(sweep, key=lambda point: point["fid"])
        chosen = dataclasses.replace(self.plain, temperature=best["temperature"], guidance=best["guidance"])
        plain, top, answers = self.scores(self.plain), self.scores(chosen), self.answers(chosen)
        top |= {"temperature": chosen.temperature, "guidance": chosen.guidance}
        words = f"FID {plain['fid']:.2f}; at its best, {_setting(top)}, {top['fid']:.2f}"
        if self.bench.judge.world.first:
            print(f"{self.name}: {words}", file=sys.stderr, flush=True)
        sheets = {"plain": self.sheet(self.plain), "best": self.sheet(chosen), **self.pictures()}
        return Found(plain, top, self.guided(), sweep, self.exposure(), answers, sheets, self.recognised(), self.sha256)

    def pictures(self) -> dict[str, np.ndarray]:
        """What the model makes of some prompts: uint8 (N, H, W, 3)."""
        panel = self.bench.panel
        if panel is None:
            return {}
        make = self.draw(self.plain, self.config.seeds[0], panel.subjects)
        return {"prompts": self.bench.judge.world.once(lambda: _rows(panel.pictures(make)))}

    def answers(self, best: Sampler) -> dict[str, prompted.Verdicts]:
        """The panel's verdicts on what the model makes of prompts, at each setting that is compared."""
        panel = self.bench.panel
        if panel is None:
            return {}
        settings = {"": self.plain, "_best": best}
        if self.config.guided != 1.0:
            settings["_guided"] = dataclasses.replace(self.plain, guidance=self.config.guided)
        key = {"set": "prompts", **self.made_by}
        return {
            setting: panel.verdicts(
                self.bench.judge, key | dataclasses.asdict(how), functools.partial(self.draw, how), self.config.seeds, self.name
            )
            for setting, how in settings.items()
        }

    def scores(self, how: Sampler) -> Scores:
        """Mean and standard deviation over the seeds."""
        return _over_seeds([self.bench.score(self.samples(how, seed, self.config.samples)) for seed in self.config.seeds])

    def recognised(self) -> list[tuple[int, int]]:
        """By class: samples of the plain comparison, and how many the metric network takes for it. Empty where it knows other classes."""
        if "class_accuracy" not in self.bench.names():
            return []
        drawn = [self.samples(self.plain, seed, self.config.samples) for seed in self.config.seeds]
        labels = torch.cat([features.labels for features in drawn])
        right = labels[torch.cat([features.logits.argmax(dim=1) for features in drawn]) == labels]
        counts = [rows.bincount(minlength=self.bench.asked.classes).tolist() for rows in (labels, right)]
        return list(zip(*counts, strict=True))

    def guided(self) -> Scores:
        """The second comparison, if there is one."""
        if self.config.guided == 1.0:
            return {}
        how = dataclasses.replace(self.plain, guidance=self.config.guided)
        return self.scores(how) | {"temperature": how.temperature, "guidance": how.guidance}

    def sweep(self) -> list[Scores]:
        """Every temperature with every guidance against the validation images."""
        points = []
        for guidance, temperature in itertools.product(self.config.guidances, self.config.temperatures):
            how = dataclasses.replace(self.plain, temperature=temperature, guidance=guidance)
            generated = self.samples(how, SWEEP_SEED, self.config.sweep_samples, self.bench.tried)
            found = self.bench.sweep_score(generated)
            points.append({"model": self.name, "temperature": temperature, "guidance": guidance, **_rounded(found)})
        return points

    def exposure(self) -> Scores:
        """FID of draws on real contexts and of free-running samples: as many images, the same settings (temperature 1)."""
        count = min(self.config.samples, len(self.bench.real))
        rows = []
        for seed in self.config.seeds:
            free = self.samples(Sampler(), seed, count, self.bench.tried)  # asked for what the contexts show
            sets = {"fid_teacher_forced": self.teacher_forced(seed, count), "fid_free_running": free}
            row = {name: self.bench.distance(generated) for name, generated in sets.items()}
            rows.append(_rounded({**row, "gap": row["fid_free_running"] - row["fid_teacher_forced"]}))
        return _over_seeds(rows) | {"images": count}

    def samples(self, how: Sampler, seed: int, count: int, subjects: Subjects | None = None) -> Features:
        """Features of free-running samples 0 .. count - 1 of a seed, of the reference's subjects unless others are named."""
        subjects = subjects or self.bench.asked
        key = {"set": "samples", **self.made_by, **dataclasses.asdict(how), "seed": seed, "labels": subjects.key}
        title = f"{self.name}, temperature {how.temperature:g}" + (f", guidance {how.guidance:g}" if how.guidance != 1 else "")
        return self.bench.judge.features(key, count, self.draw(how, seed, subjects), title)

    def draw(self, how: Sampler, seed: int, subjects: Subjects | None = None) -> Make:
        """Free-running samples, as the judge sees them."""
        return Draw(self.policy, self.bench.judge, self.bench.model.precision, how, seed, subjects or self.bench.asked)

    def teacher_forced(self, seed: int, count: int) -> Features:
        """Features of validation images redrawn code by code, each from the true codes before it."""
        key = {"set": "teacher forced", **self.made_by, "images": self.bench.digests["validation"], "seed": seed}

        @torch.inference_mode()
        def make(numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
            labels = self.bench.real.labels[numbers[0] : numbers[-1] + 1]
            true = sampler.encode(self.policy, _floats(self.bench.real.pixels, numbers, self.policy))
            rows = max(1, LOGITS_AT_ONCE[self.policy.device.type] // (self.policy.num_codes * self.policy.vocab))
            own = torch.arange(numbers[0], numbers[0] + len(true))
            parts = zip(true.split(rows), labels.split(rows), own.split(rows), strict=True)
            codes = torch.cat([self._redraw(*part, seed) for part in parts])
            return self.bench.judge.pixels(sampler.decode(self.policy, codes)), labels

        return self.bench.judge.features(key, count, make, f"{self.name}, teacher forced")

    def _redraw(self, codes: Tensor, labels: Tensor, numbers: Tensor, seed: int) -> Tensor:
        with models.autocast(self.bench.model.precision, self.policy.device):
            logits = self.policy.logits(self.bench.tried.condition(self.policy, labels), codes)
        seeds = [image_seed(seed, number) for number in numbers.tolist()]
        uniform = sampler.uniforms(seeds, self.policy.num_codes).to(codes.device)
        return sampler.pick(logits.float().softmax(dim=-1), uniform)

    def sheet(self, how: Sampler) -> np.ndarray:
        """The first samples of the first seed: uint8 (N, H, W, 3)."""
        make = self.draw(how, self.config.seeds[0])
        return self.bench.judge.world.once(lambda: _rows(make(range(self.config.sheet_images))[0]))


def _over_seeds(rows: list[Scores]) -> Scores:
    """Each number's mean, and beside it ``_std``, its standard deviation over the seeds (None for a single one)."""
    found: Scores = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if name == "images":
            found[name] = values[0]
            continue
        found[name] = float(f"{np.mean(values):.6g}")
        found[f"{name}_std"] = float(f"{np.std(values, ddof=1):.6g}") if len(values) > 1 else None
    return found


# --- results -----------------------------------------------------------------------------------


LABELS = {
    "balanced": "image n shows class n mod the number of classes",
    "random": "uniform, drawn for each image from its seed and number",
}
CAPTIONS = {
    "balanced": "image n has caption n mod their number, of the images it is compared with",
    "random": "a caption of the images it is compared with, drawn for each image from its seed and number",
}


def _moments_of(config: EvaluateConfig) -> str:
    """Which images FID's reference moments are of."""
    return "published with the file, of more images than it holds" if config.reference.endswith(published.SUFFIX) else "these images"


def _protocol(bench: Bench) -> Scores:
    """What numbers must share to be compared. Weights are not part of it: they are what is compared."""
    config, extractor = bench.config, bench.judge.extractor
    size = min(fid.KID_SUBSET_SIZE, config.samples, len(bench.reference))
    return {
        "name": config.protocol,
        "samples": config.samples,
        "seeds": config.seeds,
        "labels": (CAPTIONS if bench.asked.captions else LABELS)[config.labels],
        "sampler": dataclasses.asdict(plain_sampler(config)),
        "sweep": {
            "temperatures": config.temperatures,
            "guidances": config.guidances,
            "samples": config.sweep_samples,
            "chosen_by": "fid against the validation images, on samples of another seed",
        },
        "image_size": bench.model.image_size,
        "precision": bench.model.precision,
        "resize": f"bicubic to {config.resize}, before uint8" if config.resize else "none",
        "uint8": "127.5 x + 128, clamped to 0 .. 255, truncated",
        "guided": config.guided,
        "reference": {"sha256": bench.digests["reference"], "images": len(bench.reference), "moments": _moments_of(config)},
        "validation": {"sha256": bench.digests["validation"], "images": len(bench.validation)},
        "extractor": {"name": extractor.name, "sha256": extractor.sha256, "dinov2": extractor.dinov2_sha256 or "none"},
        "random_extractor": "feature network with random weights, seed 0, batch norm calibrated on the reference",
        "kid": f"polynomial kernel of degree 3, {fid.KID_SUBSETS} subsets of {size}",
        "precision_recall_neighbours": neighbours.NEIGHBOURS,
        **({"prompts": bench.panel.protocol()} if bench.panel else {}),
        "inception_score_images_per_part": min(config.samples, fid.ISC_CHUNK),
        "torch_fidelity": importlib.metadata.version("torch-fidelity"),
    }


def _results(bench: Bench, found: dict[str, Found], holdout: dict[str, float | None], anchors: dict[str, Scores]) -> dict[str, Any]:
    """metrics.json."""

    def answered(one: Found, setting: str) -> Scores:
        return prompted.scores(bench.panel, one.answers[setting]) if bench.panel else {}

    return {
        "protocol": _protocol(bench),
        **{name: {**one.plain, **answered(one, ""), "reward": holdout[name]} for name, one in found.items()},
        **{f"{name}_best": {**one.best, **answered(one, "_best")} for name, one in found.items()},
        **{f"{name}_guided": {**one.guided, **answered(one, "_guided")} for name, one in found.items() if one.guided},
        "anchors": anchors,
        "exposure": {name: one.exposure for name, one in found.items()},
        "sweep": [point for one in found.values() for point in one.sweep],
        "weights": {name: one.sha256 for name, one in found.items()},
        **({"prompts": _prompts(bench, found)} if bench.panel else {}),
    }


def _prompts(bench: Bench, found: dict[str, Found]) -> Scores:
    assert bench.panel is not None
    return prompted.results(bench.panel, _answers(found), bench.answers)


def _answers(found: dict[str, Found]) -> dict[str, prompted.Verdicts]:
    """All verdicts by model and setting: base, base_best, ..."""
    return {f"{name}{setting}": verdicts for name, one in found.items() for setting, verdicts in one.answers.items()}


def _by_class(found: dict[str, Found]) -> list[Scores]:
    """Rows of classes.csv: samples of a class, and the share of them that is recognised, by model."""
    base, tuned = (found[name].recognised for name in ("base", "tuned"))
    return [
        {"class": number, "samples": count, "base": float(f"{before / count:.6g}"), "tuned": float(f"{after / count:.6g}")}
        for number, ((count, before), (_, after)) in enumerate(zip(base, tuned, strict=True))
        if count
    ]


def _shown(bench: Bench, found: dict[str, Found]) -> list[Scores]:
    """The prompts whose pictures are on the sheet."""
    return bench.panel.captions({name: one.answers[""] for name, one in found.items()}) if bench.panel else []


def _write(
    folder: Path,
    results: dict[str, Any],
    sheets: dict[str, dict[str, np.ndarray]],
    tune: Path,
    inputs: dict[str, str],
    shown: list[Scores],
) -> None:
    data.write_json(folder / "metrics.json", results)
    curves = report.read_curves(tune / "metrics.jsonl")
    _write_csv(folder / "sweep.csv", results["sweep"])
    _write_csv(folder / "curves.csv", curves)
    names = ("base", "tuned")
    before_after = {f"{name}: FID {results[name]['fid']:.2f}": sheets[name]["plain"] for name in names}
    tops = {name: results[f"{name}_best"] for name in names}
    best = {f"{name} at {_setting(top)}: FID {top['fid']:.2f}": sheets[name]["best"] for name, top in tops.items()}
    for name, rows in (("before-after", before_after), ("best", best), ("anchors", sheets["anchors"])):
        report.banded_sheet(rows.items(), data.SHEET_COLUMNS).save(folder / f"sheet-{name}.png")
    if shown:
        count = results["prompts"]["images_per_prompt"]
        answers = report_prompts.bands({name: sheets[name]["prompts"] for name in names}, shown, count)
        report.banded_sheet(answers, 2 * count).save(folder / "sheet-prompts.png")
    provenance = {"code": data.code_version(), "inputs": inputs, "weights": results["weights"]}
    (folder / "report.html").write_text(report.page(results, curves, sheets, provenance, data.SHEET_COLUMNS, shown))


def _setting(best: Scores) -> str:
    return f"temperature {best['temperature']:g}, guidance {best['guidance']:g}"


def _write_csv(path: Path, rows: list[Scores]) -> None:
    """Columns in the order in which they first occur; a number that a row lacks is left empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _track(run: Run, out: Path, results: dict[str, Any], evaluate: EvaluateConfig, inputs: dict[str, str]) -> None:
    """Numbers and sheets for the compare view."""
    groups = {name: results[name] for name in report.COMPARED if name in results} | results["anchors"]
    groups |= {f"{name}_exposure": values for name, values in results["exposure"].items()}
    numbers = {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}
    run.metrics({name: float(value) for name, value in numbers.items() if value is not None and not name.endswith("/images")})
    run.dataset("reference", inputs["reference"], evaluate.reference)
    run.image("samples/before_after", out / "sheet-before-after.png")
    run.image("samples/best", out / "sheet-best.png")
    if (out / "sheet-prompts.png").is_file():
        run.image("samples/prompts", out / "sheet-prompts.png")
    run.artifact(out / "metrics.json")
