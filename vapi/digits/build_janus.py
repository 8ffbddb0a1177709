"""A Janus that draws the scenes: teach, measure, write.

    OUT/models/scenes-janus/{config,generation_config}.json     transformers' layout, whole
    OUT/models/scenes-janus/model.safetensors
    OUT/models/scenes-janus/{tokenizer,tokenizer_config}.json   a byte-level vocabulary in which every word of a caption is one token

As large as the scenes' LlamaGen, and taught the same codes in the same order of lessons. The image tokenizer in it is the scenes'
own, OUT/models/scenes-tokenizer.safetensors; its norms have 4 groups, which config.json says, and transformers' class has 32 whatever
config.json says. What only understands images is there, so that the folder is whole, and random.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vapi.config import write_text
from vapi.digits import build_scenes, scenes
from vapi.digits.build import clock, new_folder
from vapi.digits.build_scenes import World
from vapi.digits.train import GeneratorSchedule
from vapi.models import janus, vq, weights
from vapi.models.janus_files import BOS, COUNTER, END, EOS, IMAGE, PAD, START, to_transformers

FOLDER = "models/scenes-janus"
MARKS = (BOS, EOS, PAD, START, END, IMAGE, "<|User|>", "<|Assistant|>")
PLACES = 256  # of the language model: a prompt of up to 157 tokens, and 100 codes
GUIDANCE = 6.0  # of transformers' generate, where it is not told another
NOTHING_ASKED = 0.1  # share of captions that are not told, as guidance needs

WORLD = dataclasses.replace(
    build_scenes.WORLD,
    pretraining=12_000,
    generator_schedule=GeneratorSchedule(2000, 16, 3e-3, muon_lr=0.02, flat_steps=950, alone_steps=450, noise=0.3),
)
TINY = build_scenes.TINY


def build(out: Path, world: World, pretraining_seed: int = 0) -> dict[str, float]:
    """Write the folder beside the scenes' tokenizer and return what was measured. Raises ValueError if it is there already."""
    with new_folder(out / FOLDER) as folder:
        torch.manual_seed(0)
        log, tokenizer = clock(), build_scenes.load_tokenizer(out)
        write_words(folder)
        prompts = janus.Prompts(folder)
        read, make = functools.partial(conditions, prompts), functools.partial(Learner, sizes(world, prompts), tokenizer)
        generator, measured = build_scenes.pretrain_generator(tokenizer, read, make, world, pretraining_seed, log)
        write_weights(folder, generator, tokenizer)
    for name, value in measured.items():
        log(f"{name}: {value:.4g}")
    return measured


# --- words -------------------------------------------------------------------------------------


def write_words(folder: Path) -> None:
    """tokenizer.json: bytes, the words of the scenes' captions, and Janus's marks."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # more than there are to merge: every word that it learns from becomes one token
    trainer = trainers.BpeTrainer(
        vocab_size=1000, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(mark, special=True) for mark in MARKS],
    )  # fmt: skip
    captions = [prompt.text for prompt in scenes.captions("train", 6000, build_scenes.SEEDS["pretraining"])]
    tokenizer.train_from_iterator([f" {caption}" for caption in captions], trainer)
    named = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "image_token": IMAGE, "boi_token": START, "eoi_token": END}
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    write_text(folder / "tokenizer_config.json", json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named}, indent=2) + "\n")


def conditions(prompts: janus.Prompts, captions: Sequence[str]) -> Tensor:
    """What the generator is told: (N, S), on the right, S as the longest needs."""
    ids = [torch.tensor(one) for one in prompts.ids(captions)]
    return nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=janus.NOTHING, padding_side="left")


# --- networks ----------------------------------------------------------------------------------


def sizes(world: World, prompts: janus.Prompts) -> janus.Sizes:
    """Those of the scenes' LlamaGen."""
    c = world.generator
    return janus.Sizes(
        c.dim, c.layers, c.heads, c.hidden, words=prompts.tokenizer.get_vocab_size(), pad=prompts.pad, vocab=world.tokenizer.vocab,
        code_dim=world.tokenizer.code_dim, codes=c.codes, places=PLACES,
    )  # fmt: skip


