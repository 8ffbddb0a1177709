"""Mask2Former as mmdet 2.x lays it out and computes it, small: random weights under its names, and a forward pass on them.

Written down after mmdet 2.x's and mmcv 1.x's description of the layers, with torch's functions alone: an oracle for what
``vapi.metrics.mask2former.convert`` makes of a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
LEVELS, POINTS = 3, 4


@dataclass(frozen=True)
class Layout:
    """Sizes of a network; the defaults are a small one, ``SWIN_S`` is the published one."""

    width: int = 8
    depths: tuple[int, ...] = (2, 2, 2, 2)
    heads: tuple[int, ...] = (1, 2, 2, 4)
    window: int = 7
    features: int = 32
    attention_heads: int = 4
    encoder_layers: int = 2
    encoder_width: int = 48
    decoder_layers: int = 4
    decoder_width: int = 40
    queries: int = 20
    labels: int = 80


SWIN_S = Layout(96, (2, 2, 18, 2), (3, 6, 12, 24), 7, 256, 8, 6, 1024, 9, 2048, 100, 80)


def shapes(layout: Layout) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every weight's name and shape."""

    def affine(name: str, *shape: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", shape
        yield f"{name}.bias", shape[:1]

    yield from affine("backbone.patch_embed.projection", layout.width, 3, 4, 4)
    yield from affine("backbone.patch_embed.norm", layout.width)
    widths = [layout.width * 2**i for i in range(len(layout.depths))]
    for i, (depth, heads, width) in enumerate(zip(layout.depths, layout.heads, widths, strict=True)):
        for j in range(depth):
            block = f"backbone.stages.{i}.blocks.{j}"
            yield from affine(f"{block}.norm1", width)
            yield f"{block}.attn.w_msa.relative_position_bias_table", ((2 * layout.window - 1) ** 2, heads)
            yield f"{block}.attn.w_msa.relative_position_index", (layout.window**2, layout.window**2)
            yield from affine(f"{block}.attn.w_msa.qkv", 3 * width, width)
            yield from affine(f"{block}.attn.w_msa.proj", width, width)
            yield from affine(f"{block}.norm2", width)
            yield from affine(f"{block}.ffn.layers.0.0", 4 * width, width)
            yield from affine(f"{block}.ffn.layers.1", width, 4 * width)
        if i + 1 < len(widths):
            yield from affine(f"backbone.stages.{i}.downsample.norm", 4 * width)
            yield f"backbone.stages.{i}.downsample.reduction.weight", (2 * width, 4 * width)
    for i, width in enumerate(widths):
        yield from affine(f"backbone.norm{i}", width)
    features, head = layout.features, "panoptic_head.pixel_decoder"
    for i, width in enumerate(widths[:0:-1]):
        yield from affine(f"{head}.input_convs.{i}.conv", features, width, 1, 1)
        yield from affine(f"{head}.input_convs.{i}.gn", features)
    for i in range(layout.encoder_layers):
        layer = f"{head}.encoder.layers.{i}"
        yield from affine(f"{layer}.attentions.0.sampling_offsets", layout.attention_heads * LEVELS * POINTS * 2, features)
        yield from affine(f"{layer}.attentions.0.attention_weights", layout.attention_heads * LEVELS * POINTS, features)
        yield from affine(f"{layer}.attentions.0.value_proj", features, features)
        yield from affine(f"{layer}.attentions.0.output_proj", features, features)
        yield from affine(f"{layer}.ffns.0.layers.0.0", layout.encoder_width, features)
        yield from affine(f"{layer}.ffns.0.layers.1", features, layout.encoder_width)
        for k in range(2):
            yield from affine(f"{layer}.norms.{k}", features)
    yield f"{head}.level_encoding.weight", (LEVELS, features)
    yield f"{head}.lateral_convs.0.conv.weight", (features, widths[0], 1, 1)
    yield from affine(f"{head}.lateral_convs.0.gn", features)
    yield f"{head}.output_convs.0.conv.weight", (features, features, 3, 3)
    yield from affine(f"{head}.output_convs.0.gn", features)
    yield from affine(f"{head}.mask_feature", features, features, 1, 1)
    for i in range(layout.decoder_layers):
        layer = f"panoptic_head.transformer_decoder.layers.{i}"
        for k in range(2):
            yield f"{layer}.attentions.{k}.attn.in_proj_weight", (3 * features, features)
            yield f"{layer}.attentions.{k}.attn.in_proj_bias", (3 * features,)
            yield from affine(f"{layer}.attentions.{k}.attn.out_proj", features, features)
        yield from affine(f"{layer}.ffns.0.layers.0.0", layout.decoder_width, features)
        yield from affine(f"{layer}.ffns.0.layers.1", features, layout.decoder_width)
        for k in range(3):
            yield from affine(f"{layer}.norms.{k}", features)
    yield from affine("panoptic_head.transformer_decoder.post_norm", features)
    yield "panoptic_head.query_embed.weight", (layout.queries, features)
    yield "panoptic_head.query_feat.weight", (layout.queries, features)
    yield "panoptic_head.level_embed.weight", (LEVELS, features)
    yield from affine("panoptic_head.cls_embed", layout.labels + 1, features)
    for i in (0, 2, 4):
        yield from affine(f"panoptic_head.mask_embed.{i}", features, features)


def index(window: int) -> Tensor:
    """Where in the table of (2 window - 1)^2 biases the one of two places of a window stands."""
    places = [(row, column) for row in range(window) for column in range(window)]
    step = 2 * window - 1
    return torch.tensor([[(a - c + window - 1) * step + b - d + window - 1 for c, d in places] for a, b in places])


def random(layout: Layout, seed: int = 0) -> State:
    """Random weights, large enough that every part of the network matters."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes(layout):
        noise = torch.randn(shape, generator=generator)
        if name.endswith("index"):
            state[name] = index(layout.window)
        elif name.endswith("weight") and len(shape) == 1:
            state[name] = 1 + 0.3 * noise
        elif name.endswith("sampling_offsets.bias"):
            state[name] = 2 * noise  # pixels
        elif name.endswith(("query_embed.weight", "query_feat.weight", "level_embed.weight", "level_encoding.weight")):
            state[name] = noise
        elif len(shape) == 1:
            state[name] = 0.3 * noise
        else:
            state[name] = noise / math.prod(shape[1:]) ** 0.5
    return state


# --- the forward pass ------------------------------------------------------------------------------


def forward(state: State, layout: Layout, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W), sides that 32 divides, to class logits (B, Q, C + 1) and mask logits (B, Q, H/4, W/4)."""
    maps = _swin(state, layout, pixels)
    levels, mask_feature = _pixel_decoder(state, layout, maps)
    head = "panoptic_head"
    queries = state[f"{head}.query_feat.weight"].expand(len(pixels), -1, -1)
    position = state[f"{head}.query_embed.weight"]
    classes, masks, hidden = _heads(state, layout, queries, mask_feature, levels[0].shape[-2:])
    for i in range(layout.decoder_layers):
        level = levels[i % LEVELS]
        memory = level.flatten(2).transpose(1, 2) + state[f"{head}.level_embed.weight"][i % LEVELS]
        places = _sine(level).flatten(2).transpose(1, 2)
        hidden = hidden & ~hidden.all(dim=-1, keepdim=True)  # a query that may look nowhere looks everywhere
        layer = f"{head}.transformer_decoder.layers.{i}"
        seen = _attention(state, f"{layer}.attentions.0.attn", layout.attention_heads, queries + position, memory + places, memory, hidden)
        queries = _norm(state, f"{layer}.norms.0", queries + seen)
        seen = _attention(state, f"{layer}.attentions.1.attn", layout.attention_heads, queries + position, queries + position, queries)
        queries = _norm(state, f"{layer}.norms.1", queries + seen)
        queries = _norm(state, f"{layer}.norms.2", queries + _ffn(state, f"{layer}.ffns.0.layers", queries, F.relu))
        classes, masks, hidden = _heads(state, layout, queries, mask_feature, levels[(i + 1) % LEVELS].shape[-2:])
    return classes, masks


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def _norm(state: State, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def _ffn(state: State, name: str, x: Tensor, act: object) -> Tensor:
    return _linear(state, f"{name}.1", act(_linear(state, f"{name}.0.0", x)))


def merge(x: Tensor, norm: tuple[Tensor, Tensor], reduction: Tensor) -> Tensor:
    """mmdet's PatchMerging: (B, H, W, C) to (B, H/2, W/2, 2 C), by ``nn.Unfold``."""
    batch, height, width, _ = x.shape
    x = F.pad(x.permute(0, 3, 1, 2), (0, width % 2, 0, height % 2))
    x = F.unfold(x, kernel_size=2, stride=2).transpose(1, 2)
    x = F.linear(F.layer_norm(x, x.shape[-1:], *norm), reduction)
    return x.view(batch, (height + 1) // 2, (width + 1) // 2, -1)


def _swin(state: State, layout: Layout, pixels: Tensor) -> list[Tensor]:
    x = F.conv2d(pixels, state["backbone.patch_embed.projection.weight"], state["backbone.patch_embed.projection.bias"], stride=4)
    x = _norm(state, "backbone.patch_embed.norm", x.permute(0, 2, 3, 1))
    maps = []
    for i, (depth, heads) in enumerate(zip(layout.depths, layout.heads, strict=True)):
        for j in range(depth):
            block = f"backbone.stages.{i}.blocks.{j}"
            x = x + _window_attention(state, f"{block}.attn.w_msa", layout.window, heads, _norm(state, f"{block}.norm1", x), j % 2 == 1)
            x = x + _ffn(state, f"{block}.ffn.layers", _norm(state, f"{block}.norm2", x), F.gelu)
        maps.append(_norm(state, f"backbone.norm{i}", x).permute(0, 3, 1, 2))
        if i + 1 < len(layout.depths):
            down = f"backbone.stages.{i}.downsample"
            x = merge(x, (state[f"{down}.norm.weight"], state[f"{down}.norm.bias"]), state[f"{down}.reduction.weight"])
    return maps


def _window_attention(state: State, name: str, window: int, heads: int, x: Tensor, shifted: bool) -> Tensor:
    """Attention within windows; by place, not by reshaping: every place gets the number of its window and of its region."""
    batch, height, width, channels = x.shape
    x = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    tall, wide = x.shape[1:3]
    shift = window // 2 if shifted else 0
    x = x.roll((-shift, -shift), (1, 2))
    regions = [
        torch.tensor([0 if place < side - window else 1 if place < side - shift else 2 for place in range(side)]) for side in (tall, wide)
    ]
    region = regions[0][:, None] * 3 + regions[1][None, :]
    made = torch.zeros_like(x)
    for top in range(0, tall, window):
        for left in range(0, wide, window):
            here = slice(top, top + window), slice(left, left + window)
            tokens = x[:, here[0], here[1]].flatten(1, 2)
            q, k, v = _linear(state, f"{name}.qkv", tokens).view(batch, window**2, 3, heads, -1).permute(2, 0, 3, 1, 4)
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
            scores = scores + state[f"{name}.relative_position_bias_table"][index(window)].permute(2, 0, 1)
            if shifted:
                apart = region[here].flatten()
                scores = scores - 100.0 * (apart[:, None] != apart[None, :])
            mixed = (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
            made[:, here[0], here[1]] = _linear(state, f"{name}.proj", mixed).view(batch, window, window, channels)
    return made.roll((shift, shift), (1, 2))[:, :height, :width]


def _sine(x: Tensor) -> Tensor:
    """(B, D, h, w) places, normalised, y before x."""
    height, width = x.shape[-2:]
    half = x.shape[1] // 2
    waves = 10000.0 ** (2 * (torch.arange(half) // 2) / half)
    parts = []
    for count, shape in ((height, (1, height, 1)), (width, (1, 1, width))):
        places = torch.arange(1.0, count + 1) / (count + 1e-6) * 2 * math.pi
        angles = places[None, :] / waves[:, None]
        angles = torch.where(torch.arange(half)[:, None] % 2 == 0, angles.sin(), angles.cos())
        parts.append(angles.view(half, *shape[1:]).expand(half, height, width))
    return torch.cat(parts)[None]


def _pixel_decoder(state: State, layout: Layout, maps: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    head = "panoptic_head.pixel_decoder"

    def conv(name: str, x: Tensor, padding: int = 0) -> Tensor:
        x = F.conv2d(x, state[f"{name}.conv.weight"], state.get(f"{name}.conv.bias"), padding=padding)
        return F.group_norm(x, 32, state[f"{name}.gn.weight"], state[f"{name}.gn.bias"])

    levels = [conv(f"{head}.input_convs.{i}", x) for i, x in enumerate(maps[:0:-1])]
    sizes = [(x.shape[-2], x.shape[-1]) for x in levels]
    places = [_sine(x) + state[f"{head}.level_encoding.weight"][i][:, None, None] for i, x in enumerate(levels)]
    x = torch.cat([level.flatten(2) for level in levels], dim=2).transpose(1, 2)
    position = torch.cat([place.flatten(2) for place in places], dim=2).transpose(1, 2)
    centres = torch.cat([_centres(*size) for size in sizes])
    for i in range(layout.encoder_layers):
        layer = f"{head}.encoder.layers.{i}"
        seen = _deformable(state, f"{layer}.attentions.0", layout.attention_heads, x + position, x, centres, sizes)
        x = _norm(state, f"{layer}.norms.0", x + seen)
        x = _norm(state, f"{layer}.norms.1", x + _ffn(state, f"{layer}.ffns.0.layers", x, F.relu))
    parts = x.transpose(1, 2).split([h * w for h, w in sizes], dim=2)
    levels = [part.unflatten(2, size) for part, size in zip(parts, sizes, strict=True)]
    lateral = conv(f"{head}.lateral_convs.0", maps[0])
    fine = lateral + F.interpolate(levels[-1], size=lateral.shape[-2:], mode="bilinear", align_corners=False)
    fine = F.relu(conv(f"{head}.output_convs.0", fine, padding=1))
    return levels, F.conv2d(fine, state[f"{head}.mask_feature.weight"], state[f"{head}.mask_feature.bias"])


def _centres(height: int, width: int) -> Tensor:
    """(h w, 2): x, y in 0..1."""
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)


def _deformable(
    state: State, name: str, heads: int, query: Tensor, values: Tensor, centres: Tensor, sizes: list[tuple[int, int]]
) -> Tensor:
    """Each place asks 4 points near itself, on each of 3 levels."""
    batch, count, width = query.shape
    value = _linear(state, f"{name}.value_proj", values).view(batch, count, heads, -1)
    offsets = _linear(state, f"{name}.sampling_offsets", query).view(batch, count, heads, LEVELS, POINTS, 2)
    shares = _linear(state, f"{name}.attention_weights", query).view(batch, count, heads, LEVELS * POINTS).softmax(dim=-1)
    shares = shares.view(batch, count, heads, LEVELS, POINTS)
    made = torch.zeros(batch, count, heads, width // heads)
    start = 0
    for level, (h, w) in enumerate(sizes):
        plane = value[:, start : start + h * w].permute(0, 2, 3, 1).unflatten(3, (h, w))  # (B, heads, d, h, w)
        start += h * w
        places = centres[None, :, None, None] + offsets[:, :, :, level] / torch.tensor([w, h])
        for head in range(heads):
            seen = F.grid_sample(plane[:, head], 2 * places[:, :, head] - 1, align_corners=False)  # (B, d, count, points)
            made[:, :, head] += (seen * shares[:, None, :, head, level]).sum(dim=-1).transpose(1, 2)
    return _linear(state, f"{name}.output_proj", made.flatten(2))


def _attention(state: State, name: str, heads: int, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None = None) -> Tensor:
    weights, biases = state[f"{name}.in_proj_weight"].chunk(3), state[f"{name}.in_proj_bias"].chunk(3)
    q, k, v = (F.linear(x, w, b).unflatten(2, (heads, -1)).transpose(1, 2) for x, w, b in zip((query, key, value), weights, biases))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if hidden is not None:
        scores = scores.masked_fill(hidden[:, None], -math.inf)
    return _linear(state, f"{name}.out_proj", (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))


def _heads(state: State, layout: Layout, queries: Tensor, feature: Tensor, size: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """Class logits, mask logits, and where the next layer may not look, (B, Q, h w)."""
    seen = _norm(state, "panoptic_head.transformer_decoder.post_norm", queries)
    embedded = seen
    for i in (0, 2, 4):
        embedded = _linear(state, f"panoptic_head.mask_embed.{i}", embedded if i == 0 else F.relu(embedded))
    masks = torch.einsum("bqc,bchw->bqhw", embedded, feature)
    hidden = F.interpolate(masks, size=size, mode="bilinear", align_corners=False).flatten(2).sigmoid() < 0.5
    return _linear(state, "panoptic_head.cls_embed", seen), masks, hidden
