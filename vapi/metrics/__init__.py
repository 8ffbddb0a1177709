"""Metrics of image sets: a table of functions from features to named numbers.

A new metric is a function ``(generated, reference) -> {name: number}`` and a row here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vapi.metrics import fid
from vapi.metrics.fid import MIN_IMAGES, Features

__all__ = ["METRICS", "MIN_IMAGES", "Features", "Metric", "known", "score"]

Metric = Callable[[Features, Features], dict[str, float]]

METRICS: dict[str, Metric] = {
    "fid": fid.fid,
    "sfid": fid.sfid,
    "kid": fid.kid,
    "inception_score": fid.inception_score,
    "inception_score_adm": fid.inception_score_adm,
    "precision_recall": fid.precision_recall,
    "precision_recall_adm": fid.precision_recall_adm,
    "class_accuracy": fid.class_accuracy,
    "fid_random": fid.fid_random,
    "fd_dinov2": fid.fd_dinov2,
}
NEEDS = {"sfid": "spatial", "inception_score_adm": "spatial", "precision_recall_adm": "spatial", "fd_dinov2": "dinov2"}
"""Features that a metric asks for beside those that are always there; ADM's variants mean something in its network alone."""


def known(reference: Features, classes: int) -> list[str]:
    """The metrics that make sense with a reference: accuracy needs a metric network that knows the model's classes."""
    lacking = {name for name, needed in NEEDS.items() if needed not in reference.more}
    if reference.logits.shape[1] != classes:
        lacking.add("class_accuracy")
    return [name for name in METRICS if name not in lacking]


def score(generated: Features, reference: Features, names: Iterable[str] = ()) -> dict[str, float]:
    """The named metrics (none: all that make sense) of one set against another. Raises ValueError where a set is too small for
    them, and for features that are not finite."""
    for what, features in (("generated", generated), ("reference", reference)):
        if len(features) < MIN_IMAGES:
            raise ValueError(f"{len(features)} {what} images are too few: precision and recall need at least {MIN_IMAGES}")
        if strange := [name for name, rows in features.tensors().items() if not rows.isfinite().all()]:
            raise ValueError(f"{what} features ({', '.join(strange)}) are not finite; the weights they come of are damaged")
    if generated.pooled.shape[1] != reference.pooled.shape[1]:
        raise ValueError(
            f"features of {generated.pooled.shape[1]} and {reference.pooled.shape[1]} dimensions come from different networks; "
            "they cannot be compared"
        )
    names = names or known(reference, generated.logits.shape[1])
    return {key: value for name in names for key, value in METRICS[name](generated, reference).items()}
