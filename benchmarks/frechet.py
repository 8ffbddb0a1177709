"""The Frechet distance at Inception's 2,048 dimensions, against the textbook formula with scipy's matrix square root.

    python benchmarks/frechet.py > benchmarks/results/frechet.json     # a minute or two, 2 GB

Both get the same two means and covariances (as a published reference gives them, and as samples are turned
into them) and all cores; each is timed ``REPEATS`` times, the best counts. Features are made up: rectified,
correlated and of scales from 0.01 to 10, as Inception's are. Exit code 1 where the two differ by more than
1e-8 of the distance, or ours is less than five times as fast.
"""

from __future__ import annotations

import datetime
import json
import platform
import sys
import time
from collections.abc import Callable

import numpy as np
import scipy
import scipy.linalg
import torch

from vapi.metrics.fid import Moments, frechet

DIMENSIONS, IMAGES, REPEATS = 2048, 10_000, 3
TOLERANCE, LEAST = 1e-8, 5.0


def features(seed: int) -> torch.Tensor:
    """(IMAGES, DIMENSIONS) float32; the two sets differ a little in mean and scale."""
    world, rng = np.random.default_rng(9), np.random.default_rng(seed)
    scales = np.exp(world.normal(-1.5, 1.2, DIMENSIONS))
    mix = world.normal(size=(DIMENSIONS, DIMENSIONS)) / DIMENSIONS**0.5
    rows = (rng.normal(size=(IMAGES, DIMENSIONS)) * scales * (1 + 0.1 * seed)) @ mix
    return torch.from_numpy(np.maximum(rows + 0.1 * seed, 0).astype(np.float32))


def by_sqrtm(a: Moments, b: Moments) -> float:
    """As evaluators have it."""
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance)
    return float(np.square(a.mean - b.mean).sum() + np.trace(a.covariance + b.covariance - 2 * root.real))


def timed(distance: Callable[[Moments, Moments], float], one: Moments, other: Moments) -> tuple[float, float]:
    """The distance, and the least of its times."""
    seconds = []
    for _ in range(REPEATS):
        pair = [Moments(m.mean, full=m.covariance) for m in (one, other)]  # nothing kept from the time before
        begin = time.perf_counter()
        found = distance(*pair)
        seconds.append(time.perf_counter() - begin)
    return found, min(seconds)


def main() -> int:
    one, other = Moments.of(features(0)), Moments.of(features(1))
    ours, seconds = timed(frechet, one, other)
    theirs, naive_seconds = timed(by_sqrtm, one, other)
    difference = abs(ours - theirs) / theirs
    result = {
        "command": "python benchmarks/frechet.py",
        "dimensions": DIMENSIONS,
        "images": IMAGES,
        "condition_number": float(f"{np.linalg.cond(one.covariance):.3g}"),
        "distance": ours,
        "relative_difference": difference,
        "seconds": round(seconds, 3),
        "naive_seconds": round(naive_seconds, 3),
        "speedup": round(naive_seconds / seconds, 2),
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "numpy": np.__version__, "scipy": scipy.__version__},
        "date": datetime.date.today().isoformat(),
    }
    print(json.dumps(result, indent=1))
    return 0 if difference <= TOLERANCE and naive_seconds >= LEAST * seconds else 1


if __name__ == "__main__":
    sys.exit(main())
