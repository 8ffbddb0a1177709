"""The whole embedded world in one go: paint, pretrain, measure, write.

    OUT/digits/{train,validation,reference}.parquet     painted images, Hugging Face layout
    OUT/models/{tokenizer,generator,reward,classifier,metric}.safetensors
    OUT/README.md                                       split sizes, hashes, and what was measured

Images are identical by hash wherever this runs. Weights are not bit-stable across processors; two
generators that differ in nothing but random numbers differed by 2 % in held-out loss.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from vapi.config import write_text
from vapi.digits import paint, train
from vapi.digits.train import GeneratorSchedule, Schedule
from vapi.images import png_bytes, to_float
from vapi.models import gpt, vq, weights

EXISTS = "{} exists; name a new folder, and move it into place when it is complete"
# Seed of the painting, one per purpose: images of one glyph differ between purposes.
SEEDS = {"pretraining": 100, "train": 101, "validation": 102, "reference": 103, "held out": 104, "reward": 200, "metric": 300}


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside it, which becomes it when all is written: a build that is killed is to leave nothing that bars the next.
    Raises ValueError if it is there already."""
    if folder.exists():
        raise ValueError(EXISTS.format(folder))
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    partial.rename(folder)


@dataclass(frozen=True)
class World:
    """Sizes of the embedded world. Fixed on what the base does, before anything was tuned on it."""

    painted: dict[str, int] = field(default_factory=lambda: {"train": 3000, "validation": 2000, "reference": 4000})
    pretraining: int = 24_000
    features: dict[str, int] = field(default_factory=lambda: {"metric": 8_000, "reward": 6_000})
    held_out: int = 1_000
    tokenizer: vq.VQConfig = vq.VQConfig(vocab=1024, code_dim=8, channels=16, multipliers=(1, 2, 4), blocks=1, z_channels=64, groups=8)
    # No dropout but the class's: a network this small underfits as it is.
    generator: gpt.GPTConfig = gpt.GPTConfig(
        dim=128, layers=3, heads=4, hidden=352, vocab=1024, codes=64, classes=10, token_dropout=0, residual_dropout=0, hidden_dropout=0
    )
    tokenizer_schedule: Schedule = Schedule(1800, 32, 1.5e-3)
    generator_schedule: GeneratorSchedule = GeneratorSchedule(2400, 64, 3e-3, muon_lr=0.02, flat_steps=400)
    reward_schedule: Schedule = Schedule(1000, 64, 4e-3, seed=2)
    metric_schedule: Schedule = Schedule(1500, 64, 4e-3, seed=3)
    classifier_schedule: Schedule = Schedule(1500, 64, 4e-3, seed=4)


WORLD = World()
TINY = World(
    painted={"train": 60, "validation": 40, "reference": 40},
    pretraining=200,
    features={"metric": 200, "reward": 200},
    held_out=50,
    generator=gpt.GPTConfig(dim=32, layers=1, heads=2, hidden=64, vocab=1024, codes=64, classes=10),
    tokenizer_schedule=Schedule(20, 16, 1.5e-3),
    generator_schedule=GeneratorSchedule(20, 16, 2e-3, flat_steps=5),
    reward_schedule=Schedule(20, 16, 4e-3, seed=2),
    metric_schedule=Schedule(20, 16, 4e-3, seed=3),
    classifier_schedule=Schedule(20, 16, 4e-3, seed=4),
)


def build(out: Path, world: World, pretraining_seed: int = 0) -> dict[str, float]:
    """Write the world into a new folder and return what was measured. Raises ValueError if it exists."""
    if out.exists():
        raise ValueError(EXISTS.format(out))
    torch.manual_seed(0)
    log = clock()
    pictures = {name: paint.paint(name, count, SEEDS[name]) for name, count in world.painted.items()}
    for name, (images, labels) in pictures.items():
        write_parquet(out / "digits" / f"{name}.parquet", images, labels)
    log(f"painted {sum(world.painted.values())} images")
    measured = _feature_networks(out / "models", world, log)
    measured |= _generator_and_tokenizer(out / "models", world, pretraining_seed, log)
    write_text(out / "README.md", readme(world, pictures, measured))
    return measured


