"""The Frechet distance against the textbook's matrix root, and how fast features are extracted.

The naive distance is the one that is usually written down: ``scipy.linalg.sqrtm`` of the product of two covariances.
Both start from features and must agree; the relative difference is reported.

Shapes: N samples, D dimensions.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from vapi import models
from vapi.bench import meter
from vapi.config import Measured
from vapi.metrics.fid import Moments, frechet
from vapi.models import features as networks


def naive_frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The distance of two sets of features (N, D), as in the formula."""
    a_cov, b_cov = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(a_cov @ b_cov)
    difference = a.mean(axis=0) - b.mean(axis=0)
    return float(difference @ difference + np.trace(a_cov) + np.trace(b_cov) - 2 * np.trace(root.real))


def fid(settings: Measured) -> dict[str, Any]:
    """Time the distance of two sets of twice ``bench.dimensions`` random features, and the extractor on one batch."""
    dimensions = settings.bench.dimensions
    a, b = _features(dimensions, 0), _features(dimensions, 1)
    cpu, found = torch.device("cpu"), dict[str, float]()
    ways = {
        "ours": lambda: found.update(ours=frechet(Moments.of(a), Moments.of(b))),
        "naive": lambda: found.update(naive=naive_frechet(a.double().numpy(), b.double().numpy())),
    }
    memory = meter.peak_memory(cpu, ways["ours"])
    took = meter.take_turns(cpu, ways, settings.bench.rounds)
    return {
        "dimensions": dimensions,
        "samples": len(a),
        "seconds_per_distance": took["ours"],
        "naive_seconds_per_distance": took["naive"],
        "speedup": took["naive"] / took["ours"],
        "relative_difference": abs(found["ours"] - found["naive"]) / abs(found["naive"]),
        "peak_memory_bytes": memory,
        **_extraction(settings),
    }


def _features(dimensions: int, seed: int) -> Tensor:
    """Correlated features whose spread falls off, as a network's does: (2 D, D) float32."""
    random = torch.Generator().manual_seed(seed)
    spread = torch.linspace(1, 0.01, dimensions)
    mixed = torch.randn(2 * dimensions, dimensions, generator=random) * spread
    return mixed + 0.1 * mixed.roll(1, dims=1) + 0.05 * seed


def _extraction(settings: Measured) -> dict[str, Any]:
    """Images per second through the feature network, decoded images given."""
    device, wanted = models.device_of(settings.model), settings.evaluate
    inception = wanted.extractor == "inception" or bool(settings.bench.size)
    network = RandomInception().to(device) if inception else networks.random_twin().to(device)
    side, images = wanted.resize or settings.model.image_size, min(wanted.images_per_batch or 64, 64)
    pixels = torch.randint(256, (images, 3, side, side), dtype=torch.uint8, device=device)

    @torch.inference_mode()
    def extract() -> None:
        network(pixels) if inception else network.pooled(pixels.float() / 127.5 - 1)

    took = meter.take_turns(device, {"extract": extract}, settings.bench.rounds)["extract"]
    return {"extractor": "inception" if inception else "small", "extracted_size": side, "images_per_second": images / took}


class RandomInception(FeatureExtractorInceptionV3):
    """torch-fidelity's Inception with the weights that it is born with: it reads a file before it is whole."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            torch.save({}, Path(folder) / "none.pth")
            super().__init__("random", ["2048", "logits_unbiased"], str(Path(folder) / "none.pth"))

    def load_state_dict(self, state: Any, *_: Any, **__: Any) -> None:
        assert not state
