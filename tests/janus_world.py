"""A tiny Janus (transformers' own classes, 2 layers, 4 x 4 codes of 32, byte-level words) on disk, for tests that need one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from vapi.config import ModelConfig

SPECIAL = (
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<begin_of_image>", "<end_of_image>", "<image_placeholder>",
    "<|User|>", "<|Assistant|>",
)  # fmt: skip
TEXT = {
    "vocab_size": 272, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 144, "rms_norm_eps": 1e-6,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "mlp_ratio": 2.0, "image_size": 16, "patch_size": 4,
    "projection_dim": 32, "depth": 2, "num_image_tokens": 16,
}  # fmt: skip
PICTURES = {
    "embed_dim": 4, "num_embeddings": 32, "latent_channels": 32, "base_channels": 32, "channel_multiplier": [1, 1, 2],
    "num_res_blocks": 1, "num_patches": 4, "projection_dim": 32, "image_token_embed_dim": 32, "num_hidden_layers": 2,
}  # fmt: skip


def write_words(folder: Path, special: tuple[str, ...] = SPECIAL) -> None:
    """tokenizer.json: a byte is a token, and so is every mark of Janus."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in special])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "pad_token": SPECIAL[2]}))


def config(side: int = 16, **text: Any) -> Any:
    from transformers import JanusConfig

    grid = side // VISION["patch_size"]
    return JanusConfig(
        text_config={"model_type": "llama", **TEXT, **text}, tie_word_embeddings=False, vq_config={**PICTURES, "num_patches": grid},
        vision_config={**VISION, "image_size": side, "num_image_tokens": grid**2},
    )  # fmt: skip


def network(seed: int = 0, side: int = 16, **text: Any) -> Any:
    """transformers' Janus with lively random weights."""
    from transformers import JanusForConditionalGeneration

    torch.manual_seed(seed)
    made = JanusForConditionalGeneration(config(side, **text)).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 1.5 * parameter.shape[1] ** -0.5 if "embed" not in name else 1.0)
    return made


def write(folder: Path, seed: int = 0, side: int = 16, **text: Any) -> ModelConfig:
    """A whole one in transformers' layout, as a ModelConfig."""
    write_words(folder)
    network(seed, side, **text).save_pretrained(folder)
    return ModelConfig(policy="janus", generator=str(folder), tokenizer=str(folder), image_size=side, device="cpu")
