"""Every knob of the pipeline, declared once: type, default, one line of documentation.

A section of ``params.yaml`` is a frozen dataclass here, and carries the name of the stage that
reads it. Values travel ``params.yaml`` -> command line (wins) -> stage, and are written beside
whatever the stage produced. Nothing in this file imports torch, kfp or mlflow, so that
``--help`` is instant and a pipeline compiles on a machine that has none of them.

Fields are str, int, float, bool, list or dict: Kubeflow takes neither None nor tuples. "Off" is
``""``, ``0`` or an explicit word, never a YAML boolean in disguise.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import re
import sys
import tempfile
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

PARAMS = Path("params.yaml")


def require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def _require_seed(name: str, seed: int) -> None:
    require(0 <= seed < 2**32, f"{name} holds {seed}; a seed lies in 0 .. 4294967295")


READERS = ("janus",)
"""Policies that read captions themselves, in words; what others know of a caption is what model.text_encoder makes of it."""


@dataclass(frozen=True)
class ModelConfig:
    """The base generator and its frozen tokenizer."""

    policy: str = "llamagen"
    """Adapter of the base model: a name in vapi.models.POLICIES (llamagen, janus)."""
    generator: str = "data/models/generator.safetensors"
    """Weights of the base generator: a local path, or a hub id as org/name/file; for janus a folder, or org/name."""
    tokenizer: str = "data/models/tokenizer.safetensors"
    """Weights of the frozen image tokenizer: a local path, or a hub id as org/name/file; for janus the same folder again."""
    text_encoder: str = ""
    """What reads a generator's captions for it: words (embedded), or a T5, a folder or a hub id; empty: classes, or Janus, which reads."""
    image_size: int = 32
    """Side of the square image in pixels that the generator draws."""
    device: str = "auto"
    """Where to run: auto (a GPU if there is one), cpu, cuda."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward passes; weights and optimizer state stay float32. bfloat16's advantages: benchmarks/reward_precision.py."""

    def __post_init__(self) -> None:
        require(self.image_size >= 8, f"model.image_size is {self.image_size}; it must be at least 8 pixels")

    @property
    def captions(self) -> bool:
        """Whether it draws from captions; else it draws classes."""
        return bool(self.text_encoder) or self.policy in READERS


@dataclass(frozen=True)
class SubsetConfig:
    """Which real images to tune on."""

    source: str = "data/digits/train.parquet"
    """Class folders; Parquet or tars (a file, a folder, a pattern); CSV, JSONL; hf://datasets/OWNER/NAME@REVISION/folder or pattern."""
    format: Literal["auto", "folder", "parquet", "table", "webdataset"] = "auto"
    """How to read the source; auto looks at what lies there."""
    images: int = 2048
    """How many images to pick; 0 takes them all."""
    balance: Literal["class", "random"] = "class"
    """class: the same number from every class; random: uniformly from all."""
    classes: int = 10
    """Labels must lie in 0 .. classes - 1; 0 for data without labels."""
    seed: int = 0
    """Picks the images; the same seed picks the same ones whatever the order of the files."""
    image_column: str = "image"
    """Parquet, CSV, JSONL: the column with the image's bytes or path."""
    label_column: str = "label"
    """Parquet, CSV, JSONL, webdataset: the column or key with the class id."""
    caption_column: str = "caption"
    """Parquet, CSV, JSONL, webdataset: the column or key with the caption."""
    min_size: int = 16
    """The shorter side of an image must have at least this many pixels."""
    max_pixels: int = 100_000_000
    """An image that would unpack to more pixels is quarantined unopened (a decompression bomb)."""
    max_unreadable: float = 0.01
    """Share of the images examined that may be unreadable before the stage fails."""
    max_imbalance: float = 1.5
    """Largest class over smallest class that data validation accepts; 0 accepts any."""
    images_per_shard: int = 10_000
    """Images in one Parquet shard of the output."""

    def __post_init__(self) -> None:
        require(self.images >= 0, f"subset.images is {self.images}; give a number of images, or 0 for all")
        require(self.classes >= 0, f"subset.classes is {self.classes}; give a number of classes, or 0 for none")
        require(0 <= self.max_unreadable <= 1, f"subset.max_unreadable is {self.max_unreadable}; it is a share from 0 to 1")
        require(self.max_imbalance >= 1 or self.max_imbalance == 0, f"subset.max_imbalance is {self.max_imbalance}; 1 is balanced, 0 any")
        _require_seed("subset.seed", self.seed)
        require(self.images_per_shard > 0, f"subset.images_per_shard is {self.images_per_shard}; it must be positive")


