"""Janus (Janus-Pro-1B and its kin) as a ``Policy``: a Llama that reads a caption and writes the codes of its image.

The layers are transformers' own; what is between them and a picture is here. A caption becomes a prompt as deepseek
writes it, whose last token is the beginning of the image; the codes follow at once. Prompts are padded on the left, a row's
positions count from its first token, and nothing sees padding: what is drawn for a caption does not depend on its batch mates.
Code t is predicted where code t - 1 stands, the first one where the prompt ends. (The released VA-pi pads between prompt and
image, and reads every prediction one position late, where the code itself has been read already.)

What is tuned: the language model's body with its embeddings, and the embeddings, aligner and head of image codes. The image
tokenizer is LlamaGen's VQ-16 (``vq.py``: the same layers under the same names). What only understands images is not read.

Left out: conditions of images; grouped keys (no published Janus has them).

Shapes: B images, S positions of a condition, T codes of an image, V codebook, D width, H heads, E = D / H.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vapi.config import ModelConfig
from vapi.models import gpt, janus_files, vq, weights
from vapi.models.coded import META, Coded, frozen_tokenizer
from vapi.models.janus_files import BOS, PAD, SIZES, START, Checkpoint

try:
    from transformers import JanusVQVAEConfig, LlamaConfig
    from transformers.models.janus.modeling_janus import JanusVQVAEAlignerMLP, JanusVQVAEHead
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, apply_rotary_pos_emb
except ImportError:
    raise ValueError("Janus needs transformers: pip install 'vapi-align[janus]'") from None

NOTHING = -1  # in a condition, where there is no token
STEP = 32  # prompts are padded to a multiple of it: few shapes, and next to no padding


# --- the network -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Sizes of what is tuned. ``places`` is how many positions the language model was made for."""

    dim: int
    layers: int
    heads: int
    hidden: int
    words: int  # of the text tokenizer
    pad: int  # its id of padding, which stands for the caption where nothing is asked for
    vocab: int
    code_dim: int
    codes: int
    aligner_layers: int = 2
    places: int = 16384
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6

    prefix: ClassVar[int] = 128
    """Positions of a condition that memory is reckoned with; captions may be longer."""

    @property
    def room(self) -> int:
        """The longest condition; the last code is never read."""
        return self.places - self.codes + 1


def published(name: str, vocab: int = 16384, code_dim: int = 8, codes: int = 576) -> Sizes:
    """The sizes of a published Janus, a name in ``janus_files.PUBLISHED``; 576 codes are 384 pixels."""
    dim, layers, heads, hidden = janus_files.PUBLISHED[name]
    return Sizes(dim, layers, heads, hidden, words=102_400, pad=0, vocab=vocab, code_dim=code_dim, codes=codes)


