"""Distances between two sets of images, measured on the features of a fixed network.

Every metric takes ``(generated, reference)`` in this order and returns named numbers. The formulas
of Inception Score, KID, precision and recall are torch-fidelity's; the Frechet distance is our own
(the same number by singular values: symmetric, real, exact for fewer images than dimensions).

A Frechet distance is biased by the number of images (about in proportion to 1/N), so it may only be
compared at equal numbers; KID is not. No bootstrap: resampled duplicates add the same bias again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

NEIGHBOURS = 3  # k of improved precision and recall (Kynkaanniemi et al. 2019)
KID_SUBSETS, KID_SUBSET_SIZE = 10, 1000
ISC_CHUNK = 5000  # images per split of the Inception Score, as in ADM's evaluator
MIN_IMAGES = NEIGHBOURS + 2  # one more than the k-th neighbour that is not the image itself


@dataclass(frozen=True)
class Features:
    """What the networks saw in N images, in order."""

    pooled: Tensor  # (N, D) float32: the metric network
    logits: Tensor  # (N, C) float32: its classes
    random: Tensor  # (N, R) float32: the same kind of network with random weights
    labels: Tensor  # (N,) int64: what each image was meant to show

    def __len__(self) -> int:
        return len(self.pooled)

    def __getitem__(self, index: slice | Tensor) -> Features:
        return Features(self.pooled[index], self.logits[index], self.random[index], self.labels[index])

    @cached_property
    def moments(self) -> Moments:
        return Moments.of(self.pooled)

    @cached_property
    def random_moments(self) -> Moments:
        return Moments.of(self.random)


def concatenate(parts: list[Features]) -> Features:
    """Features of several batches as one set, in the order given."""
    fields = ("pooled", "logits", "random", "labels")
    return Features(*(torch.cat([getattr(part, name) for part in parts]) for name in fields))


@dataclass(frozen=True)
class Moments:
    """Mean and a factor of the covariance (covariance = factor @ factor.T) of a set of features."""

    mean: np.ndarray  # (D,) float64
    factor: np.ndarray  # (D, min(N, D)) float64

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        x = features.double().cpu().numpy()  # (N, D)
        mean = x.mean(axis=0)
        centred = (x - mean) / np.sqrt(len(x) - 1)
        if len(x) <= x.shape[1]:
            return cls(mean, centred.T)  # the images are the factor: no covariance, no rounding
        values, vectors = np.linalg.eigh(centred.T @ centred)
        return cls(mean, vectors * np.sqrt(values.clip(min=0)))

    @property
    def trace(self) -> float:
        return float(np.square(self.factor).sum())


def frechet(a: Moments, b: Moments) -> float:
    """Frechet distance ``|ma - mb|^2 + tr(A + B - 2 sqrt(A B))`` of two Gaussians (Heusel et al. 2017).

    With ``A = F F'`` and ``B = G G'`` the trace of ``sqrt(A B)`` is the sum of the singular values of ``F' G``.
    """
    difference = a.mean - b.mean
    cross = np.linalg.svd(a.factor.T @ b.factor, compute_uv=False).sum()
    return max(0.0, float(difference @ difference) + a.trace + b.trace - 2 * float(cross))


def fid(generated: Features, reference: Features) -> dict[str, float]:
    """Frechet distance in the metric network."""
    return {"fid": frechet(generated.moments, reference.moments)}


def fid_random(generated: Features, reference: Features) -> dict[str, float]:
    """Frechet distance in a random network: one that no reward resembles, so it cannot be flattered."""
    return {"fid_random": frechet(generated.random_moments, reference.random_moments)}


def kid(generated: Features, reference: Features) -> dict[str, float]:
    """Unbiased kernel distance (Binkowski et al. 2018), mean over subsets of equal size; may fall just below 0."""
    size = min(KID_SUBSET_SIZE, len(generated), len(reference))
    found = kid_features_to_metric(
        generated.pooled.double(), reference.pooled.double(), kid_subsets=KID_SUBSETS, kid_subset_size=size, verbose=False
    )
    return {"kid": found[KEY_METRIC_KID_MEAN]}


def inception_score(generated: Features, reference: Features) -> dict[str, float]:
    """exp of the mean divergence between an image's classes and all classes (Salimans et al. 2016)."""
    splits = max(1, len(generated) // ISC_CHUNK)
    return {"inception_score": isc_features_to_metric(generated.logits, splits=splits, shuffle=splits > 1)[KEY_METRIC_ISC_MEAN]}


def precision_recall(generated: Features, reference: Features) -> dict[str, float]:
    """Share of generated images within the reference's manifold, and the other way round."""
    found = prc_features_to_metric(
        generated.pooled, reference.pooled, prc_neighborhood=NEIGHBOURS, save_cpu_ram=len(generated) > 20_000, verbose=False
    )
    return {"precision": found[KEY_METRIC_PRECISION], "recall": found[KEY_METRIC_RECALL]}


def class_accuracy(generated: Features, reference: Features) -> dict[str, float]:
    """Share of images that the metric network takes for what their label says."""
    return {"class_accuracy": (generated.logits.argmax(dim=1) == generated.labels).double().mean().item()}
