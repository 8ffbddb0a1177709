"""Metrics of image sets: a table of functions from features to named numbers.

A new metric is a function ``(generated, reference) -> {name: number}`` and a row here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vapi.metrics import fid
from vapi.metrics.fid import MIN_IMAGES, Features

__all__ = ["METRICS", "MIN_IMAGES", "Features", "Metric", "score"]

Metric = Callable[[Features, Features], dict[str, float]]

METRICS: dict[str, Metric] = {
    "fid": fid.fid,
    "kid": fid.kid,
    "inception_score": fid.inception_score,
    "precision_recall": fid.precision_recall,
    "class_accuracy": fid.class_accuracy,
    "fid_random": fid.fid_random,
}


def score(generated: Features, reference: Features, names: Iterable[str] = METRICS) -> dict[str, float]:
    """The named metrics of one set against another. Raises ValueError where a set is too small for them."""
    for what, features in (("generated", generated), ("reference", reference)):
        if len(features) < MIN_IMAGES:
            raise ValueError(f"{len(features)} {what} images are too few: precision and recall need at least {MIN_IMAGES}")
    if generated.pooled.shape[1] != reference.pooled.shape[1]:
        raise ValueError(
            f"features of {generated.pooled.shape[1]} and {reference.pooled.shape[1]} dimensions come from different networks; "
            "they cannot be compared"
        )
    return {key: value for name in names for key, value in METRICS[name](generated, reference).items()}
