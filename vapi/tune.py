"""Fine-tune a generator with VA-pi (arXiv 2512.19680, section 3), in a run that can be killed.

    for every step:
        batch = next images with their codes and conditions        # codes from the token cache
        update(objective, optimizer, batch)                        # vapi.objective: equations 4 to 11

``Examples`` is the data in its order; ``Tuning`` is the run. Killed at any moment, it is continued by the
same command from the last checkpoint and ends with the same bits, because order, noise and draws follow
from (seed, step, image) and never from what happened before. Nor from how many processes share the work:
each takes a slice of every step's images, so a run begun on eight GPUs goes on with one. SIGTERM and Ctrl-C
write a checkpoint after the current step and exit with code 75 (``INTERRUPTED``, "try again").

Left out, as in the paper: learning-rate schedule, weight averaging, guidance while tuning.

Shapes: B images, T codes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from vapi import checkpoint, data, grpo, images, launch, models, parallelize
from vapi.baselines import OBJECTIVES
from vapi.config import ModelConfig, TuneConfig, plain
from vapi.launch import INTERRUPTED, World
from vapi.models import Policy, text, weights
from vapi.objective import DRAW, HOLDOUT, ORDER, Batch, Objective, optimizer_of, update
from vapi.rewards import Reward, files, kinds, require_fit
from vapi.run import NO_RUN, Run

SHEET_IMAGES = 8
BY_ROUNDING_ONLY = ("images_per_forward", "images_per_reward", "checkpoint_every", "sharding", "activation_checkpointing", "compile")
CPU_ALLOCATOR = "DefaultCPUAllocator"  # how torch's error about memory begins where there is no GPU; it has no class of its own
READERS = 2  # threads that decode the next steps' images


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
        self._read: Tensor | None = None
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
        """Raises ValueError unless the policy can read these codes, and these labels or features of captions."""
        codes = self.tokens.codes
        if codes.shape[1] != policy.num_codes:
            raise ValueError(f"the tokens have {codes.shape[1]} codes per image, the generator draws {policy.num_codes}; run: vapi tokens")
        if codes.max() >= policy.vocab:
            raise ValueError(f"the tokens hold code {codes.max()}, the generator knows 0 .. {policy.vocab - 1}; run: vapi tokens")
        if policy.num_classes:
            self._fit_labels(policy)
        elif self.model.text_encoder:
            policy.condition(self._features(self.held[:1], policy))  # it knows what it can read
        else:
            self._words(policy)

    def cut(self, policy: Policy) -> int:
        """How many captions have more words than the generator reads: these are cut at their end."""
        if self.tokens.captions is None:
            return 0
        return int((self.tokens.captions.places[:, 1] > cast(Any, policy.generator).config.prefix).sum())

    def _fit_labels(self, policy: Policy) -> None:
        labels = self.subset.labels
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
        labels = torch.from_numpy(self.subset.labels[index])
        condition = policy.condition(labels if policy.num_classes else self._captions(rows, policy))
        asked = condition if policy.num_classes else [self.subset.captions[row] for row in index.tolist()]
        return Batch(rows, images.to_float(pixels, policy.device), codes, condition, asked)

    def _captions(self, rows: Tensor, policy: Policy) -> Tensor:
        """What a policy of captions is asked: their features, if an encoder reads for it, else what it reads itself."""
        return self._features(rows, policy) if self.model.text_encoder else self._words(policy)[rows]

    def _words(self, policy: Policy) -> Tensor:
        """All captions as the policy reads words, in one shape, which whoever compiles for shapes is glad of."""
        if self._read is None:
            self._read = policy.condition(self.subset.captions).cpu()
        return self._read

    def _features(self, rows: Tensor, policy: Policy) -> Tensor:
        """The cached features of images' captions, as the generator reads them: (B, S, C + 1)."""
        return text.pad(self.tokens.features(rows.tolist()), cast(Any, policy.generator).config.prefix)

    def load(self, rows: Tensor, policy: Policy) -> Batch:
        """Rows of the subset, read now."""
        return self.batch(rows, self.pixels(rows), policy)

    def batches(self, first: int, last: int, policy: Policy, world: World) -> Iterator[tuple[int, Batch]]:
        """(step, this process's part of its batch) from ``first`` to ``last``, the next ones being read meanwhile."""
        steps = range(first, last + 1)
        mine = [self.order(step)[world.part(self.tune.images_per_step)] for step in steps]
        for step, rows, pixels in zip(steps, mine, data.parallel(self.pixels, mine, READERS), strict=True):
            yield step, self.batch(rows, pixels, policy)


