"""LlamaGen's transformer: a Llama over image codes, with 2-D rotary positions and a condition in front.

The condition is a class (one position) or a caption (S positions). A caption is one tensor (B, S, C + 1): C
features of a text encoder, and a last channel that is 1 where a position holds a word and 0 where it is padding.
Captions are padded on the left, so what may be attended to is what lies from a row's ``starts`` on; a position
of padding attends to itself alone, and nobody to it. Parameter names are those of the published checkpoints.
The file knows the network only: weights are read in ``llamagen.py``, captions in ``text.py``, sampling is in
``sampler.py``, sharding and compilation are done *to* it.

Shapes: B images, S positions of the condition, T codes of an image, V codebook, D width, H heads, E = D / H.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a generator: of classes, or of captions when ``caption_dim`` is not 0 (it has no classes then).
    Dropout rates are those of LlamaGen's pretraining; a checkpoint does not record its own."""

    dim: int
    layers: int
    heads: int
    hidden: int
    vocab: int
    codes: int
    classes: int
    caption_dim: int = 0  # width of the text encoder's features
    prefix: int = 1  # S
    token_dropout: float = 0.1
    residual_dropout: float = 0.1
    hidden_dropout: float = 0.1
    class_dropout: float = 0.1
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        assert self.dim % self.heads == 0 and (self.dim // self.heads) % 4 == 0, (self.dim, self.heads)
        assert round(self.codes**0.5) ** 2 == self.codes, f"{self.codes} codes are not a square grid"


class RMSNorm(nn.Module):
    """Root-mean-square norm, in float32 whatever the input."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), None, self.eps).type_as(x) * self.weight


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden, bias=False)
        self.w2 = nn.Linear(config.hidden, config.dim, bias=False)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


def rotary_table(grid: int, head_dim: int, base: float, condition: int = 1) -> Tensor:
    """cos and sin of every position, (condition + grid * grid, E / 2, 2): the first half of the
    pairs turns with the row, the second with the column. Condition positions are all zero, that is
    their queries and keys vanish; so the published weights were trained."""
    half = head_dim // 2
    # on the CPU even where parameters are made without memory (device meta): this is computed, not read
    frequencies = 1.0 / (base ** (torch.arange(0, half, 2, device="cpu")[: half // 2].float() / half))
    angles = torch.outer(torch.arange(grid, device="cpu"), frequencies)  # (grid, E / 4)
    rows = angles[:, None, :].expand(-1, grid, -1)
    columns = angles[None, :, :].expand(grid, -1, -1)
    both = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # (grid * grid, E / 2)
    table = torch.stack([both.cos(), both.sin()], dim=-1)
    return torch.cat([torch.zeros(condition, half, 2, device="cpu"), table])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn neighbouring pairs of ``x`` (B, S, H, E) by ``table`` (S, E / 2, 2)."""
    pairs = x.float().unflatten(-1, (-1, 2))
    cos, sin = table[:, None, :, 0], table[:, None, :, 1]
    even, odd = pairs[..., 0], pairs[..., 1]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).type_as(x)


