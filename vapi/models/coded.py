"""What the policies share: a generator of codes that is tuned, a frozen tokenizer between codes and pixels, sampling.

A policy adds what it can be asked for (``condition``), and how its weights are written.

Shapes: B images, T codes of an image, V codebook.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from vapi.config import ModelConfig
from vapi.models import graphs, memory, sampler, vq, weights
from vapi.models.sampler import Sampling

META = torch.device("meta")  # networks are made without memory, and get that of their weights


def frozen_tokenizer(state: dict[str, Tensor], groups: int, model: ModelConfig, device: torch.device) -> vq.VQModel:
    """The tokenizer of these weights (``groups`` of its norms, 0: as published). Raises ValueError for what does not fit."""
    with META:
        tokenizer = vq.VQModel(vq.infer_config(weights.shapes(state), groups))
    weights.fill(tokenizer, state, model.tokenizer, device)
    if model.image_size % tokenizer.config.factor:
        raise ValueError(
            f"model.image_size is {model.image_size}; it must be a multiple of {tokenizer.config.factor}, the tokenizer's pixels per code"
        )
    return tokenizer.eval().requires_grad_(False)


class Coded:
    """All of a ``Policy`` (see vapi.models) that does not depend on how the generator is asked."""

    generator: Any  # a sampler.Network with ``config``

    def __init__(self, generator: Any, tokenizer: vq.VQModel, image_size: int) -> None:
        """Raises ValueError for a generator and a tokenizer of different codebooks."""
        self.generator = generator
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.num_codes = (image_size // tokenizer.config.factor) ** 2
        self.vocab = tokenizer.vocab
        self._loops = graphs.Loops()
        if generator.config.vocab != self.vocab:
            raise ValueError(
                f"the generator predicts {generator.config.vocab} codes, the tokenizer has {self.vocab}; they do not belong together"
            )
        assert generator.config.codes == self.num_codes, (generator.config.codes, self.num_codes)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.generator.layers)

    @property
    def device(self) -> torch.device:
        return self.generator.output.weight.device

    def logits(self, condition: Tensor, context: Tensor) -> Tensor:
        """Teacher-forced logits (B, T, V); ``logits[:, t]`` depends on ``context[:, :t]`` only."""
        return self.generator(condition, context)

    def features(self, condition: Tensor, context: Tensor) -> Tensor:
        """(B, T, D), of which ``predict`` makes logits: in parts, where they are large."""
        return self.generator.features(condition, context)

    def predict(self, features: Tensor) -> Tensor:
        """Logits (..., V) of features (..., D)."""
        return self.generator.predict(features)

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] to codes (B, T)."""
        return self.tokenizer.encode(images)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, T) to (B, 3, H, W), not clamped."""
        return self.tokenizer.decode(codes)

    @property
    def codebook(self) -> Tensor:
        """The vectors that codes stand for, (V, K), as they are decoded."""
        return self.tokenizer.quantize.entries()

    def paint(self, vectors: Tensor) -> Tensor:
        """Vectors (B, T, K), the codebook's or between them, to (B, 3, H, W), not clamped."""
        return self.tokenizer.paint(vectors)

    def generate(self, condition: Tensor, seeds: Sequence[int], images_per_batch: int = 0, **how: Unpack[Sampling]) -> Tensor:
        """Free-running codes (B, T); image n depends on seed n alone.

        ``images_per_batch``: batches of exactly that many, the last one filled up; on a GPU their loop is recorded, which
        takes a minute and is kept for the next call. 0: all at once, and nothing is kept.
        """
        assert not self.generator.training, "put the generator in eval mode before sampling"
        if not images_per_batch:
            return sampler.generate(self.generator, condition, seeds, **how)
        with memory.advice(images_per_batch, self.footprint(how.get("guidance", 1.0) != 1.0), self.device):
            batches = sampler.filled_up(condition, seeds, images_per_batch)
            return torch.cat([self._loops.sample(self.generator, part, its, **how)[:count] for part, its, count in batches])

    def footprint(self, guided: bool = False) -> memory.Footprint:
        """Bytes that sampling takes, in the arithmetic that the caller is in, for the longest condition that is usual."""
        count = sum(weight.numel() for weight in self.generator.parameters())
        dtype = sampler.number_type(self.generator)
        return memory.footprint(self.generator.config, count, self.tokenizer.config, dtype, guided)
