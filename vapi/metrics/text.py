"""How well pictures fit their prompts, in other eyes than GenEval's: a table of scores, and the place to plug in one's own.

A score is a function ``(images, prompts, metadata) -> numbers``; a row here makes one from the evaluation's configuration, and so
does ``module:function`` in ``evaluate.text_metrics`` (docs/text-metrics.md has an example of a few lines).

``clipscore`` is the plain cosine between CLIP's features of picture and prompt, without a prefix: the scale (0.245 to 0.291) on
which papers on LlamaGen report. Others multiply by 2.5 and cut at 0 (Hessel et al. 2021), by 100 (torchmetrics), or put "A photo
depicts " before the prompt (LlamaGen's own script), and take another CLIP: only like variants compare, so results carry ``describe``.
Left out: HPS, PickScore, ImageReward, VQAScore: each brings libraries and weights of its own, and fits the same place.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from vapi.config import EvaluateConfig, nearest
from vapi.metrics import clip as clips

PICTURES = 32  # at a time

TextMetric = Callable[[np.ndarray, Sequence[str], Sequence[Mapping[str, Any]]], Sequence[float]]
"""uint8 (B, H, W, 3), B prompts, and B rows of GenEval's metadata (or empty ones) to B finite numbers."""
Factory = Callable[[EvaluateConfig], TextMetric]


@dataclass(frozen=True)
class ClipScore:
    """Cosine of CLIP's features of picture and prompt, in float32; a prompt beyond 77 tokens is cut off."""

    clip: clips.Clip

    @property
    def description(self) -> str:
        """What must be the same for two numbers to compare."""
        return f"cosine of picture and prompt, no prefix, not scaled; {self.clip.architecture}, weights {self.clip.sha256}"

    def __call__(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[float]:
        """As ``TextMetric``."""
        found: list[float] = []
        for start in range(0, len(images), PICTURES):
            some = slice(start, start + PICTURES)
            seen = self.clip.image_features([Image.fromarray(image) for image in images[some]])
            found += F.cosine_similarity(seen, self.clip.text_features(prompts[some]), dim=1).tolist()
        return found


def _clipscore(config: EvaluateConfig) -> ClipScore:
    if not config.clip:
        raise ValueError(f"evaluate.text_metrics asks for clipscore; set evaluate.clip to a folder of CLIP's weights ({clips.EXAMPLE})")
    return ClipScore(clips.load(config.clip, "cuda" if torch.cuda.is_available() else "cpu"))


TEXT_METRICS: dict[str, Factory] = {"clipscore": _clipscore}


@dataclass(frozen=True)
class Checked:
    """A text metric that is held to what it owes."""

    name: str
    metric: TextMetric

    def __call__(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[float]:
        """As ``TextMetric``. Raises ValueError for anything but B finite numbers."""
        assert images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] == 3, (images.dtype, images.shape)
        assert len(images) == len(prompts) == len(metadata), (len(images), len(prompts), len(metadata))
        found = [float(number) for number in self.metric(images, prompts, metadata)]
        if len(found) != len(images):
            raise ValueError(f"the text metric {self.name} returned {len(found)} numbers for {len(images)} images")
        if not np.isfinite(found).all():
            raise ValueError(f"the text metric {self.name} returned numbers that are not finite")
        return found

    @property
    def describe(self) -> str:
        """The metric's own ``description``, for results; else its name alone."""
        return str(getattr(self.metric, "description", self.name))


def load(config: EvaluateConfig) -> dict[str, Checked]:
    """The metrics of ``evaluate.text_metrics`` by name. Raises ValueError for unknown names, and as the metrics' factories do."""
    factories = {name: _factory(name) for name in config.text_metrics}  # all names are looked at before weights are read
    return {name: Checked(name, make(config)) for name, make in factories.items()}


def _factory(name: str) -> Factory:
    """A row of the table, or ``module:function``. Raises ValueError for what is neither."""
    if name in TEXT_METRICS:
        return TEXT_METRICS[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"evaluate.text_metrics names {name!r}; {nearest(name, list(TEXT_METRICS))}, or give module:function of your own")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"evaluate.text_metrics names {name!r}, which cannot be imported: {error}") from error