class Body(nn.Module):
    """The language model without its head."""

    def __init__(self, llama: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(llama.vocab_size, llama.hidden_size)
        self.layers = nn.ModuleList(LlamaDecoderLayer(llama, number) for number in range(llama.num_hidden_layers))
        self.norm = LlamaRMSNorm(llama.hidden_size, llama.rms_norm_eps)


class Generator(nn.Module):
    """p(code t | condition, codes before t), for all t at once or one at a time. A ``sampler.Network``."""

    frequencies: Tensor
    padded = True

    def __init__(self, config: Sizes) -> None:
        super().__init__()
        self.config = config
        self.language_model = Body(_llama(config))
        pictures = JanusVQVAEConfig(
            embed_dim=config.code_dim, num_embeddings=config.vocab, projection_dim=config.dim, image_token_embed_dim=config.dim,
            num_hidden_layers=config.aligner_layers,
        )  # fmt: skip
        self.generation_embeddings = nn.Embedding(config.vocab, config.code_dim)
        self.generation_aligner = JanusVQVAEAlignerMLP(pictures)
        self.generation_head = JanusVQVAEHead(pictures)
        # on the CPU even where parameters are made without memory (device meta): this is computed, not read
        turns = torch.arange(0, config.dim // config.heads, 2, device="cpu").float() / (config.dim // config.heads)
        self.register_buffer("frequencies", 1.0 / config.rope_base**turns, persistent=False)

    @property
    def output(self) -> nn.Linear:
        return self.generation_head.vision_head

    def forward(self, condition: Tensor, context: Tensor) -> Tensor:
        """Teacher-forced logits (B, T, V), float32, of a condition (B, S) and codes (B, T).

        ``logits[:, t]`` depends on ``context[:, :t]`` only; the last code is never read.
        """
        return self.predict(self.features(condition, context))

    def features(self, condition: Tensor, context: Tensor) -> Tensor:
        """What the last layer says (B, T, D), of which ``predict`` makes logits."""
        x = torch.cat([self.words(condition), self.embed(context[:, :-1])], dim=1)
        starts = self.starts(condition)
        table, mask = self.rotary(starts, 0, x.shape[1]), gpt.visible(starts, x.shape[1])
        for layer in self.language_model.layers:
            x = layer(x, attention_mask=mask, position_embeddings=table)
        return x[:, condition.shape[1] - 1 :]  # the condition's last position predicts the first code

    @property
    def layers(self) -> nn.ModuleList:
        return self.language_model.layers

    def words(self, condition: Tensor) -> Tensor:
        """Vectors (B, S, D) of a condition's tokens."""
        return self.language_model.embed_tokens(condition.clamp(min=0))

    def embed(self, codes: Tensor) -> Tensor:
        """Vectors (B, T, D) of codes (B, T)."""
        return self.generation_aligner(self.generation_embeddings(codes))

    def starts(self, condition: Tensor) -> Tensor:
        """The position of each prompt's first token (B,), where padding ends."""
        return (condition == NOTHING).sum(1)

    def positions(self, condition: Tensor) -> int:
        """S of a condition."""
        return condition.shape[1]

    def table(self, at: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the position ``at`` (1,), each (B, 1, E)."""
        return self.rotary(starts, at, 1)

    def rotary(self, starts: Tensor, at: int | Tensor, count: int) -> tuple[Tensor, Tensor]:
        """cos and sin of ``count`` positions from ``at`` on, each (B, count, E), counted from every row's first token."""
        positions = at + torch.arange(count, device=starts.device) - starts[:, None]
        angles = (positions.clamp(min=0)[..., None] * self.frequencies).repeat(1, 1, 2)
        return angles.cos(), angles.sin()

    def predict(self, x: Tensor) -> Tensor:
        """Logits (..., V), float32, of what the last layer says (..., D)."""
        return self.generation_head(self.language_model.norm(x)).float()

    def null(self, condition: Tensor) -> Tensor:
        """The condition that says nothing: a prompt of the same length, padding between its first and its last token, which is
        seen, as deepseek samples."""
        place = torch.arange(condition.shape[1], device=condition.device)
        between = (place > self.starts(condition)[:, None]) & (place < condition.shape[1] - 1)
        return condition.masked_fill(between, self.config.pad)

    def front(self, condition: Tensor, guided: bool) -> tuple[Tensor, Tensor]:
        """See ``sampler.Network``."""
        if guided:
            condition = torch.cat([condition, self.null(condition)])
        return self.words(condition), self.starts(condition)

    def new_cache(self, rows: int, prefix: int) -> Tensor:
        """Room for keys and values of every layer, (L, 2, B, H, S + T - 1, E); the last code is never read."""
        c, weight = self.config, self.output.weight
        shape = (c.layers, 2, rows, c.heads, prefix + c.codes - 1, c.dim // c.heads)
        return torch.empty(shape, device=weight.device, dtype=weight.dtype)

    def prefill(self, condition: Tensor, cache: Tensor, starts: Tensor | None) -> Tensor:
        """Logits (B, V) of the first code, from the vectors (B, S, D) of a condition."""
        return self._advance(condition, 0, cache, starts)

    def step(self, codes: Tensor, position: int, cache: Tensor, starts: Tensor | None) -> Tensor:
        """Logits (B, V) of code ``position``, from the codes (B,) at ``position - 1``; positions must come in order."""
        prefix = cache.shape[4] - self.config.codes + 1
        return self._advance(self.embed(codes[:, None]), prefix + position - 1, cache, starts)

    def _advance(self, x: Tensor, at: int, cache: Tensor, starts: Tensor | None) -> Tensor:
        """Put x (B, S, D) at the places from ``at`` on, and predict what follows the last of them."""
        assert starts is not None
        table = self.rotary(starts, at, x.shape[1])
        for layer, layer_cache in zip(self.language_model.layers, cache, strict=True):
            q, k, v = self.before(layer, x, table)
            x = self.after(layer, x, gpt.attend(q, k, v, layer_cache, at, starts))
        return self.predict(x[:, -1])

    @staticmethod
    def before(layer: Any, x: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x (B, S, D) in a layer of transformers', each (B, H, S, E)."""
        attention, normed = layer.self_attn, layer.input_layernorm(x)
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        q, k, v = (project(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for project in projections)
        q, k = apply_rotary_pos_emb(q, k, *table)
        return q.to(v.dtype), k.to(v.dtype), v

    @staticmethod
    def after(layer: Any, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output, from its input x (B, S, D) and what attention found there, y (B, H, S, E)."""
        x = x + layer.self_attn.o_proj(y.transpose(1, 2).flatten(2))
        return x + layer.mlp(layer.post_attention_layernorm(x))


def _llama(config: Sizes) -> LlamaConfig:
    llama = LlamaConfig(
        vocab_size=config.words, hidden_size=config.dim, intermediate_size=config.hidden, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, num_key_value_heads=config.heads, max_position_embeddings=config.places,
        rms_norm_eps=config.norm_eps,
    )  # fmt: skip
    llama._attn_implementation = "sdpa"
    return llama


# --- captions ----------------------------------------------------------------------------------


class Prompts:
    """Captions as deepseek asks for their images, in its tokens. The library of tokenizers reads its file as it is: a
    tokenizer that transformers makes of it depends on transformers' version."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError for a folder without tokenizer.json, or one without the tokens that Janus needs."""
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{path} is not here; Janus is a folder with config.json, tokenizer.json and weights")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library has no kinds
            raise ValueError(f"{path} is no tokenizer: {error}") from None
        ids = {token: self.tokenizer.token_to_id(token) for token in (BOS, PAD, START)}
        if missing := [token for token, number in ids.items() if number is None]:
            raise ValueError(f"{path} knows no {', '.join(missing)}; it is not the tokenizer of a model that draws")
        self.bos, self.pad, self.start = (number for number in ids.values() if number is not None)

    @staticmethod
    def text(caption: str) -> str:
        """The prompt: a conversation in which the assistant's turn is the image."""
        caption = caption.strip()
        return f"<|User|>: {caption}\n\n<|Assistant|>:{START}" if caption else f"<|User|>:<|Assistant|>:{START}"

    def ids(self, captions: Sequence[str]) -> list[list[int]]:
        """Tokens of each prompt. Raises ValueError for a caption with a mark in it that is the model's own."""
        found = [[self.bos, *one.ids] for one in self.tokenizer.encode_batch([*map(self.text, captions)], add_special_tokens=False)]
        for caption, ids in zip(captions, found, strict=True):
            if ids[-1] != self.start or any(ids.count(mark) != 1 for mark in (self.bos, self.start)):
                raise ValueError(f"the caption {caption!r} holds {BOS} or {START}, which are the model's own marks; take them out")
        return found

    def fitting(self, captions: Sequence[str], sizes: Sizes) -> list[list[int]]:
        """The same. Raises ValueError for a caption that leaves no room for an image's codes too."""
        found = self.ids(captions)
        longest = max(range(len(found)), key=lambda number: len(found[number]), default=0)
        if found and len(found[longest]) > sizes.room:
            raise ValueError(
                f"a caption makes {len(found[longest])} tokens, and {sizes.room} fit before {sizes.codes} codes: "
                f"{captions[longest][:60]!r}...; shorten it, or leave it out"
            )
        return found


# --- reading -----------------------------------------------------------------------------------


def sizes_of(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor], prompts: Prompts, codes: int) -> Sizes:
    """The sizes that config.json describes. Raises ValueError if it is no Janus's, or other weights lie beside it.

    ``state``: what is tuned, under the names that it has in ``Generator``.
    """
    try:
        if config.get("model_type") == "multi_modality":
            text, code_dim = config["language_config"], config["gen_vision_config"]["params"]["n_embed"]
            vocab, aligner_layers = (
                config["gen_vision_config"]["params"]["image_token_size"],
                config["gen_aligner_config"]["params"]["depth"],
            )
        elif config.get("model_type") == "janus":
            text, pictures = config["text_config"], JanusVQVAEConfig(**config["vq_config"])
            vocab, code_dim, aligner_layers = pictures.num_embeddings, pictures.embed_dim, pictures.num_hidden_layers
        else:
            raise ValueError(f"{folder}/config.json describes a model of type {config.get('model_type')!r}, not a Janus")
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder}/config.json does not describe a Janus: {error}") from None
    llama = LlamaConfig(**text)
    _require_same(llama, state, folder)
    _require_plain(llama, folder)
    sizes = Sizes(
        dim=llama.hidden_size, layers=llama.num_hidden_layers, heads=llama.num_attention_heads, hidden=llama.intermediate_size,
        words=llama.vocab_size, pad=prompts.pad, vocab=vocab, code_dim=code_dim, codes=codes, aligner_layers=aligner_layers,
        places=llama.max_position_embeddings, rope_base=float(_rope(llama).get("rope_theta", 10_000.0)), norm_eps=llama.rms_norm_eps,
    )  # fmt: skip
    if (known := prompts.tokenizer.get_vocab_size()) > sizes.words:
        raise ValueError(f"{folder}: its text tokenizer knows {known} tokens and its weights {sizes.words}")
    return sizes


def _rope(llama: LlamaConfig) -> dict[str, Any]:
    return dict(llama.rope_parameters or {})


def _require_plain(llama: LlamaConfig, folder: Path) -> None:
    """Raises ValueError for a Llama with something that no published Janus has, and ``Generator`` neither."""
    wanted = {
        "rope_type": (_rope(llama).get("rope_type", "default"), "default"),
        "num_key_value_heads": (llama.num_key_value_heads, llama.num_attention_heads),
        "head_dim": (llama.head_dim, llama.hidden_size // llama.num_attention_heads),
        "hidden_act": (llama.hidden_act, "silu"),
        "attention_bias": (llama.attention_bias, False),
        "mlp_bias": (llama.mlp_bias, False),
    }
    if odd := [f"{name} {here}, not {there}" for name, (here, there) in wanted.items() if here != there]:
        raise ValueError(f"{folder}/config.json describes a language model that no Janus here has: {', '.join(odd)}")


def _require_same(llama: LlamaConfig, state: Mapping[str, Tensor], folder: Path) -> None:
    """Raises ValueError if config.json and weights are of different models: Pro-7B's weights with the 1B's configuration."""
    words = state.get("language_model.embed_tokens.weight")
    layers = {name.split(".")[2] for name in state if name.startswith("language_model.layers.")}
    described = llama.hidden_size, llama.num_hidden_layers
    if words is not None and (words.shape[1], len(layers)) != described:
        raise ValueError(
            f"{folder}/config.json describes a model of width {described[0]} and {described[1]} layers, and the weights beside it have "
            f"{words.shape[1]} and {len(layers)}; they do not belong together"
        )


def _side(config: Mapping[str, Any]) -> int | None:
    """Side of the images of a Janus in pixels, which config.json says of those that it understands."""
    vision = config.get("vision_config", {})
    return vision.get("params", vision).get("image_size")


Coder = tuple[dict[str, Tensor], int]
"""Weights of an image tokenizer, mapped, and the groups of its norms (0: as published)."""


def load_tokenizer(model: ModelConfig, device: torch.device) -> vq.VQModel:
    """The frozen image tokenizer, from a whole Janus or from a file of its own. Raises ValueError for what is none, or does not fit."""
    return frozen_tokenizer(*_tokenizer(model), model, device)


def _tokenizer(model: ModelConfig, base: Checkpoint | None = None) -> Coder:
    """``base``: one that has been read, and may be where the tokenizer lies."""
    path = weights.locate(model.tokenizer)
    if path.is_dir():
        whole = base if base and base.folder == path else janus_files.read(path)
        return whole.tokenizer(), whole.norm_groups
    state, meta = weights.read(path)
    return state, int(meta.get("groups", 0))


def _whole(model: ModelConfig) -> str:
    """Where config.json and tokenizer.json lie: ``model.generator``, or ``model.tokenizer`` where that is a file of tuned weights."""
    return model.tokenizer if weights.locate(model.generator).is_file() else model.generator


def described(model: ModelConfig) -> tuple[Checkpoint, Prompts, Sizes, Coder]:
    """A whole Janus, the tokens that it reads, its sizes, and its image tokenizer, while all weights are where they lie.

    Raises ValueError for one that is not all there, is put together of several, or was made for other images.
    """
    whole = _whole(model)
    base = janus_files.read(whole)
    prompts = Prompts(base.folder)
    coder = state, groups = _tokenizer(model, base)
    side, factor = _side(base.config), vq.infer_config(weights.shapes(state), groups).factor
    if side not in (None, model.image_size):
        raise ValueError(f"model.image_size is {model.image_size}, and {whole} draws {side} pixels")
    return base, prompts, sizes_of(base.folder, base.config, base.trained(), prompts, (model.image_size // factor) ** 2), coder


def require_readable(model: ModelConfig, captions: Sequence[str]) -> None:
    """Raises ValueError as ``described`` does, and for a caption that is too long or holds a mark that is the model's own."""
    _, prompts, sizes, _ = described(model)
    prompts.fitting(captions, sizes)


def load_generator(base: Checkpoint, sizes: Sizes, name: str | Path, device: torch.device) -> Generator:
    """What is tuned, ready to train. ``name``: the base itself, another whole Janus, or a file of tuned weights.

    Raises ValueError for weights that do not fit in every key.
    """
    if weights.locate(name) == base.folder:
        state = base.trained()
        _say_unread(base)
    else:
        state = tuned(name, sizes)
    with META:
        generator = Generator(sizes)
    weights.fill(generator, state, name, device)
    return generator.eval()


def tuned(name: str | Path, sizes: Sizes | None = None) -> dict[str, Tensor]:
    """Tuned weights, from a file that ``Janus.save`` wrote or from a whole Janus. Raises ValueError for one of other sizes."""
    path = weights.locate(name)
    if path.is_dir():
        return janus_files.read(path).trained()
    state, meta = weights.read(path)
    if SIZES not in meta:
        raise ValueError(f"{path} holds no tuned Janus; name the file that the stage tune wrote, or a folder")
    made = Sizes(**json.loads(meta[SIZES]))
    if sizes is not None and replace(made, pad=sizes.pad) != sizes:
        other = [f"{field} {value}, not {asdict(sizes)[field]}" for field, value in asdict(made).items() if value != asdict(sizes)[field]]
        raise ValueError(f"{path} was tuned from another Janus than model.generator: {', '.join(other)}")
    return state


def _say_unread(base: Checkpoint) -> None:
    parts = ", ".join(f"{part} ({count})" for part, count in base.unread().items())
    if parts:
        print(f"{base.folder}: tensors that only understand images stay unread: {parts}", file=sys.stderr)


def load(model: ModelConfig, generator: str | Path, device: torch.device) -> Janus:
    """Read both networks and the text tokenizer; every key must match."""
    if model.text_encoder:
        raise ValueError(f"model.text_encoder is {model.text_encoder!r}; Janus reads captions itself: leave it empty")
    base, prompts, sizes, coder = described(model)
    tokenizer = frozen_tokenizer(*coder, model, device)
    return Janus(load_generator(base, sizes, generator, device), tokenizer, prompts, model.image_size)


def export(base: str | Path, source: str | Path, target: str | Path, layout: str = "transformers") -> None:
    """A whole Janus with tuned weights, in float32, which ``JanusForConditionalGeneration.from_pretrained`` loads, or (layout
    deepseek) deepseek's own code. ``source``: a file of tuned weights, or what the stage tune wrote. ``target``: a new folder.

    Raises ValueError for weights of another model, and where ``target`` cannot be written.
    """
    path, inside = Path(source), Path(source) / "model.safetensors"
    if inside.is_file() and not (path / "tokenizer.json").is_file():  # of the stage tune, not a whole Janus
        path = inside
    janus_files.write(janus_files.read(base), tuned(path), target, layout)


# --- the policy --------------------------------------------------------------------------------


class Janus(Coded):
    """A ``Policy`` (see vapi.models)."""

    generator: Generator

    num_classes = 0

    def __init__(self, generator: Generator, tokenizer: vq.VQModel, prompts: Prompts | None, image_size: int) -> None:
        """Without ``prompts`` it reads no words, and conditions must come as tokens (for measurements)."""
        super().__init__(generator, tokenizer, image_size)
        self.prompts = prompts

    def condition(self, what: Sequence[int] | Sequence[str] | Tensor) -> Tensor:
        """Captions as tokens (B, S), on the model's device: prompts on the right, ``NOTHING`` where there is no token. As many positions
        as the longest needs, to a multiple of ``STEP``.

        Raises ValueError for a caption that is too long, or holds a mark that is the model's own.
        """
        if isinstance(what, Tensor):
            assert what.dim() == 2 and not what.is_floating_point(), what.shape
            return what.to(self.device)
        assert self.prompts is not None
        prompts = self.prompts.fitting([str(caption) for caption in what], self.generator.config)
        longest = max(map(len, prompts), default=1)
        condition = torch.full((len(prompts), min(self.generator.config.room, STEP * math.ceil(longest / STEP))), NOTHING)
        for row, prompt in zip(condition, prompts, strict=True):
            row[len(row) - len(prompt) :] = torch.tensor(prompt)
        return condition.to(self.device)

    def cut(self, captions: Sequence[str]) -> int:
        """None are: what is too long is refused."""
        self.condition(captions)
        return 0

    def save(self, path: str | Path, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Write what is tuned, in float32; ``tensors``, if they are not at hand in the module (sharded). See ``export``."""
        weights.save(self.generator, path, {SIZES: json.dumps(asdict(self.generator.config))}, tensors)
