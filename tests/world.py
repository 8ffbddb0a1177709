"""A tiny world of data and weights under the names that a recipe gives them, for tests that run whole pipelines."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from conftest import write_tiny
from PIL import Image

from vapi import config
from vapi.config import Config
from vapi.metrics import features as judges
from vapi.models import features as networks
from vapi.models import weights

CHANGES: dict[str, Any] = {
    "model.image_size": 16,
    "model.device": "cpu",
    "model.precision": "float32",
    "model.generator": "data/models/generator.safetensors",
    "model.tokenizer": "data/models/tokenizer.safetensors",
    "subset.source": "data/digits/train.parquet",
    "subset.images": 40,
    "subset.classes": 10,
    "subset.balance": "class",
    "subset.min_size": 8,
    "tokens.images_per_batch": 20,
    "tune.steps": 6,
    "tune.images_per_step": 8,
    "tune.images_per_forward": 8,
    "tune.images_per_reward": 32,
    "tune.group_size": 4,
    "tune.perceptual": "data/models/reward.safetensors",
    "tune.compile": False,
    "tune.holdout_images": 8,
    "tune.holdout_every": 3,
    "tune.sheet_every": 6,
    "tune.checkpoint_every": 1,
    "evaluate.protocol": "own",
    "evaluate.samples": 40,
    "evaluate.sweep_samples": 20,
    "evaluate.temperatures": [1.0],
    "evaluate.guidances": [1.0],
    "evaluate.guided": 1.0,
    "evaluate.labels": "balanced",
    "evaluate.reference": "data/digits/reference.parquet",
    "evaluate.validation": "data/digits/validation.parquet",
    "evaluate.extractor": "data/models/metric.safetensors",
    "evaluate.resize": 0,
    "evaluate.images_per_batch": 20,
    "evaluate.sheet_images": 10,
    "track.uri": "off",
}
"""What makes a recipe run on this world, in seconds."""


def write_images(path: Path, count: int, seed: int, size: int = 16) -> None:
    """Smooth coloured blobs of ten classes, as Hugging Face writes images."""
    rng = np.random.default_rng(seed)
    labels, rows = np.arange(count) % 10, []
    for label in labels:
        small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8) // 2 + np.uint8(10 * label)
        buffer = io.BytesIO()
        Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": ""})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": rows, "label": labels}), path)


def write(root: Path) -> Path:
    """The files, below ``root``/data."""
    write_tiny(root / "data/models")
    images = torch.randint(256, (64, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    for seed, name in ((7, "metric"), (8, "reward")):
        weights.save(judges.calibrated(networks.random_twin(seed), images), root / f"data/models/{name}.safetensors", {})
    for seed, (part, count) in enumerate({"train": 60, "reference": 50, "validation": 30}.items()):
        write_images(root / f"data/digits/{part}.parquet", count, seed)
    return root


def settings(recipe: Config, **changes: Any) -> Config:
    """A recipe on this world. ``changes``: tune_steps=3."""
    named = {**CHANGES, **{name.replace("_", ".", 1): value for name, value in changes.items()}}
    values = config.plain(recipe)
    for dotted, value in named.items():
        section, _, knob = dotted.partition(".")
        values[section][knob] = value
    return config.build(Config, values)  # type: ignore[no-any-return]


def fields(form: Any, made: Config, recipe: Config) -> dict[str, Any]:
    """A configuration as the fields of a form, and overrides for the rest. ``form``: the names of its fields."""
    found: dict[str, Any] = {}
    overrides: dict[str, Any] = {}
    for section, values in config.plain(made).items():
        for knob, value in values.items():
            if value != getattr(getattr(recipe, section), knob):
                name = f"{section}_{knob}"
                (found if name in form else overrides)[name if name in form else f"{section}.{knob}"] = value
    return {**found, "overrides": overrides}


ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "VAPI_", "KFP_", "DVC_"))},
    "PYTHONPATH": str(Path(__file__).parents[1]),
    "OMP_NUM_THREADS": "1",
}
"""For processes that a test starts."""
