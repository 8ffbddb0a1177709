"""From images to the features that metrics compare: uint8 in, float32 out, nothing kept but the rows.

Two judges look at every image; DINOv2 is a third, where its weights are given. The metric network is
torch-fidelity's Inception or a small network of ours, which is registered with torch-fidelity too, so that
its own tools can be asked for a second opinion. The other judge has random weights: no reward can have
been trained into it, so a gain that it does not see deserves distrust. Left out on purpose:
torch-fidelity's cache (its keys know neither the images nor the weights) and its loop (it cannot stream).
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from vapi import images as pixels
from vapi.metrics.fid import Features

SMALL = "vapi-feature-network"
INCEPTION = "inception-v3-compat"
INCEPTION_FILE = URL_INCEPTION_V3.rsplit("/", 1)[-1]
INCEPTION_SHA256 = INCEPTION_FILE.removesuffix(".pth").rsplit("-", 1)[-1]  # by torch.hub's convention, the digest's first digits
SPATIAL_CHANNELS = 7  # of mixed_6/conv, as ADM's evaluator takes them: 17 x 17 x 7 = 2023 numbers
DINOV2_SIZE, DINOV2_MEAN, DINOV2_STD = 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CALIBRATION_PIXELS = 1 << 20  # at a time
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
    at_once = max(1, CALIBRATION_PIXELS // images[0, 0].numel())
    with torch.no_grad():
        for some in images[:CALIBRATION_IMAGES].split(at_once):
            network.pooled(pixels.to_float(some))
    return network.eval().requires_grad_(False)


class SpatialInception(FeatureExtractorInceptionV3):
    """torch-fidelity's Inception, which also gives the map that ADM's sFID is measured in."""

    def __init__(self, weights: str) -> None:
        super().__init__(INCEPTION, ["2048", "logits_unbiased"], feature_extractor_weights_path=weights)
        self.caught = threading.local()  # batches are looked at in several threads
        # TensorFlow's mixed_6/conv; channels last when flattened, or published moments would not fit
        self.Mixed_6d.branch1x1.register_forward_hook(lambda *found: setattr(self.caught, "map", found[-1]))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """uint8 (B, 3, H, W) to pooled (B, 2048), class scores (B, 1008) and ``spatial`` (B, 2023)."""
        pooled, logits = super().forward(images)
        return pooled, logits, self.caught.map[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float()


class DinoV2(nn.Module):
    """DINOv2 from a folder as Hugging Face keeps it: the class token after the last norm, as torch.hub's model returns."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import Dinov2Model

        self.network = Dinov2Model.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) to (B, D), scaled to 224 by 224 (bicubic, smoothed) on the way."""
        small = F.interpolate(images.float() / 255, size=(DINOV2_SIZE, DINOV2_SIZE), mode="bicubic", antialias=True)
        mean, std = (small.new_tensor(values).view(3, 1, 1) for values in (DINOV2_MEAN, DINOV2_STD))
        return self.network(pixel_values=(small.clamp(0, 1) - mean) / std).last_hidden_state[:, 0].float()


@dataclass(frozen=True)
class Extractor:
    """The judges, and what identifies them."""

    name: str
    sha256: str  # of the metric network's weights
    network: FeatureExtractorBase
    random: FeatureNetwork
    device: torch.device
    dinov2: DinoV2 | None = None
    dinov2_sha256: str = ""

    @torch.inference_mode()
    def __call__(self, images: Tensor, labels: Tensor) -> Features:
        """uint8 (B, 3, H, W) to features on the CPU. Raises ValueError when a network returns something not finite."""
        assert images.dtype == torch.uint8 and images.dim() == 4, (images.dtype, images.shape)
        images = images.to(self.device)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            pooled, logits, *spatial = self.network(images)
            random = self.random.pooled(pixels.to_float(images))
            more = dict(zip(["spatial"], spatial))
            if self.dinov2 is not None:
                more["dinov2"] = self.dinov2(images)
        seen = {"pooled": pooled, "logits": logits, "random": random, **more}
        seen = {name: rows.float().cpu() for name, rows in seen.items()}
        if not all(torch.isfinite(rows).all() for rows in seen.values()):
            raise ValueError(f"{self.name} returned features that are not finite; its weights are damaged")
        return Features.of({**seen, "labels": labels.cpu()})


def small(path: Path, random: Any, device: torch.device) -> Extractor:
    """Our own feature network from a weights file."""
    network = FEATURE_EXTRACTORS_REGISTRY[SMALL](SMALL, ["pooled", "logits"], feature_extractor_weights_path=str(path))
    return Extractor(SMALL, sha256(path), network.to(device), random.to(device), device)


def require_inception(path: Path) -> str:
    """The sha256 of torch-fidelity's Inception. Raises ValueError where it is missing or is another file."""
    if not path.is_file():
        raise ValueError(f"evaluate.extractor is inception, but {path} is not here; fetch {URL_INCEPTION_V3} to that place")
    digest = sha256(path)
    if not digest.startswith(INCEPTION_SHA256):
        raise ValueError(
            f"{path} is not the published Inception: its sha256 is {digest[:16]}... and not {INCEPTION_SHA256}..., so it is damaged, "
            f"half-downloaded or another network, whose numbers compare with nobody's; fetch {URL_INCEPTION_V3}"
        )
    return digest


def inception(path: Path, random: Any, device: torch.device) -> Extractor:
    """torch-fidelity's Inception from a local file. Raises ValueError where it is missing or is another file."""
    digest = require_inception(path)
    try:  # torch-fidelity unpickles whatever it is given, so look before it does
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is damaged or holds more than weights; it is not loaded ({type(error).__name__})") from None
    return Extractor(INCEPTION, digest, SpatialInception(str(path)).to(device), random.to(device), device)


def require_dinov2(folder: Path) -> Path:
    """DINOv2's weights in ``folder``. Raises ValueError where its folder or its library is missing."""
    weights = folder / "model.safetensors"
    if not (folder / "config.json").is_file() or not weights.is_file():
        raise ValueError(f"evaluate.dinov2 is {folder}; give a folder with config.json and model.safetensors (facebook/dinov2-large)")
    if importlib.util.find_spec("transformers") is None:
        raise ValueError("evaluate.dinov2 needs the library transformers; install it with: pip install 'vapi-align[dinov2]'")
    return weights


def with_dinov2(extractor: Extractor, folder: Path) -> Extractor:
    """The same judges and DINOv2. Raises ValueError where its folder or its library is missing."""
    weights = require_dinov2(folder)
    network = DinoV2(folder).to(extractor.device)
    return dataclasses.replace(extractor, dinov2=network, dinov2_sha256=sha256(weights))


def inception_path(given: str) -> Path:
    """Where Inception's weights are expected: the path given, or torch's own cache."""
    return Path(given) if given else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE


def sha256(path: Path) -> str:
    """Digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
