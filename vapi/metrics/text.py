"""How well pictures fit their prompts, in other eyes than GenEval's: a table of scores, and the place to plug in one's own.

A score is whatever has a ``name`` and ``score(images, prompts, metadata)``; a row here makes one from the evaluation's
configuration, and so does ``module:function`` in ``evaluate.text_metrics`` (docs/text-metrics.md has an example of ten lines).

``clipscore`` is the plain cosine between CLIP's features of picture and prompt, without a prefix: the scale (0.245 to 0.291) on
which papers on LlamaGen report. Others multiply by 2.5 and cut at 0 (Hessel et al. 2021), by 100 (torchmetrics), or put "A photo
depicts " before the prompt (LlamaGen's own script), and take another CLIP: only like variants compare, hence the long name.
Left out: HPS, PickScore, ImageReward, VQAScore: each brings libraries and weights of its own, and fits the same place.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from vapi.config import EvaluateConfig
from vapi.metrics import clip as clips

PICTURES = 32  # at a time


class TextMetric(Protocol):
    """Pictures and what they should show, to a number each."""

    name: str  # of the numbers, in results; it should tell variants apart
    description: str  # what they are, and whose weights gave them

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Sequence[float]:
        """uint8 (B, H, W, 3), B prompts, and B rows of GenEval's metadata (or empty ones) to B numbers."""


Factory = Callable[[EvaluateConfig, torch.device], TextMetric]


@dataclass(frozen=True)
class ClipScore(TextMetric):
    """Cosine of CLIP's features of picture and prompt, in float32."""

    clip: clips.Clip
    name: str = "clipscore_cosine"

    @property
    def description(self) -> str:  # type: ignore[override]
        return f"cosine of picture and prompt, no prefix, not scaled; {self.clip.architecture}, weights {self.clip.sha256}"

    def score(self, images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> list[float]:
        """As ``TextMetric``; a prompt beyond 77 tokens is cut off."""
        found: list[float] = []
        for start in range(0, len(images), PICTURES):
            some = slice(start, start + PICTURES)
            seen = self.clip.image_features([Image.fromarray(image) for image in images[some]])
            found += F.cosine_similarity(seen, self.clip.text_features(prompts[some]), dim=1).tolist()
        return found


def _clipscore(config: EvaluateConfig, device: torch.device) -> ClipScore:
    if not config.clip:
        raise ValueError(f"evaluate.text_metrics asks for clipscore; set evaluate.clip to a folder of CLIP's weights ({clips.EXAMPLE})")
    return ClipScore(clips.load(config.clip, device))


TEXT_METRICS: dict[str, Factory] = {"clipscore": _clipscore}


def factory(name: str) -> Factory:
    """A row of the table, or ``module:function``. Raises ValueError for what is neither."""
    if name in TEXT_METRICS:
        return TEXT_METRICS[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"evaluate.text_metrics names {name}; known are {', '.join(TEXT_METRICS)}, or module:function of your own")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"evaluate.text_metrics names {name}, which cannot be imported: {error}") from error


def load(config: EvaluateConfig, device: torch.device | str) -> list[TextMetric]:
    """The metrics of ``evaluate.text_metrics``, in order. Raises ValueError for unknown names, or two of one name."""
    factories = [factory(name) for name in config.text_metrics]  # all names are looked at before weights are read
    made = [make(config, torch.device(device)) for make in factories]
    names = [metric.name for metric in made]
    if len(set(names)) < len(names):
        raise ValueError(f"two of evaluate.text_metrics are called the same: {', '.join(sorted(names))}")
    return made


def score(
    metrics: Iterable[TextMetric], images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
) -> dict[str, list[float]]:
    """Every metric of uint8 (B, H, W, 3) pictures, by name. Raises ValueError for one that returns not B finite numbers."""
    assert images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] == 3, (images.dtype, images.shape)
    assert len(images) == len(prompts) == len(metadata), (len(images), len(prompts), len(metadata))
    table = {}
    for metric in metrics:
        found = [float(number) for number in metric.score(images, prompts, metadata)]
        if len(found) != len(images) or not np.isfinite(found).all():
            raise ValueError(f"the text metric {metric.name} returned {len(found)} numbers for {len(images)} images, or some not finite")
        table[metric.name] = found
    return table
