"""LlamaGen's and VA-pi's own code, run from checkouts of theirs beside ours: what parity is measured against.

A checkout is a folder that holds ``autoregressive/`` and ``tokenizer/`` (of the VA-pi repository, its ``LlamaGen/``), or ``janus/``.
Nothing of it is copied or installed; what it imports and does not need here (wandb, datasets) is put aside. Weights
are random and follow from a seed bit by bit on any machine, so that they need not be stored: whole numbers from
numpy's PCG64, scaled. Sizes are those of our configurations.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib
import sys
import types
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vapi.models import gpt, vq, weights

State = dict[str, Tensor]
NOT_NEEDED = ("wandb", "datasets", "dataset.build")  # imported at the top of the released script
SCRIPT = "autoregressive/train/train_c2i_grpo.py"


# --- random numbers that are the same everywhere -----------------------------------------------


def uniform(shape: Sequence[int], *seed: int) -> Tensor:
    """float32 numbers in [-1, 1) with 24 random bits."""
    whole = np.random.default_rng(seed).integers(0, 1 << 24, size=tuple(shape), dtype=np.int64)
    return torch.from_numpy((whole / float(1 << 23) - 1).astype(np.float32))


def integers(below: int, shape: Sequence[int], *seed: int) -> Tensor:
    """int64 numbers in 0 .. below - 1."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, below, size=tuple(shape), dtype=np.int64))


def random_state(network: nn.Module, seed: int) -> State:
    """Weights for a network (which may be on device meta): gains near 1, biases near 0, the rest keeps the size of what it is given."""
    state = {}
    for name, shape in weights.shapes(network.state_dict()).items():
        values = uniform(shape, seed, zlib.crc32(name.encode()))
        if len(shape) > 1:
            state[name] = values * (3.0 / float(np.prod(shape[1:]))) ** 0.5
        else:
            state[name] = values * 0.1 + (1.0 if name.endswith("weight") else 0.0)
    return state


def filled(network: nn.Module, seed: int) -> nn.Module:
    """A network of ours with random weights, in eval mode."""
    weights.fill(network, random_state(network, seed), "random weights")
    return network.eval()


# --- theirs ------------------------------------------------------------------------------------


@contextlib.contextmanager
def checkout(path: Path) -> Iterator[None]:
    """Import from a checkout, and forget its modules afterwards: LlamaGen's and VA-pi's have the same names."""
    before, aside = set(sys.modules), {name: types.ModuleType(name) for name in NOT_NEEDED}
    aside["dataset.build"].build_dataset = None  # type: ignore[attr-defined]
    known = {name: sys.modules.get(name) for name in aside}
    sys.modules.update(aside)
    sys.path.insert(0, str(path))
    try:
        yield
    finally:
        sys.path.remove(str(path))
        tops = {entry.stem for entry in path.iterdir()}
        for name in set(sys.modules) - before | set(aside):
            if name.split(".")[0] in tops or name in aside:
                sys.modules.pop(name, None)
        sys.modules.update({name: module for name, module in known.items() if module is not None})


def theirs(name: str) -> Any:
    """A module of the checkout."""
    return importlib.import_module(name)


def generator(config: gpt.GPTConfig, state: State) -> nn.Module:
    """Their transformer of our sizes; every key of ``state`` must match theirs."""
    module = theirs("autoregressive.models.gpt")
    arguments = module.ModelArgs(
        dim=config.dim, n_layer=config.layers, n_head=config.heads, multiple_of=config.hidden, vocab_size=config.vocab,
        block_size=config.codes, num_classes=config.classes, cls_token_num=config.prefix, class_dropout_prob=config.class_dropout,
        **({"model_type": "t2i", "caption_dim": config.caption_dim} if config.caption_dim else {}),
    )  # fmt: skip
    network = module.Transformer(arguments)
    network.load_state_dict(state, strict=True)
    return network.eval()


def tokenizer(config: vq.VQConfig, state: State, module_name: str = "tokenizer.tokenizer_image.vq_model") -> nn.Module:
    """Their tokenizer of our sizes. Theirs is always 128 channels wide; ours may be narrower, so its halves are made singly."""
    module = theirs(module_name)
    levels = list(config.multipliers)
    network = module.VQModel(module.ModelArgs(config.vocab, config.code_dim, encoder_ch_mult=levels, decoder_ch_mult=levels))
    sizes = {"ch": config.channels, "ch_mult": levels, "z_channels": config.z_channels, "num_res_blocks": config.blocks}
    network.encoder, network.decoder = module.Encoder(**sizes), module.Decoder(**sizes)
    network.quant_conv = nn.Conv2d(config.z_channels, config.code_dim, 1)
    network.post_quant_conv = nn.Conv2d(config.code_dim, config.z_channels, 1)
    network.load_state_dict(state, strict=True)
    return network.eval()


