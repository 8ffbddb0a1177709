"""LlamaGen's image tokenizer: a convolutional VQ auto-encoder with an l2-normalised codebook.

Parameter names and arithmetic are those of the published VQ-8 and VQ-16 checkpoints. The codebook is
normalised at every look-up, in encoding and in decoding, and the nearest code is chosen in float32.

Shapes: B images, T = h * w codes, V codebook, K code width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class VQConfig:
    """Sizes of a tokenizer; one more level halves the grid once more."""

    vocab: int = 16384
    code_dim: int = 8
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    z_channels: int = 256
    groups: int = 32

    @property
    def factor(self) -> int:
        """Pixels per code, along one side."""
        return 2 ** (len(self.multipliers) - 1)


def norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, into: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = norm(into, groups)
        self.conv1 = nn.Conv2d(into, out, 3, padding=1)
        self.norm2 = norm(out, groups)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        if into != out:
            self.nin_shortcut = nn.Conv2d(into, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head attention over all positions."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2).unsqueeze(1) for conv in (self.q, self.k, self.v))  # (B, 1, hw, C)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(y.squeeze(1).transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # one row below and right: how the weights were trained


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, with attention at the coarsest, then a change of resolution."""

    def __init__(self, into: int, out: int, blocks: int, groups: int, attend: bool) -> None:
        super().__init__()
        self.res = nn.ModuleList(ResnetBlock(into if i == 0 else out, out, groups) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(out, groups) for _ in range(blocks if attend else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        for resample in ("downsample", "upsample"):
            if hasattr(self, resample):
                x = getattr(self, resample)(x)
        return x


def middle(channels: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList([ResnetBlock(channels, channels, groups), AttnBlock(channels, groups), ResnetBlock(channels, channels, groups)])


class Encoder(nn.Module):
    def __init__(self, c: VQConfig) -> None:
        super().__init__()
        widths = [c.channels * m for m in c.multipliers]
        self.conv_in = nn.Conv2d(3, c.channels, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for i, (into, out) in enumerate(zip([c.channels, *widths], widths, strict=False)):
            last = i == len(widths) - 1
            level = Level(into, out, c.blocks, c.groups, attend=last)
            if not last:
                level.downsample = Downsample(out)
            self.conv_blocks.append(level)
        self.mid = middle(widths[-1], c.groups)
        self.norm_out = norm(widths[-1], c.groups)
        self.conv_out = nn.Conv2d(widths[-1], c.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    def __init__(self, c: VQConfig) -> None:
        super().__init__()
        widths = [c.channels * m for m in reversed(c.multipliers)]
        self.conv_in = nn.Conv2d(c.z_channels, widths[0], 3, padding=1)
        self.mid = middle(widths[0], c.groups)
        self.conv_blocks = nn.ModuleList()
        for i, (into, out) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            level = Level(into, out, c.blocks + 1, c.groups, attend=i == 0)
            if i < len(widths) - 1:
                level.upsample = Upsample(out)
            self.conv_blocks.append(level)
        self.norm_out = norm(widths[-1], c.groups)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        z = self.conv_in(z)
        for block in (*self.mid, *self.conv_blocks):
            z = block(z)
        return self.conv_out(F.silu(self.norm_out(z)))


class Quantizer(nn.Module):
    """The codebook."""

    def __init__(self, c: VQConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(c.vocab, c.code_dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / c.vocab, 1.0 / c.vocab)
        # A counter of pretraining. It changes nothing here; published checkpoints carry it.
        self.register_buffer("codebook_used", torch.zeros(65536))

    def entries(self) -> Tensor:
        """The codebook as it is used: (V, K), unit rows, float32."""
        return F.normalize(self.embedding.weight.float(), dim=-1)

    def nearest(self, z: Tensor) -> Tensor:
        """Nearest code of each vector: (B, K, h, w) -> (B, T). For unit vectors the nearest is the
        one with the largest inner product."""
        z = F.normalize(z.float().flatten(2).transpose(1, 2), dim=-1)  # (B, T, K)
        return (z @ self.entries().T).argmax(dim=-1)


class VQModel(nn.Module):
    """Images to codes and back."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.z_channels, 1)

    @property
    def vocab(self) -> int:
        """Size of the codebook, V."""
        return self.config.vocab

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to codes (B, T), row by row."""
        return self.quantize.nearest(self.quant_conv(self.encoder(images)))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, T) to images (B, 3, H, W), about [-1, 1], not clamped."""
        return self.paint(self.quantize.entries()[codes])

    def paint(self, vectors: Tensor) -> Tensor:
        """Vectors (B, T, K) in the place of the codebook's to images, as ``decode``."""
        side = round(vectors.shape[1] ** 0.5)
        z = vectors.transpose(1, 2).unflatten(2, (side, side))
        return self.decoder(self.post_quant_conv(z.to(self.post_quant_conv.weight.dtype)))


def infer_config(shapes: dict[str, tuple[int, ...]], groups: int = 0) -> VQConfig:
    """The sizes that weights of these shapes belong to; ``groups`` if they are not the published 32.

    Raises ValueError if they are not a tokenizer's."""
    try:
        vocab, code_dim = shapes["quantize.embedding.weight"]
        channels = shapes["encoder.conv_in.weight"][0]
        z_channels = shapes["encoder.conv_out.weight"][0]
        levels = 1 + max(int(n.split(".")[2]) for n in shapes if n.startswith("encoder.conv_blocks."))
        multipliers = tuple(shapes[f"encoder.conv_blocks.{i}.res.0.conv1.weight"][0] // channels for i in range(levels))
    except (KeyError, ValueError) as error:
        raise ValueError(f"not the weights of a LlamaGen tokenizer: {error}") from None
    blocks = 1 + max(int(n.split(".")[4]) for n in shapes if n.startswith("encoder.conv_blocks.0.res."))
    return VQConfig(vocab, code_dim, channels, multipliers, blocks, z_channels, groups or 32)


def metadata(config: VQConfig) -> dict[str, str]:
    """What a checkpoint must say beside its tensors, as safetensors metadata."""
    return {"groups": str(config.groups)}
