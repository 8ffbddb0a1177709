"""What is measured: the recipe's networks, or others of the same sizes with random weights.

Nothing is downloaded and no file is needed. Which sizes a missing checkpoint has is read off its name
(``c2i_XXL_384.pt`` is GPT-XXL's, Janus-Pro-1B is what it says) unless ``--size`` says it; a figure says which weights
it was taken with.

Shapes: B images, G group, T codes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vapi import models
from vapi.bench import meter, naive, say
from vapi.config import Measured, ModelConfig, TuneConfig, nearest
from vapi.models import Policy, features, gpt, janus_files, llamagen, vq
from vapi.objective import Batch
from vapi.rewards import NETWORKS, Lpips, Reward

TOKENS = 64  # of a prompt of Janus
WIDTHS = {"vgg": (64, 128, 256, 512, 512), "alex": (64, 192, 384, 256, 256)}  # channels of the maps that LPIPS compares
TOKENIZERS = {8: vq.VQConfig(multipliers=(1, 2, 2, 4)), 16: vq.VQConfig()}  # pixels per code -> LlamaGen's sizes


@dataclass
class World:
    """Networks and where they came from."""

    policy: Policy
    weights: str

    @property
    def device(self) -> torch.device:
        return self.policy.device


def world(settings: Measured) -> World:
    """The policy to measure, in eval mode, its tokenizer frozen. Raises ValueError where not even its sizes are known."""
    model, size = settings.model, settings.bench.size
    missing = [name for name in (model.generator, model.tokenizer) if not Path(name).exists()]
    if not size and not missing:
        policy = models.load(model)
        policy.generator.eval()
        return World(policy, model.generator)
    size = size or _size_in(Path(model.generator).stem, missing[0])  # a hub id's last part, too
    if size not in (known := [*gpt.PUBLISHED, *janus_files.PUBLISHED]):
        raise ValueError(f"no generator is called {size!r}; {nearest(size, known)}")
    say(f"random weights of {size}" + ("" if settings.bench.size else f", since {missing[0]} is not here"))
    return World(random_policy(size, model, models.device_of(model)), f"random, {size}")


def _size_in(name: str, missing: str) -> str:
    for size in janus_files.PUBLISHED:
        if size in name:
            return size
    words = re.split(r"[^A-Za-z0-9]+", name)
    for size in gpt.PUBLISHED:
        if size.removeprefix("GPT-") in words:
            return size
    raise ValueError(f"{missing} is not here, and its sizes are not known; say --size with one of {', '.join(gpt.PUBLISHED)}")


def random_policy(size: str, model: ModelConfig, device: torch.device | str) -> Policy:
    """A LlamaGen or a Janus of a published size with random weights, for images of ``model.image_size``."""
    with torch.device(device):
        torch.manual_seed(0)
        tokenizer = vq.VQModel(TOKENIZERS[8 if "ds8" in model.tokenizer else 16]).eval().requires_grad_(False)
        if model.image_size % tokenizer.config.factor:
            raise ValueError(f"model.image_size is {model.image_size}; it must be a multiple of {tokenizer.config.factor}")
        codes = (model.image_size // tokenizer.config.factor) ** 2
        if size in janus_files.PUBLISHED:
            return _random_janus(size, tokenizer, codes, model.image_size)
        generator = gpt.Transformer(gpt.published(size, tokenizer.vocab, codes, captions=bool(model.text_encoder)))
    # the table of positions is computed on the CPU whatever the device of the weights
    return llamagen.LlamaGen(generator.to(device).eval(), tokenizer, model.image_size)


def _random_janus(size: str, tokenizer: vq.VQModel, codes: int, image_size: int) -> Policy:
    from vapi.models import janus  # it needs transformers

    config = tokenizer.config
    generator = janus.Generator(janus.published(size, config.vocab, config.code_dim, codes))
    return janus.Janus(generator.to(generator.output.weight.device).eval(), tokenizer, None, image_size)


def reward(settings: Measured, device: torch.device | str) -> Reward:
    """The recipe's reward; its network has random weights where a file is missing or ``--size`` asks for a published one."""
    tune = settings.tune
    given = "lpips" in tune.rewards and not settings.bench.size
    if given and (tune.perceptual in NETWORKS or Path(tune.perceptual).is_file()):
        try:
            return Reward.of(tune, device)
        except ValueError as error:
            say(f"random weights, since {error}")
    named = tune.perceptual if tune.perceptual in NETWORKS else "vgg" if settings.bench.size else ""
    lpips = random_lpips(device, named) if named else Lpips(features.random_twin().to(device).features)
    return Reward(tune.rewards, functions={"lpips": lpips})


def random_lpips(device: torch.device | str, name: str = "vgg") -> Lpips:
    """LPIPS on a published network, a name in ``rewards.NETWORKS``, with random weights."""
    kind, _ = NETWORKS[name]
    with torch.device("meta"):
        shapes = kind.layers().state_dict()
    random = torch.Generator().manual_seed(0)

    def tensor(shape: torch.Size) -> Tensor:
        spread = (2 / shape[1:].numel()) ** 0.5 if len(shape) > 1 else 0.0
        return torch.randn(shape, generator=random) * spread

    state = {f"features.{name}": tensor(value.shape) for name, value in shapes.items()}
    lines = [torch.rand(width, generator=random).to(device) for width in WIDTHS[name]]
    return Lpips(kind(state).to(device), lines)


