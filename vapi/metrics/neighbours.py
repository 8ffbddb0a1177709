"""Improved precision and recall (Kynkaanniemi et al. 2019): who lies within whose ball.

An image's ball reaches to its third neighbour in its own set. Precision is the share of generated images
that lie in a real image's ball, recall the share of real images in a generated one's. All distances are
looked at in blocks, and nothing but the radii is kept of them.

ADM's evaluator measures in float16, where many distances are equal and "within" includes the rim, so its
values lie a little above those in float32. ``half_distances`` does as it does, block for block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NEIGHBOURS = 3  # k
BLOCK = 10_000  # ADM's: a block with a distance that float16 cannot hold is measured in float32

Distances = Callable[[Tensor, Tensor], Tensor]  # (M, D), (N, D) -> (M, N) float32


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances (M, N) of float32 rows."""
    return torch.cdist(a, b)


def half_distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances (M, N) as float16 arithmetic has them, in float32; exact sums where float16 overflows."""
    found = _squared(a.half(), b.half())
    return found.float() if torch.isfinite(found).all() else _squared(a, b)


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """|a|^2 - 2 a b + |b|^2, every step rounded to the dtype of ``a``; products are summed in float32."""
    kind = a.dtype
    norm_a, norm_b = (rows.square().float().sum(dim=1).to(kind) for rows in (a, b))
    product = (a.float() @ b.float().T).to(kind)
    return (norm_a[:, None] - 2 * product + norm_b).clamp_(min=0)


def precision_recall(generated: Tensor, real: Tensor, measure: Distances) -> tuple[float, float]:
    """Precision and recall of float32 features (N, D) and (M, D), where they lie (a GPU is much quicker)."""
    reach_generated, reach_real = radii(generated, measure), radii(real, measure)
    within_real = torch.zeros(len(generated), dtype=torch.bool, device=generated.device)
    within_generated = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for i in range(0, len(real), BLOCK):
        for j in range(0, len(generated), BLOCK):
            rows, columns = slice(i, i + BLOCK), slice(j, j + BLOCK)
            block = measure(real[rows], generated[columns])
            within_real[columns] |= (block <= reach_real[rows, None]).any(dim=0)
            within_generated[rows] |= (block <= reach_generated[columns]).any(dim=1)
    return within_real.double().mean().item(), within_generated.double().mean().item()


def radii(features: Tensor, measure: Distances) -> Tensor:
    """(N,): each row's distance to its third neighbour (it is its own zeroth)."""
    found = []
    for rows in features.split(BLOCK):
        nearest = torch.empty(len(rows), 0, device=features.device)
        for columns in features.split(BLOCK):
            block = torch.cat([nearest, measure(rows, columns)], dim=1)
            nearest = block.topk(min(NEIGHBOURS + 1, block.shape[1]), dim=1, largest=False).values
        found.append(nearest.amax(dim=1))
    return torch.cat(found)