# --- a run that can be killed ------------------------------------------------------------------


class Progress:
    """The numbers of a run: metrics.jsonl as it grows, the tracker, and a line for whoever watches. The first
    process's alone; the numbers are those of all."""

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
    """Weights, optimizer, numbers and sheets of one run, in a folder that outlives it until it has succeeded.

    Every process has one, and they do the same steps; the first writes.
    """

    def __init__(
        self, model: ModelConfig, tune: TuneConfig, examples: Examples, state: Path, digest: str, run: Run, world: World = launch.ALONE
    ) -> None:
        device = models.device_of(model)
        reward = Reward.of(tune, device)
        self.tune, self.examples, self.state, self.digest, self.run, self.world = tune, examples, state, digest, run, world
        self.policy = models.load(model)
        examples.fit(self.policy)
        self.policy.generator.eval()
        parallelize.speed_up(self.policy, reward, tune)
        self.objective = OBJECTIVES[tune.objective](self.policy, tune, reward, model.precision, world)
        parallelize.parallelize(self.policy, tune, world)
        self.optimizer = optimizer_of(self.objective.trained, tune)
        self.held = examples.load(examples.held[world.part(len(examples.held))], self.policy)
        self.shown = examples.load(examples.held[:SHEET_IMAGES], self.policy)
        self.sheets = state / "sheets"
        self.sheets.mkdir(exist_ok=True)
        saved = checkpoint.load(state / "checkpoint.pt", digest)
        self.step: int = saved["step"] if saved else -1  # -1: not even the look before the first step
        self.seconds: list[float] = saved["seconds"] if saved else []  # of every step
        self.before = len(self.seconds)  # those of earlier processes
        if len(set(world.gather(self.step))) > 1:
            raise ValueError(f"processes find different checkpoints in {state}; put DVC_ROOT on a disk that all machines share")
        if saved:
            parallelize.restore(self.objective.trained, self.optimizer, saved)
        if world.first:
            self.progress = Progress(state / "metrics.jsonl", saved["lines"] if saved else [], tune.steps, run)
            if cut := examples.cut(self.policy):
                print(
                    f"{cut:,} of {len(examples.subset):,} captions are longer than the generator reads, and cut",
                    file=sys.stderr,
                    flush=True,
                )
            if saved:
                print(f"continuing after step {self.step} of {tune.steps}", file=sys.stderr, flush=True)

    def train(self) -> None:
        """All steps that are left. Raises SystemExit(75) when a signal asked to stop."""
        with stop_signals() as stop:
            if self.step < 0:
                self.finish_step(0, {})
            for step, batch in self.examples.batches(self.step + 1, self.tune.steps, self.policy, self.world):
                begin = time.perf_counter()
                values = update(self.objective, self.optimizer, batch, step)
                self.seconds.append(time.perf_counter() - begin)
                self.finish_step(step, {f"tune/{name}": value for name, value in values.items()})
                if self.world.any(stop.is_set()) and step < self.tune.steps:
                    self.save()
                    if self.world.first:
                        print(f"stopped after step {step} of {self.tune.steps}; the same command continues", file=sys.stderr, flush=True)
                    raise SystemExit(INTERRUPTED)

    def finish_step(self, step: int, values: dict[str, float]) -> None:
        """What is due after a step: a look at the held-out images, a sheet, a line, a checkpoint."""
        tune, last = self.tune, step == self.tune.steps
        if step % tune.holdout_every == 0 or last:
            looked = self.objective.look(self.held, step)
            values = {**values, **{f"holdout/{name}": value for name, value in looked.items()}}
        if step % tune.sheet_every == 0 or last:
            self.draw_sheet(step)
        self.step = step
        if self.world.first:
            self.progress.log(step, values)
        if (step and step % tune.checkpoint_every == 0) or last:  # the last too: writing the result may fail
            self.save()

    def draw_sheet(self, step: int) -> None:
        """What the generator makes of a few held-out images and their conditions. Uncompiled: a sheet has a shape of its own,
        which is not worth a graph."""
        with parallelize.whole(self.policy.generator), torch.compiler.set_stance("force_eager"):
            if self.world.first:
                path = self.sheets / f"step-{step:06d}.png"
                picture, rewards = sheet(self.policy, self.objective, self.shown)
                path.write_bytes(images.png_bytes(picture))
                keys = [self.examples.subset.keys[row] for row in self.shown.rows.tolist()]
                data.write_json(path.with_suffix(".json"), {"step": step, "keys": keys, "rewards": rewards})
                self.run.image("samples/tune", path, step)

    def save(self) -> None:
        """Everything a later process needs to go on as if nothing had happened."""
        networks = parallelize.state(self.objective.trained, self.optimizer)
        if self.world.first:
            numbers = {"step": self.step, "lines": self.progress.lines, "seconds": self.seconds}
            checkpoint.save(self.state / "checkpoint.pt", self.digest, {**networks, **numbers})
        self.world.gather(None)  # nobody leaves before it is written: a launcher may end those that are left

    def write(self, folder: Path | None) -> None:
        """The result, into the first process's folder; all processes give their shards of it."""
        tensors = parallelize.weights(self.objective.trained)
        if folder is None:
            return
        self.progress.bar.close()
        self.objective.save(folder, tensors)
        (folder / "metrics.jsonl").write_text("".join(self.progress.lines))
        shutil.copytree(self.sheets, folder / "sheets")
        summary = self.summary(sum(tensor.numel() for tensor in tensors.values()))
        data.write_json(folder / "summary.json", summary)
        self.run.metrics({f"final/{k.removeprefix('holdout/')}": v for k, v in summary["holdout"]["last"].items() if k != "step"})

    def summary(self, parameters: int) -> dict[str, Any]:
        """summary.json: where it began, where it ended."""
        looks = self.progress.held_out()
        return {
            "steps": self.tune.steps,
            "images_seen": self.tune.steps * self.tune.images_per_step,
            "parameters": parameters,
            "captions_cut": self.examples.cut(self.policy),
            "subset": {"source": self.examples.subset.source, "images": len(self.examples.subset)},
            "holdout": {"images": len(self.examples.held), "first": looks[0], "last": looks[-1]},
        }


