"""Free-running sampling with a KV cache, for evaluation only: VA-pi never rolls out while tuning.

Randomness belongs to the image, not to the process: image n uses one uniform number per code, drawn
from seed n, and takes the code at which the cumulative probability passes it. Which images share a
batch, and how many processes share the work, changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from vapi.models.gpt import Transformer


class Sampling(TypedDict, total=False):
    """How codes are drawn from predictions; what is left out is as in ``generate``."""

    temperature: float
    top_k: int
    top_p: float
    guidance: float


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """One row of ``count`` numbers in [0, 1) for each seed: (B, count), float64."""
    generator = torch.Generator()
    return torch.stack([torch.rand(count, generator=generator.manual_seed(int(seed)), dtype=torch.float64) for seed in seeds])


def keep_likely(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Set all but the likeliest codes of (B, V) to -inf: the ``top_k`` best (0: all), then the smallest
    set that holds probability ``top_p`` (1.0: all)."""
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1) - ordered.softmax(dim=-1)
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before > top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    return logits


def pick(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Inverse-CDF draw: probabilities (B, V) and one uniform number each (B,) to codes (B,)."""
    cumulative = probabilities.double().cumsum(dim=-1)
    target = uniform.unsqueeze(-1) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp_(max=probabilities.shape[-1] - 1)


def guide(logits: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance: conditional rows above, unconditional rows below."""
    if guidance == 1.0:
        return logits
    conditional, unconditional = logits.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


@torch.no_grad()
def generate(
    model: Transformer,
    labels: Tensor,
    seeds: Sequence[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    guidance: float = 1.0,
) -> Tensor:
    """Draw codes (B, T) for class ids (B,), one seed each.

    ``top_k`` 0, ``top_p`` 1 and ``guidance`` 1 leave the predictions as they are.
    """
    assert len(seeds) == len(labels), (len(seeds), len(labels))
    numbers = uniforms(seeds, model.config.codes).to(labels.device)
    double = guidance != 1.0
    inputs = torch.cat([labels, model.unconditional(labels)]) if double else labels
    cache = model.new_cache(len(inputs))
    codes = torch.empty(len(labels), model.config.codes, dtype=torch.long, device=labels.device)
    for position in range(model.config.codes):
        logits = guide(model.step(inputs, position, cache), guidance)
        likely = keep_likely(logits / temperature, top_k, top_p)
        code = pick(likely.softmax(dim=-1), numbers[:, position])
        codes[:, position] = code
        inputs = torch.cat([code, code]) if double else code
    return codes
