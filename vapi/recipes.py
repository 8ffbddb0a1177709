"""Named points in the configuration space: one row each, as what differs from the defaults.

``config.py`` holds the defaults, and they are the recipe ``digits``. A row says in a line what it is
for, what to expect of it (a number that somebody measured, and where), and which fields differ. A new
base model, data set or ablation is a new row here and nothing else.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vapi import config
from vapi.config import Config


@dataclass(frozen=True)
class Recipe:
    """One row: what it is, what to expect, and ``{"section.field": value}`` where it leaves the defaults."""

    doc: str
    expect: str
    changes: dict[str, Any] = field(default_factory=dict)
    gpu: bool = False  # whether it wants GPUs, and on a cluster a volume for its data; the others are content with a CPU


class Times(float):
    """So many times what the recipe says."""

    def __str__(self) -> str:
        return f"x {float(self):g}"


_OTHER = {"tune.policy_dropout": "none"}  # which VA-pi alone knows, as released
_FREE = {"tune.objective": "ar_grpo", **_OTHER, "tune.prior": "kl", "tune.context_noise": 0.0}
_FREE |= {"tune.rewards.mse": 0.0, "tune.rewards.lpips": 0.0}
ARMS: dict[str, dict[str, Any]] = {
    "VA-pi": {},
    "fine-tuning": {"tune.policy_weight": 0.0},
    "token credit": {"tune.credit": "token"},
    "straight-through": {"tune.objective": "ste", **_OTHER},
    "CCA": {"tune.objective": "cca", **_OTHER},
    "AR-GRPO": {**_FREE, "tune.rewards.class": 1.0},
    "tokenizer": {"tune.objective": "tokenizer", "tune.prior_weight": 0.0, **_OTHER},
}
"""What can be done with a generator and a tokenizer, as what it changes in VA-pi's recipe."""
RATES = {"fine-tuning": 0.3, "token credit": 1.0, "straight-through": 1.0, "CCA": 3.0, "AR-GRPO": 1.0, "tokenizer": 0.3}
"""At how many times VA-pi's learning rate each was best on the digits (experiments ``rates`` and ``cca``)."""
AT_BEST = {name: changes | ({"tune.lr": Times(RATES[name])} if name in RATES else {}) for name, changes in ARMS.items()}
"""The arms, each at its own rate."""
BY_CLIP = {**_FREE, "tune.rewards.clip": 1.0}
"""AR-GRPO from captions, by tune.clip_model."""


# The paper's class-conditional runs (table 7, section 4.1; what it leaves open as in its released scripts): 100 steps on
# 12,800 ImageNet images, each seen once, and 128 more that are only looked at.
_LLAMAGEN_384 = {
    "model.tokenizer": "data/llamagen/vq_ds16_c2i.pt",
    "model.image_size": 384,
    "model.precision": "bfloat16",
    "subset.source": "data/imagenet/train",
    "subset.images": 12_928,
    "subset.balance": "random",
    "subset.max_imbalance": 0.0,
    "subset.classes": 1000,
    "tokens.images_per_batch": 32,
    "tune.images_per_step": 128,
    "tune.images_per_forward": 16,
    "tune.images_per_reward": 32,
    "tune.lr": 1e-6,
    "tune.cca_beta": 0.02,  # of CCA, which the experiments compare with, as its authors tuned these weights
    "tune.cca_weight": 300.0,
    "tune.rewards": {"mse": 1.0, "lpips": 1.0},
    "tune.perceptual": "vgg",
    "tune.compile": True,
    "tune.checkpoint_every": 50,  # 17 GB each; SIGTERM writes one anyway
    "evaluate.protocol": "adm-256-50k",
    **{f"evaluate.{name}": value for name, value in config.PROTOCOLS["adm-256-50k"].items()},
    "evaluate.temperatures": [0.9, 1.0],
    "evaluate.guidances": [1.0, 1.5, 1.75, 2.0],
    "evaluate.sweep_samples": 5_000,
    "evaluate.reference": "data/imagenet/VIRTUAL_imagenet256_labeled.npz",
    "evaluate.validation": "data/imagenet/validation",
    "evaluate.images_per_batch": 0,
    # Inception does not know the model's classes; the paper's models gain precision and lose up to 14 % of recall
    "register.allowances": {"kid": 0.0, "inception_score": 0.0, "precision": 0.05, "recall": 0.2},
}
_XL = {"model.generator": "data/llamagen/c2i_XL_384.pt", "register.model_name": "llamagen-xl-c2i", "evaluate.guided": 2.0}
_XXL = {"model.generator": "data/llamagen/c2i_XXL_384.pt", "register.model_name": "llamagen-xxl-c2i", "evaluate.guided": 1.75}
_OFFICIAL = {"tune.policy_dropout": "official"}
_XL_PAPER = (
    "the paper, table 2, without guidance: FID 15.55 to 9.23, IS 79.16 to 111.59; guidance 2.0: FID 2.79 to 2.94; 20 minutes on 8 A100"
)
_XXL_PAPER = (
    "the paper, table 2, without guidance: FID 14.36 to 7.65, IS 86.55 to 116.70; guidance 1.75: FID 2.37 to 2.28; 25 minutes on 8 A100"
)