@torch.no_grad()
def sheet(policy: Policy, objective: Objective, batch: Batch) -> tuple[Image.Image, dict[str, list[float]]]:
    """Four rows: real images, the tokenizer's reconstructions, teacher-forced draws, free-running samples. Beside it the rewards of
    the draws, in all and by part, unweighted: {"reward": [...], "mse": [...]}."""
    drawn = policy.decode(_one_draw(objective, batch))
    total, parts = objective.reward_of(drawn[:, None], batch.images, asked=batch.asked)
    samples = policy.decode(policy.generate(batch.condition, list(range(len(batch)))))
    rows = dict(zip(data.SHEET_ROWS, (batch.images, policy.decode(batch.codes), drawn, samples), strict=True))
    rewards = {name: [float(f"{value:.6g}") for value in of.flatten().tolist()] for name, of in {"reward": total, **parts}.items()}
    pixels = torch.cat([images.to_uint8(row) for row in rows.values()]).permute(0, 2, 3, 1).cpu().numpy()
    captions = [name for name in rows for _ in range(len(batch))]
    return images.sheet(pixels, len(batch), images.tile_scale(policy.image_size), captions), rewards


def _one_draw(objective: Objective, batch: Batch) -> Tensor:
    predicted = objective.predict(objective.policy, batch.condition, batch.codes)
    return objective.draw(predicted, 1, grpo.keys(batch.rows, HOLDOUT, DRAW).to(batch.codes.device))[:, 0]


# --- the stage ---------------------------------------------------------------------------------


def tune(model: ModelConfig, tune: TuneConfig, subset: Path, tokens: Path, out: Path, run: Run = NO_RUN) -> None:
    """Fine-tune ``model.generator`` on a subset and write the tuned weights to ``out``.

    ``out``: model.safetensors (with objective tokenizer: tokenizer.safetensors), metrics.jsonl (a line per step, from 0), sheets/,
    summary.json, config.json, provenance.json. Raises ValueError for inputs that do not fit, before anything expensive, and for a loss that
    is not finite; SystemExit(75) after SIGTERM or Ctrl-C. A run that ended early is continued by the same call,
    by any number of processes.
    """
    begin = time.perf_counter()
    world = launch.world(model.device)
    with world.first_enters(data.output_folder(out, "tune")) as folder:
        _require_work(tune, world)
        require_fit(kinds(tune), tune.objective, model.captions)
        parallelize.require_compiler(tune, models.device_of(model))
        examples = Examples(model, tune, subset, tokens)
        inputs = world.once(lambda: _inputs(model, tune, subset, tokens))
        digest = world.once(lambda: _digest(model, tune, inputs))
        with world.first_enters(data.locked(data.state_dir("locks") / f"tune-{digest}.lock", wait=False)):
            state = data.state_dir("resume", "tune", digest)
            run.dataset("subset", inputs["subset"], subset)
            if world.first:
                _mention_unfinished(state)
            with _memory_advice(tune, models.device_of(model)) as advised:
                tuning = Tuning(model, tune, examples, state, digest, run, world)
                advised.append(tuning)
                tuning.train()
                tuning.write(folder)
            if folder is not None:
                cost: dict[str, float | str] = {
                    "seconds_per_step": round(float(np.median(tuning.seconds)), 4),
                    "seconds_in_own_steps": round(sum(tuning.seconds[tuning.before :]), 3),  # like its seconds, without those before
                    "processes": world.size,
                    "device": models.device_name(models.device_of(model)),
                }
                data.describe(folder, "tune", {"model": model, "tune": tune}, inputs, time.perf_counter() - begin, **cost)
    if world.first:
        shutil.rmtree(state, ignore_errors=True)


