"""Distances between two sets of images, measured on the features of a fixed network.

Every metric takes ``(generated, reference)`` in this order and returns named numbers. KID is
torch-fidelity's formula; the Frechet distance, Inception Score, precision and recall (neighbours.py) are
our own: rows are looked at in blocks, so that besides the features themselves memory does not grow with
the number of images.

A Frechet distance is biased by the number of images (about in proportion to 1/N), so it may only be
compared at equal numbers; KID is not. No bootstrap: resampled duplicates add the same bias again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_kid import kernel_mmd

from vapi.metrics import neighbours

KID_SUBSETS, KID_SUBSET_SIZE, KID_SEED = 10, 1000, 2020
ISC_CHUNK, ISC_SEED = 5000, 2020  # images per part of the Inception Score, as in ADM's evaluator; the shuffle is torch-fidelity's
MIN_IMAGES = neighbours.NEIGHBOURS + 2  # one more than the k-th neighbour that is not the image itself
ROWS = 4096  # features that are looked at in float64 at a time
ROUNDING = 1e-8  # share of a distance's terms that roots of nearly vanishing eigenvalues may blur


@dataclass(frozen=True)
class Features:
    """What the networks saw in N images, in order."""

    pooled: Tensor  # (N, D) float32: the metric network
    logits: Tensor  # (N, C) float32: its classes
    random: Tensor  # (N, R) float32: the same kind of network with random weights
    labels: Tensor  # (N,) int64: what each image was meant to show
    more: Mapping[str, Tensor] = field(default_factory=dict)  # (N, ...) float32: spatial (Inception's, for sFID), dinov2
    published: Mapping[str, Moments] = field(default_factory=dict)  # of a larger set, which these images are drawn from

    def __len__(self) -> int:
        return len(self.pooled)

    def __getitem__(self, index: slice | Tensor) -> Features:
        return Features.of({name: rows[index] for name, rows in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Everything that was seen, by name: what is stored."""
        return {"pooled": self.pooled, "logits": self.logits, "random": self.random, "labels": self.labels, **self.more}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], published: Mapping[str, Moments] | None = None) -> Features:
        """The opposite of ``tensors``."""
        own = ("pooled", "logits", "random", "labels")
        more = {name: rows for name, rows in tensors.items() if name not in own}
        pooled, logits, random, labels = (tensors[name] for name in own)
        return cls(pooled, logits, random, labels, more, published or {})

    def to(self, device: torch.device) -> Features:
        """The same on another device, where distances between many images are quicker."""
        return Features.of({name: rows.to(device) for name, rows in self.tensors().items()}, self.published)

    def moments_of(self, name: str) -> Moments:
        """Moments of one kind of features: published ones where there are some, else of these images."""
        if name not in self.published:
            found = {**self.published, name: Moments.of(self.tensors()[name])}
            object.__setattr__(self, "published", found)  # measured once
        return self.published[name]

    @property
    def moments(self) -> Moments:
        return self.moments_of("pooled")


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of a set of features, float64.

    Of fewer images than dimensions ``rows`` is what is kept, not the covariance (rows @ rows.T): the images
    themselves, centred and scaled, lose nothing to rounding.
    """

    mean: np.ndarray  # (D,)
    rows: np.ndarray | None = None  # (D, N), N <= D
    full: np.ndarray | None = None  # (D, D)

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Of float32 (N, D), N at least 2."""
        count, dim = features.shape
        mean = torch.stack([block.sum(dim=0) for block in _blocks(features)]).sum(dim=0) / count
        if count <= dim:
            rows = (features.double() - mean) / (count - 1) ** 0.5
            return cls(mean.cpu().numpy(), rows=rows.T.cpu().numpy())
        full = torch.zeros(dim, dim, dtype=torch.float64, device=features.device)
        for block in _blocks(features):
            full.addmm_((block - mean).T, block - mean)
        return cls(mean.cpu().numpy(), full=full.div_(count - 1).cpu().numpy())

    @cached_property
    def covariance(self) -> np.ndarray:
        """(D, D)."""
        if self.full is not None:
            return self.full
        assert self.rows is not None
        return self.rows @ self.rows.T

    @cached_property
    def factor(self) -> np.ndarray:
        """(D, min(N, D)) with covariance = factor @ factor.T."""
        if self.rows is not None:
            return self.rows
        values, vectors = np.linalg.eigh(self.covariance)
        return vectors * np.sqrt(values.clip(min=0))

    @property
    def trace(self) -> float:
        return float(np.square(self.rows).sum() if self.rows is not None else np.trace(self.covariance))


def _blocks(features: Tensor) -> Iterator[Tensor]:
    return (block.double() for block in features.split(ROWS))


def frechet(a: Moments, b: Moments) -> float:
    """Frechet distance ``|ma - mb|^2 + tr(A + B - 2 sqrt(A B))`` of two Gaussians (Heusel et al. 2017)."""
    difference = a.mean - b.mean
    return max(0.0, float(difference @ difference) + a.trace + b.trace - 2 * _cross(a, b))