def _feature_networks(out: Path, world: World, log: train.Log) -> dict[str, float]:
    images, labels = paint.paint("metric", world.features["metric"], SEEDS["metric"], pose=1.0)
    unseen, their = paint.paint("validation", world.held_out, SEEDS["held out"])
    metric = train.train_metric_network(images, torch.as_tensor(labels), world.metric_schedule, log)
    weights.save(metric, out / "metric.safetensors", {"objective": "digit, ground and damage"})
    images, labels = paint.paint("reward", world.features["reward"], SEEDS["reward"], pose=1.0)
    reward = train.train_reward_network(images, world.reward_schedule, log)
    weights.save(reward, out / "reward.safetensors", {"objective": "rotation and denoising"})
    classifier = train.train_metric_network(images, torch.as_tensor(labels), world.classifier_schedule, log)
    weights.save(classifier, out / "classifier.safetensors", {"objective": "digit, ground and damage"})
    judges = {"metric network": metric, "reward's classifier": classifier}
    return {f"{name}: accuracy on unseen glyphs": train.accuracy(each, unseen, torch.as_tensor(their)) for name, each in judges.items()}


def _generator_and_tokenizer(out: Path, world: World, seed: int, log: train.Log) -> dict[str, float]:
    images, _ = paint.paint("train", world.pretraining, SEEDS["pretraining"], pose=1.0)
    unseen, _ = paint.paint("validation", world.held_out, SEEDS["held out"])
    tokenizer = train.train_tokenizer(images, world.tokenizer, world.tokenizer_schedule, log)
    weights.save(tokenizer, out / "tokenizer.safetensors", vq.metadata(world.tokenizer))
    return {
        "tokenizer: PSNR on unseen glyphs, dB": psnr(tokenizer, unseen),
        **pretrain_generator(tokenizer, out / "generator.safetensors", world, seed, log),
    }


def pretrain_generator(tokenizer: vq.VQModel, out: Path, world: World, seed: int, log: train.Log) -> dict[str, float]:
    """Train a generator on a tokenizer's codes of the pretraining images, write it, and return its losses."""
    images, digits = paint.paint("train", world.pretraining, SEEDS["pretraining"])
    plain, _ = paint.paint("train", world.pretraining, SEEDS["pretraining"], textured=False)
    unseen, their = paint.paint("validation", world.held_out, SEEDS["held out"])
    codes, flat, labels = train.encode_all(tokenizer, images), train.encode_all(tokenizer, plain), torch.as_tensor(digits)
    held_out = train.encode_all(tokenizer, unseen), torch.as_tensor(their)
    schedule = dataclasses.replace(world.generator_schedule, seed=seed)
    lessons = [train.Lesson(flat, labels, schedule.flat_steps), train.Lesson(codes, labels, schedule.steps)]
    generator = train.train_generator(lessons, held_out, lambda: gpt.Transformer(world.generator), schedule, log)
    weights.save(generator, out, gpt.metadata(world.generator))
    return learned(generator, codes, labels, held_out)


def learned(generator: Any, codes: Tensor, said: Tensor, held_out: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Of the codebook what the pretraining images' codes (N, T) use, and the generator's losses on some of them and on unseen glyphs."""
    vocab = generator.config.vocab
    return {
        "tokenizer: codebook perplexity on pretraining images": perplexity(codes, vocab),
        "tokenizer: share of the codebook in use": len(codes.unique()) / vocab,
        "generator: cross-entropy on pretraining images, nats": train.cross_entropy(generator, codes[:1000], said[:1000]),
        "generator: cross-entropy on unseen glyphs, nats": train.cross_entropy(generator, *held_out),
    }


def write_parquet(path: Path, images: np.ndarray, labels: np.ndarray | None = None, captions: Sequence[str] = ()) -> None:
    """Images uint8 (N, S, S, 3) as PNG in one Parquet file, as Hugging Face lays it out, with labels or captions."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": png_bytes(Image.fromarray(image)), "path": f"{i:05d}.png"} for i, image in enumerate(images)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    says = {"caption": pa.array(captions, pa.string())} if labels is None else {"label": pa.array(labels, pa.int64())}
    pq.write_table(pa.table({"image": pa.array(cells, kind), **says}), path)


