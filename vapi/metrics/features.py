"""From images to the features that metrics compare: uint8 in, float32 out, nothing kept but the rows.

Two judges look at every image. The metric network is torch-fidelity's Inception or a small network of
ours, which is registered with torch-fidelity too, so that its own tools can be asked for a second
opinion. The other judge has random weights: no reward can have been trained into it, so a gain that it
does not see deserves distrust. Left out on purpose: torch-fidelity's cache (its keys know neither the
images nor the weights) and its loop (it cannot stream).
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from vapi import images as pixels
from vapi.metrics.fid import Features

SMALL = "vapi-feature-network"
INCEPTION = "inception-v3-compat"
INCEPTION_FILE = URL_INCEPTION_V3.rsplit("/", 1)[-1]
CALIBRATION_IMAGES = 1024


class FeatureNetwork(Protocol):
    """A frozen network with a feature vector and class scores on top of it."""

    def pooled(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to (B, D)."""

    def head(self, pooled: Tensor) -> Tensor:
        """(B, D) to class scores (B, C)."""


def register(load: Callable[[str], FeatureNetwork]) -> None:
    """Make the small networks that ``load`` reads from files known to torch-fidelity under the name ``SMALL``."""

    class SmallExtractor(FeatureExtractorBase):
        """torch-fidelity's view of a small feature network: uint8 images to pooled features and class scores."""

        def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str = "", **_: object) -> None:
            super().__init__(name, features_list)
            self.network = load(feature_extractor_weights_path)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("pooled", "logits")

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "pooled"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            pooled = self.network.pooled(pixels.to_float(images))
            found = {"pooled": pooled, "logits": self.network.head(pooled)}
            return tuple(found[name] for name in self.features_list)

    FEATURE_EXTRACTORS_REGISTRY.pop(SMALL, None)
    register_feature_extractor(SMALL, SmallExtractor)


def calibrated(network: Any, images: Tensor) -> Any:
    """``network`` with batch-norm statistics measured on uint8 images, so that random weights give features of order one."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # a plain average
        norm.reset_running_stats()
    network.train()
    with torch.no_grad():
        network.pooled(pixels.to_float(images[:CALIBRATION_IMAGES]))
    return network.eval().requires_grad_(False)


@dataclass(frozen=True)
class Extractor:
    """The two judges, and what identifies them."""

    name: str
    sha256: str  # of the metric network's weights
    network: FeatureExtractorBase
    random: FeatureNetwork
    device: torch.device

    @torch.inference_mode()
    def __call__(self, images: Tensor, labels: Tensor) -> Features:
        """uint8 (B, 3, H, W) to features on the CPU. Raises ValueError when a network returns something not finite."""
        assert images.dtype == torch.uint8 and images.dim() == 4, (images.dtype, images.shape)
        images = images.to(self.device)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            pooled, logits = self.network(images)
            random = self.random.pooled(pixels.to_float(images))
        pooled, logits, random = (x.float().cpu() for x in (pooled, logits, random))
        if not all(torch.isfinite(x).all() for x in (pooled, logits, random)):
            raise ValueError(f"{self.name} returned features that are not finite; its weights are damaged")
        return Features(pooled, logits, random, labels.cpu())


def small(path: Path, random: Any, device: torch.device) -> Extractor:
    """Our own feature network from a weights file."""
    network = FEATURE_EXTRACTORS_REGISTRY[SMALL](SMALL, ["pooled", "logits"], feature_extractor_weights_path=str(path))
    return Extractor(SMALL, sha256(path), network.to(device), random.to(device), device)


def inception(path: Path, random: Any, device: torch.device) -> Extractor:
    """torch-fidelity's Inception from a local file. Raises ValueError where it is missing or holds more than weights."""
    if not path.is_file():
        raise ValueError(f"evaluate.extractor is inception, but {path} is not here; fetch {URL_INCEPTION_V3} to that place")
    try:  # torch-fidelity unpickles whatever it is given, so look before it does
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is damaged or holds more than weights; it is not loaded ({type(error).__name__})") from None
    digest = sha256(path)
    if not digest.startswith(INCEPTION_FILE.removesuffix(".pth").rsplit("-", 1)[-1]):
        print(f"{path} is not the published Inception (sha256 {digest}): numbers will not compare with others'", file=sys.stderr)
    network = FeatureExtractorInceptionV3(INCEPTION, ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path))
    return Extractor(INCEPTION, digest, network.to(device), random.to(device), device)


def inception_path(given: str) -> Path:
    """Where Inception's weights are expected: the path given, or torch's own cache."""
    return Path(given) if given else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE


def sha256(path: Path) -> str:
    """Digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