@torch.no_grad()
def encode(network: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (B, T), and the encoder's output before it is quantised (B, K, h, w)."""
    before = network.quant_conv(network.encoder(images))
    return network.encode(images)[2][2].view(len(images), -1), before


@torch.no_grad()
def decode(network: Any, codes: Tensor, code_dim: int) -> Tensor:
    side = round(codes.shape[1] ** 0.5)
    return network.decode_code(codes, [len(codes), code_dim, side, side])


@torch.no_grad()
def teacher_forced(network: Any, condition: Tensor, codes: Tensor, prefix: int = 1) -> Tensor:
    """Logits (B, T, V), of classes (B,) or captions (B, S, C + 1) as ours."""
    length = prefix + codes.shape[1] - 1
    if not condition.is_floating_point():
        return network(codes[:, :-1], condition, input_pos=torch.arange(length))[0][:, prefix - 1 :]
    # the mask of their data set: causal, without padding, every position itself
    mask = torch.tril(torch.ones(length, length, dtype=torch.bool)).repeat(len(codes), 1, 1, 1)
    mask[..., :prefix] &= condition[:, None, None, :, -1].bool()
    mask |= torch.eye(length, dtype=torch.bool)
    return network(codes[:, :-1], condition[..., :-1], input_pos=torch.arange(length), mask=mask)[0][:, prefix - 1 :]


def greedy(network: Any, condition: Tensor, codes: int, **how: Any) -> Tensor:
    """The likeliest code at each position, by their own sampling loop (B, T)."""
    if condition.is_floating_point():
        condition, how["emb_masks"] = condition[..., :-1], condition[..., -1]
    return theirs("autoregressive.models.generate").generate(network, condition, codes, sample_logits=False, **how).long()


def lpips(vgg: State, lines: State) -> nn.Module:
    """Their LPIPS, with random networks in place of those that it would download."""
    import torchvision

    def random_vgg(pretrained: bool = True) -> nn.Module:
        network = make(weights=None, init_weights=False)
        network.features.load_state_dict({name.removeprefix("features."): tensor for name, tensor in vgg.items()})
        return network

    make, torchvision.models.vgg16 = torchvision.models.vgg16, random_vgg
    try:
        network = theirs("tokenizer.tokenizer_image.lpips").LPIPS()
    finally:
        torchvision.models.vgg16 = make
    network.load_state_dict(lines, strict=False)
    return network.eval()


def lpips_state(seed: int) -> tuple[State, State]:
    """Random weights of VGG-16 under torchvision's names, and of LPIPS's lines under the lpips package's (not negative)."""
    from torchvision.models import vgg16

    with torch.device("meta"):
        body = vgg16(weights=None, init_weights=False).features
    vgg = {f"features.{name}": tensor for name, tensor in random_state(body, seed).items()}
    widths = (64, 128, 256, 512, 512)
    return vgg, {f"lin{i}.model.1.weight": uniform((1, width, 1, 1), seed, i).abs() for i, width in enumerate(widths)}


# --- Janus -------------------------------------------------------------------------------------


def janus(config: Mapping[str, Any], siglip: Mapping[str, Any], tokens: vq.VQConfig, state: State) -> Any:
    """Their whole model, in sizes that its configuration and its table of SigLIPs do not know; every name of ``state`` must match
    theirs, and all of theirs be there, but for SigLIP's attention pool, which they make and do not use."""
    with _plain_configurations():
        modeling = theirs("janus.models.modeling_vlm")
    theirs("janus.models.siglip_vit").SigLIP_MODEL_CONFIG["siglip_tiny"] = dict(siglip)
    values = copy.deepcopy(dict(config))
    values["vision_config"]["params"]["model_name"] = "siglip_tiny"
    tokenizer_state = {name.removeprefix("gen_vision_model."): t for name, t in state.items() if name.startswith("gen_vision_model.")}
    network = modeling.MultiModalityCausalLM(modeling.MultiModalityConfig(**values))
    network.gen_vision_model = tokenizer(tokens, tokenizer_state, "janus.models.vq_model")
    told = network.load_state_dict(state, strict=False)
    lacking = [name for name in told.missing_keys if ".attn_pool." not in name and "rotary_emb" not in name]
    assert not told.unexpected_keys and not lacking, told
    return network.eval()


@contextlib.contextmanager
def _plain_configurations() -> Iterator[None]:
    """Their configurations were written for transformers 4, of which 5 would make dataclasses."""
    from transformers import PretrainedConfig

    known = PretrainedConfig.__dict__["__init_subclass__"]
    PretrainedConfig.__init_subclass__ = classmethod(lambda cls, **named: None)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        PretrainedConfig.__init_subclass__ = known  # type: ignore[method-assign]


def janus_prompt(caption: str) -> str:
    """What their script for images asks, as text."""
    conversation = theirs("janus.utils.conversation").get_conv_template("deepseek")
    conversation.set_system_message("")
    conversation.append_message("<|User|>", caption.strip())
    conversation.append_message("<|Assistant|>", "")
    return conversation.get_prompt().strip() + "<begin_of_image>"


@torch.no_grad()
def janus_logits(network: Any, ids: Sequence[int], codes: Tensor) -> Tensor:
    """Logits (T, V) of one caption's codes (T,), each predicted where their sampling predicts it."""
    words = network.language_model.get_input_embeddings()(torch.tensor([ids]))
    inputs = torch.cat([words, network.prepare_gen_img_embeds(codes[None, :-1])], dim=1)
    seen = network.language_model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    return network.gen_head(seen[0, len(ids) - 1 :])


@torch.no_grad()
def janus_greedy(network: Any, ids: Sequence[int], pad: int, count: int, guidance: float) -> Tensor:
    """The likeliest codes (T,) of one caption, in the order of their generation_inference.py, without its cache."""
    tokens = torch.tensor([ids, [ids[0], *[pad] * (len(ids) - 2), ids[-1]]])
    inputs = network.language_model.get_input_embeddings()(tokens)
    drawn = []
    for _ in range(count):
        seen = network.language_model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        with_caption, without = network.gen_head(seen[:, -1])
        drawn.append((without + guidance * (with_caption - without)).argmax())
        inputs = torch.cat([inputs, network.prepare_gen_img_embeds(drawn[-1].repeat(2))[:, None]], dim=1)
    return torch.stack(drawn)


# --- the released loop -------------------------------------------------------------------------


def released_step(
    path: Path, transformer: Any, vq_model: Any, perceptual: nn.Module, images: Tensor, labels: Tensor, group: int, ratio_clip: float = 0.2
) -> dict[str, Any]:
    """One step of the released C2I script with its dropout off, on the CPU: its own statements, unchanged.

    They stand in ``main``, between what needs eight GPUs, so the loop's body is taken out of the file and run with
    everything it names. Returns codes (B, T), draws (B * G, T), rewards (B * G,), loss and the gradient by parameter.
    """
    source = (path / SCRIPT).read_text()
    module = theirs(SCRIPT.removesuffix(".py").replace("/", "."))
    main = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "main")
    loop = next(node for node in main.body if isinstance(node, ast.For) and ast.unparse(node.target) == "epoch")
    side = images.shape[-1]
    grid = round((transformer.config.block_size) ** 0.5)
    arguments = argparse.Namespace(
        epochs=1, num_generations=group, codebook_size=transformer.vocab_size, codebook_embed_dim=vq_model.config.codebook_embed_dim,
        cls_token_num=1, mixed_precision="fp32", temperature=1.0, top_k=0, top_p=1.0, image_size=side, use_token_noise=False,
        reward_use_gan=False, reward_use_embedcos=False, reward_rec_type="l2", reward_rec_weight=1.0, reward_perceptual_weight=1.0,
        reward_gan_weight=1.0, use_wandb=False, sample_model_mode="eval", kl_coef=0.0, use_kl_loss=False, adv_clip_max=5.0,
        clip_range=ratio_clip, aux_ce_weight=0.1, gradient_accumulation_steps=len(images), train_batch_size=group, max_grad_norm=1.0,
        ckpt_every=0,
    )  # fmt: skip
    gradient: State = {}
    losses: list[float] = []

    def clip(limit: float) -> float:
        """Where FSDP clips: keep the whole gradient."""
        gradient.update({name: p.grad.clone() for name, p in transformer.named_parameters() if p.grad is not None})
        return 0.0

    def backward(self: Tensor, *given: Any, **named: Any) -> None:
        losses.append(self.item())
        plain_backward(self, *given, **named)

    transformer.clip_grad_norm_ = clip
    module.args = arguments  # functions of the script read it as a global
    space = {
        **vars(module), "args": arguments, "gpt": transformer, "gpt_base": None, "vq_model": vq_model, "lpips_model": perceptual,
        "disc_model": None, "optimizer": torch.optim.SGD(transformer.parameters(), lr=0.0), "loader": [(images, labels)],
        "sampler": types.SimpleNamespace(set_epoch=lambda epoch: None), "device": "cpu", "latent_size": grid, "world_size": 1,
        "global_rank": 1, "global_opt_step": 0, "dist": types.SimpleNamespace(is_initialized=lambda: False, barrier=lambda: None),
    }  # fmt: skip
    plain_backward, Tensor.backward = Tensor.backward, backward  # type: ignore[method-assign]
    try:
        exec(compile(ast.Module([loop], []), SCRIPT, "exec"), space)
    finally:
        Tensor.backward = plain_backward  # type: ignore[method-assign]
    samples: Mapping[str, Tensor] = space["samples"]
    return {
        "codes": space["z"], "draws": samples["token_indices"], "rewards": samples["rewards"],
        "loss": torch.tensor(losses, dtype=torch.float64).sum(), "gradient": gradient,
    }  # fmt: skip
