"""Pretraining of the four small networks: tokenizer, generator, and two feature networks.

The generator learns next codes with 10 % null class, as LlamaGen does, until its rate is annealed to
zero; the two feature networks learn from different glyphs, with different objectives, so that what
rewards is not what measures.

B images, T codes, S side in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vapi.images import to_float
from vapi.models.features import CLASSES, WIDTHS, FeatureNet
from vapi.models.vq import VQConfig, VQModel

Log = Callable[[str], None]
G = TypeVar("G", bound=Any)  # a generator: logits (B, T, V) of conditions and codes (B, T), with ``config``


@dataclass(frozen=True)
class Schedule:
    """Steps, batch and peak learning rate (linear warm-up over 5 %, cosine to zero)."""

    steps: int
    batch: int
    lr: float
    seed: int = 0

    def rate(self, step: int) -> float:
        warm = max(1, self.steps // 20)
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


@dataclass(frozen=True)
class GeneratorSchedule(Schedule):
    """Muon (momentum, then orthogonalised) for the matrices inside the layers, AdamW at ``lr`` for the rest. At this size
    and length it learns in hundreds of steps what AdamW alone learns in thousands."""

    muon_lr: float = 0.02
    flat_steps: int = 0  # so long, grounds are flat
    alone_steps: int = 0  # and so long, captions speak of one thing
    noise: float = 0.0  # share of the context that is replaced, for the first half: what was drawn already tells less than the caption

    def noise_at(self, step: int) -> float:
        """Level for half of the steps, gone after 80 % of them."""
        return self.noise * min(1.0, max(0.0, (0.8 - step / self.steps) / 0.3))

    def trapezoid(self, step: int) -> float:
        """Up over 50 steps, level, and linearly to zero over the last 60 %."""
        return min(1, (step + 1) / 50) * min(1, (self.steps - step) / (0.6 * self.steps))


def batches(size: int, schedule: Schedule) -> Iterator[tuple[int, Tensor]]:
    """(step, indices (B,)): epochs of fresh permutations."""
    generator = torch.Generator().manual_seed(schedule.seed)
    order = torch.empty(0, dtype=torch.long)
    for step in range(schedule.steps):
        while len(order) < schedule.batch:
            order = torch.cat([order, torch.randperm(size, generator=generator)])
        yield step, order[: schedule.batch]
        order = order[schedule.batch :]


def optimise(parameters: list[nn.Parameter], schedule: Schedule, decay: float, size: int, loss_of: Callable[[int, Tensor], Tensor]) -> None:
    """AdamW over ``loss_of(step, indices)``."""
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=schedule.lr, betas=(0.9, 0.95), fused=True)
    for step, indices in batches(size, schedule):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        loss = loss_of(step, indices)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def optimise_with_muon(
    model: nn.Module, hidden: Sequence[str], schedule: GeneratorSchedule, size: int, loss_of: Callable[[int, Tensor], Tensor]
) -> None:
    """Muon for the matrices whose name has one of ``hidden`` in it and AdamW for the rest, over ``loss_of(step, indices)``."""
    named = dict(model.named_parameters())
    inside = {name for name, p in named.items() if p.dim() == 2 and any(part in name for part in hidden)}
    muon = Muon([named[name] for name in named if name in inside], schedule.muon_lr, momentum=0.95, weight_decay=0.05)
    rest = [p for name, p in named.items() if name not in inside]
    adam = torch.optim.AdamW(rest, lr=schedule.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    for step, indices in batches(size, schedule):
        for optimizer, peak in ((muon, schedule.muon_lr), (adam, schedule.lr)):
            for group in optimizer.param_groups:
                group["lr"] = peak * schedule.trapezoid(step)
        loss = loss_of(step, indices)
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adam.step()


# --- tokenizer ---------------------------------------------------------------------------------


def train_tokenizer(images: np.ndarray, config: VQConfig, schedule: Schedule, log: Log) -> VQModel:
    """Auto-encode images uint8 (N, S, S, 3); codes that nothing uses are put back among the data."""
    torch.manual_seed(schedule.seed)
    model = VQModel(config)
    nn.init.normal_(model.quantize.embedding.weight)
    used = torch.zeros(config.vocab)
    seen = torch.empty(0, config.code_dim)  # what the encoder said one step ago

    def loss_of(step: int, indices: Tensor) -> Tensor:
        nonlocal seen
        if step % 50 == 49 and step < 0.8 * schedule.steps:
            revive(model, used, seen)
        x = to_float(images[indices.numpy()])
        z = F.normalize(model.quant_conv(model.encoder(x)).flatten(2).transpose(1, 2), dim=-1)  # (B, T, K)
        entries = model.quantize.entries()
        with torch.no_grad():
            codes = (z @ entries.T).argmax(-1)
            used.add_(torch.bincount(codes.flatten(), minlength=config.vocab))
        q = entries[codes]
        straight = z + (q - z).detach()
        side = round(codes.shape[1] ** 0.5)
        decoded = model.decoder(model.post_quant_conv(straight.transpose(1, 2).unflatten(2, (side, side))))
        pixels = F.mse_loss(decoded, x) + 0.5 * F.l1_loss(decoded, x)
        commitment = F.mse_loss(q, z.detach()) + 0.25 * F.mse_loss(z, q.detach())
        seen = z.detach().flatten(0, 1)
        if step % 200 == 0 or step == schedule.steps - 1:
            log(f"tokenizer step {step}: pixels {pixels.item():.4f}, commitment {commitment.item():.4f}")
        return pixels + commitment

    optimise(list(model.parameters()), schedule, 1e-4, len(images), loss_of)
    return model.eval().requires_grad_(False)


def revive(model: VQModel, used: Tensor, vectors: Tensor) -> None:
    """Move codes that nothing used since the last call onto vectors (M, K) of the present batch."""
    dead = (used == 0).nonzero().flatten()
    chosen = torch.randint(len(vectors), (len(dead),))
    with torch.no_grad():
        model.quantize.embedding.weight[dead] = vectors[chosen] + 0.01 * torch.randn(len(dead), vectors.shape[1])
    used.zero_()


@torch.no_grad()
def encode_all(tokenizer: VQModel, images: np.ndarray, batch: int = 256) -> Tensor:
    """Codes (N, T) of images uint8 (N, S, S, 3)."""
    return torch.cat([tokenizer.encode(to_float(images[i : i + batch])) for i in range(0, len(images), batch)])


# --- generator ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lesson:
    """Codes (N, T) and what they were drawn for, labels (N,) or captions (N, S, C + 1): learned from before step ``until``."""

    codes: Tensor
    said: Tensor
    until: int


HIDDEN = ("layers.", "cls_embedding.cap_proj.", "generation_aligner.", "generation_head.proj_out.")  # where names hold one, Muon learns


def train_generator(
    lessons: Sequence[Lesson], held_out: tuple[Tensor, Tensor], make: Callable[[], G], schedule: GeneratorSchedule, log: Log
) -> G:
    """Next-code prediction by a network that is made here, with the schedule's seed; logs cross-entropy on held-out glyphs.

    The first lessons show the same glyphs on flat grounds, where the class is a large share of what is to be learned, and
    what was learned of it stays. Captions of one thing teach what words mean before who belongs to whom is asked.
    """
    torch.manual_seed(schedule.seed)
    model = make().train()

    def loss_of(step: int, indices: Tensor) -> Tensor:
        lesson = next(lesson for lesson in lessons if step < lesson.until)
        chosen = indices % len(lesson.codes)
        batch = lesson.codes[chosen]
        context = corrupted(batch, schedule.noise_at(step), model.config.vocab)
        loss = F.cross_entropy(model(lesson.said[chosen], context).flatten(0, 1), batch.flatten())
        if step % 100 == 0 or step == schedule.steps - 1:
            log(f"generator step {step}: train {loss.item():.4f}, held out {cross_entropy(model, *held_out):.4f}")
        return loss

    optimise_with_muon(model, HIDDEN, schedule, len(lessons[-1].codes), loss_of)
    return model.eval()


def corrupted(codes: Tensor, noise: float, vocab: int) -> Tensor:
    """Codes (B, T), a share ``noise`` of them replaced by any."""
    if noise == 0:
        return codes
    return torch.where(torch.rand(codes.shape) < noise, torch.randint(vocab, codes.shape), codes)


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon's step in float32: torch computes it in bfloat16, which on a CPU without it takes longer than the
    forward and backward pass together."""

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for matrix in group["params"]:
                average = self.state[matrix].setdefault("average", torch.zeros_like(matrix))
                average.lerp_(matrix.grad, 1 - group["momentum"])
                direction = orthogonal(torch.lerp(matrix.grad, average, group["momentum"]))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(direction, alpha=-group["lr"] * max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """About the nearest matrix with orthonormal rows or columns: five steps of Muon's Newton-Schulz iteration (K. Jordan, 2024)."""
    x = matrix / matrix.norm().clamp_min(1e-7)
    x = x.T if matrix.shape[0] > matrix.shape[1] else x
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


@torch.no_grad()
def cross_entropy(model: nn.Module, codes: Tensor, labels: Tensor, batch: int = 256) -> float:
    """Mean cross-entropy per code, in nats, without dropout."""
    training = model.training
    model.eval()
    total = 0.0
    for i in range(0, len(codes), batch):
        logits = model(labels[i : i + batch], codes[i : i + batch])
        total += F.cross_entropy(logits.flatten(0, 1), codes[i : i + batch].flatten(), reduction="sum").item()
    model.train(training)
    return total / codes.numel()


# --- feature networks --------------------------------------------------------------------------


def train_metric_network(images: np.ndarray, labels: Tensor, schedule: Schedule, log: Log, places: Tensor | None = None) -> FeatureNet:
    """Recognise the digit, tell the ground (mean colour of each quarter, how rough), and tell what was done to the
    picture: a judge that learned only the digit would not see a patch out of place.

    ``labels`` are one digit each, int64 (N,). Of pictures with several they are which digits are there and what else is, float
    (N, 10 + M) of zeros and ones, and ``places`` says where: the digit at each place of the last map, or -1, int64 (N, S/4, S/4).
    """
    torch.manual_seed(schedule.seed)
    network, ground, harm = FeatureNet().train(), nn.Linear(WIDTHS[-1], 14), nn.Linear(WIDTHS[-1], 3)
    more = (
        nn.ModuleList()
        if places is None
        else nn.ModuleList([nn.Linear(WIDTHS[-1], labels.shape[1] - CLASSES), nn.Conv2d(WIDTHS[-1], CLASSES, 1)])
    )

    def recognise(last: Tensor, indices: Tensor) -> Tensor:
        """From the last map (B, 64, S/4, S/4)."""
        pooled = last.mean(dim=(2, 3))
        if places is None:
            return F.cross_entropy(network.head(pooled), labels[indices])
        others, where = more
        there = F.binary_cross_entropy_with_logits(torch.cat([network.head(pooled), others(pooled)], dim=1), labels[indices])
        return there + F.cross_entropy(where(last), places[indices], ignore_index=-1)

    def loss_of(step: int, indices: Tensor) -> Tensor:
        clean = to_float(images[indices.numpy()])
        seen, done = damage(clean)
        last = network.features(seen)[-1]
        pooled = last.mean(dim=(2, 3))
        recognised = recognise(last, indices)
        described = F.mse_loss(ground(pooled), describe(clean))
        judged = F.mse_loss(harm(pooled), done)
        if step % 200 == 0 or step == schedule.steps - 1:
            words = f"class {recognised.item():.4f}, ground {described.item():.4f}, damage {judged.item():.4f}"
            log(f"metric network step {step}: {words}")
        return recognised + described + judged

    parameters = [*network.parameters(), *ground.parameters(), *harm.parameters(), *more.parameters()]
    optimise(parameters, schedule, 1e-2, len(images), loss_of)
    return network.eval().requires_grad_(False)


def train_reward_network(images: np.ndarray, schedule: Schedule, log: Log) -> FeatureNet:
    """Without labels: tell by which quarter-turn an image was rotated, and undo the noise on it."""
    torch.manual_seed(schedule.seed)
    network = FeatureNet().train()
    denoise = nn.ModuleList([nn.Conv2d(WIDTHS[0], 3, 1), nn.Conv2d(WIDTHS[1], 3, 1), nn.Conv2d(WIDTHS[2], 3, 1)])

    def loss_of(step: int, indices: Tensor) -> Tensor:
        turns = torch.randint(4, (len(indices),))
        x = to_float(images[indices.numpy()])
        x = torch.stack([torch.rot90(image, int(k), (1, 2)) for image, k in zip(x, turns, strict=True)])
        maps = network.features(degrade(x))
        turned = F.cross_entropy(network.head(maps[-1].mean(dim=(2, 3)))[:, :4], turns)
        wanted = [F.adaptive_avg_pool2d(x, m.shape[-1]) for m in maps]
        restored = torch.stack([F.mse_loss(head(m), w) for head, m, w in zip(denoise, maps, wanted, strict=True)]).sum()
        if step % 200 == 0 or step == schedule.steps - 1:
            log(f"reward network step {step}: turn {turned.item():.4f}, noise {restored.item():.4f}")
        return turned + restored

    optimise([*network.parameters(), *denoise.parameters()], schedule, 1e-2, len(images), loss_of)
    return network.eval().requires_grad_(False)


def degrade(images: Tensor) -> Tensor:
    """Noise of random strength on images (B, 3, S, S): features should not hang on single pixels."""
    strength = 0.15 * torch.rand(len(images), 1, 1, 1)
    return images + strength * torch.randn_like(images)


def damage(images: Tensor, patch: int = 4) -> tuple[Tensor, Tensor]:
    """Patches from another image, blur, and noise, each on half of the images (B, 3, S, S), and how much of each
    (B, 3) in [0, 1]."""
    b, side = len(images), images.shape[-1] // patch
    done = torch.rand(b, 3) * (torch.rand(b, 3) < 0.5)
    swapped = (torch.rand(b, 1, side, side) < 0.3 * done[:, 0, None, None, None]).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    images = torch.where(swapped, images.roll(1, 0), images)
    images = torch.lerp(images, F.avg_pool2d(images, 3, 1, 1, count_include_pad=False), done[:, 1, None, None, None])
    return images + 0.15 * done[:, 2, None, None, None] * torch.randn_like(images), done


def describe(images: Tensor) -> Tensor:
    """(B, 14): mean colour of the four quarters, mean step from pixel to pixel across and down."""
    quarters = F.adaptive_avg_pool2d(images, 2).flatten(1)
    across = (images[..., 1:] - images[..., :-1]).abs().mean(dim=(1, 2, 3))
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean(dim=(1, 2, 3))
    return torch.cat([quarters, across[:, None] * 4, down[:, None] * 4], dim=1)


@torch.no_grad()
def presence_accuracy(network: FeatureNet, images: np.ndarray, there: Tensor, batch: int = 500) -> float:
    """Share of digits that are rightly said to be there or not, where half of the count is of those that are: images uint8
    (N, S, S, 3), there (N, 10)."""
    right = torch.cat([network.logits(to_float(images[i : i + batch])) > 0 for i in range(0, len(images), batch)]) == there.bool()
    return float((right[there.bool()].float().mean() + right[~there.bool()].float().mean()) / 2)


@torch.no_grad()
def accuracy(network: FeatureNet, images: np.ndarray, labels: Tensor, batch: int = 500) -> float:
    """Share of images uint8 (N, S, S, 3) recognised as their label."""
    right = 0
    for i in range(0, len(images), batch):
        right += int((network.logits(to_float(images[i : i + batch])).argmax(-1) == labels[i : i + batch]).sum())
    return right / len(images)
