"""The world of scenes in one go: paint, pretrain, measure, write.

    OUT/scenes/{train,validation,reference}.parquet     painted scenes and captions, Hugging Face layout
    OUT/scenes/{validation,test}.jsonl                  prompts, as GenEval's metadata
    OUT/scenes/README.md                                split sizes, hashes, and what was measured
    OUT/models/scenes-{tokenizer,generator,reward,metric,judge}.safetensors

Pictures and prompts are identical by hash wherever this runs; weights are not bit-stable across processors.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vapi.config import ModelConfig, write_text
from vapi.digits import judges, scenes, train
from vapi.digits.build import EXISTS, clock, learned, pixel_hash, psnr, write_parquet
from vapi.digits.scenes import Pictures
from vapi.digits.train import G, GeneratorSchedule, Log, Schedule
from vapi.metrics.detections import Detector
from vapi.metrics.scenes import Learned, classical
from vapi.models import gpt, llamagen, text, vq, weights

# Seed of the painting, one per purpose.
SEEDS = {"pretraining": 110, "train": 111, "validation": 112, "reference": 113, "held out": 114, "reward": 210, "metric": 310}
SEEDS |= {"judge": 410, "thresholds": 411, "anchors": 412}
TOKENIZER = "models/scenes-tokenizer.safetensors"
SHUFFLE = 7  # of prompts, for the score of pictures that were made for others


@dataclass(frozen=True)
class World:
    """Sizes of the world of scenes. Fixed on what the base does, before anything was tuned on it."""

    painted: dict[str, int] = field(default_factory=lambda: {"train": 3000, "validation": 960, "reference": 2400})
    prompts: dict[str, int] = field(default_factory=lambda: {"validation": 20, "test": 100})  # of each task
    pretraining: int = 24_000
    features: dict[str, int] = field(default_factory=lambda: {"metric": 6_000, "reward": 6_000, "judge": 6_000})
    held_out: int = 600
    tokenizer: vq.VQConfig = vq.VQConfig(vocab=1024, code_dim=8, channels=12, multipliers=(1, 2, 4), blocks=1, z_channels=64, groups=4)
    # No dropout but the caption's: a network this small underfits as it is. Captions have at most 10 words.
    generator: gpt.GPTConfig = gpt.GPTConfig(
        dim=128, layers=3, heads=4, hidden=352, vocab=1024, codes=100, classes=0, caption_dim=text.Words.width, prefix=12,
        token_dropout=0, residual_dropout=0, hidden_dropout=0,
    )  # fmt: skip
    tokenizer_schedule: Schedule = Schedule(1500, 24, 2e-3)
    generator_schedule: GeneratorSchedule = GeneratorSchedule(3000, 32, 3e-3, muon_lr=0.02, flat_steps=1300, alone_steps=600, noise=0.3)
    reward_schedule: Schedule = Schedule(800, 48, 4e-3, seed=2)
    metric_schedule: Schedule = Schedule(1200, 48, 4e-3, seed=3)
    judge_schedule: Schedule = Schedule(1500, 48, 4e-3, seed=4)


WORLD = World()
TINY = World(
    painted={"train": 60, "validation": 24, "reference": 24},
    prompts={"validation": 2, "test": 3},
    pretraining=120,
    features={"metric": 100, "reward": 100, "judge": 60},
    held_out=30,
    tokenizer=vq.VQConfig(vocab=256, code_dim=8, channels=4, multipliers=(1, 2, 4), blocks=1, z_channels=16, groups=4),
    generator=gpt.GPTConfig(dim=32, layers=1, heads=2, hidden=64, vocab=256, codes=100, classes=0, caption_dim=176, prefix=12),
    tokenizer_schedule=Schedule(10, 8, 1.5e-3),
    generator_schedule=GeneratorSchedule(10, 8, 2e-3, flat_steps=4, alone_steps=2, noise=0.3),
    reward_schedule=Schedule(5, 8, 4e-3, seed=2),
    metric_schedule=Schedule(5, 8, 4e-3, seed=3),
    judge_schedule=Schedule(5, 8, 4e-3, seed=4),
)


def build(out: Path, world: World, pretraining_seed: int = 0) -> dict[str, float]:
    """Write the world into a folder and return what was measured. Raises ValueError if it is there already."""
    if (out / "scenes").exists():
        raise ValueError(EXISTS.format(out / "scenes"))
    torch.manual_seed(0)
    log, read = clock(), functools.partial(conditions, world=world)
    pictures = {name: painted(name, world) for name in world.painted}
    write_pictures(out / "scenes", world, pictures)
    log(f"painted {sum(map(len, pictures.values()))} scenes")
    tokenizer, measured = pretrain_tokenizer(out / "models", world, log)
    generator, losses = pretrain_generator(tokenizer, read, lambda: gpt.Transformer(world.generator), world, pretraining_seed, log)
    weights.save(generator, out / "models/scenes-generator.safetensors", gpt.metadata(world.generator))
    measured |= losses
    measured |= feature_networks(out / "models", world, log)
    network = judges.train_judge(learner_pictures("judge", world), tokenizer, world.judge_schedule, log)
    weights.save(network, out / "models/scenes-judge.safetensors", {"objective": "middles of digits on damaged renders"})
    measured |= anchors(tokenizer, [classical(), Learned(network)], world)
    write_text(out / "scenes/README.md", readme(world, pictures, out / "scenes", measured))
    return measured


# --- pictures ----------------------------------------------------------------------------------


def painted(name: str, world: World) -> Pictures:
    """What ships: for training, prompts at random; for validation and reference, those of the prompt files in turn."""
    if name == "train":
        asked = scenes.captions("train", world.painted[name], SEEDS[name])
    else:
        known = prompts("test" if name == "reference" else name, world)
        asked = [known[i % len(known)] for i in range(world.painted[name])]
    return scenes.paint_prompts(asked, name, SEEDS[name])


def prompts(name: str, world: World) -> list[scenes.Prompt]:
    """The prompts of a file, validation or test."""
    return scenes.prompts(name, world.prompts[name])


def write_pictures(out: Path, world: World, pictures: dict[str, Pictures]) -> None:
    for name, some in pictures.items():
        write_parquet(out / f"{name}.parquet", some.images, captions=some.captions)
    for name in world.prompts:
        write_text(out / f"{name}.jsonl", scenes.jsonl(prompts(name, world)))


def learner_pictures(purpose: str, world: World) -> Pictures:
    """For a network that looks at pictures: prompts at random, poses twice as far, any colour of any digit."""
    glyphs = judges.GLYPHS if purpose == "judge" else purpose
    asked = scenes.captions("train", world.features[purpose], SEEDS[purpose])
    return scenes.paint_prompts(asked, glyphs, SEEDS[purpose], pose=2.0, any_colour=True)


def presence(pictures: Pictures) -> Tensor:
    """Which digits and which colours are there: (N, 16), zeros and ones."""
    there = torch.zeros(len(pictures), len(scenes.DIGITS) + len(scenes.COLOURS))
    for row, placed in zip(there, pictures.layouts, strict=True):
        for glyph in placed:
            row[glyph.digit] = row[len(scenes.DIGITS) + list(scenes.COLOURS).index(glyph.colour)] = 1
    return there


# --- networks ----------------------------------------------------------------------------------


def pretrain_tokenizer(out: Path, world: World, log: Log) -> tuple[vq.VQModel, dict[str, float]]:
    asked = scenes.captions("train", world.pretraining, SEEDS["pretraining"])
    pictures = scenes.paint_prompts(asked, "train", SEEDS["pretraining"])
    tokenizer = train.train_tokenizer(pictures.images, world.tokenizer, world.tokenizer_schedule, log)
    weights.save(tokenizer, out / "scenes-tokenizer.safetensors", vq.metadata(world.tokenizer))
    return tokenizer, {"tokenizer: PSNR on unseen glyphs, dB": psnr(tokenizer, held_out(world).images)}


def load_tokenizer(out: Path) -> vq.VQModel:
    """The scenes' own, which is there. Raises ValueError where it is not."""
    return llamagen.load_tokenizer(ModelConfig(tokenizer=str(out / TOKENIZER), image_size=scenes.SIDE), torch.device("cpu"))