def _cross(a: Moments, b: Moments) -> float:
    """tr sqrt(A B), with A = F F': the roots of the eigenvalues of the symmetric F' B F, any F.

    An eigenvalue that is all but zero has no digits left when its root is taken. Where that could show
    (dead features, both sets smaller than their dimensions), singular values of F' G with B = G G' give the
    same sum without a root, for four times the work.
    """
    if a.full is not None and b.full is None:
        a, b = b, a
    if b.full is not None:
        factor, vanishing = _cheap_factor(a)
        if factor is not None:
            values = torch.linalg.eigvalsh(factor.T @ torch.from_numpy(b.full) @ factor)[vanishing:]
            roots = values.clamp(min=0).sqrt()
            noise = torch.finfo(torch.float64).eps * values[-1]
            blurred = torch.minimum(noise.sqrt(), noise / (2 * roots)).sum()
            if blurred <= ROUNDING * roots.sum():
                return float(roots.sum())
    return float(np.linalg.svd(a.factor.T @ b.factor, compute_uv=False).sum())


def _cheap_factor(a: Moments) -> tuple[Tensor | None, int]:
    """Some F with A = F F', and how many of its directions are known to be none; no F where A is singular."""
    if a.rows is not None:
        return torch.from_numpy(a.rows), 1  # centred rows sum to zero
    triangle, failed = torch.linalg.cholesky_ex(torch.from_numpy(a.covariance))
    return (None, 0) if failed else (triangle, 0)


def fid(generated: Features, reference: Features) -> dict[str, float]:
    """Frechet distance in the metric network."""
    return {"fid": frechet(generated.moments, reference.moments)}


def sfid(generated: Features, reference: Features) -> dict[str, float]:
    """Frechet distance in 7 channels of one of Inception's maps (Nash et al. 2021), which know where things are."""
    return {"sfid": frechet(generated.moments_of("spatial"), reference.moments_of("spatial"))}


def fid_random(generated: Features, reference: Features) -> dict[str, float]:
    """Frechet distance in a random network: one that no reward resembles, so it cannot be flattered."""
    return {"fid_random": frechet(generated.moments_of("random"), reference.moments_of("random"))}


def fd_dinov2(generated: Features, reference: Features) -> dict[str, float]:
    """Frechet distance in DINOv2 (Stein et al. 2023): trained without ImageNet's labels, which Inception and the reward's VGG share."""
    return {"fd_dinov2": frechet(generated.moments_of("dinov2"), reference.moments_of("dinov2"))}


def kid(generated: Features, reference: Features) -> dict[str, float]:
    """Unbiased kernel distance (Binkowski et al. 2018), mean over subsets of equal size; may fall just below 0."""
    size = min(KID_SUBSET_SIZE, len(generated), len(reference))
    picks = np.random.RandomState(KID_SEED)
    found = []
    for _ in range(KID_SUBSETS):
        pair = [one.pooled[torch.from_numpy(picks.choice(len(one), size, replace=False))] for one in (generated, reference)]
        found.append(kernel_mmd(*(rows.double().cpu().numpy() for rows in pair)))
    return {"kid": float(np.mean(found))}


def inception_score(generated: Features, reference: Features) -> dict[str, float]:
    """exp of the mean divergence between an image's classes and all classes (Salimans et al. 2016), of shuffled images."""
    order = torch.from_numpy(np.random.RandomState(ISC_SEED).permutation(len(generated)))
    return {"inception_score": _inception_score(generated.logits[order])}


def inception_score_adm(generated: Features, reference: Features) -> dict[str, float]:
    """The same of images in the order in which they were drawn, as ADM's evaluator takes them."""
    return {"inception_score_adm": _inception_score(generated.logits)}


def _inception_score(logits: Tensor) -> float:
    scores = []
    for part in logits.split(ISC_CHUNK):
        log_p = part.double().log_softmax(dim=1)
        p = log_p.exp()
        divergence = torch.where(p == 0, 0, p * (log_p - p.mean(dim=0).log()))  # a class that nobody believes in adds nothing
        scores.append(divergence.sum(dim=1).mean().exp().item())
    return float(np.mean(scores))


def precision_recall(generated: Features, reference: Features) -> dict[str, float]:
    """Share of generated images within the reference's manifold, and the other way round (Kynkaanniemi et al. 2019)."""
    precision, recall = neighbours.precision_recall(generated.pooled, reference.pooled, neighbours.distances)
    return {"precision": precision, "recall": recall}


def precision_recall_adm(generated: Features, reference: Features) -> dict[str, float]:
    """The same with distances in float16, as ADM's evaluator has them: a little higher, and what papers print."""
    precision, recall = neighbours.precision_recall(generated.pooled, reference.pooled, neighbours.half_distances)
    return {"precision_adm": precision, "recall_adm": recall}


def class_accuracy(generated: Features, reference: Features) -> dict[str, float]:
    """Share of images that the metric network takes for what their label says."""
    return {"class_accuracy": (generated.logits.argmax(dim=1) == generated.labels).double().mean().item()}
