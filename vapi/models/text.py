"""What a generator of captions reads them with: text encoders, all frozen, behind one protocol.

A caption becomes features (L, C), one row for each of its L words (or pieces of words), as many as it has. Padding
is no business of an encoder: ``pad`` puts features in front of a generator as it was trained, on the right of its
S positions, with a channel more that tells words from padding.

    words    embedded: hashes of words and of their neighbours; no weights, no download, the same bits on every machine

Whatever an encoder gives fits in bfloat16 without loss, so that features are kept in half precision.

Shapes: B captions, L words of a caption, S positions of a condition, C channels of a feature.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

MAX_WORDS = 120
"""LlamaGen's: its encoder cuts there, and its generators of captions have as many positions."""


class TextEncoder(Protocol):
    """A frozen encoder. ``digest`` names its weights and rules: equal digests give equal features."""

    width: int  # C
    digest: str
    max_words: int

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """Words of each caption before any cut. Raises ValueError for a caption that this encoder cannot read."""

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Features of each caption, float32 (L, C) on the CPU, 1 <= L <= ``max_words``: what is longer is cut at its end.
        Raises ValueError for a caption that this encoder cannot read."""


def load(name: str, device: torch.device | str = "cpu") -> TextEncoder:
    """The encoder that ``model.text_encoder`` names. Raises ValueError if there is none of that name."""
    if name == "words":
        return Words()
    raise ValueError(f"model.text_encoder is {name!r}; use words")


def pad(features: Sequence[Tensor], positions: int) -> Tensor:
    """The condition of captions with these features (L, C): float32 (B, S, C + 1), words on the right, a last channel that is
    1 for a word and 0 for padding, whose features are 0. What is longer than S positions is cut at its end."""
    condition = torch.zeros(len(features), positions, features[0].shape[1] + 1)
    for row, feature in zip(condition, features, strict=True):
        kept = feature[:positions]
        row[positions - len(kept) :, :-1] = kept
        row[positions - len(kept) :, -1] = 1
    return condition


# --- words -------------------------------------------------------------------------------------


class Words:
    """The embedded encoder. A caption's words are its runs of letters and digits, in lower case; anything else separates.

    A word's vector is 32 signs, bits of the sha256 of the word. Its feature is the vectors of the three words before it,
    its own and that of the next one, zeros beyond the ends, and 16 numbers that tell where in the caption it stands.
    Neighbours are in it because LlamaGen's attention takes all of a caption's positions evenly (their keys are zero, see
    ``gpt.rotary_table``): who belongs to whom ("a red 3 left of a blue 7") must be said within a position.
    """

    REACH = (-3, -2, -1, 0, 1)
    SIGNS = 32
    TURNS = 8

    width = SIGNS * len(REACH) + 2 * TURNS
    max_words = MAX_WORDS
    digest = hashlib.sha256(b"words, version 1").hexdigest()

    def lengths(self, captions: Sequence[str]) -> list[int]:
        return [len(_split(caption)) for caption in captions]

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        return [self._encode(_split(caption)[: self.max_words]) for caption in captions]

    def _encode(self, words: Sequence[str]) -> Tensor:
        edge = [torch.zeros(self.SIGNS)] * max(map(abs, self.REACH))
        vectors = [*edge, *map(_signs, words), *edge]
        around = [torch.stack(vectors[len(edge) + step :][: len(words)]) for step in self.REACH]
        return torch.cat([*around, _turns(self.max_words, self.TURNS)[: len(words)]], dim=1)


def _split(caption: str) -> list[str]:
    words = re.findall("[a-z0-9]+", caption.lower())
    if not words:
        raise ValueError(f"the caption {caption!r} has no word of the letters a to z and digits, and the encoder words reads no other")
    return words


@functools.lru_cache(maxsize=2**16)
def _signs(word: str) -> Tensor:
    """+1 and -1 by the first 32 bits of a word's sha256."""
    bits = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big")
    return torch.tensor([1.0 if bits >> place & 1 else -1.0 for place in range(Words.SIGNS)])


@functools.cache
def _turns(count: int, pairs: int) -> Tensor:
    """sin and cos of positions (count, 2 * pairs), in periods from 6 words to 350; steps of 1/256 fit in bfloat16."""
    angles = [[position / 100 ** (pair / pairs) for pair in range(pairs)] for position in range(count)]
    return torch.tensor([[round(256 * turn(angle)) / 256 for angle in row for turn in (math.sin, math.cos)] for row in angles])