class Attention(nn.Module):
    """The projections of self-attention; who attends to whom is said by ``causal`` and ``attend``."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)
        self.dropout = nn.Dropout(config.residual_dropout)

    def qkv(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.wqkv(x).chunk(3, dim=-1))
        return rotate(q, table).transpose(1, 2), rotate(k, table).transpose(1, 2), v.transpose(1, 2)  # (B, H, S, E)

    def join(self, y: Tensor) -> Tensor:
        """What each head found (B, H, S, E) to (B, S, D)."""
        return self.dropout(self.wo(y.transpose(1, 2).flatten(2)))


def visible(starts: Tensor, length: int) -> Tensor:
    """Who attends to whom among the first ``length`` positions: (B, 1, S, S) bool. To itself, and to all before it that
    are no padding, which ends where ``starts`` (B,) says."""
    place = torch.arange(length, device=starts.device)
    before = place[None, :] <= place[:, None]
    itself = place[None, :] == place[:, None]
    return ((before & (place >= starts[:, None, None])) | itself)[:, None]


def causal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Every position attends to itself and all before it, or to those that ``mask`` (B, 1, S, S) allows."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def attend(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, position: int, starts: Tensor | None = None) -> Tensor:
    """Write keys and values of S positions, the first of them ``position``, into a layer's cache (2, B, H, P, E), and attend to
    the part that is filled, nothing beyond, and nothing before ``starts`` (B,). Several at once may come at the front alone."""
    several = q.shape[2] > 1
    assert not several or position == 0, (position, q.shape)
    end = position + q.shape[2]
    cache[0, :, :, position:end] = k
    cache[1, :, :, position:end] = v
    if starts is None:
        mask = None
    elif several:
        mask = visible(starts, end)
    else:
        mask = (torch.arange(end, device=starts.device) >= starts[:, None])[:, None, None]
    keys, values = cache[0, :, :, :end], cache[1, :, :, :end]
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=several and mask is None)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def before(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x (B, S, D), each (B, H, S, E)."""
        return self.attention.qkv(self.attention_norm(x), table)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """The block's output, from its input x (B, S, D) and what attention found there, y (B, H, S, E)."""
        x = x + self.attention.join(y)
        return x + self.feed_forward(self.ffn_norm(x))

    def forward(self, x: Tensor, table: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.after(x, causal(*self.before(x, table), mask))

    def step(self, x: Tensor, table: Tensor, cache: Tensor, position: int, starts: Tensor | None = None) -> Tensor:
        return self.after(x, attend(*self.before(x, table), cache, position, starts))


class LabelEmbedder(nn.Module):
    """Class ids (B,) to vectors (B, 1, D); the last row is the null class that guidance needs."""

    def __init__(self, classes: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.classes = classes
        self.dropout = dropout
        self.embedding_table = nn.Embedding(classes + 1, dim)

    def forward(self, labels: Tensor) -> Tensor:
        if self.training and self.dropout > 0:
            dropped = torch.rand(labels.shape, device=labels.device) < self.dropout
            labels = torch.where(dropped, self.classes, labels)
        return self.embedding_table(labels).unsqueeze(1)  # (B, 1, D)

    def null(self, labels: Tensor) -> Tensor:
        """The condition that says nothing, for as many images."""
        return torch.full_like(labels, self.classes)

    def starts(self, labels: Tensor) -> None:
        """Where padding ends: a class has none."""


class Projection(nn.Module):
    """Features of a text encoder to the width of the transformer."""

    def __init__(self, into: int, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(into, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CaptionEmbedder(nn.Module):
    """Captions (B, S, C + 1) to vectors (B, S, D), and those of no caption, which guidance needs."""

    uncond_embedding: Tensor

    def __init__(self, caption_dim: int, prefix: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.cap_proj = Projection(caption_dim, dim)
        self.register_buffer("uncond_embedding", torch.randn(prefix, caption_dim) / caption_dim**0.5)

    def forward(self, captions: Tensor) -> Tensor:
        if self.training and self.dropout > 0:
            dropped = torch.rand(len(captions), device=captions.device) < self.dropout
            captions = torch.where(dropped[:, None, None], self.null(captions), captions)
        return self.cap_proj(captions[..., :-1])

    def null(self, captions: Tensor) -> Tensor:
        """The condition that says nothing, for as many images, at as many positions as these captions have words."""
        nothing = self.uncond_embedding.to(captions.dtype).expand(len(captions), -1, -1)
        return torch.cat([nothing, captions[..., -1:]], dim=-1)

    def starts(self, captions: Tensor) -> Tensor:
        """The position of each caption's first word (B,), where padding ends."""
        return captions.shape[1] - captions[..., -1].sum(dim=-1).long()


class Transformer(nn.Module):
    """p(code t | condition, codes before t), for all t at once or one at a time."""

    rotary: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_embedding = (
            CaptionEmbedder(config.caption_dim, config.prefix, config.dim, config.class_dropout)
            if config.caption_dim
            else LabelEmbedder(config.classes, config.dim, config.class_dropout)
        )
        self.tok_embeddings = nn.Embedding(config.vocab, config.dim)
        self.dropout = nn.Dropout(config.token_dropout)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab, bias=False)
        grid = round(config.codes**0.5)
        table = rotary_table(grid, config.dim // config.heads, config.rope_base, config.prefix)
        self.register_buffer("rotary", table, persistent=False)
        self.apply(_initialise)

    def forward(self, condition: Tensor, context: Tensor) -> Tensor:
        """Teacher-forced logits (B, T, V) of a condition, labels (B,) or captions (B, S, C + 1), and codes (B, T).

        ``logits[:, t]`` depends on ``context[:, :t]`` only; the last code is never read.
        """
        return self.predict(self.features(condition, context))

    def features(self, condition: Tensor, context: Tensor) -> Tensor:
        """What the last block says (B, T, D), of which ``predict`` makes logits."""
        x = torch.cat([self.cls_embedding(condition), self.tok_embeddings(context[:, :-1])], dim=1)
        x = self.dropout(x)
        table, starts = self.rotary[: x.shape[1]], self.cls_embedding.starts(condition)
        mask = None if starts is None else visible(starts, x.shape[1])
        for layer in self.layers:
            x = layer(x, table, mask)
        return x[:, self.config.prefix - 1 :]  # the condition's last position predicts the first code

    @property
    def padded(self) -> bool:
        """Whether there may be padding in front of a condition."""
        return bool(self.config.caption_dim)

    def positions(self, condition: Tensor) -> int:
        """S of a condition: as the weights were made."""
        return self.config.prefix

    def embed(self, codes: Tensor) -> Tensor:
        """(B, T) -> (B, T, D)."""
        return self.tok_embeddings(codes)

    def table(self, at: Tensor, starts: Tensor) -> Tensor:
        """cos and sin of the position ``at`` (1,), in every row the same."""
        return self.rotary.index_select(0, at)

    @staticmethod
    def before(layer: Block, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Block.before``."""
        return layer.before(x, table)

    @staticmethod
    def after(layer: Block, x: Tensor, y: Tensor) -> Tensor:
        """See ``Block.after``."""
        return layer.after(x, y)

    def null(self, condition: Tensor) -> Tensor:
        """The condition that says nothing, for as many images."""
        return self.cls_embedding.null(condition)

    def front(self, condition: Tensor, guided: bool) -> tuple[Tensor, Tensor | None]:
        """What stands before the first code, (B, S, D), or (2 B, S, D) with nothing as the condition of the second half; and
        where padding ends in each row, (B,) or (2 B,), if there may be some."""
        if guided:
            condition = torch.cat([condition, self.null(condition)])
        starts = self.cls_embedding.starts(condition)
        if condition.is_floating_point():  # captions; their lengths first, which bfloat16 could not count
            condition = condition.to(self.output.weight.dtype)
        return self.cls_embedding(condition), starts

    def new_cache(self, rows: int, prefix: int = 0) -> Tensor:
        """Room for keys and values of every layer, (L, 2, B, H, S + T - 1, E); the last code is never read. ``prefix``: S, which
        the weights decide here."""
        c = self.config
        weight = self.output.weight
        assert prefix in (0, c.prefix), (prefix, c.prefix)
        room = c.prefix + c.codes - 1
        return torch.empty(c.layers, 2, rows, c.heads, room, c.dim // c.heads, device=weight.device, dtype=weight.dtype)

    def prefill(self, condition: Tensor, cache: Tensor, starts: Tensor | None) -> Tensor:
        """Logits (B, V) of the first code, from the condition's embeddings (B, S, D) and ``cls_embedding.starts`` of it."""
        return self._advance(condition, 0, cache, starts)

    def step(self, codes: Tensor, position: int, cache: Tensor, starts: Tensor | None) -> Tensor:
        """Logits (B, V) of code ``position``, from the codes (B,) at ``position - 1``; positions must come in order."""
        return self._advance(self.tok_embeddings(codes).unsqueeze(1), self.config.prefix + position - 1, cache, starts)

    def _advance(self, x: Tensor, at: int, cache: Tensor, starts: Tensor | None) -> Tensor:
        """Put x (B, S, D) at the places from ``at`` on, and predict what follows the last of them."""
        table = self.rotary[at : at + x.shape[1]]
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            x = cast(Block, layer).step(x, table, layer_cache, at, starts)
        return self.predict(x[:, -1])

    def predict(self, x: Tensor) -> Tensor:
        """Logits (..., V), float32, of what the last block says (..., D)."""
        return self.output(self.norm(x)).float()


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)


# Sizes of the published generators: width, layers, heads. The feed-forward width follows.
PUBLISHED = {
    "GPT-B": (768, 12, 12),
    "GPT-L": (1024, 24, 16),
    "GPT-XL": (1280, 36, 20),
    "GPT-XXL": (1536, 48, 24),
    "GPT-XXXL": (2560, 48, 40),
    "GPT-1B": (2048, 22, 32),
    "GPT-3B": (3200, 24, 32),
    "GPT-7B": (4096, 32, 32),
}


def infer_config(shapes: dict[str, tuple[int, ...]], codes: int, heads: int = 0) -> GPTConfig:
    """The sizes that weights of these shapes belong to.

    The number of heads leaves no trace in a shape: it comes with the file (``heads``) or from the
    table of published sizes. Nor does the number of codes. Raises ValueError if nobody knows the heads, or if a
    key needed for it is missing.
    """
    try:
        vocab, dim = shapes["tok_embeddings.weight"]
        hidden = shapes["layers.0.feed_forward.w1.weight"][0]
        if text := "cls_embedding.cap_proj.fc1.weight" in shapes:
            prefix, caption_dim = shapes["cls_embedding.uncond_embedding"]
        else:
            rows = shapes["cls_embedding.embedding_table.weight"][0]
    except KeyError as error:
        raise ValueError(f"not the weights of a LlamaGen generator: {error} is missing") from None
    layers = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("layers."))
    known = {(d, n): h for d, n, h in PUBLISHED.values()}
    if not heads and (dim, layers) not in known:
        raise ValueError(f"a generator of width {dim} and {layers} layers is none of {', '.join(PUBLISHED)}, and the file names no heads")
    sizes = {"dim": dim, "layers": layers, "heads": heads or known[dim, layers], "hidden": hidden, "vocab": vocab, "codes": codes}
    return GPTConfig(**sizes, classes=0, caption_dim=caption_dim, prefix=prefix) if text else GPTConfig(**sizes, classes=rows - 1)


def published(name: str, vocab: int = 16384, codes: int = 576, classes: int = 1000, captions: bool = False) -> GPTConfig:
    """The sizes of a published generator, a name in ``PUBLISHED``, of classes, or of captions as flan-t5-xl reads them; 576
    codes are 384 pixels with VQ-16."""
    dim, layers, heads = PUBLISHED[name]
    hidden = 256 * math.ceil(int(8 * dim / 3) / 256)
    if captions:
        return GPTConfig(dim, layers, heads, hidden, vocab, codes, classes=0, caption_dim=2048, prefix=120)
    return GPTConfig(dim, layers, heads, hidden, vocab, codes, classes)


def metadata(config: GPTConfig) -> dict[str, str]:
    """What a checkpoint must say beside its tensors, as safetensors metadata."""
    return {"heads": str(config.heads), "codes": str(config.codes)}