def held_out(world: World) -> Pictures:
    """Prompts as in training, with glyphs that nothing learned from."""
    return scenes.paint_prompts(scenes.captions("train", world.held_out, SEEDS["held out"]), "validation", SEEDS["held out"])


def pretrain_generator(
    tokenizer: vq.VQModel, read: Callable[[Sequence[str]], Tensor], make: Callable[[], G], world: World, seed: int, log: Log
) -> tuple[G, dict[str, float]]:
    """Train a generator of captions, as it reads them, on a tokenizer's codes, and return its losses."""
    asked = scenes.captions("train", world.pretraining, SEEDS["pretraining"])
    codes, flat = (
        train.encode_all(tokenizer, scenes.paint_prompts(asked, "train", SEEDS["pretraining"], textured).images)
        for textured in (True, False)
    )
    unseen = held_out(world)
    said, theirs = read([prompt.text for prompt in asked]), read(unseen.captions)
    others = train.encode_all(tokenizer, unseen.images), theirs
    schedule = dataclasses.replace(world.generator_schedule, seed=seed)
    alone = torch.tensor([prompt.task in ("single_object", "colors") for prompt in asked])
    lessons = [
        train.Lesson(flat[alone], said[alone], schedule.alone_steps),
        train.Lesson(flat, said, schedule.flat_steps),
        train.Lesson(codes, said, schedule.steps),
    ]
    generator = train.train_generator(lessons, others, make, schedule, log)
    shuffled_captions = train.cross_entropy(generator, others[0], theirs.roll(1, 0))
    return generator, {**learned(generator, codes, said, others), "generator: the same with each other's captions": shuffled_captions}