def batch(policy: Policy, images: int) -> Batch:
    """Random images with random codes: nothing that is timed depends on what they show."""
    random = torch.Generator().manual_seed(0)
    pixels = torch.rand(images, 3, policy.image_size, policy.image_size, generator=random) * 2 - 1
    codes = torch.randint(policy.vocab, (images, policy.num_codes), generator=random)
    return Batch(torch.arange(images), pixels.to(policy.device), codes.to(policy.device), condition(policy, images))


def condition(policy: Policy, images: int) -> Tensor:
    """Classes in turn, or captions of 10 to 59 random words (of Janus: prompts of 64 tokens)."""
    if policy.num_classes:
        return policy.condition(torch.arange(images) % policy.num_classes)
    config: Any = policy.generator.config
    random = torch.Generator().manual_seed(1)
    if not hasattr(config, "caption_dim"):
        return policy.condition(torch.randint(config.words, (images, TOKENS), generator=random))
    words = torch.randint(min(10, config.prefix), min(60, config.prefix + 1), (images, 1, 1), generator=random)
    there = (torch.arange(config.prefix)[None, :, None] >= config.prefix - words).float()
    features = torch.randn(images, config.prefix, config.caption_dim, generator=random) * there
    return policy.condition(torch.cat([features, there], dim=-1))


def laid_out(policy: Policy, reward: Reward, layout: torch.memory_format) -> tuple[Policy, Reward]:
    """Copies that share the generator, with the frozen networks in a memory layout."""
    policy, reward = copy.deepcopy((policy, reward), {id(policy.generator): policy.generator})
    for network in (policy.tokenizer, *reward.networks):
        network.to(memory_format=layout)
    return policy, reward


def as_released(policy: Policy, reward: Reward) -> tuple[Policy, dict[naive.RewardFunction, float]]:
    """Copies, the generator's too, in the memory layout of the released code; the reward's functions with their weights."""
    policy, reward = laid_out(*copy.deepcopy((policy, reward)), torch.contiguous_format)
    return policy, {function: reward.weights[name] for name, function in reward.functions.items()}


def _tensors(policy: Policy, reward: Reward) -> Iterator[Tensor]:
    for network in (policy.generator, policy.tokenizer, *reward.networks):
        yield from network.parameters()
        yield from network.buffers()
    for function in reward.functions.values():
        yield from getattr(function, "weights", None) or []


# --- operations --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operations:
    """Operations for one image: of a forward and a backward, of decoding one draw, of rewarding it."""

    forward: int
    backward: int
    decode: int
    features: int  # the perceptual network on one image

    def shared(self, group: int) -> dict[str, int]:
        """The shared step: one forward and backward, and the image's own features once."""
        return {"transformer": self.forward + self.backward, "reward": group * self.decode + (group + 1) * self.features}

    def released(self, group: int, base: bool = False) -> dict[str, int]:
        """The released step: the old policy, G copies of the image, maybe as many of a base; features of each pair."""
        transformer = self.forward + group * (self.forward + self.backward) + (group * self.forward if base else 0)
        return {"transformer": transformer, "reward": group * (self.decode + 2 * self.features)}


def count(policy: Policy, reward: Reward) -> Operations:
    """Count on shapes alone, one image."""
    policy, reward = meter.weightless((policy, reward), _tensors(policy, reward))
    codes = torch.zeros(1, policy.num_codes, dtype=torch.long, device="meta")
    pixels = torch.zeros(1, 3, policy.image_size, policy.image_size, device="meta")
    what = _nothing(policy.generator.config)
    logits: list[Tensor] = []
    forward = meter.flops(lambda: logits.append(policy.logits(what, codes)))
    backward = meter.flops(lambda: logits[0].sum().backward())
    decode = meter.flops(lambda: policy.decode(codes))
    pair = meter.flops(lambda: reward.score(pixels[:, None], pixels))
    return Operations(forward, backward, decode, pair // 2)


def _nothing(config: Any) -> Tensor:
    """A condition's shape, of one image."""
    if not hasattr(config, "caption_dim"):
        return torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    if config.caption_dim:
        return torch.zeros(1, config.prefix, config.caption_dim + 1, device="meta")
    return torch.zeros(1, dtype=torch.long, device="meta")


def count_published(size: str, image_size: int, captions: bool = False, perceptual: str = "vgg") -> Operations:
    """The same for a published size, without any weights: with VQ-16 and LPIPS on a published network."""
    settings = Measured()
    policy = random_policy(size, replace(settings.model, image_size=image_size, text_encoder="words" if captions else ""), "meta")
    return count(policy, Reward(TuneConfig().rewards, functions={"lpips": random_lpips("meta", perceptual)}))
