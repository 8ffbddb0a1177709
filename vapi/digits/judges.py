"""The learned judge of the scenes: what it learns from, and how both judges' thresholds were fixed.

It learns from glyphs of its own (those of the reward's split) on renders that were damaged: reconstructed by the
tokenizer, some with codes out of place, saved as JPEG, blurred, noised. So it reads pictures that a generator draws.

B images, S side in pixels, M objects.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vapi.digits import scenes, train
from vapi.digits.scenes import COLOURS, SIDE, Pictures
from vapi.digits.train import Log, Schedule
from vapi.images import to_float, to_uint8
from vapi.metrics import geneval
from vapi.metrics.detections import Detector, Objects, Rules
from vapi.metrics.scenes import CELL, Marks
from vapi.models.vq import VQModel

GLYPHS = "reward"


def train_judge(pictures: Pictures, tokenizer: VQModel, schedule: Schedule, log: Log) -> Marks:
    """Mark the middles of digits on damaged pictures."""
    torch.manual_seed(schedule.seed)
    versions = damaged(pictures.images, tokenizer)
    here, digit, colour, reach = targets(pictures)
    network = Marks().train()

    def loss_of(step: int, indices: Tensor) -> Tensor:
        chosen = torch.randint(len(versions), (len(indices),))
        seen = np.stack([versions[int(v)][int(i)] for v, i in zip(chosen, indices, strict=True)])
        x, _ = train.damage(to_float(seen), patch=2)
        marks, names, colours, reaches = network(x)
        sure, near = here[indices], here[indices] > 0.3
        found = F.binary_cross_entropy_with_logits(marks, sure, weight=1 + 4 * sure)
        told = F.cross_entropy(names.movedim(1, -1)[near], digit[indices][near])
        painted = F.cross_entropy(colours.movedim(1, -1)[near], colour[indices][near])
        boxed = F.l1_loss(reaches.movedim(1, -1)[near], reach[indices][near])
        if step % 200 == 0 or step == schedule.steps - 1:
            parts = {"middle": found, "digit": told, "colour": painted, "box": boxed}
            log(f"judge step {step}: " + ", ".join(f"{name} {part.item():.4f}" for name, part in parts.items()))
        return 4 * found + told + painted + boxed

    train.optimise(list(network.parameters()), schedule, 1e-2, len(pictures), loss_of)
    return network.eval().requires_grad_(False)


def targets(pictures: Pictures, cell: int = CELL) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """By cell of so many pixels (N, h, w): how near the middle of an object is, 0 .. 1; its digit; its colour; and (N, h, w, 4) its
    box's reach."""
    n, side = len(pictures), SIDE // cell
    here, digit, colour, reach = (
        np.zeros((n, side, side)),
        *(np.zeros((n, side, side), np.int64) for _ in range(2)),
        np.zeros((n, side, side, 4)),
    )
    rows, columns = np.meshgrid(np.arange(side) + 0.5, np.arange(side) + 0.5, indexing="ij")
    for i, placed in enumerate(pictures.layouts):
        for glyph, (x0, y0, x1, y1) in zip(placed, boxes(placed), strict=True):
            x, y = (x0 + x1) / 2 / cell, (y0 + y1) / 2 / cell
            near = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 0.8)
            owned = near > here[i]
            here[i][owned] = near[owned]
            digit[i][owned], colour[i][owned] = glyph.digit, list(COLOURS).index(glyph.colour)
            edges = [columns - x0 / cell, rows - y0 / cell, x1 / cell - columns, y1 / cell - rows]
            reach[i][owned] = np.stack(edges, axis=-1)[owned]
    return torch.tensor(here).float(), torch.tensor(digit), torch.tensor(colour), torch.tensor(reach).float()