# The paper's text-to-image run (table 7): 200 steps on 25,600 images of LAION-COCO, half of each context replaced, 256 pixels.
_LLAMAGEN_T2I = {
    "model.generator": "data/llamagen/t2i_XL_stage1_256.pt",
    "model.tokenizer": "data/llamagen/vq_ds16_t2i.pt",
    "model.text_encoder": "data/llamagen/flan-t5-xl",
    "model.image_size": 256,
    "model.precision": "bfloat16",
    "subset.source": "data/laion-coco/train",
    "subset.images": 25_728,  # 200 steps x 128 and 128 that are only looked at
    "subset.balance": "random",
    "subset.classes": 0,
    "subset.min_size": 256,
    "tokens.images_per_batch": 64,
    "tune.steps": 200,
    "tune.images_per_step": 128,
    "tune.images_per_forward": 32,
    "tune.images_per_reward": 64,
    "tune.lr": 1e-6,
    "tune.context_noise": 0.5,
    "tune.rewards": {"mse": 1.0, "lpips": 1.0},
    "tune.perceptual": "vgg",
    "tune.clip_model": "data/geneval/clip-vit-large-patch14",  # of AR-GRPO, which the experiments compare with
    "tune.compile": True,
    "tune.checkpoint_every": 50,
    # as GenEval was sampled in the paper; its images are judged by OpenMMLab's detector, converted
    "evaluate.samples": 5_000,
    "evaluate.top_k": 2000,
    "evaluate.guidance": 7.5,
    "evaluate.labels": "random",
    "evaluate.temperatures": [1.0],
    "evaluate.guidances": [2.0, 4.0, 7.5],
    "evaluate.sweep_samples": 2_000,
    "evaluate.reference": "data/coco/reference",
    "evaluate.validation": "data/coco/validation",
    "evaluate.extractor": "inception",
    "evaluate.images_per_batch": 0,
    "evaluate.prompts": "data/geneval/prompts.jsonl",
    "evaluate.detector": "data/geneval/mask2former",
    "evaluate.second_detector": "",
    "evaluate.clip": "data/geneval/clip-vit-large-patch14",
    "evaluate.text_metrics": ["clipscore"],
    "register.model_name": "llamagen-xl-t2i",
    "register.min_fid_drop": 0.0,
    "register.min_geneval_gain": 0.05,
    "register.allowances": {"fid": 0.05, "fid_random": 0.1, "clipscore": 0.02},
}

# The same judged as in table 1, on prompts that no detector judges.
_DRAWBENCH = {
    **_LLAMAGEN_T2I,
    "evaluate.prompts": "data/drawbench/prompts.csv",
    "evaluate.detector": "",
    "evaluate.hps": "data/hpsv2",
    "evaluate.text_metrics": ["clipscore", "hpsv2"],
    "register.min_fid_drop": 0.05,
    "register.min_geneval_gain": 0.0,
    "register.allowances": {"fid_random": 0.1, "clipscore": 0.02, "hpsv2": 0.02},
}

# The paper's run of Janus-Pro-1B (table 7; its script says noise 1.0): pictures of FLUX-Reason-6M from the hub, 384 pixels, LPIPS
# on AlexNet. Results are bound by the licences of Janus's weights (DeepSeek's, with restrictions of use that stay with tuned
# weights) and of FLUX.1 [dev], which drew the pictures.
_JANUS = {
    **_LLAMAGEN_T2I,
    "model.policy": "janus",
    "model.generator": "deepseek-ai/Janus-Pro-1B",
    "model.tokenizer": "deepseek-ai/Janus-Pro-1B",
    "model.text_encoder": "",
    "model.image_size": 384,
    "subset.source": "hf://datasets/LucasFang/FLUX-Reason-6M",
    "subset.images": 12_928,
    "subset.caption_column": "caption_original",
    "subset.min_size": 384,
    "tokens.images_per_batch": 32,
    "tune.steps": 100,
    "tune.images_per_forward": 16,
    "tune.images_per_reward": 32,
    "tune.lr": 1e-7,
    "tune.context_noise": 0.95,
    "tune.perceptual": "alex",
    "evaluate.top_k": 0,
    "evaluate.guidance": 5.0,
    "evaluate.guidances": [3.0, 5.0, 7.0],
    "register.model_name": "janus-pro-1b",
    "register.min_geneval_gain": 0.02,
}