def conditions(captions: Sequence[str], world: World) -> Tensor:
    """What the generator is told: (N, S, C + 1)."""
    return text.pad(text.load("words").encode(captions), world.generator.prefix)


def feature_networks(out: Path, world: World, log: Log) -> dict[str, float]:
    pictures = learner_pictures("metric", world)
    here, digit, *_ = judges.targets(pictures)
    places = torch.where(here > 0.3, digit, -1)
    metric = train.train_metric_network(pictures.images, presence(pictures), world.metric_schedule, log, places)
    weights.save(metric, out / "scenes-metric.safetensors", {"objective": "digits, colours, ground and damage"})
    reward = train.train_reward_network(learner_pictures("reward", world).images, world.reward_schedule, log)
    weights.save(reward, out / "scenes-reward.safetensors", {"objective": "rotation and denoising"})
    unseen = held_out(world)
    there = presence(unseen)[:, : len(scenes.DIGITS)]
    return {"metric network: accuracy of which digits are there, unseen glyphs": train.presence_accuracy(metric, unseen.images, there)}


# --- anchors -----------------------------------------------------------------------------------


def anchors(tokenizer: vq.VQModel, both: Sequence[Detector], world: World) -> dict[str, float]:
    """What the judges say of pictures that fit their prompts, of their reconstructions, and of pictures made for other prompts."""
    asked = prompts("test", world)
    clean = scenes.paint_prompts(asked, "reference", SEEDS["anchors"]).images
    through = judges.reconstructed(train.encode_all(tokenizer, clean), tokenizer)
    measured = {}
    for judge in both:
        name = f"{judge.identity.name} judge, overall"
        measured[f"{name}: clean renders of the test prompts"] = judges.scores(judge, clean, asked)["overall"]
        measured[f"{name}: reconstructions of these"] = judges.scores(judge, through, asked)["overall"]
        measured[f"{name}: renders of other prompts of the task"] = judges.scores(judge, clean, shuffled(asked))["overall"]
    return measured