@torch.no_grad()
def psnr(tokenizer: vq.VQModel, images: np.ndarray) -> float:
    """Mean peak signal-to-noise ratio of reconstructions, in dB; the peak-to-peak range is 2."""
    x = to_float(images)
    error = (tokenizer.decode(train.encode_all(tokenizer, images)).clamp(-1, 1) - x).square().mean(dim=(1, 2, 3))
    return float((10 * torch.log10(4 / error)).mean())


def perplexity(codes: Tensor, vocab: int) -> float:
    """exp of the entropy of how often each code occurs: how many codes are really in use."""
    p = torch.bincount(codes.flatten(), minlength=vocab).double() / codes.numel()
    return float(torch.exp(-(p * p.clamp_min(1e-30).log()).sum()))


def pixel_hash(images: np.ndarray) -> str:
    """sha256 of the raw pixels."""
    return hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()


def readme(world: World, pictures: dict[str, tuple[np.ndarray, np.ndarray]], measured: dict[str, float]) -> str:
    """What lies in the folder, in Markdown."""
    purposes = {
        "train": "tokenizer, generator and the subset to tune on",
        "validation": "choosing temperatures; contexts of teacher-forced draws; held-out losses",
        "reference": "the numbers that are reported",
        "reward": "the reward's network, and the reward's classifier",
        "metric": "the metrics' network",
    }
    rows = [f"| {name} | {len(paint.split(name))} | {purpose} |" for name, purpose in purposes.items()]
    files = [f"| digits/{n}.parquet | {len(images)} | `{pixel_hash(images)}` |" for n, (images, _) in pictures.items()]
    numbers = [f"| {name} | {value:.4g} |" for name, value in measured.items()]
    return "\n".join(
        [
            "# Embedded data: painted handwritten digits",
            "",
            "Inputs only; what the pipeline makes goes to `artifacts/`. Rebuild with `python -m vapi.digits NEW_FOLDER`.",
            "The glyphs are the test part of the UCI set *Optical Recognition of Handwritten Digits* (E. Alpaydin, C. Kaynak,",
            "1998; CC BY 4.0) as scikit-learn carries it, painted in colour on textured grounds, 32 x 32 pixels.",
            "",
            f"The {paint.GLYPHS:,} glyphs are split by class into disjoint sets:",
            "",
            "| set | glyphs | used for |",
            "|---|---|---|",
            *rows,
            "",
            "| file | images | sha256 of the pixels |",
            "|---|---|---|",
            *files,
            "",
            "`models/` holds five networks, trained here and nowhere else: the tokenizer and the generator (LlamaGen's",
            "architecture and key names), and three feature networks of one shape (`vapi/models/features.py`). The reward's",
            "learned to tell rotations and undo noise, without labels; the metrics' to recognise digits, describe grounds,",
            "and tell how far a picture was damaged (`tests/test_digits.py` shows that it sees damage); `classifier`, which rewards",
            "free draws (`tune.objective ar_grpo`), the same as the metrics' from the reward's glyphs.",
            "",
            "The world of captions, in `scenes/` and `models/scenes-*`, is described in [scenes/README.md](scenes/README.md); GenEval's",
            "own prompts, in `geneval/`, are somebody else's (MIT, see the licence there).",
            "",
            "| measured at the build | |",
            "|---|---|",
            *numbers,
            "",
        ]
    )


def clock() -> train.Log:
    """Prints lines with the seconds since now."""
    start = time.monotonic()
    return lambda line: print(f"[{time.monotonic() - start:6.0f} s] {line}", flush=True)