# Scenes of the embedded digits, drawn from captions: docs/embedded-world.md and docs/text-to-image.md say what was tried.
_DIGITS_T2I = {
    "model.generator": "data/models/scenes-generator.safetensors",
    "model.tokenizer": "data/models/scenes-tokenizer.safetensors",
    "model.text_encoder": "words",
    "model.image_size": 40,
    "subset.source": "data/scenes/train.parquet",
    "subset.balance": "random",
    "subset.classes": 0,
    "tune.images_per_step": 32,
    "tune.perceptual": "data/models/scenes-reward.safetensors",
    "tune.clip_model": "data/models/scenes-clip",  # of AR-GRPO, which the experiments compare with
    "evaluate.samples": 1200,
    "evaluate.guidance": 4.0,  # the base needs some, as LlamaGen's of captions does (the paper: 7.5)
    "evaluate.temperatures": [0.7, 0.85, 1.0],
    "evaluate.guidances": [2.0, 4.0],
    "evaluate.sweep_samples": 600,
    "evaluate.reference": "data/scenes/reference.parquet",
    "evaluate.validation": "data/scenes/validation.parquet",
    "evaluate.extractor": "data/models/scenes-metric.safetensors",
    "register.model_name": "vapi-digits-t2i",
    "register.min_fid_drop": 0.0,
    "register.min_geneval_gain": 0.02,
    "register.allowances": {"fid": 0.05, "kid": 0.1, "geneval_second": 0.05, "precision": 0.05, "recall": 0.1},
}

# The same scenes by a tiny Janus, which reads captions itself: docs/janus.md. What differs was chosen by what the base does.
_DIGITS_JANUS = _DIGITS_T2I | {
    "model.policy": "janus",
    "model.generator": "data/models/scenes-janus",
    "model.tokenizer": "data/models/scenes-janus",
    "model.text_encoder": "",
    "tune.images_per_step": 16,
    "evaluate.images_per_prompt": 2,
    "evaluate.guidance": 6.0,  # chosen on the validation prompts: docs/janus.md
    "evaluate.guidances": [4.0, 6.0],
    "register.model_name": "vapi-digits-janus",
}


def _objective(name: str, doc: str, expect: str) -> Recipe:
    return Recipe(doc, f"{expect}, where VA-pi gives 0.95 (docs/results.md)", AT_BEST[name])


_OBJECTIVES = {
    "fine-tuning": _objective("fine-tuning", "Fine-tuning: the cross-entropy alone, at the rate that was best for it.", "FID 1.02 to 1.10"),
    "straight-through": _objective("straight-through", "The reward's gradient straight through to the generator.", "FID 1.02 to 0.99"),
    "cca": _objective("CCA", "Condition contrastive alignment (arXiv 2410.09347): classes told apart.", "FID 1.02 to 0.55"),
    "ar-grpo": _objective("AR-GRPO", "GRPO on free draws, rewarded by an embedded classifier (arXiv 2508.06924).", "FID 1.02 to 0.48"),
    "tokenizer": _objective("tokenizer", "The tokenizer's decoder learns to paint its teacher-forced draws.", "FID 1.02 to 0.97"),
}

