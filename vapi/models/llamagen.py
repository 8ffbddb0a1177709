"""LlamaGen as a ``Policy``, class to image or caption to image: the transformer that is tuned, and the tokenizer and
(for captions) the text encoder that are not. Which of the two a generator is follows from its weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vapi.config import ModelConfig
from vapi.models import gpt, text, vq, weights
from vapi.models.coded import META, Coded, frozen_tokenizer


def load_tokenizer(model: ModelConfig, device: torch.device) -> vq.VQModel:
    """The frozen tokenizer. Raises ValueError for a file that is none, or does not fit."""
    state, meta = weights.read(model.tokenizer)
    return frozen_tokenizer(state, int(meta.get("groups", 0)), model, device)


def load_generator(model: ModelConfig, name: str | Path, factor: int, device: torch.device) -> gpt.Transformer:
    """The transformer, ready to train, for a tokenizer with ``factor`` pixels per code, along one side.

    Raises ValueError for weights that do not fit in every key, or were made for other images. (Weights alone, as
    LlamaGen publishes them, do not tell 256 pixels from 384: no shape depends on it.)
    """
    state, meta = weights.read(name)
    codes = (model.image_size // factor) ** 2
    if int(meta.get("codes", codes)) != codes:
        raise ValueError(f"{name} draws {meta['codes']} codes, but model.image_size {model.image_size} makes {codes} with this tokenizer")
    generator = _empty_generator(state, meta, codes)
    _require_same_training(model, name, factor, generator.config.classes, meta)
    _require_text_encoder(model, name, generator.config)
    weights.fill(generator, state, name, device)
    return generator.eval()


def _empty_generator(state: dict[str, Tensor], meta: dict[str, str], codes: int) -> gpt.Transformer:
    """The network that these weights belong to, without memory."""
    state.pop("freqs_cis", None)  # a constant that some exports carry
    with META:
        return gpt.Transformer(gpt.infer_config(weights.shapes(state), codes, int(meta.get("heads", 0))))


def _require_same_training(model: ModelConfig, name: str | Path, factor: int, classes: int, meta: dict[str, str]) -> None:
    """Raises ValueError if the arguments of LlamaGen's training, where a checkpoint holds them, are not those of its use here."""
    for argument, here, words in (
        ("image_size", model.image_size, "model.image_size is"),
        ("downsample_size", factor, "pixels per code of this tokenizer are"),
        ("num_classes", classes or meta.get(f"{weights.ARGUMENT}num_classes"), "its table, less the row for no class, holds"),
    ):
        then = meta.get(f"{weights.ARGUMENT}{argument}", here)
        if str(then) != str(here):
            raise ValueError(f"{name} was trained with {argument} {then}, but {words} {here}; they do not belong together")


def _require_text_encoder(model: ModelConfig, name: str | Path, config: gpt.GPTConfig) -> None:
    """Raises ValueError unless there is a text encoder for captions, and none for classes."""
    if config.caption_dim and not model.text_encoder:
        raise ValueError(
            f"{name} draws from captions ({config.prefix} x {config.caption_dim} features of a text encoder), but model.text_encoder is "
            "empty; name the encoder it was trained with (google/flan-t5-xl), or take class-conditional weights (c2i)"
        )
    if model.text_encoder and not config.caption_dim:
        raise ValueError(
            f"{name} draws from class ids, but model.text_encoder is {model.text_encoder!r}; leave it empty, or take weights of a "
            "generator of captions (t2i)"
        )


def load(model: ModelConfig, generator: str | Path, device: torch.device) -> LlamaGen:
    """Read both networks; every key must match. The text encoder is read when a caption first comes as words."""
    tokenizer = load_tokenizer(model, device)
    network = load_generator(model, generator, tokenizer.config.factor, device)
    return LlamaGen(network, tokenizer, model.image_size, model.text_encoder)


def export(source: str | Path, target: str | Path) -> None:
    """Copy the weights of a generator or a tokenizer into the layout that LlamaGen's own scripts read: a torch
    checkpoint with the state dict under ``model``.

    Raises ValueError for weights that are neither's, and where ``target`` cannot be written.
    """
    state, meta = weights.read(source)
    if "quantize.embedding.weight" in state:
        with META:
            network: nn.Module = vq.VQModel(vq.infer_config(weights.shapes(state), int(meta.get("groups", 0))))
    else:
        network = _empty_generator(state, meta, codes=int(meta.get("codes", 1)))
    weights.require(network, state, source)
    weights.save_torch({"model": {name: state[name].clone() for name in network.state_dict()}}, target)


class LlamaGen(Coded):
    """A ``Policy`` (see vapi.models)."""

    generator: gpt.Transformer

    def __init__(self, generator: gpt.Transformer, tokenizer: vq.VQModel, image_size: int, text_encoder: str = "") -> None:
        super().__init__(generator, tokenizer, image_size)
        self.num_classes = generator.config.classes
        self._text_encoder = text_encoder

    @functools.cached_property
    def encoder(self) -> text.TextEncoder:
        """The frozen text encoder. Raises ValueError for one that the generator was not made for."""
        encoder, wanted = text.load(self._text_encoder, self.device), self.generator.config.caption_dim
        if encoder.width != wanted:
            raise ValueError(
                f"model.text_encoder {self._text_encoder} gives {encoder.width} features per word, the generator reads {wanted}; "
                "name the encoder that it was trained with"
            )
        return encoder

    def condition(self, what: Sequence[int] | Sequence[str] | Tensor) -> Tensor:
        """Class ids as a tensor (B,), or captions, in words or as their features (B, S, C + 1), on the model's device.

        Raises ValueError for a class out of range, and for features of another encoder.
        """
        return self._captions(what) if self.generator.config.caption_dim else self._classes(what)

    def cut(self, captions: Sequence[str]) -> int:
        """How many captions have more words than there are positions."""
        return sum(length > self.generator.config.prefix for length in self.encoder.lengths(captions))

    def _captions(self, what: Any) -> Tensor:
        config = self.generator.config
        if not isinstance(what, Tensor):
            places = {caption: n for n, caption in enumerate(dict.fromkeys(what))}
            what = text.pad(self.encoder.encode(list(places)), config.prefix)[[places[caption] for caption in what]]
        if what.shape[1:] != (config.prefix, config.caption_dim + 1):
            raise ValueError(
                f"the generator reads captions of {config.prefix} positions x {config.caption_dim} features, and these have "
                f"{what.shape[1]} x {what.shape[2] - 1}; encode them with the encoder that it was trained with: vapi tokens"
            )
        return what.to(self.device)

    def _classes(self, labels: Any) -> Tensor:
        labels = torch.as_tensor(labels, dtype=torch.long, device=self.device)
        if len(labels) and (labels.min() < 0 or labels.max() >= self.num_classes):
            raise ValueError(f"class ids must lie in 0 .. {self.num_classes - 1}; got {labels.min().item()} .. {labels.max().item()}")
        return labels

    def save(self, path: str | Path, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Write the generator's weights under LlamaGen's key names; ``tensors``, if they are not at hand in the module (sharded)."""
        weights.save(self.generator, path, gpt.metadata(self.generator.config), tensors)