@dataclass(frozen=True)
class TokensConfig:
    """How the frozen tokenizer is run over the subset, once."""

    crop: Literal["center"] = "center"
    """center: ADM's centre crop (box halvings, bicubic, crop), as LlamaGen was trained."""
    images_per_batch: int = 128
    """Images that the tokenizer encodes at a time."""
    workers: int = 0
    """Threads that decode and crop images; 0 takes as many as there are cores, shared out among the processes."""
    min_codebook_usage: float = 0.0
    """Validation fails when a smaller share of the codebook occurs in the subset; 0 accepts any."""
    words_per_batch: int = 4096
    """Captions are encoded together, sorted by length, up to this many text tokens at a time."""

    def __post_init__(self) -> None:
        require(self.images_per_batch > 0, f"tokens.images_per_batch is {self.images_per_batch}; it must be positive")
        require(self.workers >= 0, f"tokens.workers is {self.workers}; give a number of threads, or 0 for one per core")
        require(self.words_per_batch > 0, f"tokens.words_per_batch is {self.words_per_batch}; it must be positive")


@dataclass(frozen=True)
class TuneConfig:
    """VA-pi: objective, optimizer, sizes (arXiv 2512.19680, section 3 and table 7)."""

    objective: Literal["va_pi", "ste", "cca", "ar_grpo", "tokenizer"] = "va_pi"
    """va_pi: the paper's; ste: straight-through gradient; cca: contrast of classes; ar_grpo: free draws; tokenizer: its decoder alone."""
    steps: int = 100
    """Each sees a fresh batch of images, and is one optimizer step (or updates_per_rollout)."""
    images_per_step: int = 64
    """Images per optimizer step, over all processes."""
    images_per_forward: int = 64
    """Images that fit through one forward and backward; gradient accumulation follows from it."""
    group_size: int = 8
    """G: token maps drawn per image from the one teacher-forced prediction (section 3.3)."""
    lr: float = 1e-4
    """AdamW's constant learning rate; well below pretraining's (digits: a thirtieth, the paper: about a hundredth)."""
    weight_decay: float = 1e-4
    """AdamW's weight decay, on parameters with two or more dimensions."""
    beta1: float = 0.9
    """AdamW's first moment."""
    beta2: float = 0.999
    """AdamW's second moment."""
    max_grad_norm: float = 1.0
    """The gradient's norm is clipped to this; 0 leaves it alone."""
    policy_weight: float = 1.0
    """Weight of the clipped policy term (eq. 11); 0 trains on the prior alone."""
    prior_weight: float = 0.1
    """beta: weight of the prior term (eq. 9); 0 trains on the reward alone."""
    prior: Literal["ce", "kl"] = "ce"
    """ce: cross-entropy on the true codes (eq. 9); kl: k3 divergence from the frozen base (fig. 4)."""
    context_noise: float = 0.0
    """xi: probability that a code of the context is replaced by a random one (eq. 28)."""
    updates_per_rollout: int = 1
    """Optimizer steps made of each step's draws; the paper makes one."""
    ratio_clip: float = 0.2
    """epsilon of the clipped ratio; active only with policy_dropout official or several updates_per_rollout."""
    baseline: Literal["group", "leave_one_out"] = "group"
    """group: a draw's reward by its group's mean and spread (eq. 4); leave_one_out: less the other draws' mean, and not scaled."""
    advantage_clip: float = 5.0
    """Advantages are clipped to this."""
    credit: Literal["image", "token"] = "image"
    """image: one advantage for a draw (eq. 4); token: one for each of its codes, from the reward around the code's place."""
    credit_radius: int = 0
    """With credit token: so many neighbours to each side count towards a code's reward."""
    temperature: float = 1.0
    """Temperature at which the G token maps are drawn."""
    rollout_guidance: float = 1.0
    """With objective ar_grpo: guidance of its free draws; 1.0 is none."""
    cca_beta: float = 0.2
    """With objective cca: the larger, the less the tuned model has to leave the base until the contrast counts as learned."""
    cca_weight: float = 1.0
    """With objective cca: lambda, the weight of images under another class than theirs; published for LlamaGen: beta 0.02, lambda 300."""
    rewards: dict[str, float] = field(default_factory=lambda: {"mse": 1.0, "lpips": 10.0})
    """Weight of each part of the reward (eq. 10), names in vapi.rewards.REWARDS; with VGG, whose distances are larger, lpips is 1."""
    perceptual: str = "data/models/reward.safetensors"
    """Network behind the lpips reward: a .safetensors of ours, or LPIPS on torchvision's VGG-16 (vgg) or AlexNet (alex)."""
    perceptual_weights: str = ""
    """For perceptual vgg or alex: folder with vgg16-397923af.pth or alexnet-owt-7be5be79.pth; empty: torch's own cache."""
    classifier: str = "data/models/classifier.safetensors"
    """Network behind the reward class, the log-probability of the class that was asked for: a .safetensors of ours."""
    clip_model: str = ""
    """Network behind the reward clip, how well a picture fits its caption: a folder of CLIP's weights, or of HPSv2's laid out alike."""
    images_per_reward: int = 64
    """Decoded images that the tokenizer and the perceptual network take at a time."""
    policy_dropout: Literal["none", "official"] = "none"
    """none: one shared forward per image; official: dropout and class drop in the update, as released (slow)."""
    sharding: Literal["none", "full"] = "none"
    """none: every process holds the whole generator; full: FSDP2 shares out its weights, gradients and optimizer state."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass: a third more work in the generator, a fraction of the memory."""
    compile: bool = False
    """Compile the generator's blocks and the decoder with torch.compile; pays on a GPU after about ten steps."""
    seed: int = 0
    """Data order, context noise and draws; the same for any number of processes."""
    holdout_images: int = 128
    """Images kept out of tuning; reward, cross-entropy and entropy are followed on them."""
    holdout_every: int = 10
    """Steps between two looks at the held-out images."""
    sheet_every: int = 50
    """Steps between two sample sheets."""
    checkpoint_every: int = 10
    """Steps between two resumable checkpoints."""

    def __post_init__(self) -> None:
        for name in ("steps", "images_per_step", "images_per_forward", "images_per_reward", "holdout_images", "updates_per_rollout"):
            require(getattr(self, name) >= 1, f"tune.{name} is {getattr(self, name)}; it must be at least 1")
        compares = self.objective in ("va_pi", "ar_grpo") and self.policy_weight > 0
        require(
            self.group_size >= (2 if compares else 1),
            f"tune.group_size is {self.group_size}; an advantage needs at least 2 draws to compare",
        )
        require(0 < self.lr <= 1, f"tune.lr is {self.lr}; it must be positive, and at most 1: AdamW moves a weight by about so much a step")
        self._require_known()
        for name in ("cca_beta", "cca_weight"):
            require(getattr(self, name) > 0, f"tune.{name} is {getattr(self, name)}; it must be positive")
        require(self.credit_radius >= 0, f"tune.credit_radius is {self.credit_radius}; it must not be negative")
        require(
            self.credit == "token" or not self.credit_radius,
            f"tune.credit_radius is {self.credit_radius}, and with credit image no code has a reward of its own; set credit to token",
        )
        require(self.temperature > 0, f"tune.temperature is {self.temperature}; it must be positive")
        for name in ("max_grad_norm", "weight_decay", "ratio_clip"):
            require(getattr(self, name) >= 0, f"tune.{name} is {getattr(self, name)}; it must not be negative")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"tune.{name} is {getattr(self, name)}; it must lie in [0, 1)")
        require(self.rollout_guidance >= 1, f"tune.rollout_guidance is {self.rollout_guidance}; 1.0 is none, more is stronger")
        for name, only in {"updates_per_rollout": 1, "baseline": "group"}.items():
            value = getattr(self, name)
            words = f"tune.{name} is {value}, and tune.policy_weight 0 draws nothing; set it to {only}"
            require(value == only or self.policy_weight > 0, words)
        for reward, name in {"class": "classifier", "clip": "clip_model"}.items():
            require(
                not self.rewards.get(reward) or bool(getattr(self, name)),
                f"tune.rewards.{reward} is {self.rewards.get(reward)}, and tune.{name} is empty; name the weights that it reads",
            )
        require(self.advantage_clip > 0, f"tune.advantage_clip is {self.advantage_clip}; it must be positive")
        require(all(w >= 0 for w in self.rewards.values()), f"tune.rewards is {self.rewards}; weights must not be negative")
        _require_seed("tune.seed", self.seed)
        require(0 <= self.context_noise <= 1, f"tune.context_noise is {self.context_noise}; it is a probability")
        require(
            self.policy_weight > 0 or self.prior_weight > 0,
            "tune.policy_weight and tune.prior_weight are both 0; there is nothing to optimise",
        )
        require(
            self.policy_weight > 0 or self.prior == "ce",
            "tune.policy_weight is 0 and tune.prior is kl; the base would be held to itself, there is nothing to optimise",
        )
        require(self.policy_weight >= 0 and self.prior_weight >= 0, "tune.policy_weight and tune.prior_weight must not be negative")
        for name in ("holdout_every", "sheet_every", "checkpoint_every"):
            require(getattr(self, name) >= 1, f"tune.{name} is {getattr(self, name)}; it must be at least 1 step")

    def _require_known(self) -> None:
        """Raises ValueError for a field that would do nothing with this objective."""
        foreign: dict[str, Any] = {} if self.objective == "va_pi" else {"policy_dropout": "none", "credit": "image"}
        if self.objective in ("ste", "cca", "tokenizer"):
            foreign |= {"prior": "ce", "updates_per_rollout": 1, "baseline": "group"}
        if self.objective == "tokenizer":
            foreign |= {"prior_weight": 0.0, "activation_checkpointing": False}
        if self.objective in ("ar_grpo", "tokenizer"):
            foreign |= {"sharding": "none"}
        if self.objective == "ar_grpo":
            foreign |= {"context_noise": 0.0} | ({"prior": "kl"} if self.prior_weight else {})
        else:
            foreign |= {"rollout_guidance": 1.0}
        for name, only in foreign.items():
            value = getattr(self, name)
            require(value == only, f"tune.{name} is {value}, which objective {self.objective} knows nothing of; set it to {only}")