RECIPES = {
    "digits": Recipe(
        "VA-pi on painted handwritten digits, everything embedded, minutes on a CPU.",
        "the table that opens the README",
    ),
    "digits-prior-alone": Recipe(
        "Control: the same steps on the cross-entropy prior, without any reward.",
        "FID 0.92 to 1.00 (docs/embedded-world.md); the paper, table 4: 14.36 to 14.17",
        {"tune.policy_weight": 0.0},
    ),
    "digits-reward-alone": Recipe(
        "Control: the same steps on the reward, without the prior that holds the model.",
        "FID 0.92 to 1.04 (docs/embedded-world.md); the paper, table 4: 14.36 to 38.63",
        {"tune.prior_weight": 0.0},
    ),
    "digits-token": Recipe(
        "VA-pi with a reward for each code, from its place and the eight around it, in place of one for each image.",
        "FID 1.03 to 0.85, where one reward an image gives 0.97 (six seeds; docs/results.md), and a little less recall",
        {"tune.credit": "token", "tune.credit_radius": 1},
    ),
    **{f"digits-{name.lower()}": row for name, row in _OBJECTIVES.items()},
    "digits-t2i": Recipe(
        "VA-pi from captions to scenes of digits, judged by two detectors; everything embedded, minutes on a CPU.",
        "FID 1.15 to 1.00, overall score 0.201 to 0.215 by one judge and 0.328 to 0.331 by the other (docs/text-to-image.md)",
        _DIGITS_T2I,
    ),
    "digits-janus": Recipe(
        "The same by a tiny Janus in place of a LlamaGen; everything embedded, minutes on a CPU.",
        "reward -0.0995 to -0.0914, cross-entropy 3.386 to 3.413; overall score 0.052 to 0.049 and 0.073 to 0.074 (docs/janus.md)",
        _DIGITS_JANUS,
    ),
    "llamagen-xl-t2i": Recipe(
        "LlamaGen-XL at 256 from captions of LAION-COCO: the paper's run with one forward per image, no dropout in the update.",
        "the paper, table 3: GenEval 0.306 to 0.339. Not run here",
        _LLAMAGEN_T2I,
        gpu=True,
    ),
    "llamagen-xl-drawbench": Recipe(
        "The same, its pictures of DrawBench's prompts scored by CLIP and HPSv2 in place of GenEval.",
        "the paper, table 1: CLIP score 0.245 to 0.291, HPSv2 0.153 to 0.211. Not run here",
        _DRAWBENCH,
        gpu=True,
    ),
    "janus-pro-1b": Recipe(
        "Janus-Pro-1B at 384 from captions of FLUX-Reason-6M: the paper's run, each code predicted where it belongs.",
        "the paper, table 3: GenEval 0.725 to 0.744 (released code off by one position). Not run here",
        _JANUS,
        gpu=True,
    ),
    "llamagen-xl-c2i": Recipe(
        "LlamaGen-XL at 384 on 1 % of ImageNet: the paper's run with one forward per image, no dropout in the update.",
        f"{_XL_PAPER} (with dropout: see the -official recipe). Not run here",
        _LLAMAGEN_384 | _XL,
        gpu=True,
    ),
    "llamagen-xl-c2i-official": Recipe(
        "The same as released: dropout and class drop in the update, a forward for every draw (several times slower).",
        f"{_XL_PAPER}. Not run here",
        _LLAMAGEN_384 | _XL | _OFFICIAL,
        gpu=True,
    ),
    "llamagen-xxl-c2i": Recipe(
        "LlamaGen-XXL at 384 on 1 % of ImageNet: the paper's run with one forward per image, no dropout in the update.",
        f"{_XXL_PAPER} (with dropout: see the -official recipe). Not run here",
        _LLAMAGEN_384 | _XXL,
        gpu=True,
    ),
    "llamagen-xxl-c2i-official": Recipe(
        "The same as released: dropout and class drop in the update, a forward for every draw (several times slower).",
        f"{_XXL_PAPER}. Not run here",
        _LLAMAGEN_384 | _XXL | _OFFICIAL,
        gpu=True,
    ),
}


def recipe(name: str) -> Config:
    """The configuration of a recipe. Raises ValueError that names the nearest known one."""
    if name not in RECIPES:
        raise ValueError(f"no recipe is called {name!r}; {config.nearest(name, RECIPES)}")
    return changed(Config(), RECIPES[name].changes)


def changed(base: Config, changes: dict[str, Any]) -> Config:
    """A configuration with some fields changed, checked. ``changes``: {"tune.lr": Times(3), "tune.rewards.mse": 0.0}."""
    values = config.plain(base)
    for dotted, value in changes.items():
        *path, last = dotted.split(".")
        section = functools.reduce(operator.getitem, path, values)
        section[last] = float(f"{section[last] * float(value):.12g}") if isinstance(value, Times) else value
    made: Config = config.build(Config, values)
    return made


def text(name: str) -> str:
    """The recipe as the text of a complete ``params.yaml``."""
    made = recipe(name)
    return f"# Made by `vapi recipe {name} --write`: {RECIPES[name].doc}\n\n{config.dump(made)}"


def changes(ours: Config, theirs: Config | dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields in which two configurations differ: ``{"tune.lr": (ours, theirs)}``; a name that one lacks is None.
    ``theirs`` may be plain values that no longer, or not yet, make a configuration."""
    left, right = config.flat(ours), config.flat(theirs)
    return {name: (left.get(name), right.get(name)) for name in [*left, *(right.keys() - left)] if left.get(name) != right.get(name)}


def closest(values: Config | dict[str, Any]) -> str:
    """The recipe that differs from a configuration in the fewest fields."""
    return min(RECIPES, key=lambda name: len(changes(recipe(name), values)))


def write(name: str, path: Path = config.PARAMS, force: bool = False) -> None:
    """Write a recipe to ``params.yaml``, whole or not at all.

    Raises ValueError when the file there is no recipe as written: somebody's edits would be lost.
    """
    made = text(name)
    if path.exists() and not force and path.read_text() not in {text(known) for known in RECIPES}:
        raise ValueError(f"{path} has edits that would be lost (see: vapi recipe diff); keep a copy, then add --force")
    config.write_text(path, made)