class Learner(janus.Generator):
    """A generator that while it learns is not told one caption in ten. It begins with the tokenizer's own vectors of its codes."""

    def __init__(self, config: janus.Sizes, tokenizer: vq.VQModel) -> None:
        super().__init__(config)
        for weight in self.language_model.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)
        with torch.no_grad():
            self.generation_embeddings.weight.copy_(tokenizer.quantize.entries())

    def forward(self, condition: Tensor, context: Tensor) -> Tensor:
        if self.training:
            untold = torch.rand(len(condition), 1) < NOTHING_ASKED
            condition = torch.where(untold, self.null(condition), condition)
        return super().forward(condition, context)


def write_weights(folder: Path, generator: janus.Generator, tokenizer: vq.VQModel) -> None:
    """config.json, generation_config.json and model.safetensors."""
    from transformers.models.janus.modeling_janus import JanusVisionAlignerMLP, JanusVisionModel

    prompts, c = janus.Prompts(folder), generator.config
    described = config(c, tokenizer.config, prompts)
    understanding = {
        "model.vision_model": JanusVisionModel(described.vision_config),
        "model.aligner": JanusVisionAlignerMLP(described.vision_config),
        "lm_head": nn.Linear(c.dim, c.words, bias=False),
    }
    state = {f"{part}.{name}": tensor for part, network in understanding.items() for name, tensor in network.state_dict().items()}
    state |= {f"model.{name}": tensor for name, tensor in generator.state_dict().items()}
    state |= {to_transformers(f"gen_vision_model.{name}"): tensor for name, tensor in tokenizer.state_dict().items() if name != COUNTER}
    ids = {name: getattr(described.text_config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    drawing = {**ids, "guidance_scale": GUIDANCE, "generation_kwargs": {"boi_token_id": prompts.start}}
    described.save_pretrained(folder)
    write_text(folder / "generation_config.json", json.dumps(drawing, indent=2) + "\n")
    weights.save_tensors(state, folder / "model.safetensors", {})


def config(c: janus.Sizes, pictures: vq.VQConfig, prompts: janus.Prompts) -> Any:
    """transformers' configuration. What only understands images is as small as it can be."""
    from transformers import JanusConfig

    grid, id_of = round(c.codes**0.5), cast(Any, prompts.tokenizer.token_to_id)
    return JanusConfig(
        architectures=["JanusForConditionalGeneration"], dtype="float32", tie_word_embeddings=False,
        image_token_id=id_of(IMAGE),
        text_config={
            "model_type": "llama", "bos_token_id": prompts.bos, "eos_token_id": id_of(EOS),
            "pad_token_id": prompts.pad, "vocab_size": c.words, "hidden_size": c.dim, "intermediate_size": c.hidden,
            "num_hidden_layers": c.layers, "num_attention_heads": c.heads, "num_key_value_heads": c.heads,
            "max_position_embeddings": c.places, "rms_norm_eps": c.norm_eps,
        },
        vq_config={
            "embed_dim": c.code_dim, "num_embeddings": c.vocab, "latent_channels": pictures.z_channels,
            "base_channels": pictures.channels, "channel_multiplier": list(pictures.multipliers), "num_res_blocks": pictures.blocks,
            "norm_groups": pictures.groups, "num_patches": grid, "projection_dim": c.dim, "image_token_embed_dim": c.dim,
            "num_hidden_layers": c.aligner_layers,
        },
        vision_config={
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "mlp_ratio": 1.0, "image_size": scenes.SIDE,
            "patch_size": scenes.SIDE // grid, "projection_dim": c.dim, "depth": 2, "num_image_tokens": c.codes,
        },
    )  # fmt: skip
