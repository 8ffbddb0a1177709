"""A small convolutional network whose features stand in for VGG (reward) and Inception (metrics).

The embedded data ships three of them, trained with different seeds, objectives and glyphs, so that the
metric does not grade its own reward: VA-pi's has no labels, and the classifier is for free draws alone.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vapi.models import weights

WIDTHS = (16, 32, 64)
CLASSES = 10


class Stage(nn.Module):
    """Two convolutions with batch norm; the first may halve the resolution."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(x)))


class FeatureNet(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] to feature maps, a pooled vector, and class scores."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        ins = (3, *WIDTHS[:-1])
        self.stages = nn.ModuleList(Stage(a, b, 1 if i == 0 else 2) for i, (a, b) in enumerate(zip(ins, WIDTHS, strict=True)))
        self.head = nn.Linear(WIDTHS[-1], classes)

    def features(self, images: Tensor) -> list[Tensor]:
        """One map per stage: (B, 16, H, W), (B, 32, H/2, W/2), (B, 64, H/4, W/4)."""
        maps = []
        for stage in self.stages:
            images = stage(images)
            maps.append(images)
        return maps

    def pooled(self, images: Tensor) -> Tensor:
        """(B, 64): the last map's mean."""
        return self.features(images)[-1].mean(dim=(2, 3))

    def logits(self, images: Tensor) -> Tensor:
        """Class scores (B, classes)."""
        return self.head(self.pooled(images))


def load(path: str | Path, device: torch.device | str = "cpu") -> FeatureNet:
    """Read a network, frozen. Raises ValueError if the file is not one of ours."""
    state, _ = weights.read(path)
    network = FeatureNet(len(state.get("head.bias", ())) or CLASSES)
    weights.fill(network, state, path)
    return network.to(device).eval().requires_grad_(False)


def random_twin(seed: int = 0) -> FeatureNet:
    """The same network with random weights, for a metric that no training has shaped."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FeatureNet().eval().requires_grad_(False)
