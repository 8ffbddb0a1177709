"""The problems that upstream's code has answered (make.py) and ours must answer alike (test_parity.py).

Small, but whole: a transformer of two layers over 4 x 4 codes, with classes and with captions of 120
positions; VQ-16 and VQ-8 at a quarter of their width; LPIPS on VGG-16 as it is; a Janus of two layers.
"""

from __future__ import annotations

import janus_world
import numpy as np
import torch
import upstream
from torch import Tensor

from vapi.models import gpt, vq

CLASSES = gpt.GPTConfig(dim=32, layers=2, heads=2, hidden=96, vocab=512, codes=16, classes=10)
T2I = gpt.GPTConfig(dim=32, layers=2, heads=2, hidden=96, vocab=512, codes=16, classes=0, caption_dim=24, prefix=120)
VQS = {
    "vq16": vq.VQConfig(vocab=512, channels=32, multipliers=(1, 1, 2, 2, 4), z_channels=64),
    "vq8": vq.VQConfig(vocab=512, channels=32, multipliers=(1, 2, 2, 4), z_channels=64),
}
SIDE, IMAGES = 64, 2
LABELS = torch.tensor([3, 0, 9])

GREEDY = (1.0, 1.75, 4.0)  # guidance
POWER = ((4.0, 2.0), (1.75, 2.75))  # guidance, power of the power-cosine schedule
CROPS = ((67, 45), (45, 67), (33, 131), (301, 130), (32, 32), (129, 64))  # width, height; cropped to 32 x 32
STEP_GROUP = 4


def generator_state(config: gpt.GPTConfig) -> upstream.State:
    """Random weights, with an output that makes some codes likelier than others."""
    with torch.device("meta"):
        network = gpt.Transformer(config)
    state = upstream.random_state(network, 1)
    state["output.weight"] *= 3
    return state


def tokenizer_state(config: vq.VQConfig) -> upstream.State:
    with torch.device("meta"):
        network = vq.VQModel(config)
    return upstream.random_state(network, 2)


def context(config: gpt.GPTConfig) -> Tensor:
    return upstream.integers(config.vocab, (len(LABELS), config.codes), 3)


WORDS = (T2I.prefix, 1, 31)  # of each caption


def captions() -> Tensor:
    """(3, 120, 24 + 1): features of captions padded on the left, and which positions are none."""
    place = torch.arange(T2I.prefix)
    words = torch.stack([place >= T2I.prefix - count for count in WORDS])[..., None].float()
    return torch.cat([upstream.uniform((len(LABELS), T2I.prefix, T2I.caption_dim), 4) * words, words], dim=-1)


ASKED = ("a photo of a red three", "two sevens", "  a blue eight left of a green one  ")
JANUS_GUIDANCE = 5.0
SIGLIP = {"image_size": 16, "patch_size": 4, "width": 32, "layers": 1, "heads": 1, "mlp_ratio": 2.0, "global_pool": "map"}
JANUS_VQ = vq.VQConfig(vocab=32, code_dim=4, channels=32, multipliers=(1, 1, 2), blocks=1, z_channels=32)


def janus_state() -> upstream.State:
    """Random weights of a whole Janus under transformers' names."""
    from transformers import JanusForConditionalGeneration

    with torch.device("meta"):
        network = JanusForConditionalGeneration(janus_world.config())
    state = upstream.random_state(network, 8)
    state["model.generation_head.vision_head.weight"] *= 3
    return state


def janus_codes() -> Tensor:
    return upstream.integers(JANUS_VQ.vocab, (len(ASKED), 16), 9)


def small_images() -> Tensor:
    """(2, 3, 16, 16)."""
    return upstream.uniform((2, 3, 16, 16), 10)


def images() -> Tensor:
    """(2, 3, 64, 64): coarse colours under fine noise."""
    coarse = upstream.uniform((IMAGES, 3, 8, 8), 6).repeat_interleave(8, 2).repeat_interleave(8, 3)
    return (coarse + 0.5 * upstream.uniform((IMAGES, 3, SIDE, SIDE), 7)).clamp(-1, 1)


def photo(width: int, height: int) -> np.ndarray:
    """uint8 (H, W, 3)."""
    return upstream.integers(256, (height, width, 3), width, height).numpy().astype(np.uint8)