_ADM_256_50K = {
    "samples": 50_000, "extractor": "inception", "resize": 256, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "guidance": 1.0,
    "guidance_schedule": "constant",
}  # fmt: skip
PROTOCOLS: dict[str, dict[str, Any]] = {
    "adm-256-50k": _ADM_256_50K | {"labels": "random"},  # as in LlamaGen's and VA-pi's papers
    "adm-256-50k-balanced": _ADM_256_50K | {"labels": "balanced"},
}
"""Names of protocols: what a configuration that bears one must say, the reference being a published .npz besides."""


@dataclass(frozen=True)
class EvaluateConfig:
    """How base and tuned are compared."""

    protocol: Literal["own", "adm-256-50k", "adm-256-50k-balanced"] = "own"
    """own: as the fields below say; another name is a promise to papers' readers, and fields that break it are refused."""
    samples: int = 2000
    """Images drawn per model and seed."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """One full evaluation per seed; mean and standard deviation are reported."""
    temperature: float = 1.0
    """Sampling temperature of the plain comparison."""
    top_k: int = 0
    """Keep the k likeliest codes; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of codes with this probability; 1.0 keeps all."""
    guidance: float = 1.0
    """Classifier-free guidance of the plain comparison; 1.0 is none."""
    guidance_schedule: Literal["constant", "power-cosine"] = "constant"
    """constant: the same guidance at every code; power-cosine: rising from none to all of it, as in the released sampler."""
    guidance_power: float = 2.0
    """For power-cosine: higher keeps guidance low for longer; 2.0 is the released sampler's."""
    guided: float = 1.0
    """Guidance of a second comparison beside the plain one, since papers print both; 1.0 leaves it out."""
    labels: Literal["balanced", "random"] = "balanced"
    """balanced: image n shows class n mod the number of classes; random: a class that follows from its seed, as papers draw."""
    temperatures: list[float] = field(default_factory=lambda: [0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    """Temperatures swept for each model's best; chosen on the validation reference."""
    guidances: list[float] = field(default_factory=lambda: [1.0])
    """Guidances swept for each model's best; chosen on the validation reference."""
    sweep_samples: int = 1000
    """Images per point of that sweep."""
    reference: str = "data/digits/reference.parquet"
    """Real images that numbers compare with: Parquet, a folder as subset reads it, or a published .npz (mu, sigma, arr_0 ...)."""
    validation: str = "data/digits/validation.parquet"
    """Other real images, Parquet or a folder: the sweep chooses on them, and the teacher-forced draws start from them."""
    extractor: str = "data/models/metric.safetensors"
    """Feature network of FID and its kin: a .safetensors of ours, or inception (torch-fidelity's)."""
    extractor_weights: str = ""
    """For extractor inception: the weights' file; empty: torch's own cache."""
    dinov2: str = ""
    """Folder of DINOv2's weights (config.json, model.safetensors), for a distance that no ImageNet label shaped; empty: none."""
    prompts: str = "data/scenes/test.jsonl"
    """What a generator of captions is asked for: GenEval's metadata as JSON lines; without a detector any captions (DrawBench's CSV)."""
    images_per_prompt: int = 4
    """Images drawn for each of these prompts; GenEval's is 4."""
    detector: str = "digits"
    """Who looks for the prompts' objects: digits (for the embedded scenes), a folder of Mask2Former's weights; empty: nobody."""
    second_detector: str = "data/models/scenes-judge.safetensors"
    """Another one, so that nobody is believed alone: the same, or a .safetensors of ours; empty: none."""
    clip: str = ""
    """Folder of CLIP ViT-L/14's weights: colours of what Mask2Former finds, and CLIPScore; empty: neither."""
    hps: str = ""
    """Folder of HPSv2's weights as transformers keeps a CLIP, for the text metric hpsv2."""
    text_metrics: list[str] = field(default_factory=list)
    """More scores of pictures for their prompts: clipscore (by evaluate.clip), hpsv2 (evaluate.hps), module:function of your own."""
    resize: int = 0
    """Side to which samples are scaled before they are judged (bicubic, as LlamaGen's 384 to 256); 0 leaves them."""
    images_per_batch: int = 250
    """Images sampled at a time; 0: as many as memory allows. Results depend on it by rounding only."""
    sheet_images: int = 40
    """Images on the sheet of the same seeds before and after."""
    deterministic: bool = False
    """The same bits again on the same card and software: deterministic kernels, at some cost. A CPU needs no such thing."""

    def __post_init__(self) -> None:
        require(self.samples >= 2, f"evaluate.samples is {self.samples}; at least 2 are needed")
        require(len(self.seeds) >= 1, "evaluate.seeds is empty; give at least one seed")
        require(self.temperature > 0, f"evaluate.temperature is {self.temperature}; it must be positive")
        require(self.top_k >= 0, f"evaluate.top_k is {self.top_k}; give a number of codes, or 0 for all")
        for seed in self.seeds:
            _require_seed("evaluate.seeds", seed)
        require(len(set(self.seeds)) == len(self.seeds), f"evaluate.seeds is {self.seeds}; a seed counts once")
        require(0 < self.top_p <= 1, f"evaluate.top_p is {self.top_p}; it must lie in (0, 1]")
        require(self.guidance >= 1, f"evaluate.guidance is {self.guidance}; 1.0 is none, more is stronger")
        require(self.guided >= 1, f"evaluate.guided is {self.guided}; 1.0 leaves it out, more is stronger guidance")
        for name, value in PROTOCOLS.get(self.protocol, {}).items():
            found = getattr(self, name)
            require(found == value, f"evaluate.protocol {self.protocol} means evaluate.{name} {value}, and it is {found}; or say own")
        published = self.protocol == "own" or self.reference.endswith(".npz")
        require(published, f"evaluate.protocol {self.protocol} compares with a published .npz; evaluate.reference is {self.reference}")
        require(all(t > 0 for t in self.temperatures), "evaluate.temperatures must all be positive")
        require(all(g >= 1 for g in self.guidances), "evaluate.guidances must all be at least 1.0")
        require(self.sweep_samples >= 2, f"evaluate.sweep_samples is {self.sweep_samples}; at least 2 are needed")
        require(bool(self.temperatures and self.guidances), "evaluate.temperatures and evaluate.guidances each need at least one value")
        require(self.resize >= 0, f"evaluate.resize is {self.resize}; give a side in pixels, or 0 to leave samples as they are")
        require(self.sheet_images >= 1, f"evaluate.sheet_images is {self.sheet_images}; it must be at least 1")
        require(self.images_per_batch >= 0, f"evaluate.images_per_batch is {self.images_per_batch}; 0 takes what memory allows")
        require(self.images_per_prompt >= 1, f"evaluate.images_per_prompt is {self.images_per_prompt}; it must be at least 1")
        require(self.guidance_power > 0, f"evaluate.guidance_power is {self.guidance_power}; it must be positive")


@dataclass(frozen=True)
class RegisterConfig:
    """What a tuned model must show before it enters the registry."""

    model_name: str = "vapi-digits"
    """Name of the registered model."""
    min_fid_drop: float = 0.05
    """FID must fall by at least this share of the base's; 0: FID decides nothing."""
    min_geneval_gain: float = 0.0
    """GenEval's overall score (by evaluate.detector) must rise by at least this share of the base's; 0: it decides nothing."""
    allowances: dict[str, float] = field(
        default_factory=lambda: {"kid": 0.0, "inception_score": 0.0, "precision": 0.05, "recall": 0.1, "class_accuracy": 0.05}
    )
    """How much worse than the base each other metric may be, as a share of the base's."""
    licences: dict[str, str] = field(default_factory=dict)
    """Licences that the model card cannot know, or has wrong, by input, as {data: CC BY 4.0}: generator, tokenizer, data, detector, ..."""
    strict: bool = False
    """Exit with code 1 when the model is not promoted."""

    def __post_init__(self) -> None:
        require(0 <= self.min_fid_drop < 1, f"register.min_fid_drop is {self.min_fid_drop}; it is a share from 0 to less than 1")
        require(self.min_geneval_gain >= 0, f"register.min_geneval_gain is {self.min_geneval_gain}; it must not be negative")
        require(
            self.min_fid_drop > 0 or self.min_geneval_gain > 0,
            "register.min_fid_drop and register.min_geneval_gain are both 0; a model must get better at something to be promoted",
        )
        require(all(a >= 0 for a in self.allowances.values()), f"register.allowances is {self.allowances}; they must not be negative")
        for name in self.licences:
            require(name in INPUTS, f"register.licences names {name!r}; {nearest(name, INPUTS)}")
        good = bool(re.fullmatch(r"[\w.-]+", self.model_name))
        require(good, f"register.model_name is {self.model_name!r}; use letters, digits, - _ .")


@dataclass(frozen=True)
class TrackConfig:
    """Where runs are compared; changes no result."""

    experiment: str = "vapi"
    """MLflow experiment that the runs belong to."""
    uri: str = ""
    """MLflow server; empty: MLFLOW_TRACKING_URI, else mlflow.db in this clone; off: metrics.jsonl only."""


@dataclass(frozen=True)
class BenchConfig:
    """How `vapi bench` measures. It decides no result, so params.yaml does not hold it."""

    size: str = ""
    """A published generator (GPT-B, GPT-XL, ..., Janus-Pro-1B) with random weights, VQ-16 and VGG or AlexNet; empty: the recipe's."""
    rounds: int = 3
    """Measured rounds, after one that is not; ours and the naive reference take turns in each, and medians count."""
    dimensions: int = 2048
    """fid: length of a feature vector, Inception's."""
    out: str = ""
    """A file that the result is appended to as one line of JSON."""

    def __post_init__(self) -> None:
        require(self.rounds >= 1, f"bench.rounds is {self.rounds}; it must be at least 1")
        require(self.dimensions >= 1, f"bench.dimensions is {self.dimensions}; it must be at least 1")


@dataclass(frozen=True)
class Config:
    """The whole experiment: what params.yaml holds."""

    model: ModelConfig = field(default_factory=ModelConfig)
    subset: SubsetConfig = field(default_factory=SubsetConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    register: RegisterConfig = field(default_factory=RegisterConfig)
    track: TrackConfig = field(default_factory=TrackConfig)


@dataclass(frozen=True)
class Stage:
    """What a stage reads: config sections, and the folders that earlier stages made."""

    doc: str
    sections: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    parallel: bool = False  # one process per visible GPU


# A stage is the function vapi.<name>.<name>(**sections, **inputs, out, run): sections are config
# dataclasses, inputs and out are folders (default artifacts/<name>), run is a vapi.run.Run.
STAGES = {
    "subset": Stage("Pick images from a source and validate them.", ("subset",)),
    "tokens": Stage("Run the frozen tokenizer over the subset, once.", ("model", "tokens"), ("subset",), parallel=True),
    "tune": Stage("Fine-tune the generator with VA-pi.", ("model", "tune"), ("subset", "tokens"), parallel=True),
    "evaluate": Stage("Compare base and tuned side by side.", ("model", "evaluate"), ("tune",), parallel=True),
    "register": Stage("Register the tuned model if it passes the gates.", ("model", "register"), ("tune", "evaluate")),
}
ARTIFACTS = Path("artifacts")


def sections_so_far(stage: str) -> tuple[str, ...]:
    """The sections that a stage's result follows from: its own and those of the stages before it."""
    until = list(STAGES)[: list(STAGES).index(stage) + 1]
    return tuple(dict.fromkeys(section for name in until for section in STAGES[name].sections))


FILES = {
    "model": ("generator", "tokenizer", "text_encoder"),
    "subset": ("source",),
    "tune": ("perceptual", "perceptual_weights", "classifier", "clip_model"),
    "evaluate": (
        "reference",
        "validation",
        "extractor",
        "extractor_weights",
        "dinov2",
        "prompts",
        "detector",
        "second_detector",
        "clip",
        "hps",
    ),
}
"""Fields that name a file, a folder or a pattern of files (or hold a word in place of one, or nothing)."""
INPUTS = {
    "data" if field == "source" else field: f"{section}.{field}"
    for section, fields in FILES.items()
    for field in fields
    if not field.endswith("_weights")  # only says where
}
"""What a model is made of and judged by, as register.licences calls it, and the field that names it."""
TUNED = {"generator": "model.safetensors", "tokenizer": "tokenizer.safetensors"}
"""What the stage tune writes, one of these: by the field of ``ModelConfig`` whose network it replaces."""
FOR_CAPTIONS = tuple(f"evaluate.{field}" for field in ("prompts", "detector", "second_detector", "clip", "hps"))
"""Those of them that a generator of classes has no use for."""
FOR_REWARDS = {"lpips": ("tune.perceptual", "tune.perceptual_weights"), "class": ("tune.classifier",), "clip": ("tune.clip_model",)}
"""And those that a reward reads, by its name."""
JUDGES = {"geneval": "detector", "geneval_second": "second_detector"}
"""Scores by detectors, and the field of ``EvaluateConfig`` that names who gives each."""
TEXT_METRICS = {"clipscore": "clip", "hpsv2": "hps"}
"""Text metrics of ours, and the field that names the CLIP of each."""
PERCEPTUAL = ("vgg", "alex")  # networks that tune.perceptual calls by a word
WORDS = ("", *PERCEPTUAL, "inception", "words", "digits")
"""What such a field may hold in place of a file's name."""


def named_files(settings: Config, sections: Iterable[str] = FILES) -> dict[str, str]:
    """What some sections name: files, folders or patterns of files by field (``model.generator``), without words, and without what
    this model and these rewards have no use for."""
    named = {f"{section}.{field}": getattr(getattr(settings, section), field) for section in sections for field in FILES.get(section, ())}
    unused = [] if settings.model.captions else [*FOR_CAPTIONS]
    unused += [field for reward, fields in FOR_REWARDS.items() if not settings.tune.rewards.get(reward) for field in fields]
    return {field: name for field, name in named.items() if name not in WORDS and field not in unused}


@dataclass(frozen=True)
class Measured:
    """What `vapi bench` runs with: the experiment's sections, and its own."""

    model: ModelConfig = field(default_factory=ModelConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)


# A benchmark is the function vapi.bench.<name>.<name>(settings) -> dict.
BENCHES = {
    "tune": Stage("One optimizer step against the released algorithm, and where its time goes.", ("model", "tune", "bench")),
    "sample": Stage("Free-running sampling against a loop as LlamaGen's.", ("model", "evaluate", "bench")),
    "reward": Stage("Decoding and reward in each precision and memory layout.", ("model", "tune", "bench")),
    "fid": Stage("The Frechet distance against scipy's matrix root, and feature extraction.", ("model", "evaluate", "bench")),
    "geneval": Stage("GenEval from codes to verdicts: pictures a second.", ("model", "evaluate", "bench")),
    "gpu": Stage("All of these for LlamaGen-XXL at 384 pixels on one GPU, in under nine minutes.", ("bench",)),
}


# --- plain values <-> dataclasses --------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: 2e-06 is a float, and off, no, yes are words (PyYAML speaks YAML 1.1)."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_FLOAT = re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


class _Dumper(yaml.SafeDumper):
    """Quotes what either of the two versions would take for something else than a word."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def read_yaml(text: str) -> Any:
    """Parse YAML with the scalars of YAML 1.2. Raises ValueError with the place of a syntax error."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {error}") from error


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """A hint for an error message: the known name closest to a misspelt one, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def convert(value: Any, kind: Any, where: str) -> Any:
    """``value`` as the declared type, or ValueError. Numbers survive every road: Kubeflow turns an
    int inside a dict into a double, and a shell or DVC may hand over a number as text."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{where} is {value!r}; it must be one of {', '.join(map(repr, args))}")
        return value
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} is {value!r}; it must be a list")
        return [convert(v, args[0], f"{where}[{i}]") for i, v in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {value!r}; it must be a mapping of names to values")
        # in one order, since Kubeflow keeps none: the same configuration must be the same bytes
        return {str(k): convert(v, args[1], f"{where}.{k}") for k, v in sorted(value.items(), key=lambda item: str(item[0]))}
    if kind is bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and value.is_integer():
            return int(value)
        if isinstance(value, str) and re.fullmatch(r"\s*[-+]?\d[\d_]*\s*", value):
            return int(value)
    elif kind is float:
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                number = float(value)
            except ValueError:
                number = math.nan
            if math.isfinite(number):
                return number
    elif kind is str and isinstance(value, str):
        return value
    hint = " (quote it in YAML)" if kind is str else ""
    raise ValueError(f"{where} is {value!r}; it must be {'an' if kind is int else 'a'} {kind.__name__}{hint}")


COMPLETE = "vapi recipe digits --write"
"""The command that writes a complete ``params.yaml``."""


def build(kind: type, values: Any, where: str = "", complete: str = COMPLETE) -> Any:
    """Make the dataclass ``kind`` from plain values, every field given and none unknown.

    Raises ValueError that names the field and the nearest known one. There are no silent defaults:
    a stale file fails loudly (the command ``complete`` makes a complete one).
    """
    label = where or "the config"
    if not isinstance(values, dict):
        raise ValueError(f"{label} is {values!r}; it must be a mapping of names to values")
    types = typing.get_type_hints(kind)
    for name in values:
        if name not in types:
            raise ValueError(f"{label} has no field {str(name)!r}; {nearest(str(name), types)}")
    missing = [name for name in types if name not in values]
    if missing:
        raise ValueError(f"{label} lacks {', '.join(missing)}; add it, or write a complete file with: {complete}")
    prefix = f"{where}." if where else ""
    made = {
        name: build(t, values[name], prefix + name, complete)
        if isinstance(t, type) and dataclasses.is_dataclass(t)
        else convert(values[name], t, prefix + name)
        for name, t in types.items()
    }
    return kind(**made)


def plain(config: Any) -> dict[str, Any]:
    """A config dataclass as nested plain values."""
    return dataclasses.asdict(config)


def flat(config: Any) -> dict[str, Any]:
    """A config dataclass, or its nested plain values, as ``{"tune.lr": 2e-5, ...}``."""

    def walk(values: Any, prefix: str) -> dict[str, Any]:
        if isinstance(values, dict) and values:
            return {k: v for name, value in values.items() for k, v in walk(value, f"{prefix}.{name}" if prefix else name).items()}
        return {prefix: values}

    return walk(config if isinstance(config, dict) else plain(config), "")


def load_values(path: Path = PARAMS) -> Any:
    """What ``params.yaml`` says, unchecked. Raises ValueError if it is not there or no YAML."""
    try:
        return read_yaml(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is not here; run inside the project, or make one with: {COMPLETE}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load(path: Path = PARAMS) -> Config:
    """Read ``params.yaml``. Raises ValueError in words a user can act on."""
    values = load_values(path)
    try:
        return build(Config, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def dump(config: Any, comments: bool = True) -> str:
    """``params.yaml`` text (of any dataclass of sections): every field spelled out, its documentation as a comment above it."""
    lines: list[str] = []
    for section in dataclasses.fields(config):
        value = getattr(config, section.name)
        if comments:
            lines.append(f"# {type(value).__doc__}")
        lines.append(f"{section.name}:")
        docs = field_docs(type(value)) if comments else {}
        for name, item in plain(value).items():
            if docs.get(name):
                lines.append(f"  # {docs[name]}")
            lines.append(f"  {name}: {scalar(item)}")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def scalar(value: Any) -> str:
    """A value on one line of YAML that every reader, PyYAML's 1.1 too, takes for the same value."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=math.inf, sort_keys=False).strip()
    text = text.removesuffix("...").strip()
    assert read_yaml(text) == value, (text, value)
    return text


def field_docs(kind: type) -> dict[str, str]:
    """The string under each field of a config dataclass, by field name."""
    return _documentation(str(sys.modules[kind.__module__].__file__))[kind.__name__]


@functools.cache
def _documentation(file: str) -> dict[str, dict[str, str]]:
    """Every class of a file with the strings under its fields."""
    import ast

    def documented(body: list[ast.stmt]) -> dict[str, str]:
        docs: dict[str, str] = {}
        for statement, following in zip(body, body[1:]):
            match statement, following:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                    docs[name] = doc
        return docs

    return {node.name: documented(node.body) for node in ast.parse(Path(file).read_text()).body if isinstance(node, ast.ClassDef)}


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: temporary name, fsync, rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