def _mention_unfinished(state: Path) -> None:
    """A stopped run is kept until it is continued, and one of a billion parameters takes 17 GB."""
    others = [path.stat().st_size for path in state.parent.glob("*/checkpoint.pt") if path.parent != state]
    if others:
        words = f"unfinished runs besides this one: {len(others)}, {sum(others) / 1e9:.2g} GB"
        print(f"{words} in {state.parent}; remove what will not be continued", file=sys.stderr, flush=True)


def _require_work(tune: TuneConfig, world: World) -> None:
    """Raises ValueError if there are more processes than images, or if they cannot move in step."""
    for name in ("images_per_step", "holdout_images"):
        count = getattr(tune, name)
        if count < world.size:
            raise ValueError(
                f"{world.size} processes (GPUs) share tune.{name} {count}; use fewer GPUs (CUDA_VISIBLE_DEVICES) or more images"
            )
    if tune.sharding == "full" and tune.policy_dropout == "official" and tune.images_per_step % world.size:
        raise ValueError(
            f"tune.images_per_step {tune.images_per_step} is no multiple of {world.size} processes; with sharding full and "
            "policy_dropout official they must all make as many forwards"
        )


@contextlib.contextmanager
def _memory_advice(tune: TuneConfig, device: torch.device) -> Iterator[list[Tuning]]:
    """Turn an allocator's error into words about the knobs, with what would probably fit. Takes the run once it is there."""
    tuning: list[Tuning] = []
    try:
        yield tuning
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and CPU_ALLOCATOR not in str(error):
            raise
        raise ValueError(_advice(tune, device, _fixed_bytes(tuning[0]) if tuning else 0)) from error


def _fixed_bytes(tuning: Tuning) -> int:
    """What weights, gradient and AdamW's moments take in this process, whatever the number of images, beside the frozen networks."""
    parameters = [p for group in tuning.optimizer.param_groups for p in group["params"]]
    own = [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
    return 4 * sum(p.numel() * p.element_size() for p in own)


def _advice(tune: TuneConfig, device: torch.device, fixed: int) -> str:
    words = f"out of memory with tune.images_per_forward {tune.images_per_forward} and tune.images_per_reward {tune.images_per_reward}"
    if device.type == "cuda":
        total, peak = torch.cuda.get_device_properties(device).total_memory, torch.cuda.max_memory_allocated(device)
        fits = int(tune.images_per_forward * 0.8 * (total - fixed) / max(1, peak - fixed))
        fits = max(1, min(fits, tune.images_per_forward // 2))
        words += (
            f": weights and optimizer take {fixed / 2**30:.1f} of {total / 2**30:.1f} GiB; images_per_forward {fits} would probably fit"
        )
    return (
        f"{words}. Results depend on these two by rounding only: lower them, then try tune.activation_checkpointing true, "
        "model.precision bfloat16, or with several GPUs tune.sharding full"
    )


def _inputs(model: ModelConfig, tune: TuneConfig, subset: Path, tokens: Path) -> dict[str, str]:
    """Digests of everything the result depends on."""
    paths = {"subset": subset, "tokens": tokens, "generator": weights.locate(model.generator), "tokenizer": weights.locate(model.tokenizer)}
    paths |= files(tune)
    return {name: data.known_digest(path) for name, path in paths.items()} | {"text_encoder": data.encoder_digest(model)}


def _digest(model: ModelConfig, tune: TuneConfig, inputs: dict[str, str]) -> str:
    """Names a run by everything its result depends on, so that a run with other sizes or on other devices continues it."""
    depends = {name: value for name, value in plain(tune).items() if name not in BY_ROUNDING_ONLY}
    networks = {name: value for name, value in plain(model).items() if name != "device"}
    values = {"model": networks, "tune": depends, "inputs": inputs, "source": data.code_version()["source"]}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