def threshold_pictures(count: int = 600) -> Pictures:
    """What the judges' thresholds were fixed on: the validation prompts in turn, with validation glyphs."""
    known = prompts("validation", WORLD)
    return scenes.paint_prompts([known[i % len(known)] for i in range(count)], "validation", SEEDS["thresholds"])


def shuffled(asked: Sequence[scenes.Prompt]) -> list[scenes.Prompt]:
    """The prompts of each task in another order."""
    order = list(range(len(asked)))
    for task in scenes.TASKS:
        rows = [i for i, prompt in enumerate(asked) if prompt.task == task]
        for here, there in zip(rows, np.random.default_rng(SHUFFLE).permutation(rows), strict=True):
            order[here] = int(there)
    return [asked[i] for i in order]


def readme(world: World, pictures: dict[str, Pictures], folder: Path, measured: dict[str, float]) -> str:
    """What lies in the folder, in Markdown."""
    splits = {
        "train": "tokenizer, generator and the subset to tune on",
        "validation": "choosing anything; the judges' thresholds; held-out losses",
        "reference": "pictures for the test prompts, which reported numbers compare with",
        "metric": "the metrics' network and the classical judge",
        "reward": "the reward's network and the learned judge",
    }
    glyphs = [f"| {name} | {sum(map(len, scenes.glyphs(name)))} | {purpose} |" for name, purpose in splits.items()]
    files = [f"| {name}.parquet | {len(some)} | `{pixel_hash(some.images)}` |" for name, some in pictures.items()]
    for name in world.prompts:
        digest = hashlib.sha256((folder / f"{name}.jsonl").read_bytes()).hexdigest()
        files.append(f"| {name}.jsonl | {len(prompts(name, world))} prompts | `{digest}` |")
    tasks = [
        f"| {task} | " + " | ".join(str(len(scenes.combinations(task, n))) for n in ("train", "validation", "test")) + " |"
        for task in scenes.TASKS
    ]
    unseen = ", ".join(f"{colour} {scenes.DIGITS[digit]}" for colour, digit in sorted(scenes.UNSEEN))
    numbers = [f"| {name} | {value:.4g} |" for name, value in measured.items()]
    return "\n".join(
        [
            "# Embedded scenes: coloured digits with captions",
            "",
            "Inputs only. Rebuild with `python -m vapi.digits NEW_FOLDER --scenes`; `vapi/digits/scenes.py` says what a scene is. Pictures",
            "are 40 x 40 pixels. The glyphs are those of [the digits](../README.md) in the same sets, less what is hard to tell apart:",
            "",
            "| set | legible glyphs | used for |",
            "|---|---|---|",
            *glyphs,
            "",
            "What a prompt may ask for, as combinations of digits, colours, counts and relations. No combination is in two columns but",
            "single_object's, where all three ask for the ten digits; every combination may begin in twelve ways (*a photo of*, ...).",
            "",
            "| task | train | validation | test |",
            "|---|---|---|---|",
            *tasks,
            "",
            f'No picture of train or validation shows a {unseen}. Test prompts that ask for one say `"unseen": true`.',
            "",
            "| file | holds | sha256 of the pixels, of the text |",
            "|---|---|---|",
            *files,
            "",
            "`../models/scenes-*.safetensors` are five networks, trained here and nowhere else: tokenizer and generator (LlamaGen's",
            "architecture and key names), two feature networks as the digits have them (the metrics' learned which digits and colours are",
            "there, grounds and damage; the reward's rotations and noise), and the learned judge. The two judges share no glyphs and no",
            "code; neither is part of a reward. `../models/scenes-janus` is a Janus that draws the same codes (docs/janus.md), and",
            "`../models/scenes-clip` a CLIP that tells which caption fits a scene (docs/embedded-world.md).",
            "",
            "| measured at the build | |",
            "|---|---|",
            *numbers,
            "",
        ]
    )
