"""What the generator predicts at every position of a batch, never whole where that is large.

At Janus's sizes the log-probabilities of sixteen images take 0.6 GB in float32, and logits, their softmax and their gradient as
much again, each. What is needed of them is a few numbers a position. So the generator's last features are kept, and the head
predicts from some of them at a time, as often as somebody asks and once more in the backward pass: three products with the head
more than at once, by count a hundredth of a step's operations where the head is a fiftieth of a generator. Results differ by
nothing but the order of sums.

Left out: to write the gradient by hand in the forward pass, which would save the second prediction.

Shapes: B images, T codes, D width, V codebook; N of the B x T positions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Columns = tuple[Tensor, ...]
MOST = 1 << 23
"""Numbers of a prediction that are held at a time: 512 positions of 16,384 codes, 34 MB in float32."""


class Prediction:
    """log pi(. | context) at B x T positions, to be asked for some numbers each."""

    def __init__(self, features: Tensor, head: Callable[[Tensor], Tensor], vocab: int) -> None:
        """``features`` (B, T, D), of which ``head`` predicts: (N, D) -> (N, V), in whatever arithmetic it is to have."""
        self.shape, self.head, self.rows = features.shape[:2], head, max(1, MOST // vocab)
        flat = features.flatten(0, 1)
        few = len(flat) <= self.rows
        self.parts: Columns = (head(flat),) if few else flat.split(self.rows)
        self.predicted = few

    def ask(self, function: Callable[..., Columns], *about: Tensor) -> Columns:
        """``function`` of log-probabilities (N, V) and of what it is asked about (N, ...), each from ``about`` (B, T, ...): columns
        (N, ...), and so of all positions, (B, T, ...)."""
        parts = zip(self.parts, *(each.flatten(0, 1).split(self.rows) for each in about), strict=True)
        columns = zip(*(self._ask(function, *part) for part in parts), strict=True)
        return tuple(torch.cat(column).unflatten(0, self.shape) for column in columns)

    def _ask(self, function: Callable[..., Columns], part: Tensor, *about: Tensor) -> Columns:
        def again(features: Tensor, *about: Tensor) -> Columns:
            return function(self.head(features), *about)

        if self.predicted:
            return function(part, *about)
        if not torch.is_grad_enabled():
            return again(part, *about)
        found: Columns = checkpoint(again, part, *about, use_reentrant=False, preserve_rng_state=False)
        return found