def boxes(placed: Sequence[scenes.Placed]) -> np.ndarray:
    """Where each glyph covers a good part of a pixel: (M, 4), x0, y0, x1, y1 with the ends beyond the last pixel."""
    inked = scenes.coverage(placed) > 0.3
    spans = []
    for axis in (1, 2):  # columns, rows
        line = np.any(inked, axis=axis, keepdims=True).reshape(len(placed), -1)
        spans.append((line.argmax(axis=1), line.shape[1] - line[:, ::-1].argmax(axis=1)))
    (x0, x1), (y0, y1) = spans
    return np.stack([x0, y0, x1, y1], axis=1)


def damaged(images: np.ndarray, tokenizer: VQModel) -> list[np.ndarray]:
    """The pictures as they are, as JPEGs, reconstructed, and reconstructed with one code in thirty out of place."""
    codes = train.encode_all(tokenizer, images)
    strange = torch.where(torch.rand(codes.shape) < 1 / 30, codes.roll(1, 0), codes)
    return [images, as_jpeg(images), reconstructed(codes, tokenizer), reconstructed(strange, tokenizer)]


def as_jpeg(images: np.ndarray, quality: int = 50) -> np.ndarray:
    saved = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=quality)
        saved.append(np.asarray(Image.open(buffer)))
    return np.stack(saved)


@torch.no_grad()
def reconstructed(codes: Tensor, tokenizer: VQModel, batch: int = 256) -> np.ndarray:
    """Pictures uint8 (N, S, S, 3) of codes (N, T)."""
    decoded = [to_uint8(tokenizer.decode(codes[i : i + batch])) for i in range(0, len(codes), batch)]
    return torch.cat(decoded).permute(0, 2, 3, 1).numpy()


# --- thresholds and anchors --------------------------------------------------------------------


def scores(judge: Detector, images: np.ndarray, asked: Sequence[scenes.Prompt], rules: Rules | None = None) -> dict[str, float]:
    """GenEval's table of one picture per prompt, by task, and overall."""
    rules = rules or judge.rules
    read = [geneval.parse_prompt(line, "a prompt", judge.classes, judge.colours) for line in scenes.jsonl(asked).splitlines()]
    found = judge.detect(list(images))
    right = [
        geneval.score(prompt, objects, rules, colours_of(judge, image)).correct
        for prompt, objects, image in zip(read, found, images, strict=True)
    ]
    run = geneval.Run.of(read, np.array(right)[:, None])
    tasks = run.of_task()
    return {task: float(run.shares[rows].mean()) for task, rows in tasks.items()} | {"overall": geneval.overall(run.shares, tasks)}


def colours_of(judge: Detector, image: np.ndarray) -> Callable[[Objects], list[str]]:
    return lambda objects: judge.colour(image, objects)


def true_scores(judge: Detector, pictures: Pictures) -> np.ndarray:
    """What the judge gives to objects that are there and that it names rightly: (M,)."""
    found = []
    for placed, objects in zip(pictures.layouts, judge.detect(list(pictures.images)), strict=True):
        for glyph, (x0, y0, x1, y1) in zip(placed, boxes(placed), strict=True):
            if (same := objects.get(scenes.DIGITS[glyph.digit])) is not None:
                there = same.boxes[np.abs(same.boxes[:, :2] + same.boxes[:, 2:4] - [x0 + x1, y0 + y1]).max(axis=1) < 2 * CELL]
                found += there[:, 4].tolist()
    return np.array(found)


def threshold(judge: Detector, pictures: Pictures, tokenizer: VQModel) -> float:
    """Nine tenths of the score that 99 % of the objects that are there reach, on pictures as they are and reconstructed (a
    generator can do no better); two digits. The same for every task: what counts as a digit should not hang on the question."""
    through = reconstructed(train.encode_all(tokenizer, pictures.images), tokenizer)
    seen = [true_scores(judge, pictures), true_scores(judge, dataclasses.replace(pictures, images=through))]
    return round(0.9 * float(np.quantile(np.concatenate(seen), 0.01)), 2)
