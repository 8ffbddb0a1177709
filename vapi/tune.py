"""Fine-tune a generator with VA-pi (arXiv 2512.19680, section 3).

    for every step:
        images, codes, condition = next batch                      # codes from the token cache
        context    = corrupt(codes)                                # eq. 28
        logits     = generator(condition, context)                 # once per image, with gradient
        draws      = G token maps from softmax(logits)             # eq. 7, no rollout
        rewards    = -(MSE + LPIPS)(decode(draws), images)         # eq. 10, everything frozen
        advantages = rewards normalised within each image's group  # eq. 4
        loss       = clipped policy term + beta * prior            # eq. 11, eq. 9

``Objective`` is that algorithm; ``Examples`` is the data in its order; the rest makes a run that can
be killed at any moment: the same command continues from the last checkpoint and ends with the same
bits, because order, noise and draws follow from (seed, step, image) and never from what happened
before. SIGTERM and Ctrl-C write a checkpoint after the current step and exit with code 75
(``INTERRUPTED``, "try again").

Left out, as in the paper: learning-rate schedule, weight averaging, guidance while tuning.

Shapes: B images, G group, T codes, V codebook.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from vapi import checkpoint, data, grpo, images, models
from vapi.config import ModelConfig, TuneConfig, plain
from vapi.models import Policy, weights
from vapi.rewards import Reward, network_files
from vapi.run import NO_RUN, Run

INTERRUPTED = 75
"""Exit code after SIGTERM or Ctrl-C (EX_TEMPFAIL): run the same command again to continue."""

ORDER, NOISE, DRAW, DROPOUT, HOLDOUT = range(5)  # what a random number is for
HOLDOUT_DRAWS = 1  # per held-out image; always from the same numbers, so that a change shows
SHEET_IMAGES = 8
READERS = 2  # threads that decode the next steps' images

Terms = dict[str, Tensor]


# --- the algorithm -----------------------------------------------------------------------------


@dataclass
class Batch:
    """Images with what the frozen networks know about them."""

    rows: Tensor  # (B,) which images of the subset
    images: Tensor  # (B, 3, H, W) in [-1, 1]
    codes: Tensor  # (B, T)
    condition: Tensor  # (B, ...)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, part: slice) -> Batch:
        return Batch(self.rows[part], self.images[part], self.codes[part], self.condition[part])

    def split(self, size: int) -> Iterator[Batch]:
        """Parts of at most ``size`` images."""
        return (self[at : at + size] for at in range(0, len(self), size))


@dataclass
class Draws:
    """G token maps of each image and how they fared."""

    codes: Tensor  # (B, G, T)
    advantages: Tensor  # (B, G)
    old: Tensor | None = None  # (B, G, T) log-probabilities when drawn; None: those of now
    base: Tensor | None = None  # (B, G, T) log-probabilities under the frozen base

    def of(self, image: int) -> Draws:
        """The draws of one image, each a row of its own: (G, 1, ...)."""

        def rows(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[image, :, None]

        return Draws(self.codes[image, :, None], self.advantages[image, :, None], rows(self.old), rows(self.base))


class Objective:
    """The loss of VA-pi on a batch, in pieces that fit through one forward and backward."""

    def __init__(self, policy: Policy, tune: TuneConfig, reward: Reward, precision: str = "float32") -> None:
        self.policy, self.tune, self.reward = policy, tune, reward
        self.precision = precision
        self.map = _parallel_map(policy.device)
        self.base = _frozen_copy(policy) if tune.prior == "kl" and tune.prior_weight > 0 else None

    def pieces(self, batch: Batch, step: int) -> Iterator[tuple[float, Tensor, Terms]]:
        """(share of the batch, loss, its terms): the gradient of the step is that of sum(share * loss)."""
        for part in batch.split(self.tune.images_per_forward):
            if self.tune.policy_dropout == "none":
                yield len(part) / len(batch), *self.shared(part, step)
            else:
                for loss, terms in self.official(part, step):
                    yield 1 / len(batch), loss, terms

    def shared(self, batch: Batch, step: int) -> tuple[Tensor, Terms]:
        """One forward per image: its G draws share the context, so they share the prediction."""
        context = self.context(batch, step)
        predicted = self.log_probs(self.policy, batch.condition, context)
        terms = self.prediction(predicted.detach(), batch.codes, step)
        draws = self.rollout(predicted.detach(), batch, context, step, terms)
        return self.loss(predicted, batch.codes, draws, step, terms)

    def official(self, batch: Batch, step: int) -> Iterator[tuple[Tensor, Terms]]:
        """As released: draws from the network in eval mode, the update in train mode, where every draw is a
        forward of its own with its own dropout mask and class drop. The ratio leaves 1 for that reason alone."""
        context = self.context(batch, step)
        with torch.no_grad():
            predicted = self.log_probs(self.policy, batch.condition, context)
            terms = self.prediction(predicted, batch.codes, step)
            draws = self.rollout(predicted, batch, context, step, terms)
            if draws is not None:
                draws.old = grpo.chosen(grpo.tempered(predicted, self.tune.temperature), draws.codes)
        del predicted
        for image in range(len(batch)):
            one = batch[image : image + 1]
            repeat = [0] * self.tune.group_size
            with _dropout(self.policy, int(grpo.keys(one.rows, self.tune.seed, DROPOUT, step))):
                rows = self.log_probs(self.policy, one.condition[repeat], context[image : image + 1][repeat])
            yield self.loss(rows, one.codes[repeat], None if draws is None else draws.of(image), step, terms)

    def context(self, batch: Batch, step: int) -> Tensor:
        """The noised codes that the generator reads (eq. 28)."""
        keys = grpo.keys(batch.rows, self.tune.seed, NOISE, step).to(batch.codes.device)
        return grpo.corrupt(batch.codes, self.tune.context_noise, self.policy.vocab, keys)

    def log_probs(self, policy: Policy, condition: Tensor, context: Tensor) -> Tensor:
        """Teacher-forced log-probabilities (B, T, V)."""
        with models.autocast(self.precision, self.policy.device):
            return grpo.log_probs(policy.logits(condition, context))

    def prediction(self, log_probs: Tensor, codes: Tensor, step: int) -> Terms:
        """Cross-entropy and entropy of a prediction: how well, and how surely, it names the true codes."""
        return _finite({"ce": grpo.prior_ce(log_probs, codes), "entropy": grpo.entropy(log_probs)}, step)

    @torch.no_grad()
    def rollout(self, log_probs: Tensor, batch: Batch, context: Tensor, step: int, terms: Terms) -> Draws | None:
        """Draw G token maps per image and reward them, unless the prior alone is wanted; adds to ``terms`` what that showed."""
        tune = self.tune
        if tune.policy_weight == 0:
            return None
        keys = grpo.keys(batch.rows, tune.seed, DRAW, step).to(log_probs.device)
        codes = grpo.draw(log_probs, tune.group_size, tune.temperature, keys)
        rewards, parts = self.score(codes, batch.images)
        terms |= _finite({**_named_means(parts), "reward": rewards.mean()}, step)
        draws = Draws(codes, grpo.advantages(rewards, tune.advantage_clip))
        terms |= {"reward_std": rewards.std(1).mean(), "advantage_std": draws.advantages.std(1).mean()}
        if self.base is not None:
            base = self.log_probs(self.base, batch.condition, context)
            draws.base = grpo.chosen(grpo.tempered(base, tune.temperature), codes)
        return draws

    def score(self, codes: Tensor, targets: Tensor) -> tuple[Tensor, Terms]:
        """Reward (B, G) of token maps (B, G, T) against their images, and its parts: most of a step's work."""
        (count, group), size = codes.shape[:2], self.tune.images_per_reward
        many, few = max(1, size // group), min(group, size)
        blocks = [(slice(b, b + many), slice(g, g + few)) for b in range(0, count, many) for g in range(0, group, few)]
        scored = list(self.map(lambda block: self._score_block(codes[block], targets[block[0]]), blocks))

        def whole(values: list[Tensor]) -> Tensor:
            result = values[0].new_empty(count, group)
            for block, value in zip(blocks, values, strict=True):
                result[block] = value
            return result

        parts = {name: whole([theirs[name] for _, theirs in scored]) for name in scored[0][1]}
        return whole([total for total, _ in scored]), parts

    @torch.no_grad()
    def _score_block(self, codes: Tensor, targets: Tensor) -> tuple[Tensor, Terms]:
        """``score`` of what fits at a time. Runs in a thread of its own."""
        with models.autocast(self.precision, self.policy.device):
            decoded = self.policy.decode(codes.flatten(0, 1)).unflatten(0, codes.shape[:2])
            return self.reward.score(decoded, targets)

    def loss(self, log_probs: Tensor, codes: Tensor, draws: Draws | None, step: int, terms: Terms) -> tuple[Tensor, Terms]:
        """Equation 11: the clipped policy term plus beta times the prior. Predictions (B, T, V), true codes (B, T)."""
        tune = self.tune
        prior = ce = grpo.prior_ce(log_probs, codes)
        terms = {**terms, "ce": ce.detach()}
        loss = torch.zeros_like(ce)
        if draws is not None:
            new = grpo.chosen(grpo.tempered(log_probs, tune.temperature), draws.codes)
            policy, clipped = grpo.policy_term(new, new.detach() if draws.old is None else draws.old, draws.advantages, tune.ratio_clip)
            terms |= {"policy": policy.detach(), "clip_fraction": clipped}
            loss = loss + tune.policy_weight * policy
            if draws.base is not None:
                prior = grpo.prior_kl(new, draws.base)
                terms["kl"] = prior.detach()
        if tune.prior_weight > 0:
            loss = loss + tune.prior_weight * prior
        return loss, _finite({**terms, "loss": loss.detach()}, step)

    @torch.no_grad()
    def look(self, batch: Batch, step: int) -> Terms:
        """Reward, its parts, cross-entropy and entropy, with noise and draws that never change."""
        totals: Terms = {}
        for part in batch.split(self.tune.images_per_forward):
            noise, draw = (grpo.keys(part.rows, HOLDOUT, purpose).to(part.codes.device) for purpose in (NOISE, DRAW))
            context = grpo.corrupt(part.codes, self.tune.context_noise, self.policy.vocab, noise)
            predicted = self.log_probs(self.policy, part.condition, context)
            terms = self.prediction(predicted, part.codes, step)
            rewards, parts = self.score(grpo.draw(predicted, HOLDOUT_DRAWS, self.tune.temperature, draw), part.images)
            terms |= {"reward": rewards.mean(), **_named_means(parts)}
            _add(totals, terms, len(part) / len(batch))
        return totals


def _parallel_map(device: torch.device) -> Callable[..., Iterable[Any]]:
    """``map`` over independent blocks of work. On a CPU one thread each, instead of all threads in every
    operation: these are small, and the slowest thread would hold up each of them."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        return map
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)).map


def _frozen_copy(policy: Policy) -> Policy:
    """The policy as it is now, for the KL prior; the frozen tokenizer is shared."""
    base = copy.deepcopy(policy, {id(policy.tokenizer): policy.tokenizer})
    base.generator.requires_grad_(False)
    return base


@contextlib.contextmanager
def _dropout(policy: Policy, seed: int) -> Iterator[None]:
    """Train mode with masks that follow from ``seed``."""
    with torch.random.fork_rng([policy.device] if policy.device.type == "cuda" else []):
        torch.manual_seed(seed)
        policy.generator.train()
        yield
        policy.generator.eval()


def _named_means(parts: Terms) -> Terms:
    return {f"reward_{name}": part.mean() for name, part in parts.items()}


def _finite(terms: Terms, step: int) -> Terms:
    for name, value in terms.items():
        if not value.isfinite():
            raise ValueError(
                f"step {step}: {name} is {value.item()}; stopped before the update. "
                "A smaller tune.lr, a larger tune.prior_weight or model.precision float32 may help"
            )
    return terms


def _add(totals: Terms, terms: Terms, share: float) -> None:
    for name, value in terms.items():
        totals[name] = totals.get(name, 0.0) + share * value.double()


def optimizer_of(generator: torch.nn.Module, tune: TuneConfig) -> torch.optim.AdamW:
    """AdamW with a constant rate; weight decay on parameters with two or more dimensions."""
    parameters = [p for p in generator.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": tune.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=tune.lr, betas=(tune.beta1, tune.beta2))


def update(objective: Objective, optimizer: torch.optim.Optimizer, batch: Batch, step: int) -> dict[str, float]:
    """One optimizer step; means of all terms over the batch. Raises ValueError, before anything changed, if one is not finite."""
    tune = objective.tune
    totals: Terms = {}
    optimizer.zero_grad(set_to_none=True)
    for share, loss, terms in objective.pieces(batch, step):
        (share * loss).backward()
        _add(totals, terms, share)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = clip_grad_norm_(parameters, tune.max_grad_norm or float("inf"))
    totals |= _finite({"grad_norm": norm}, step)
    optimizer.step()
    return {name: value.item() for name, value in totals.items()}


# --- the data, in its order --------------------------------------------------------------------


class Examples:
    """The subset's images with their codes: a fixed few held out, the others in a new order every epoch.

    An epoch is cut into whole steps, so no step sees an image twice; its order, and so every step's
    images, follow from the seed alone.
    """

    def __init__(self, model: ModelConfig, tune: TuneConfig, subset: Path, tokens: Path) -> None:
        """Raises ValueError if images, tokens and configuration do not belong together."""
        self.model, self.tune = model, tune
        self.subset, self.tokens = data.read_subset(subset), data.read_tokens(tokens)
        self.tokens.require(model, self.subset)
        total, needed = len(self.subset), tune.holdout_images + tune.images_per_step
        if total < needed:
            raise ValueError(
                f"the subset has {total} images, but tune.holdout_images {tune.holdout_images} + "
                f"tune.images_per_step {tune.images_per_step} = {needed} are needed; pick more images or lower one of the two"
            )
        shuffled = grpo.keys(torch.arange(total), HOLDOUT).argsort()  # the same for every seed, so that curves compare
        self.held, self.rows = shuffled[: tune.holdout_images], shuffled[tune.holdout_images :]

    def fit(self, policy: Policy) -> None:
        """Raises ValueError unless the policy can read these codes and labels."""
        codes, labels = self.tokens.codes, self.subset.labels
        if codes.shape[1] != policy.num_codes:
            raise ValueError(f"the tokens have {codes.shape[1]} codes per image, the generator draws {policy.num_codes}; run: vapi tokens")
        if codes.max() >= policy.vocab:
            raise ValueError(f"the tokens hold code {codes.max()}, the generator knows 0 .. {policy.vocab - 1}; run: vapi tokens")
        wrong = np.flatnonzero((labels < 0) | (labels >= policy.num_classes))
        if len(wrong):
            names = ", ".join(f"{self.subset.keys[i]} ({labels[i]})" for i in wrong[:5])
            raise ValueError(f"{len(wrong)} labels lie outside the model's classes 0 .. {policy.num_classes - 1}: {names}")

    def order(self, step: int) -> Tensor:
        """The images of a step (from 1), as rows of the subset."""
        size = self.tune.images_per_step
        epoch, at = divmod(step - 1, len(self.rows) // size)
        shuffled = self.rows[grpo.keys(self.rows, self.tune.seed, ORDER, epoch).argsort()]
        return shuffled[at * size : (at + 1) * size]

    def pixels(self, rows: Tensor) -> np.ndarray:
        """Images as the tokenizer saw them, uint8 (B, H, W, 3)."""
        return np.stack([self.subset.pixels(row, self.model.image_size) for row in rows.tolist()])

    def batch(self, rows: Tensor, pixels: np.ndarray, policy: Policy) -> Batch:
        """Rows of the subset as tensors on the policy's device."""
        index = rows.numpy()
        codes = torch.from_numpy(self.tokens.codes[index].astype(np.int64)).to(policy.device)
        condition = policy.condition(torch.from_numpy(self.subset.labels[index]))
        return Batch(rows, images.to_float(pixels).to(policy.device), codes, condition)

    def batches(self, first: int, last: int, policy: Policy) -> Iterator[tuple[int, Batch]]:
        """(step, batch) from ``first`` to ``last``, the next ones being read meanwhile."""
        steps = range(first, last + 1)
        for step, pixels in zip(steps, data.parallel(lambda step: self.pixels(self.order(step)), steps, READERS), strict=True):
            yield step, self.batch(self.order(step), pixels, policy)


# --- a run that can be killed ------------------------------------------------------------------


class Progress:
    """The numbers of a run: metrics.jsonl as it grows, the tracker, and a line for whoever watches."""

    def __init__(self, path: Path, lines: list[str], steps: int, run: Run) -> None:
        self.path, self.lines, self.steps, self.run = path, lines, steps, run
        path.write_text("".join(lines))  # a killed run may have got further than its last checkpoint
        self.bar = tqdm(total=steps, initial=max(0, len(lines) - 1), desc="tune", unit="step", disable=not sys.stderr.isatty())

    def log(self, step: int, values: dict[str, float]) -> None:
        """One line per step; seven digits are what float32 has."""
        values = {name: float(f"{value:.7g}") for name, value in values.items()}
        self.lines.append(json.dumps({"step": step, **values}) + "\n")
        with self.path.open("a") as file:
            file.write(self.lines[-1])
        self.run.metrics(values, step)
        shown = [name for name in ("tune/reward", "tune/ce", "holdout/reward", "holdout/ce") if name in values]
        words = "  ".join(f"{name} {values[name]:.4g}" for name in shown)
        if not self.bar.disable:
            self.bar.update(min(step, 1))
            self.bar.set_postfix_str(words)
        elif "holdout/reward" in values:
            print(f"step {step} of {self.steps}  {words}", file=sys.stderr, flush=True)

    def held_out(self) -> list[dict[str, float]]:
        """What the held-out images showed, from the first look to the last."""
        rows = [json.loads(line) for line in self.lines]
        return [{k: v for k, v in row.items() if not k.startswith("tune/")} for row in rows if "holdout/reward" in row]


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that the first SIGTERM or Ctrl-C sets; a second one ends the process at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals there only
        yield asked
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()
        restore()

    for number in before:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        restore()


class Tuning:
    """Weights, optimizer, numbers and sheets of one run, in a folder that outlives it until it has succeeded."""

    def __init__(self, model: ModelConfig, tune: TuneConfig, examples: Examples, state: Path, digest: str, run: Run) -> None:
        device = models.device_of(model)
        reward = Reward(tune.rewards, tune.perceptual, tune.perceptual_weights, device)
        self.tune, self.examples, self.state, self.digest, self.run = tune, examples, state, digest, run
        self.policy = models.load(model)
        examples.fit(self.policy)
        self.policy.generator.eval()
        self.policy.tokenizer.to(memory_format=torch.channels_last)  # a fifth faster to decode, the same numbers
        self.objective = Objective(self.policy, tune, reward, model.precision)
        self.optimizer = optimizer_of(self.policy.generator, tune)
        self.held = examples.batch(examples.held, examples.pixels(examples.held), self.policy)
        self.sheets = state / "sheets"
        self.sheets.mkdir(exist_ok=True)
        saved = checkpoint.load(state / "checkpoint.pt", digest)
        self.step: int = saved["step"] if saved else -1  # -1: not even the look before the first step
        self.seconds: list[float] = saved["seconds"] if saved else []
        self.progress = Progress(state / "metrics.jsonl", saved["lines"] if saved else [], tune.steps, run)
        if saved:
            self.policy.generator.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            print(f"continuing after step {self.step} of {tune.steps}", file=sys.stderr, flush=True)

    def train(self) -> None:
        """All steps that are left. Raises SystemExit(75) when a signal asked to stop."""
        with stop_signals() as stop, contextlib.closing(self.progress.bar):
            if self.step < 0:
                self.finish_step(0, {})
            for step, batch in self.examples.batches(self.step + 1, self.tune.steps, self.policy):
                begin = time.perf_counter()
                values = update(self.objective, self.optimizer, batch, step)
                self.seconds.append(time.perf_counter() - begin)
                self.finish_step(step, {f"tune/{name}": value for name, value in values.items()})
                if stop.is_set() and step < self.tune.steps:
                    self.save()
                    print(f"stopped after step {step} of {self.tune.steps}; the same command continues", file=sys.stderr, flush=True)
                    raise SystemExit(INTERRUPTED)

    def finish_step(self, step: int, values: dict[str, float]) -> None:
        """What is due after a step: a look at the held-out images, a sheet, a line, a checkpoint."""
        tune, last = self.tune, step == self.tune.steps
        if step % tune.holdout_every == 0 or last:
            looked = self.objective.look(self.held, step)
            values = {**values, **{f"holdout/{name}": value.item() for name, value in looked.items()}}
        if step % tune.sheet_every == 0 or last:
            path = self.sheets / f"step-{step:06d}.png"
            path.write_bytes(images.png_bytes(sheet(self.policy, self.objective, self.held[:SHEET_IMAGES])))
            self.run.image("samples/tune", path, step)
        self.step = step
        self.progress.log(step, values)
        if step % tune.checkpoint_every == 0 or last:  # the last too: writing the result may fail
            self.save()

    def save(self) -> None:
        """Everything a later process needs to go on as if nothing had happened."""
        networks = {"model": self.policy.generator.state_dict(), "optimizer": self.optimizer.state_dict()}
        numbers = {"step": self.step, "lines": self.progress.lines, "seconds": self.seconds}
        checkpoint.save(self.state / "checkpoint.pt", self.digest, {**networks, **numbers})

    def summary(self) -> dict[str, Any]:
        """summary.json: where it began, where it ended."""
        looks = self.progress.held_out()
        return {
            "steps": self.tune.steps,
            "images_seen": self.tune.steps * self.tune.images_per_step,
            "parameters": sum(p.numel() for p in self.policy.generator.parameters()),
            "holdout": {"images": len(self.held), "first": looks[0], "last": looks[-1]},
        }


@torch.no_grad()
def sheet(policy: Policy, objective: Objective, batch: Batch) -> Image.Image:
    """Four rows: real images, the tokenizer's reconstructions, teacher-forced draws, free-running samples."""
    rows = {
        "real": batch.images,
        "reconstruction": policy.decode(batch.codes),
        "draw": policy.decode(_one_draw(objective, batch)),
        "sample": policy.decode(policy.generate(batch.condition, list(range(len(batch))))),
    }
    pixels = torch.cat([images.to_uint8(row) for row in rows.values()]).permute(0, 2, 3, 1).cpu().numpy()
    captions = [name for name in rows for _ in range(len(batch))]
    return images.sheet(pixels, len(batch), max(1, 96 // policy.image_size), captions)


def _one_draw(objective: Objective, batch: Batch) -> Tensor:
    predicted = objective.log_probs(objective.policy, batch.condition, batch.codes)
    return grpo.draw(predicted, 1, objective.tune.temperature, grpo.keys(batch.rows, HOLDOUT, DRAW).to(predicted.device))[:, 0]


# --- the stage ---------------------------------------------------------------------------------


def tune(model: ModelConfig, tune: TuneConfig, subset: Path, tokens: Path, out: Path, run: Run = NO_RUN) -> None:
    """Fine-tune ``model.generator`` on a subset and write the tuned weights to ``out``.

    ``out``: model.safetensors, metrics.jsonl (a line per step, from 0), sheets/, summary.json, config.json,
    provenance.json. Raises ValueError for inputs that do not fit, before anything expensive, and for a loss that
    is not finite; SystemExit(75) after SIGTERM or Ctrl-C. A run that ended early is continued by the same call.
    """
    begin = time.perf_counter()
    with data.output_folder(out, "tune") as folder:
        examples = Examples(model, tune, subset, tokens)
        inputs = _inputs(model, tune, subset, tokens)
        digest = _digest({"model": plain(model), "tune": plain(tune), "inputs": inputs, "source": data.code_version()["source"]})
        with data.locked(data.state_dir("locks") / f"tune-{digest}.lock", wait=False):
            state = data.state_dir("resume", "tune", digest)
            run.dataset("subset", inputs["subset"], subset)
            tuning = Tuning(model, tune, examples, state, digest, run)
            tuning.train()
            _write(folder, tuning)
            timings = {"seconds_per_step": round(float(np.median(tuning.seconds)), 4)}
            data.describe(folder, "tune", {"model": model, "tune": tune}, inputs, time.perf_counter() - begin, **timings)
    shutil.rmtree(state, ignore_errors=True)


def _inputs(model: ModelConfig, tune: TuneConfig, subset: Path, tokens: Path) -> dict[str, str]:
    """Digests of everything the result depends on."""
    paths = {"subset": subset, "tokens": tokens, "generator": weights.locate(model.generator), "tokenizer": weights.locate(model.tokenizer)}
    if "lpips" in tune.rewards:
        paths |= network_files(tune.perceptual, tune.perceptual_weights)
    return {name: data.file_digest(path) for name, path in paths.items()}


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _write(folder: Path, tuning: Tuning) -> None:
    tuning.policy.save(folder / "model.safetensors")
    (folder / "metrics.jsonl").write_text("".join(tuning.progress.lines))
    shutil.copytree(tuning.sheets, folder / "sheets")
    summary = tuning.summary()
    data.write_json(folder / "summary.json", summary)
    tuning.run.metrics({f"final/{k.removeprefix('holdout/')}": v for k, v in summary["holdout"]["last"].items() if k != "step"})
