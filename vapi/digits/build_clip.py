"""A CLIP that reads the scenes: teach, measure, write.

    OUT/models/scenes-clip/config.json            transformers' layout, whole: vapi.metrics.clip.load reads it
    OUT/models/scenes-clip/model.safetensors
    OUT/models/scenes-clip/{vocab,merges}.*       a byte-level vocabulary in which every word of a caption is one token
    OUT/models/scenes-clip/tokenizer_config.json

It tells which caption a picture fits: as a metric (clipscore), or as the reward clip. As the learned judge it learns from glyphs of
the reward's split, on renders that were damaged and reconstructed by the scenes' tokenizer, OUT/models/scenes-tokenizer.safetensors;
and from the combinations of all prompt files, since a judge may know what can be asked for.

B images, K captions beside the own one, L tokens, D dimensions, S side in pixels.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vapi.config import write_text
from vapi.digits import build_scenes, judges, scenes, train
from vapi.digits.build import clock, new_folder
from vapi.digits.scenes import Pictures, Placed, Prompt
from vapi.digits.train import GeneratorSchedule, Log
from vapi.images import to_float
from vapi.metrics import clip as clips
from vapi.metrics.text import ClipScore
from vapi.models import weights
from vapi.models.vq import VQModel

FOLDER = "models/scenes-clip"
SEED = 510  # of the painting, beside those of build_scenes
CHANGES = 8  # captions that are wrong in one thing, kept for each picture
SHOWN = 4  # of them in a step
START, END = "<|startoftext|>", "<|endoftext|>"
LONGEST = 12  # tokens: captions have at most ten words
PITCHES = (math.pi / 8, math.pi / 4, math.pi / 2, 3 * math.pi / 4)  # of a patch's place, in radians per patch
NEIGHBOURS = ((-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (1, -1), (-1, 1), (1, 1))  # columns, rows
SEEK = 2.0  # how sharply
SHARPEST = 100.0  # how far the contrast is multiplied at most, as CLIP has it


@dataclass(frozen=True)
class World:
    """Sizes of the network and of what it learns from."""

    pictures: int = 12_000
    prompts: int = 100  # of each task, to measure on
    patch: int = 5
    width: int = 128
    hidden: int = 320
    layers: int = 3
    named_after: int = 2  # layers, what patches show is to be known
    words_width: int = 96
    words_hidden: int = 192
    words_layers: int = 2
    heads: int = 8
    places: int = 24  # of tokens: a caption has 12
    shared: int = 64  # dimensions that pictures and captions have in common
    clean_steps: int = 500  # so long, nothing is damaged
    schedule: GeneratorSchedule = GeneratorSchedule(2400, 48, 3e-3, seed=5, muon_lr=0.02)


WORLD = World()
TINY = World(
    pictures=60, prompts=3, width=32, hidden=16, layers=2, named_after=1, words_width=16, words_hidden=16, words_layers=1, heads=2,
    shared=8, clean_steps=2, schedule=GeneratorSchedule(5, 8, 3e-3, seed=5),
)  # fmt: skip


def build(out: Path, world: World, pretraining_seed: int = 0) -> dict[str, float]:
    """Write the folder beside the scenes' tokenizer and return what was measured. The generator's seed has no say: judges are the
    same for all. Raises ValueError if it is there already."""
    with new_folder(out / FOLDER) as folder:
        torch.manual_seed(0)
        log, tokenizer = clock(), build_scenes.load_tokenizer(out)
        write_words(folder)
        network = teach(folder, learner_pictures(world), tokenizer, world, log)
        network.config.save_pretrained(folder)
        weights.save_tensors(network.state_dict(), folder / "model.safetensors", {})
        measured = measure(clips.load(folder), tokenizer, world)
    for name, value in measured.items():
        log(f"{name}: {value:.4g}")
    return measured


# --- words -------------------------------------------------------------------------------------


def write_words(folder: Path) -> None:
    """vocab.json, merges.txt and tokenizer_config.json: bytes, the words of the scenes' captions, and CLIP's two marks."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # more than there are to merge: every word that it learns from becomes one token
    trainer = trainers.BpeTrainer(vocab_size=1000, show_progress=False, end_of_word_suffix="</w>")
    tokenizer.train_from_iterator((prompt.text for prompt in asked(6000)), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    learned = sorted(model["vocab"], key=model["vocab"].get)
    tokens = dict.fromkeys([*letters, *(f"{letter}</w>" for letter in letters), *learned, START, END])
    write_text(folder / "vocab.json", json.dumps({token: i for i, token in enumerate(tokens)}, indent=0) + "\n")
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]) + "\n")
    write_text(folder / "tokenizer_config.json", json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": WORLD.places}) + "\n")


# --- pictures and captions ---------------------------------------------------------------------


def asked(count: int) -> list[Prompt]:
    """As many prompts, from the combinations of all three files."""
    return [prompt for name in ("train", "validation", "test") for prompt in scenes.captions(name, count // 3, SEED)]


def learner_pictures(world: World) -> Pictures:
    """As the learned judge's: poses twice as far, any colour of any digit."""
    return scenes.paint_prompts(asked(world.pictures), judges.GLYPHS, SEED, pose=2.0, any_colour=True)


@functools.cache
def changes(prompt: Prompt) -> dict[str, list[Prompt]]:
    """Captions that are another in one thing, by which it is."""
    things = prompt.things

    def with_thing(place: int, **changed: Any) -> Prompt:
        return replace(prompt, things=(*things[:place], replace(things[place], **changed), *things[place + 1 :]))

    digits, colours = {thing.digit for thing in things}, {thing.colour for thing in things}
    found = {"digit": [with_thing(i, digit=digit) for i in range(len(things)) for digit in range(10) if digit not in digits]}
    if "" not in colours:
        found["colour"] = [with_thing(i, colour=other) for i in range(len(things)) for other in scenes.COLOURS if other not in colours]
    elif len(things) == 1:
        found["count"] = [with_thing(0, count=count) for count in (1, 2, 3, 4) if count != things[0].count]
    if len(colours) == 2:
        first, second = things
        swapped = replace(first, colour=second.colour), replace(second, colour=first.colour)
        found["whose colour"] = [replace(prompt, things=swapped)]
    if prompt.relation:
        found["relation"] = [replace(prompt, relation=relation) for relation in scenes.RELATIONS if relation != prompt.relation]
    return found


def changed(prompt: Prompt, random: np.random.Generator) -> Prompt:
    """One of ``changes``, each kind as often."""
    kinds = list(changes(prompt).values())
    kind = kinds[random.integers(len(kinds))]
    return kind[random.integers(len(kind))]


def fits(prompt: Prompt, placed: Sequence[Placed]) -> bool:
    """Whether a picture shows what a prompt asks for, and nothing else."""
    if sorted(thing.digit for thing in prompt.things for _ in range(thing.count)) != sorted(glyph.digit for glyph in placed):
        return False
    if any(thing.colour not in ("", glyph.colour) for thing in prompt.things for glyph in placed if thing.digit == glyph.digit):
        return False
    if not prompt.relation:
        return True
    first, second = (next(glyph for glyph in placed if glyph.digit == thing.digit) for thing in prompt.things)
    across, down = first.x - second.x, first.y - second.y
    if abs(across) > abs(down):
        return prompt.relation == ("left of" if across < 0 else "right of")
    return prompt.relation == ("above" if down < 0 else "below")


# --- network -----------------------------------------------------------------------------------


def config(world: World, words: int) -> Any:
    """transformers' configuration of a network that knows so many tokens."""
    from transformers import CLIPConfig

    common = {"num_attention_heads": world.heads, "hidden_act": "quick_gelu"}
    return CLIPConfig(
        architectures=["CLIPModel"], dtype="float32",
        text_config=common | {
            "hidden_size": world.words_width, "intermediate_size": world.words_hidden, "num_hidden_layers": world.words_layers,
            "vocab_size": words, "max_position_embeddings": world.places, "bos_token_id": words - 2, "eos_token_id": words - 1,
            "pad_token_id": words - 1,
        },
        vision_config=common | {
            "hidden_size": world.width, "intermediate_size": world.hidden, "num_hidden_layers": world.layers, "image_size": scenes.SIDE,
            "patch_size": world.patch,
        },
        projection_dim=world.shared,
    )  # fmt: skip


class Learner(nn.Module):
    """A CLIP that also says what each patch shows, by heads that are thrown away: is the middle of a digit near, which digit, and in
    which colour."""

    def __init__(self, world: World, words: int) -> None:
        super().__init__()
        from transformers import CLIPModel

        self.clip, self.after = CLIPModel(config(world, words)), world.named_after
        begin_with_neighbours(self.clip.vision_model)
        self.patches = nn.Sequential(nn.LayerNorm(world.width), nn.Linear(world.width, 1 + len(scenes.DIGITS) + len(scenes.COLOURS)))

    def see(self, pictures: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Pictures (B, 3, S, S) in [-1, 1] to directions (B, D), and logits of what patches show (B, T, 1), (B, T, 10), (B, T, 6)."""
        mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (clips.MEAN, clips.STD))
        seen = self.clip.vision_model(pixel_values=((pictures + 1) / 2 - mean) / std, output_hidden_states=True)
        named = self.patches(seen.hidden_states[self.after][:, 1:]).split([1, len(scenes.DIGITS), len(scenes.COLOURS)], dim=-1)
        return F.normalize(self.clip.visual_projection(seen.pooler_output), dim=-1), named

    def read(self, captions: Tensor) -> Tensor:
        """Tokens (..., L) to directions (..., D)."""
        pooled = self.clip.text_model(input_ids=captions.flatten(0, -2)).pooler_output
        return F.normalize(self.clip.text_projection(pooled), dim=-1).unflatten(0, captions.shape[:-1])


@torch.no_grad()
def begin_with_neighbours(vision: Any) -> None:
    """Patches begin by knowing their places, as waves in the first dimensions, and the heads of the first layer by looking at one
    neighbour each: a digit is three patches wide, and to learn from random weights which patches are neighbours takes longer than
    to learn digits."""
    c, embeddings, attention = vision.config, vision.embeddings, vision.encoder.layers[0].self_attn
    side, places = c.image_size // c.patch_size, 4 * len(PITCHES)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    waves = torch.stack([torch.outer(axis.flatten(), torch.tensor(PITCHES)) for axis in (columns, rows)], dim=1)  # (T, 2, 4)
    embeddings.position_embedding.weight.zero_()
    embeddings.position_embedding.weight[1:, :places] = torch.stack([waves.cos(), waves.sin()], dim=-1).flatten(1)
    nn.init.normal_(embeddings.patch_embedding.weight, std=2 / (3 * c.patch_size**2) ** 0.5)  # pixels weigh as much as places
    embeddings.patch_embedding.weight[:places] = 0
    width = c.hidden_size // c.num_attention_heads
    queries, keys = (nn.init.zeros_(part.weight).unflatten(0, (-1, width)) for part in (attention.q_proj, attention.k_proj))
    for query, key, step in zip(queries, keys, NEIGHBOURS):
        turns = [torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]) for d in step for a in (d * p for p in PITCHES)]
        query[:places, :places], key[:places, :places] = SEEK * torch.block_diag(*turns), SEEK * torch.eye(places)


def teach(folder: Path, pictures: Pictures, tokenizer: VQModel, world: World, log: Log) -> Any:
    """A CLIP that has learned from damaged pictures, their captions, and captions that are wrong in one thing."""
    from transformers import CLIPTokenizer

    words = CLIPTokenizer.from_pretrained(folder)
    random = np.random.default_rng(SEED)
    own, wrong = pictures.prompts, [[changed(prompt, random) for _ in range(CHANGES)] for prompt in pictures.prompts]

    def ids(prompts: Sequence[Prompt]) -> Tensor:
        return words([prompt.text for prompt in prompts], padding="max_length", max_length=LONGEST, return_tensors="pt")["input_ids"]

    said = torch.stack([ids(own), *(ids(others) for others in zip(*wrong, strict=True))], dim=1)  # (N, 1 + CHANGES, L)
    torch.manual_seed(world.schedule.seed)
    versions = judges.damaged(pictures.images, tokenizer)
    here, digit, colour = (x.flatten(1) for x in judges.targets(pictures, world.patch)[:3])
    learner = Learner(world, len(words)).train()

    def shown_at(step: int, indices: Tensor) -> Tensor:
        if step < world.clean_steps:
            return to_float(pictures.images[indices.numpy()])
        chosen = torch.randint(len(versions), (len(indices),))
        return train.damage(to_float(np.stack([versions[int(v)][int(i)] for v, i in zip(chosen, indices, strict=True)])), patch=2)[0]

    def loss_of(step: int, indices: Tensor) -> Tensor:
        shown, (marks, digits, colours) = learner.see(shown_at(step, indices))
        few = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(CHANGES)[:SHOWN]])
        told = learner.read(said[indices][:, few])
        contrast = contrast_of(shown, told, fitting(pictures, indices), learner.clip.logit_scale)
        sure, near = here[indices], here[indices] > 0.3
        found = F.binary_cross_entropy_with_logits(marks.squeeze(-1), sure, weight=1 + 4 * sure)
        named = F.cross_entropy(digits[near], digit[indices][near]), F.cross_entropy(colours[near], colour[indices][near])
        if step % 100 == 0 or step == world.schedule.steps - 1:
            parts = {"contrast": contrast, "middle": found, "digit": named[0], "colour": named[1]}
            log(f"clip step {step}: " + ", ".join(f"{name} {part.item():.4f}" for name, part in parts.items()))
        return contrast + found + sum(named)

    train.optimise_with_muon(learner, ("encoder.layers.",), world.schedule, len(pictures), loss_of)
    return learner.clip.eval()


def fitting(pictures: Pictures, indices: Tensor) -> Tensor:
    """Which captions (columns) fit which pictures (rows): (B, B)."""
    rows = indices.tolist()
    return torch.tensor([[fits(pictures.prompts[j], pictures.layouts[i]) for j in rows] for i in rows])


def contrast_of(shown: Tensor, told: Tensor, fitting: Tensor, scale: Tensor) -> Tensor:
    """Cross-entropy of a picture's own caption among those of the batch and its wrong ones, and of a caption's picture among those of
    the batch. What also fits is not among them. Directions (B, D) and (B, 1 + K, D), the own caption's first."""
    sharpness = scale.exp().clamp(max=SHARPEST)
    also = fitting & ~torch.eye(len(shown), dtype=torch.bool)
    among = (sharpness * shown @ told[:, 0].T).masked_fill(also, -torch.inf)
    wrong = sharpness * torch.einsum("bd,bkd->bk", shown, told[:, 1:])
    right = torch.arange(len(shown))
    return F.cross_entropy(torch.cat([among, wrong], dim=1), right) + F.cross_entropy(among.T, right)


# --- what it knows -----------------------------------------------------------------------------


def measure(clip: clips.Clip, tokenizer: VQModel, world: World) -> dict[str, float]:
    """Of clean renders of the test prompts with glyphs that nothing learned from, and of their reconstructions: the cosine with the own
    caption and with another one of the task, and how often the own one wins, against that and against one that is wrong in one thing."""
    own = scenes.prompts("test", world.prompts)
    pictures = scenes.paint_prompts(own, "reference", build_scenes.SEEDS["anchors"])
    others, random = build_scenes.shuffled(own), np.random.default_rng(SEED)
    wrong = [changed(prompt, random) for prompt in own]
    unlike = np.array([not fits(other, placed) for other, placed in zip(others, pictures.layouts, strict=True)])
    tasks = np.array([prompt.task for prompt in own])
    through = judges.reconstructed(train.encode_all(tokenizer, pictures.images), tokenizer)
    measured = {}
    for name, images in (("clean renders", pictures.images), ("reconstructions", through)):
        right, other, near = (scores(clip, images, prompts) for prompts in (own, others, wrong))
        measured[f"CLIP, {name}: cosine with the own caption"] = float(right.mean())
        measured[f"CLIP, {name}: with another of the task"] = float(other[unlike].mean())
        measured[f"CLIP, {name}: own above another of the task"] = float((right > other)[unlike].mean())
        for task in scenes.TASKS:
            measured[f"CLIP, {name}: own above one that is wrong in one thing, {task}"] = float((right > near)[tasks == task].mean())
    return measured


def scores(clip: clips.Clip, images: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
    """Cosines (N,) of pictures uint8 (N, S, S, 3) and their prompts."""
    return np.array(ClipScore(clip)(images, [prompt.text for prompt in prompts], [{}] * len(prompts)))
